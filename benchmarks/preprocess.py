"""Measure how long it takes from an image file to the pixel values that the encoder takes.

Four ways take turns: PIL only decoding the file, PIL doing everything in the plain way (decode,
turn, pad, resize, divide), this library, and this library with `fast=True`. The second and third
must give the same values; the error of the fourth is measured. For several files at once, times are
per file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from fastvlm_mlx.image.preprocess import preprocess, preprocess_each
from fastvlm_mlx.image.resize import expand_to_square

from .tables import Result
from .turns import in_turns, seconds_of

OPTIONS: dict[str, dict[str, Any]] = {
    "files": {"nargs": "*", "type": Path, "help": "images, instead of made-up ones"},
    "--image-size": {"default": 1024},
    "--rounds": {"default": 9},
}
BATCH = 8


def measure(args: argparse.Namespace) -> Result:
    """A row per image: milliseconds, ratios, and the error of `fast` in steps of 1 / 255."""
    samples = [(file.name, [file.read_bytes()]) for file in args.files] or list(made_up())
    return {
        "kind": "table",
        "title": f"Reading and resizing images to {args.image_size} pixels, in milliseconds",
        "results": [
            measure_files(name, files, args.image_size, args.rounds) for name, files in samples
        ],
    }


def measure_files(name: str, files: list[bytes], side: int, rounds: int) -> dict[str, Any]:
    """The medians of each way; ValueError if the exact values are not PIL's."""
    expected = plain(files[0], side)
    if not mx.array_equal(preprocess(files[0], side), expected):
        raise ValueError(f"{name}: the pixel values differ from PIL's.")

    def ours(*, fast: bool) -> None:
        mx.eval([pixels for pixels, _ in preprocess_each(files, side, fast=fast)])

    ways: dict[str, Callable[[], Any]] = {
        "decode": lambda: [Image.open(BytesIO(data)).load() for data in files],
        "plain PIL": lambda: mx.eval([plain(data, side) for data in files]),
        "exact": partial(ours, fast=False),
        "fast": partial(ours, fast=True),
    }
    timed = {way: partial(seconds_of, run) for way, run in ways.items()}
    found = in_turns(timed, rounds, name)
    times = {way: 1000 * median(seconds) / len(files) for way, seconds in found.items()}
    error = np.abs(255 * np.asarray(preprocess(files[0], side, fast=True) - expected))
    width, height = Image.open(BytesIO(files[0])).size
    filled = min(width, height) / max(width, height)  # the rest is black in both
    return {
        "image": name,
        **times,
        "exact / decode": times["exact"] / times["decode"],
        "plain / exact": times["plain PIL"] / times["exact"],
        "fast: mean error": float(error.mean()) / filled,
        "max": round(float(error.max())),
    }


def plain(data: bytes, side: int) -> mx.array:
    """What the original code does: float32 [1, S, S, 3]."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    square = expand_to_square(image).resize((side, side), Image.Resampling.BICUBIC)
    return mx.array(np.asarray(square, np.float32)[None] / 255)


def made_up() -> Iterator[tuple[str, list[bytes]]]:
    """Photo-like images of 12 megapixels, and a small one, as files."""
    landscape, sideways = photo(4000, 3000), Image.Exif()
    sideways[0x0112] = 6
    yield "4000 × 3000 JPEG", [encoded(landscape)]
    yield f"the same, {BATCH} files", [encoded(landscape)] * BATCH
    yield "4000 × 3000 JPEG, turned by EXIF", [encoded(landscape, exif=sideways)]
    yield "4000 × 3000 PNG", [encoded(landscape, "PNG", compress_level=1)]
    yield "3000 × 4000 JPEG", [encoded(landscape.transpose(Image.Transpose.ROTATE_90))]
    yield "6000 × 2000 JPEG", [encoded(photo(6000, 2000))]
    yield "640 × 480 JPEG", [encoded(photo(640, 480))]


def encoded(image: Image.Image, suffix: str = "JPEG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, suffix, quality=90, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Noise that, like a photo, has more contrast the coarser it is, and less in colour."""
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
