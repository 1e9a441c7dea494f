"""Images that a person names in a terminal: dragged paths, and what each of them is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..checks import brief
from ..hub.resolve import NANO
from ..image.load import dragged_path, load_image


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


def is_bundled(path: str) -> bool:
    """Whether an image is one of the samples that come with the bundled model."""
    return Path(path).parent == NANO / "images"
