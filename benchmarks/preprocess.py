"""Measure how long it takes from an image file to the pixels that the encoder takes.

Four ways take turns: PIL decoding the file and nothing else, PIL doing all in the plain way
(decode, turn, pad, resize, divide), this library, and this library with `fast=True`. The second and
third must give the same pixels; how far the fourth is from them is measured too. For several files
at once, the times are per file.

    python benchmarks/preprocess.py
    python benchmarks/preprocess.py --image-size 512 ~/Pictures/*.jpg
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import PIL
from PIL import Image, ImageOps

from fastvlm_mlx.image.preprocess import preprocess, preprocess_each
from fastvlm_mlx.image.resize import expand_to_square

BATCH = 8


class Row(NamedTuple):
    """Medians in seconds, and the error of `fast` in steps of 1 / 255."""

    name: str
    decode: float
    plain: float
    exact: float
    fast: float
    mean_error: float
    max_error: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="images, instead of made-up ones")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    print(f"Milliseconds, medians of {args.runs} runs in turns, at {args.image_size}²,", end=" ")
    print(f"on {os.cpu_count()} cores, with Pillow {PIL.__version__}\n")
    names = ["image", "decode", "plain PIL", "exact", "fast"]
    names += ["exact / decode", "plain / exact", "fast: mean error", "max"]
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    samples = ((file.name, file.read_bytes()) for file in args.files) if args.files else made_up()
    for name, data in samples:
        show(measure(name, [data], args.image_size, args.runs))
        if not args.files and name == "4000 × 3000 JPEG":
            show(measure(f"the same, {BATCH} files", [data] * BATCH, args.image_size, args.runs))


def show(row: Row) -> None:
    times = [f"{1000 * seconds:.1f}" for seconds in row[1:5]]
    ratios = [f"{row.exact / row.decode:.2f}", f"{row.plain / row.exact:.2f}"]
    errors = [f"{row.mean_error:.2f}", str(row.max_error)]
    print("| " + " | ".join([row.name, *times, *ratios, *errors]) + " |", flush=True)


def measure(name: str, files: Sequence[bytes], side: int, runs: int) -> Row:
    expected = plain(files[0], side)
    if not mx.array_equal(preprocess(files[0], side), expected):
        raise SystemExit(f"{name}: the pixels differ from PIL's.")
    ways: list[Callable[[], Any]] = [
        lambda: [Image.open(BytesIO(data)).load() for data in files],
        lambda: mx.eval([plain(data, side) for data in files]),
        lambda: mx.eval([pixels for pixels, _ in preprocess_each(files, side)]),
        lambda: mx.eval([pixels for pixels, _ in preprocess_each(files, side, fast=True)]),
    ]
    decode, by_pil, exact, fast = (seconds / len(files) for seconds in medians(ways, runs))
    error = np.abs(255 * np.asarray(preprocess(files[0], side, fast=True) - expected))
    width, height = Image.open(BytesIO(files[0])).size
    filled = min(width, height) / max(width, height)  # the rest is black in both
    mean, most = float(error.mean()) / filled, round(float(error.max()))
    return Row(name, decode, by_pil, exact, fast, mean, most)


def medians(ways: Sequence[Callable[[], Any]], runs: int) -> list[float]:
    """The median seconds of each, all called in turns after a call to warm up."""
    times: list[list[float]] = [[] for _ in ways]
    for run in range(-1, runs):
        for way, spent in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if run >= 0:
                spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def plain(data: bytes, side: int) -> mx.array:
    """What the original code does: float32 [1, S, S, 3]."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    square = expand_to_square(image).resize((side, side), Image.Resampling.BICUBIC)
    return mx.array(np.asarray(square, np.float32)[None] / 255)


def made_up() -> Iterator[tuple[str, bytes]]:
    """Photo-like images of 12 megapixels, and a small one, as files."""
    landscape = photo(4000, 3000)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    yield "4000 × 3000 JPEG", encoded(landscape, "JPEG")
    yield "4000 × 3000 JPEG, turned by EXIF", encoded(landscape, "JPEG", exif=sideways)
    yield "4000 × 3000 PNG", encoded(landscape, "PNG", compress_level=1)
    portrait = landscape.transpose(Image.Transpose.ROTATE_90)
    yield "3000 × 4000 JPEG", encoded(portrait, "JPEG")
    yield "6000 × 2000 JPEG", encoded(photo(6000, 2000), "JPEG")
    yield "640 × 480 JPEG", encoded(photo(640, 480), "JPEG")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, quality=90, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Noise that, like a photo, has the more contrast the coarser it is, and less in colour."""
    rng = np.random.default_rng(0)

    def plane(finest: int, contrast: float, middle: float) -> Image.Image:
        total, weight, cell = np.zeros((height, width), np.float32), 1.0, max(width, height) // 2
        while cell >= finest:
            grid = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
            smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
            total += weight * np.asarray(smooth)
            weight, cell = 0.78 * weight, cell // 2
        total *= contrast / total.std()
        return Image.fromarray(np.clip(total + middle, 0, 255).astype(np.uint8))

    planes = [plane(1, 55, 120), plane(16, 18, 128), plane(16, 18, 128)]
    return Image.merge("YCbCr", planes).convert("RGB")


if __name__ == "__main__":
    main()
