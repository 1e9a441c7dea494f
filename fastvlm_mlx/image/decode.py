"""Bytes, a PIL image or an array → a picture: RGB on white, with what turns it upright."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeAlias

import mlx.core as mx

from ..checks import reason

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

MAX_PIXELS = 178_956_970  # above it, PIL's own default speaks of a decompression bomb
FAST_MARGIN = 1.5  # a reduced image stays at least this much larger than its resized one
HEIC_MARKS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
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


def crop(image: PILImage, left: int, top: int, right: int, bottom: int) -> PILImage:
    """A part of an RGB image, black beyond its edges."""
    from PIL import Image

    part = Image.new("RGB", (right - left, bottom - top))
    part.paste(image, (-left, -top))
    return part


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


# Where a picture comes from


def from_file(stream: BinaryIO, name: str, reduction: Reduction | None = None) -> Picture:
    """The image in a seekable file, read from where the file stands.

    Args:
        stream: the file.
        name: what errors call it.
        reduction: how much smaller a JPEG may be decoded; None for not at all.

    Raises:
        ValueError: not an image, a damaged one, or one of more than `MAX_PIXELS`.
    """
    from PIL import Image

    head = stream.read(12)
    if not head:
        raise ValueError(f"Cannot read {name}: it is empty.")
    try:
        with _quiet_pil(), _process_wide:
            image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise ValueError(f"Cannot read {name}: {reason(error).partition(',')[0]}.") from None
    except Exception:  # PIL's readers raise whatever bad bytes lead them to
        what = "not an image in PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or another format PIL knows"
        if head[4:] in HEIC_MARKS:
            what = "a HEIC photo; save it as JPEG or PNG first"
        raise ValueError(f"Cannot read {name}: it is {what}.") from None
    if image.format == "EPS":  # to decode it, PIL would run Ghostscript
        raise ValueError(f"Cannot read {name}: it is PostScript; save it as PNG first.")
    return _to_rgb(image, name, reduction)


def from_pil(image: PILImage) -> Picture:
    """A PIL image of any mode, decoded or not; ValueError as in `from_file`."""
    with _one_at_a_time:  # it may be the same for two threads
        return _to_rgb(image, "the PIL image")


def from_array(array: np.ndarray | mx.array) -> Picture:
    """An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: uint8, bool, or float in [0, 1].

    Raises:
        ValueError: another shape, dtype or range of values, or more than `MAX_PIXELS`.
    """
    import numpy as np
    from PIL import Image

    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:  # numpy has no bfloat16
        array = array.astype(mx.float32)
    array = np.asarray(array)
    _check_shape(list(array.shape))
    samples = _array_to_bytes(array)
    image = Image.fromarray(samples[..., 0] if samples.shape[2:] == (1,) else samples)
    return _to_rgb(image, "the array")


def _check_shape(shape: list[int]) -> None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = "; bring its channels last with transpose(1, 2, 0)"
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

    kind = array.dtype.kind
    if array.dtype != np.uint8 and kind not in "bf":
        raise ValueError(
            f"Cannot read the array: its dtype {array.dtype} is not uint8 (0 to 255), float (0 to "
            "1) or bool."
        )
    if kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"Cannot read the array: its floats run from {low:g} to {high:g}, not from 0 to 1."
            )
        array = np.rint(array * np.float32(255))
    elif kind == "b":
        array = array * np.uint8(255)
    return np.ascontiguousarray(array, dtype=np.uint8)


# Any PIL image → RGB on white


def _to_rgb(image: PILImage, name: str, reduction: Reduction | None = None) -> Picture:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read {name}: it has {width} × {height} pixels, not 1 to {MAX_PIXELS:,}."
        )
    try:
        with _quiet_pil():
            shrink = _draft(image, reduction) if reduction is not None else 1
            key = _transparent_colour(image)
            image.load()
            rgb = _flatten(image, key)
            orientation = _orientation(image)
    except Exception as error:  # as in from_file
        raise ValueError(
            f"Cannot read {name}: its pixels cannot be decoded: {reason(error)}."
        ) from None
    return Picture(rgb, orientation, _upright((width, height), orientation), shrink)


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


def _transparent_colour(image: PILImage) -> int | tuple[int, ...] | None:
    """The colour that means transparent (PNG's tRNS chunk), in the scale of the decoded samples.

    PIL gives it in the file's scale, but stretches grey samples of 2 or 4 bits to 8, and cuts RGB
    ones of 16 bits to 8. How the samples are packed is known only until they are decoded.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    packing = tiles[0][3] if tiles else None
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        return tuple(value >> 8 for value in key) if packing == "RGB;16B" else key
    if image.mode in ("1", "L", "I;16", "I") and isinstance(key, int):
        return key * (85 if packing == "L;2" else 17 if packing == "L;4" else 1)
    return None


def _flatten(image: PILImage, key: int | tuple[int, ...] | None) -> PILImage:
    """The image, or a copy, in RGB, white where it is transparent or has the colour `key`."""
    import numpy as np
    from PIL import Image

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P"):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    if key is None and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image if image.mode == "RGB" else image.convert("RGB")
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    rgb = Image.fromarray(_samples_to_bytes(samples)).convert("RGB")
    if key is not None:
        same = samples == np.array(key)
        rgb.paste("white", mask=Image.fromarray(same.all(-1) if same.ndim == 3 else same))
    return rgb


def _samples_to_bytes(samples: np.ndarray) -> np.ndarray:
    """PIL's samples as uint8: the high byte of 16 bits (which PIL may hold in an int32), and floats
    stretched from [0, 1] unless they go to 255."""
    import numpy as np

    if samples.dtype == np.uint8:
        return samples
    low, high = samples.min(), samples.max()
    if samples.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN fails too
            raise ValueError(f"values from {low:g} to {high:g} are neither 0 to 1 nor 0 to 255")
        return np.rint(samples * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"values from {low} to {high} are not 0 to 65535")
    return (samples >> 8).astype(np.uint8)


# PIL in several threads

_one_at_a_time = Lock()
_process_wide = RLock()  # for PIL's list of formats and the warning filters
_quiet_threads = 0
_quiet = warnings.catch_warnings()


@contextmanager
def _quiet_pil() -> Iterator[None]:
    """Silence PIL's warnings: an image is read, or an error says why not.

    The filters belong to the process, so the first of several threads sets them and the last
    restores them.
    """
    global _quiet, _quiet_threads
    with _process_wide:
        if _quiet_threads == 0:
            _quiet = warnings.catch_warnings()
            _quiet.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_threads += 1
    try:
        yield
    finally:
        with _process_wide:
            _quiet_threads -= 1
            if _quiet_threads == 0:
                _quiet.__exit__(None, None, None)
