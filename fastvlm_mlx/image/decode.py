"""Bytes, a PIL image or an array → a picture: RGB on white, with what turns it upright."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import mlx.core as mx

from ..checks import reason
from .flatten import (
    decode_low_bytes,
    flatten,
    is_dark_colour,
    join_bytes,
    samples_to_bytes,
    transparent_colour,
)
from .open import open_image, quiet_pil

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

MAX_PIXELS = 178_956_970  # above it, PIL's own default speaks of a decompression bomb
FAST_MARGIN = 1.5  # a reduced image stays at least this much larger than its resized one
# What PIL calls the turn that each EXIF orientation asks for; from 5 on, width becomes height.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
FROM_THE_RIGHT, FROM_THE_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)

# How many times smaller an image of this upright (width, height) may be decoded.
Reduction: TypeAlias = Callable[[tuple[int, int]], float]

_one_at_a_time = Lock()


class Picture(NamedTuple):
    """A decoded image, not yet turned upright.

    Attributes:
        image: RGB; it may be the source itself, so it must not be changed.
        orientation: EXIF's, from 1 to 8.
        full_size: (width, height) of the upright image in the file.
        shrink: how many of the file's pixels make one of `image`, along each axis.
    """

    image: PILImage
    orientation: int
    full_size: tuple[int, int]
    shrink: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return _upright(self.image.size, self.orientation)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the upright pixels that the image fills: the last ones stored may stand for
        less than a pixel."""
        width, height = (edge / self.shrink for edge in self.full_size)
        left = self.size[0] - width if self.orientation in FROM_THE_RIGHT else 0
        top = self.size[1] - height if self.orientation in FROM_THE_BOTTOM else 0
        return left, top, left + width, top + height

    def upright(self) -> PILImage:
        """The whole image; a copy if it must be turned."""
        return self._turn(self.image)

    def crop(self, left: int, top: int, right: int, bottom: int) -> PILImage:
        """A part of the upright image, black beyond its edges."""
        width, height = self.size
        if self.orientation in FROM_THE_RIGHT:
            left, right = width - right, width - left
        if self.orientation in FROM_THE_BOTTOM:
            top, bottom = height - bottom, height - top
        if self.orientation >= 5:
            left, top, right, bottom = top, left, bottom, right
        return self._turn(crop(self.image, left, top, right, bottom))

    def _turn(self, image: PILImage) -> PILImage:
        from PIL.Image import Transpose

        if self.orientation == 1:
            return image
        return image.transpose(Transpose[TURNS[self.orientation]])


class Purpose(NamedTuple):
    """What an image is decoded for.

    Attributes:
        check: ValueError for a picture of an unsuitable size; asked before it is decoded, too.
        reduction: how much smaller a JPEG may be decoded; None for not at all.
    """

    check: Callable[[Picture], None]
    reduction: Reduction | None = None


def crop(image: PILImage, left: int, top: int, right: int, bottom: int) -> PILImage:
    """A part of an RGB image, black beyond its edges."""
    from PIL import Image

    part = Image.new("RGB", (right - left, bottom - top))
    part.paste(image, (-left, -top))
    return part


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


# Where a picture comes from


def from_file(stream: BinaryIO, name: str, purpose: Purpose | None = None) -> Picture:
    """The image in a seekable file.

    Args:
        stream: the file.
        name: what errors call it.
        purpose: what the image is decoded for; None for itself.

    Raises:
        ValueError: not an image, a damaged one, one of more than `MAX_PIXELS`, or one that does not
            suit the purpose.
    """
    image = open_image(stream, name)
    picture = _to_picture(image, name, purpose, purpose.reduction if purpose else None)
    return _brightened(picture, image, stream, name) if is_dark_colour(image) else picture


def _brightened(picture: Picture, image: PILImage, stream: BinaryIO, name: str) -> Picture:
    """The picture of a TIFF that has values of fewer than 16 bits in 16, decoded once more."""
    stream.seek(0)
    low = open_image(stream, name)
    if not decode_low_bytes(low):
        return picture
    with _decoding(name):
        low.load()
        return picture._replace(image=join_bytes(image, low))


def from_pil(image: PILImage, purpose: Purpose | None = None) -> Picture:
    """A PIL image of any mode, decoded or not; ValueError as in `from_file`."""
    with _one_at_a_time:  # it may be the same for two threads
        return _to_picture(image, "the PIL image", purpose)


