"""Images that a person names in a terminal: dragged paths, and what each of them is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..checks import brief
from ..hub.resolve import NANO
from ..image.load import dragged_paths, load_image


class NamedImage(NamedTuple):
    """An image that can be read, and its (width, height) in pixels."""

    path: str
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{brief(self.path)} ({self.size[0]} × {self.size[1]} pixels)"


def named_images(text: str) -> list[NamedImage]:
    """The images at a path or URL, or at several that were dragged in; errors as `load_image`."""
    return [NamedImage(path, load_image(path).size) for path in dragged_paths(text)]


def repeat_image_flag(arguments: list[str]) -> list[str]:
    """`--image a b` as `--image a --image b`: files that are dragged in at once stand so."""
    repeated: list[str] = []
    values = None  # how many the flag has had, after one
    for argument in arguments:
        if argument.startswith("-"):
            values = 0 if argument == "--image" else 1 if argument.startswith("--image=") else None
        elif values is not None:
            repeated += ["--image"] if values else []
            values += 1
        repeated.append(argument)
    return repeated


def is_bundled(path: str) -> bool:
    """Whether an image is one of the samples that come with the bundled model."""
    return Path(path).parent == NANO / "images"
