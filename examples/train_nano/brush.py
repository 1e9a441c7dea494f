"""Backgrounds, emoji, shapes, text and noise. Coordinates are those of the unit square."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from . import fonts
from .words import ALL, COLORS

if TYPE_CHECKING:
    from PIL import Image

Color = tuple[int, int, int]
Shape = tuple[int, int]  # (height, width)
MOST_NOISE = 7.0  # standard deviation
OVERSAMPLING = 3  # shapes are drawn larger, so that their edges are smooth


@dataclass(frozen=True)
class Thing:
    """An emoji or a shape: what it is called and where it is."""

    name: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    color: str = ""
    shape: str = ""

    @property
    def called(self) -> str:
        """Its shape, or what it is."""
        return self.shape or self.name


@dataclass(frozen=True)
class Background:
    """A colour, or a gradient from the top to the bottom."""

    top: Color
    bottom: Color

    @property
    def name(self) -> str | None:
        """Its colour in words, where one word is clearly right."""
        names = {color_name(self.top), color_name(self.bottom)}
        return names.pop() if len(names) == 1 else None


def from_hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


# Hues (of 360) that have one name, where they are strong and bright enough.
HUES = {"red": (-8, 8), "orange": (25, 36), "yellow": (51, 63), "green": (95, 145)}
HUES |= {"blue": (210, 245), "purple": (268, 290), "pink": (310, 338)}


def color_name(color: Color) -> str | None:
    """A colour in one word; none where people would differ."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in color))
    if value < 0.12:
        return "black"
    if saturation < 0.06:
        grays = {"white": value > 0.95, "gray": 0.35 < value < 0.75}
        return next((name for name, fits in grays.items() if fits), None)
    if saturation < 0.6 or value < 0.55:
        return None
    degrees = 360 * hue if hue < 0.95 else 360 * hue - 360
    return next((name for name, (low, high) in HUES.items() if low <= degrees <= high), None)


def any_color(rng: Random) -> Color:
    """Half of the time pale, otherwise anything."""
    if rng.random() < 0.5:
        return from_hsv(rng.random(), rng.uniform(0.02, 0.2), rng.uniform(0.82, 1.0))
    return from_hsv(rng.random(), rng.uniform(0.2, 1.0), rng.uniform(0.1, 1.0))


def named_color(rng: Random, name: str) -> Color:
    """A colour that has this name, for a shape or a background."""
    return tuple(min(255, max(0, part + rng.randint(-10, 10))) for part in COLORS[name])  # type: ignore[return-value]


def any_background(rng: Random) -> Background:
    top = any_color(rng)
    if rng.random() < 0.25:
        return Background(top, any_color(rng))
    if rng.random() < 0.25:
        top = named_color(rng, rng.choice([n for n in COLORS if n != "brown"]))
    return Background(top, top)


def paper(rng: Random) -> Background:
    """What notes are written on: white, gray or pale."""
    value, saturation = rng.uniform(0.84, 1.0), rng.uniform(0.04, 0.2)
    color = from_hsv(rng.random(), saturation if rng.random() < 0.65 else 0.0, value)
    return Background(color, color)


def canvas(background: Background, size: int | Shape) -> Image.Image:
    """A picture of nothing else; `size` is the side of a square or (height, width)."""
    from PIL import Image

    height, width = size if isinstance(size, tuple) else (size, size)
    if background.top == background.bottom:
        return Image.new("RGB", (width, height), background.top)
    ends = np.array([background.top, background.bottom], np.float32)
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    rows = ends[0] * (1 - share) + ends[1] * share
    pixels = np.broadcast_to(rows[:, None], (height, width, 3))
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def paste(image: Image.Image, part: Image.Image, x: float, y: float) -> None:
    """Put a cut-out with its centre at (x, y)."""
    left = round(x * image.width - part.width / 2)
    top = round(y * image.height - part.height / 2)
    image.paste(part, (left, top), part)


def draw_thing(image: Image.Image, thing: Thing, color: Color | None = None) -> None:
    """Draw an emoji, or a shape in a colour."""
    side = thing.size * image.width
    part = cut_shape(thing, side, color) if thing.shape and color else cut_emoji(thing, side)
    paste(image, part, thing.x, thing.y)


