"""The fonts, the emoji and the word list, from openly licensed packages (LICENCES.md)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FOLDER = Path(os.environ.get("TRAIN_NANO_FONTS", "~/.cache/fastvlm-mlx/train-nano")).expanduser()
# Family and weights. The held-out ones are drawn for evaluation only.
HANDWRITING = ["caveat-400", "caveat-700", "gochi-hand-400", "indie-flower-400"]
HANDWRITING += ["kalam-400", "kalam-700", "patrick-hand-400"]
HANDWRITING_HELD_OUT = ["shadows-into-light-400", "caveat-500", "kalam-300"]
PRINT = ["inter-400", "inter-700", "lora-400", "lora-700", "open-sans-400", "open-sans-700"]
PRINT += ["roboto-mono-400", "roboto-mono-700"]
PRINT_HELD_OUT = ["lato-400", "merriweather-400"]
VERSION = "5.3.0"
EMOJI = [
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "/Library/Fonts/NotoColorEmoji.ttf",
]
WORDS = ["/usr/share/dict/american-english-small", "/usr/share/dict/words"]
BITMAP_SIZE = 109  # the one size of the emoji's bitmaps


class MissingError(FileNotFoundError):
    """A font or word list that is not installed, with the command that installs it."""


def npm_command() -> str:
    """What installs all fonts but the emoji."""
    names = HANDWRITING + HANDWRITING_HELD_OUT + PRINT + PRINT_HELD_OUT
    families = sorted({name.rsplit("-", 1)[0] for name in names})
    packages = " ".join(f"@fontsource/{family}@{VERSION}" for family in families)
    return f"npm install --prefix {FOLDER} {packages}"


def font_path(name: str) -> Path:
    """The file of a font, as in `caveat-400`.

    Raises:
        MissingError: it is not installed.
    """
    family, weight = name.rsplit("-", 1)
    files = FOLDER / "node_modules" / "@fontsource" / family / "files"
    path = files / f"{family}-latin-{weight}-normal.woff"
    if not path.is_file():
        raise MissingError(f"The font {name} is missing; install it with: {npm_command()}")
    return path


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(font_path(name), size)


def _first(paths: list[str], missing: str) -> Path:
    found = [path for path in map(Path, map(os.path.expanduser, paths)) if path.is_file()]
    if not found:
        raise MissingError(missing)
    return found[0]


@cache
def glyph(emoji: str) -> Image.Image:
    """An emoji, cut out, with transparency.

    Raises:
        MissingError: Noto Color Emoji is missing, or has outlines instead of bitmaps.
    """
    from PIL import Image, ImageDraw, ImageFont

    missing = (
        "Noto Color Emoji with bitmaps is missing; install it with: "
        "apt-get install fonts-noto-color-emoji (on a Mac, copy NotoColorEmoji.ttf of that "
        "package to ~/Library/Fonts)"
    )
    try:
        face = ImageFont.truetype(_first(EMOJI, missing), BITMAP_SIZE)
    except OSError as error:
        raise MissingError(missing) from error
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((8, 8), emoji, font=face, embedded_color=True)
    return image.crop(image.getbbox())


@cache
def dictionary(longest: int) -> tuple[str, ...]:
    """Words of two to `longest` lower-case letters.

    Raises:
        MissingError: there is no word list.
    """
    missing = "There is no word list; install one with: apt-get install wamerican-small"
    lines = _first(WORDS, missing).read_text(encoding="utf-8").split()
    return tuple(
        word
        for word in lines
        if 2 <= len(word) <= longest and word.isascii() and word.isalpha() and word.islower()
    )


def check() -> None:
    """See that everything is installed.

    Raises:
        MissingError: naming the first thing that is not.
    """
    for name in HANDWRITING + HANDWRITING_HELD_OUT + PRINT + PRINT_HELD_OUT:
        font_path(name)
    glyph("🐱")
    dictionary(6)
