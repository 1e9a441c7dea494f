"""Slight changes of a picture, drawn anew in every epoch. None of them flips it: text, left and
right keep their sense."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


@dataclass(frozen=True)
class Augment:
    """How far pictures are changed at most.

    Attributes:
        colour: share by which brightness, contrast and saturation each vary.
        crop: share of the width and of the height that is cut off.
        rotation: degrees, to either side.
    """

    colour: float = 0.2
    crop: float = 0.05
    rotation: float = 2.0

    def apply(self, picture: PILImage, draw: Random) -> PILImage:
        """A changed copy of an upright RGB picture."""
        from PIL import Image, ImageEnhance

        width, height = picture.size
        kept = 1 - self.crop * draw.random()
        left, top = ((1 - kept) * edge * draw.random() for edge in picture.size)
        box = (left, top, left + kept * width, top + kept * height)
        picture = picture.resize(picture.size, Image.Resampling.BICUBIC, box)
        angle = self.rotation * (2 * draw.random() - 1)
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=_corners(picture))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + self.colour * (2 * draw.random() - 1)
            picture = enhance(picture).enhance(factor)
        return picture


def random_of(*names: object) -> Random:
    """Random numbers that depend on these names only, in every process."""
    named = "\0".join(map(str, names)).encode(errors="surrogatepass")
    return Random(int.from_bytes(blake2b(named, digest_size=16).digest(), "little"))


def _corners(picture: PILImage) -> tuple[int, ...]:
    """The colour that the corners have on average, which a turned picture shows beyond its edge."""
    width, height = picture.size
    places = [(x, y) for x in (0, width - 1) for y in (0, height - 1)]
    pixels = [picture.getpixel(place) for place in places]
    return tuple(sum(values) // 4 for values in zip(*pixels, strict=True))