def cut_emoji(thing: Thing, side: float) -> Image.Image:
    from PIL import Image

    whole = fonts.glyph(ALL[thing.name].emoji)
    scale = side / max(whole.size)
    scaled = whole.resize(
        (max(1, round(whole.width * scale)), max(1, round(whole.height * scale))),
        Image.Resampling.BILINEAR,
        reducing_gap=2.0,
    )
    return scaled.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)


def cut_shape(thing: Thing, side: float, color: Color) -> Image.Image:
    from PIL import Image, ImageDraw

    wide = max(2, round(OVERSAMPLING * side))
    mask = Image.new("L", (wide, wide), 0)
    draw, points = ImageDraw.Draw(mask), outline(thing.shape)
    if thing.shape == "circle":
        draw.ellipse((0, 0, wide - 1, wide - 1), fill=255)
    else:
        draw.polygon([(x * (wide - 1), y * (wide - 1)) for x, y in points], fill=255)
    turned = mask.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    small = turned.reduce(OVERSAMPLING)
    part = Image.new("RGBA", small.size, (*color, 0))
    part.putalpha(small)
    return part


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in the unit square."""
    if shape == "square":
        return (0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)
    if shape == "triangle":
        return (0.5, 0.02), (1.0, 0.95), (0.0, 0.95)
    if shape == "diamond":
        return (0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)
    if shape == "cross":
        x = (0.0, 0.34, 0.66, 1.0)
        top = ((x[1], x[0]), (x[2], x[0]), (x[2], x[1]), (x[3], x[1]), (x[3], x[2]), (x[2], x[2]))
        return (
            *top,
            (x[2], x[3]),
            (x[1], x[3]),
            (x[1], x[2]),
            (x[0], x[2]),
            (x[0], x[1]),
            (x[1], x[1]),
        )
    if shape == "star":
        turns = [math.pi * i / 5 for i in range(10)]
        radii = [0.5, 0.2] * 5
        return tuple(
            (0.5 + r * math.sin(t), 0.52 - r * math.cos(t))
            for r, t in zip(radii, turns, strict=True)
        )
    return tuple(_heart(2 * math.pi * i / 40) for i in range(40))


def _heart(t: float) -> tuple[float, float]:
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 0.5 + x / 34, 0.46 - y / 34


def cut_text(text: str, font: str, height: float, color: Color, angle: float) -> Image.Image:
    """A text without its margins, turned."""
    from PIL import Image, ImageDraw

    face = fonts.font(font, max(6, round(height)))
    left, top, right, bottom = face.getbbox(text)
    part = Image.new("RGBA", (int(right - left) + 4, int(bottom - top) + 4), (*color, 0))
    ImageDraw.Draw(part).text((2 - left, 2 - top), text, font=face, fill=(*color, 255))
    if not angle:
        return part
    return part.rotate(angle, Image.Resampling.BICUBIC, expand=True)


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1 << 20,)).astype(np.float32)


def add_noise(image: Image.Image, deviation: float, rng: Random) -> Image.Image:
    """Gaussian noise, independent at each pixel and channel."""
    from PIL import Image

    if deviation < 0.5:
        return image
    pixels = np.asarray(image, np.float32)
    start = rng.randrange(len(_noise()) - pixels.size)
    noisy = pixels + deviation * _noise()[start : start + pixels.size].reshape(pixels.shape)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def scattered(
    rng: Random, sizes: list[float], gap: float = 1.0, tries: int = 60
) -> list[tuple[float, float]] | None:
    """Places in the unit square for things of such sizes, apart from each other, if found."""
    found: list[tuple[float, float, float]] = []
    for size in sizes:
        for _ in range(tries):
            x, y = (rng.uniform(size / 2, 1 - size / 2) for _ in range(2))
            if all(math.hypot(x - u, y - v) > gap * (size + s) / 2 for u, v, s in found):
                found.append((x, y, size))
                break
        else:
            return None
    return [(x, y) for x, y, _ in found]
