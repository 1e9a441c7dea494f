"""A decoded PIL image of any mode → RGB on white, band by band so that copies stay small."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

BAND = 2**22  # pixels, of which there are copies at one time
USUAL_BITS = (8, 10, 12, 14, 16)  # of a camera's or a scanner's grey samples

Key: TypeAlias = "int | tuple[int, ...] | None"


def transparent_colour(image: PILImage) -> Key:
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


def flatten(image: PILImage, key: Key) -> PILImage:
    """The image, or a copy, in RGB, white where it is transparent or has the colour `key`."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P"):
        return _over_white(image)
    if key is None and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image if image.mode == "RGB" else image.convert("RGB")
    return _from_samples(image, key)


def _over_white(image: PILImage) -> PILImage:
    from PIL import Image

    rgb = Image.new("RGB", image.size, "white")
    for place, band in _bands(image):
        rgba = (band.convert("LA") if image.mode == "La" else band).convert("RGBA")
        rgb.paste(rgba, place, rgba)
    return rgb


def _from_samples(image: PILImage, key: Key) -> PILImage:
    import numpy as np
    from PIL import Image

    def samples(band: PILImage) -> np.ndarray:
        return np.asarray(band.convert("L") if image.mode == "1" else band)

    extremes = np.array([(s.min(), s.max()) for s in (samples(band) for _, band in _bands(image))])
    low, high = extremes[:, 0].min(), extremes[:, 1].max()
    bits = _declared_bits(image)
    rgb = Image.new("RGB", image.size)
    for place, band in _bands(image):
        found = samples(band)
        rgb.paste(Image.fromarray(samples_to_bytes(found, low, high, bits)).convert("RGB"), place)
        if key is not None:
            same = found == np.array(key)
            mask = Image.fromarray(same.all(-1) if same.ndim == 3 else same)
            rgb.paste("white", (*place, place[0] + band.width, place[1] + band.height), mask)
    return rgb


# Colour of 16 bits, of which PIL keeps the high ones


def is_dark_colour(image: PILImage) -> bool:
    """Whether a decoded TIFF of 16-bit colour leaves two bits unused, as cameras do."""
    if image.format != "TIFF" or image.mode != "RGB":
        return False
    stored = getattr(image, "tag_v2", {}).get(258)  # BitsPerSample
    extrema: Any = image.getextrema()
    return stored == (16, 16, 16) and max(high for _, high in extrema) < 64


def decode_low_bytes(image: PILImage) -> bool:
    """Have a TIFF of 16-bit colour, not yet decoded, give its low bytes; False if it can't be."""
    swapped = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    tiles: list[Any] = []
    for tile in image.tile:  # type: ignore[attr-defined]
        codec, extents, offset, args = tile
        if not (isinstance(args, tuple) and re.fullmatch(r"RGB;16[LBN]", str(args[0]))):
            return False
        rawmode = args[0][:-1] + swapped[args[0][-1]]
        changed = codec, extents, offset, (rawmode, *args[1:])
        tiles.append(changed if type(tile) is tuple else type(tile)(*changed))
    image.tile = tiles  # type: ignore[attr-defined]
    return True


def join_bytes(high: PILImage, low: PILImage) -> PILImage:
    """RGB of the high 8 of the bits that 16-bit samples have, by the rule for grey ones.

    Args:
        high, low: RGB images of the samples' high and low bytes.
    """
    import numpy as np
    from PIL import Image

    def samples(place: tuple[int, int], band: PILImage) -> np.ndarray:
        box = (*place, place[0] + band.width, place[1] + band.height)
        return np.asarray(band).astype(np.uint16) << 8 | np.asarray(low.crop(box))

    most = max(int(samples(place, band).max()) for place, band in _bands(high))
    rgb = Image.new("RGB", high.size)
    for place, band in _bands(high):
        found = samples_to_bytes(samples(place, band), 0, most, _declared_bits(high))
        rgb.paste(Image.fromarray(found), place)
    return rgb


def _bands(image: PILImage) -> Iterator[tuple[tuple[int, int], PILImage]]:
    """Copies of the image's parts, each with the place of its upper left corner."""
    width, height = image.size
    rows, columns = max(1, BAND // width), min(width, BAND)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            right, bottom = min(left + columns, width), min(top + rows, height)
            yield (left, top), image.crop((left, top, right, bottom))


def _declared_bits(image: PILImage) -> int:
    """How many bits the file says that its grey samples have; 0 if it says only that they are in
    16 or 32, which may be a container of fewer."""
    if image.format in ("PPM", "JPEG2000"):  # PIL has stretched them
        return 16
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    stored, highest = (_first(tags.get(tag)) for tag in (258, 281))  # BitsPerSample, MaxSampleValue
    return stored if stored < 16 else highest.bit_length()


def _first(tag: object) -> int:
    value = tag[0] if isinstance(tag, tuple) and tag else tag
    return value if isinstance(value, int) else 0


def samples_to_bytes(
    samples: np.ndarray, low: float, high: float, declared_bits: int = 0
) -> np.ndarray:
    """Samples as uint8: the high 8 bits of integers, and floats stretched from [0, 1] unless they
    go to 255.

    Args:
        samples: integers or floats.
        low, high: the least and the greatest of the whole image.
        declared_bits: how many bits integers have, where they don't need more; otherwise the
            fewest of 8, 10, 12, 14 and 16 that hold `high`.

    Raises:
        ValueError: they go beyond 16 bits or 255, or below 0.
    """
    import numpy as np

    if samples.dtype == np.uint8:
        return samples
    if samples.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN fails too
            raise ValueError(f"values from {low:g} to {high:g} are neither 0 to 1 nor 0 to 255")
        return np.rint(samples * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"values from {low} to {high} are not 0 to 65535")
    needed = next(bits for bits in USUAL_BITS if high < 1 << bits)
    return (samples >> max(needed, min(declared_bits, 16)) - 8).astype(np.uint8)
