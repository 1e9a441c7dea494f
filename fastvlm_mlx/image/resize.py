"""A picture → squares of the encoder's size, pixel for pixel as PIL resizes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ..checks import shown
from .decode import MAX_PIXELS, Picture, Purpose, crop
from .grid import best_size, parse_pinpoints

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_PADDED_PIXELS = 2**30  # of rows padded to squares: seconds of work, but little memory
LINES_AT_ONCE = 256
PIXELS_FOR_THREADS = 2**20  # with fewer, threads save too little

# Resizes a picture to one square or several, in up to so many threads.
Resize: TypeAlias = Callable[[Picture, int], "list[PILImage]"]


def choose_resize(
    side: int, mode: str | None, grid_pinpoints: str | Sequence[Sequence[int]] | None
) -> tuple[Resize, Purpose]:
    """How a mode resizes a picture, and what it asks of one.

    Args:
        side: of the squares, in pixels.
        mode, grid_pinpoints: as in `preprocess`.

    Raises:
        ValueError: an unknown mode, or a bad grid.
    """
    if mode == "pad":
        check = partial(_check_padded, side)
        return partial(_resize_padded, side), Purpose(check, lambda size: max(size) / side)
    if mode in ("square", "none", "", None):
        check = partial(_check_cropped, side)
        return partial(_resize_cropped, side), Purpose(check, lambda size: min(size) / side)
    if mode != "anyres":
        raise ValueError(f'mode must be "pad", "square" or "anyres", not {shown(mode)}.')
    if grid_pinpoints is None:
        raise ValueError('Mode "anyres" needs grid_pinpoints, the sizes to choose from.')
    pinpoints = parse_pinpoints(grid_pinpoints, side)

    def reduction(size: tuple[int, int]) -> float:
        across, down = best_size(size, pinpoints)
        return min(max(size[0] / across, size[1] / down), min(size) / side)

    check = partial(_check_tiled, side, pinpoints)
    return partial(_resize_tiled, side, pinpoints), Purpose(check, reduction)


def _check_resized(size: tuple[int, int], width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise ValueError(
            f"Cannot resize an image of {size[0]} × {size[1]} pixels: it takes {width} × "
            f"{height} pixels on the way, and the limit is {limit:,}; crop it first."
        )


# "pad"


def expand_to_square(image: PILImage, fill: tuple[int, int, int] = (0, 0, 0)) -> PILImage:
    """Centre an RGB image on a square of its longer side (LLaVA's `expand2square`).

    An odd pixel of padding goes to the right or the bottom; a square image is returned unchanged.
    """
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _check_padded(side: int, picture: Picture) -> None:
    longest = max(picture.size)
    _check_resized(picture.size, side, max(side, longest))
    _check_resized(picture.size, longest, picture.size[1], MAX_PADDED_PIXELS)


def _resize_padded(side: int, picture: Picture, threads: int) -> list[PILImage]:
    """`expand_to_square` and a resize, without making the square.

    PIL resizes each row by itself, rounds to bytes, and then resizes each column. Done in bands of
    rows and then of columns, this takes little memory however long the image is, and runs in
    threads.
    """
    from PIL import Image

    width, height = picture.size
    columns = _padded_span(picture, 0, side)
    rows = _padded_span(picture, 1, side)
    narrow = Image.new("RGB", (columns.size, height))
    square = Image.new("RGB", (side, side))

    def resize_rows(start: int, stop: int) -> None:
        band = picture.crop(columns.start, start, columns.stop, stop)
        size, box = (columns.size, stop - start), (columns.low, 0, columns.high, stop - start)
        narrow.paste(band.resize(size, Image.Resampling.BICUBIC, box), (0, start))

    def resize_columns(start: int, stop: int) -> None:
        strip = crop(narrow, start, rows.start, stop, rows.stop)
        size, box = (stop - start, rows.size), (0, rows.low, stop - start, rows.high)
        strip = strip.resize(size, Image.Resampling.BICUBIC, box)
        square.paste(strip, (columns.first + start, rows.first))

    if width * height < PIXELS_FOR_THREADS:
        threads = 1
    _in_bands(resize_rows, height, threads)
    _in_bands(resize_columns, columns.size, threads)
    return [square]


class _Span(NamedTuple):
    """One axis of a resize.

    Attributes:
        start, stop: the pixels to read; those before 0 and beyond the image are black.
        low, high: the part of them that is resized, counted from `start`; the filter sees the
            others too.
        size: how many pixels that part becomes.
        first: where these begin in the resized square.
    """

    start: int
    stop: int
    low: float
    high: float
    size: int
    first: int = 0


def _padded_span(picture: Picture, axis: int, side: int) -> _Span:
    """The part of the padded square, along one axis, that is not black when resized to `side`.

    For each pixel, PIL computes in double precision where it lies and what each pixel of the source
    weighs, from a box in single precision. Where the square divided by `side` is a binary fraction,
    as it always is for 256, 512 and 1024, all these numbers are exact wherever one starts to count,
    and a part comes out as it does in the whole; otherwise the whole is resized. The box of every
    16th pixel has no more than 24 binary digits, since `_check_padded` keeps the square times
    `side` below 2²⁸.
    """
    edge, full = picture.full_size[axis], max(picture.full_size)
    scale = full / (picture.shrink * side)
    # Places count from the first pixel of the image, so the square begins at -before.
    before = (full - edge) // 2 / picture.shrink - picture.box[axis]
    after = full / picture.shrink - before
    reach = 3 * max(scale, 1) + 1  # the filter's two pixels at the smaller scale, and rounding
    first = max(0, math.floor((before - reach) / scale)) // 16 * 16
    last = math.ceil((before + picture.size[axis] + reach) / scale)
    last = min(side, -(-last // 16) * 16)
    if picture.shrink == 1 and (side // math.gcd(full, side)).bit_count() > 1:
        first, last = 0, side
    low, high = (place * full / side / picture.shrink - before for place in (first, last))
    start = math.floor(max(low - reach, -before))
    stop = math.ceil(min(high + reach, after))
    return _Span(start, stop, low - start, high - start, last - first, first)


def _in_bands(work: Callable[[int, int], None], length: int, threads: int) -> None:
    """Call `work` with the start and stop of each band of lines from 0 to `length`."""
    from concurrent.futures import ThreadPoolExecutor

    step = min(LINES_AT_ONCE, math.ceil(length / (2 * threads)))
    bands = [(start, min(start + step, length)) for start in range(0, length, step)]
    if threads == 1:
        for band in bands:
            work(*band)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *band) for band in bands]:
            done.result()


# "square"


def _check_cropped(side: int, picture: Picture) -> None:
    longest = max(*_size_to_crop(side, picture), *picture.full_size)
    _check_resized(picture.full_size, side, longest)


def _size_to_crop(side: int, picture: Picture) -> tuple[int, int]:
    """(width, height) with `side` as the shorter one."""
    width, height = picture.full_size
    short = min(width, height)
    return int(side * width / short), int(side * height / short)


def _resize_cropped(side: int, picture: Picture, threads: int) -> list[PILImage]:
    """Resize the short side to `side`, the long one in proportion, and keep the centre."""
    from PIL import Image

    width, height = _size_to_crop(side, picture)
    left, top = (width - side) // 2, (height - side) // 2
    image = picture.upright().resize((width, height), Image.Resampling.BICUBIC, picture.box)
    return [image.crop((left, top, left + side, top + side))]


# "anyres"


def _check_tiled(side: int, pinpoints: list[tuple[int, int]], picture: Picture) -> None:
    largest = max(side, *best_size(picture.full_size, pinpoints))
    _check_resized(picture.full_size, largest, max(picture.full_size))


def _resize_tiled(
    side: int, pinpoints: list[tuple[int, int]], picture: Picture, threads: int
) -> list[PILImage]:
    """The image squeezed to a square, then its tiles (LLaVA's `process_anyres_image`)."""
    from PIL import Image

    width, height = picture.full_size
    across, down = best_size(picture.full_size, pinpoints)
    if across / width < down / height:
        fitted = across, min(math.ceil(height * (across / width)), down)
    else:
        fitted = min(math.ceil(width * (down / height)), across), down
    image = picture.upright()
    canvas = Image.new("RGB", (across, down))
    corner = (across - fitted[0]) // 2, (down - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC, picture.box), corner)
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, down, side)
        for left in range(0, across, side)
    ]
    return [image.resize((side, side), Image.Resampling.BICUBIC, picture.box), *tiles]
