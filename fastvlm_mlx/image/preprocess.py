"""Images → pixel values, several at a time in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checks import shown
from .decode import Purpose
from .load import ImageSource, read_picture
from .resize import Resize, choose_resize

if TYPE_CHECKING:
    import numpy as np

MAX_THREADS = 8  # each may hold a decoded image


def preprocess(
    image: ImageSource | list[Any] | tuple[Any, ...],
    image_size: int = 1024,
    mode: str | None = "pad",
    grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
    *,
    fast: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Read an image and resize it to what the vision encoder takes.

    Args:
        image: anything `load_image` reads or, except in mode "anyres", a list or tuple of such,
            which are decoded in parallel.
        image_size: the side S of the square, in pixels: a multiple of 64.
        mode: how the image becomes a square. A checkpoint's config.json says so under the name
            `image_aspect_ratio`, with the same values; everywhere else here it is the mode.
            "pad" pads to a square with black; "square" (or None, "", "none") resizes the short side
            to S and keeps the centre, as transformers' `CLIPImageProcessor` does; "anyres" (LLaVA
            1.6) gives the image squeezed to S × S, then the tiles, row by row, of the size in
            `grid_pinpoints` that fits best.
        grid_pinpoints: for "anyres", the sizes to choose from, as in `anyres_grid`.
        fast: let the JPEG decoder make a photo 2, 4 or 8 times smaller, as long as it stays 1.5
            times as large as what it is resized to. This halves the time for 12 megapixels at S =
            1024. On photos, the mean error was below 0.5 of 255 and 99.9 % of the values were
            within 18; `python -m benchmarks preprocess` measures yours. Other formats, PIL images
            and arrays stay exact.
        dtype: float32, or uint8 for the bytes themselves, from 0 to 255: a quarter of the memory.

    Returns:
        `dtype` [N, S, S, 3], RGB, floats in [0, 1]; N is the number of images or, with "anyres",
        of tiles plus one.

    Raises:
        ValueError: a bad size, mode, grid or dtype, or an image too long to resize.
        ValueError, OSError: whatever `load_image` finds.
    """
    images = image if isinstance(image, (list, tuple)) else [image]
    if mode == "anyres" and isinstance(image, (list, tuple)):
        raise ValueError('Mode "anyres" takes one image at a time, not a list of images.')
    if not images:
        raise ValueError("The list of images is empty: preprocess needs at least one.")
    each = preprocess_each(images, image_size, mode, grid_pinpoints, fast=fast, dtype=dtype)
    pixel_values = [pixels for pixels, _ in each]
    return pixel_values[0] if len(pixel_values) == 1 else mx.concatenate(pixel_values)


def preprocess_each(
    images: Sequence[ImageSource],
    image_size: int = 1024,
    mode: str | None = "pad",
    grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
    *,
    fast: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> Iterator[tuple[mx.array, tuple[int, int]]]:
    """Preprocess images one by one, while threads decode and resize those that follow.

    Args:
        images, image_size, mode, grid_pinpoints, fast, dtype: as in `preprocess`, but "anyres"
            takes several images too. PIL images that are not yet decoded wait for one another.

    Yields:
        For each image, in order: its pixel values, as `preprocess` gives them, and the (width,
        height) of the upright image.

    Raises:
        ValueError: on the call, a bad size, mode, grid or dtype; at an image, one too long.
        ValueError, OSError: at an image, whatever `load_image` finds.
    """
    if not isinstance(image_size, int) or image_size <= 0 or image_size % 64:
        raise ValueError(f"image_size must be a positive multiple of 64, not {shown(image_size)}.")
    if not isinstance(dtype, mx.Dtype) or dtype not in (mx.float32, mx.uint8):
        raise ValueError(f"dtype must be mlx.core.float32 or uint8, not {shown(dtype)}.")
    resize, purpose = choose_resize(image_size, mode, grid_pinpoints)
    purpose = purpose if fast else purpose._replace(reduction=None)
    work = partial(read_and_resize, resize=resize, purpose=purpose)
    # MLX arrays are computed on the thread that made them.
    mx.eval([image for image in images if isinstance(image, mx.array)])
    found = _ahead(work, images)
    return ((mx.array(p) / 255 if dtype == mx.float32 else mx.array(p), size) for p, size in found)


def read_and_resize(
    source: ImageSource,
    threads: int,
    resize: Resize,
    purpose: Purpose,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixel values, uint8 [N, S, S, 3], and the (width, height) of the upright image."""
    import numpy as np

    picture = read_picture(source, purpose=purpose)
    pixels = [np.asarray(image) for image in resize(picture, threads)]
    return np.stack(pixels), picture.full_size


def _ahead(
    work: Callable[[Any, int], tuple[np.ndarray, tuple[int, int]]], images: Sequence[Any]
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """What `work` gives for each image, in order, while threads work on those that follow.

    `work` is told how many threads of its own it may use.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    threads = min(os.cpu_count() or 1, MAX_THREADS)
    at_once = min(threads, len(images))
    if at_once <= 1:
        for image in images:
            yield work(image, threads)
        return
    pool = ThreadPoolExecutor(at_once)
    started: deque[Future[tuple[np.ndarray, tuple[int, int]]]] = deque()
    try:
        for image in images:
            started.append(pool.submit(work, image, threads // at_once))
            if len(started) > 2 * at_once:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