def from_array(array: Any, purpose: Purpose | None = None) -> Picture:
    """An array of any library, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: integers from 0, bool,
    or float in [0, 1].

    Raises:
        ValueError: another shape, dtype or range of values, or more than `MAX_PIXELS`.
    """
    import numpy as np
    from PIL import Image

    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:  # numpy has no bfloat16
        array = array.astype(mx.float32)
    try:
        array = np.asarray(array)
    except Exception as error:  # a tensor on a GPU, or one that needs gradients
        raise ValueError(f"Cannot read the array: {reason(error)}.") from None
    _check_shape(list(array.shape))
    samples = _array_to_bytes(array)
    image = Image.fromarray(samples[..., 0] if samples.shape[2:] == (1,) else samples)
    return _to_picture(image, "the array", purpose)


def _check_shape(shape: list[int]) -> None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = "; bring its channels last with transpose(1, 2, 0), in torch permute(1, 2, 0)"
        elif len(shape) == 4:
            hint = "; pass a batch as a list of images"
        raise ValueError(
            f"Cannot read the array: its shape {shape} is not [H, W], [H, W, 1], [H, W, 3] or "
            f"[H, W, 4]{hint}."
        )
    if not 0 < shape[0] * shape[1] <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read the array: its shape {shape} makes {shape[0] * shape[1]:,} pixels, not "
            f"1 to {MAX_PIXELS:,}."
        )


def _array_to_bytes(array: np.ndarray) -> np.ndarray:
    import numpy as np

    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"Cannot read the array: its dtype {array.dtype} is not one of integers (0 to 255, or "
            "to 65535), float (0 to 1) or bool."
        )
    kind, low, high = array.dtype.kind, array.min(), array.max()
    if kind == "f":
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"Cannot read the array: its floats run from {low:g} to {high:g}, not from 0 to 1."
            )
        array = np.rint(array * np.float32(255))
    elif kind == "b":
        array = array * np.uint8(255)
    else:
        try:
            array = samples_to_bytes(array, low, high)
        except ValueError as error:
            raise ValueError(f"Cannot read the array: {reason(error)}.") from None
    return np.ascontiguousarray(array, dtype=np.uint8)


# Any PIL image → a picture


def _to_picture(
    image: PILImage, name: str, purpose: Purpose | None, reduction: Reduction | None = None
) -> Picture:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read {name}: it has {width} × {height} pixels, not 1 to {MAX_PIXELS:,}."
        )
    with _decoding(name):
        shrink = _draft(image, reduction) if reduction is not None else 1
        key = transparent_colour(image)
    if purpose:
        _check_undecoded(Picture(image, 1, (width, height), shrink), purpose)
    with _decoding(name):
        image.load()
        rgb = flatten(image, key)
        orientation = _orientation(image)
    full_size = (width, height) if shrink > 1 else image.size  # some headers are a little off
    picture = Picture(rgb, orientation, _upright(full_size, orientation), shrink)
    if purpose:
        purpose.check(picture)
    return picture


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        with quiet_pil():
            yield
    except Exception as error:  # as in open_image
        raise ValueError(
            f"Cannot read {name}: its pixels cannot be decoded: {reason(error)}."
        ) from None


def _check_undecoded(picture: Picture, purpose: Purpose) -> None:
    """Refuse an image that does not suit, turned or not: how it is turned may stand at its end."""
    turned = picture._replace(orientation=6, full_size=picture.full_size[::-1])
    with suppress(ValueError):
        return purpose.check(turned)
    purpose.check(picture)


def _draft(image: PILImage, reduction: Reduction) -> int:
    """Have a JPEG decoded smaller; returns how many times smaller."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    width, height = image.size
    ratio = reduction(_upright(image.size, _orientation(image))) / FAST_MARGIN
    drafted = image.draft("RGB", (max(1, int(width / ratio)), max(1, int(height / ratio))))
    return 1 if drafted is None else round(width / drafted[1][2])


def _orientation(image: PILImage) -> int:
    """EXIF's, from 1 to 8; 1 is upright."""
    try:
        found = int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata on a sound image
        return 1
    return found if found in TURNS else 1
