"""An image that is to be captioned, wherever it came from, and what is known of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..checks import shown

# Columns that may name the image of a row, and those that give its caption; the first counts.
IMAGE_COLUMNS = ("image", "file_name", "path", "filepath", "image_path", "file", "url")
CAPTION = "caption"
TAGS = "tags"
# What this command adds to a row
PROMPT, FLAGS = "prompt", "flags"


@dataclass(slots=True)
class Item:
    """One image.

    Attributes:
        key: what the output calls it; no two items of a run share one.
        image: a path, URL, bytes, or a part of an archive, as `load_image` takes it; or the error
            for which there is none.
        row: the columns of the row that named it.
        path: the file, if it is one by itself; captions may stand beside it.
    """

    key: str
    image: Any
    row: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return PurePosixPath(self.key).stem

    @property
    def folder(self) -> str:
        """The name of the folder that it lies in."""
        return (self.path.absolute() if self.path else PurePosixPath(self.key)).parent.name

    @property
    def tags(self) -> str:
        """The row's tags, or those in a file NAME.tags beside the image."""
        found = self.row.get(TAGS)
        if found is None and self.path is not None:
            found = _text_of(self.path.with_suffix(".tags"))
        return ", ".join(map(str, found)) if isinstance(found, (list, tuple)) else str(found or "")

    @property
    def stamp(self) -> str:
        """Changes when the file does; empty where there is no file."""
        try:
            found = os.stat(self.path) if self.path else None
        except (OSError, ValueError):
            found = None
        return f"{found.st_mtime_ns} {found.st_size}" if found else ""

    def read_bytes(self) -> bytes:
        """The image file as it is; ValueError where there is none, OSError if it can't be read."""
        if isinstance(self.image, bytes):
            return self.image
        if self.path is not None:
            return self.path.read_bytes()
        if hasattr(self.image, "read"):
            data: bytes = self.image.read()
            return data
        raise ValueError(f"{shown(self.key)} is no file: save it first, to write it to an archive.")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar, read when it is needed."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def printable(key: str) -> str:
    """A key that any file can hold: bytes of a name that are no text are written as escapes."""
    return key.encode("utf-8", "backslashreplace").decode()


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column in which a row names its image; None if it names none."""
    return next((name for name in IMAGE_COLUMNS if row.get(name) not in (None, "")), None)


def caption_of(row: Mapping[str, Any], field: str = CAPTION) -> str:
    """The caption that a row has already; empty if it has none."""
    found = row.get(field)
    return found.strip() if isinstance(found, str) else ""


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
