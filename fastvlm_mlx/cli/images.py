"""Images that a person names in a terminal: dragged paths, and what each of them is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from ..checks import brief
from ..hub.resolve import NANO
from ..image.load import load_image


class NamedImage(NamedTuple):
    """An image that can be read, and its (width, height) in pixels."""

    path: str
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{brief(self.path)} ({self.size[0]} × {self.size[1]} pixels)"


def named_image(path: str) -> NamedImage:
    """The image at a path or URL, as `load_image` finds it, with its errors."""
    path = dragged_path(path)
    return NamedImage(path, load_image(path).size)


def dragged_path(text: str) -> str:
    """A path as it is meant, though a terminal quoted or escaped it when it was dragged there.

    What is a file as it stands is taken as it is.
    """
    if os.path.exists(os.path.expanduser(text)):
        return text
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if os.name == "nt" or "://" in text or os.path.exists(os.path.expanduser(text)):
        return text
    return re.sub(r"\\(.)", r"\1", text)


def is_bundled(path: str) -> bool:
    """Whether an image is one of the samples that come with the bundled model."""
    return Path(path).parent == NANO / "images"
