"""An image that is to be captioned, wherever it came from, and what is known of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..checks import shown

T = TypeVar("T")

# Columns that may name the image of a row, and those that give its caption; the first counts.
IMAGE_COLUMNS = ("image", "file_name", "path", "filepath", "image_path", "file", "url")
CAPTION = "caption"
TAGS = "tags"
# What this command adds to a row
PROMPT, FLAGS = "prompt", "flags"
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(slots=True)
class Item:
    """One image.

    Attributes:
        key: what the output calls it.
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
    def ids(self) -> list[str]:
        """What the item is known by, the best first; no two items of a run share the first.

        Several rows may ask about one image, each with its own prompt; a record that has no prompt
        may be about any of them.
        """
        if not (prompt := self.row.get(PROMPT)):
            return [self.key]
        with suppress(ValueError):  # which is found again when it is asked
            prompt = fill(str(prompt), self)
        return [f"{self.key}\n{prompt}", f"{self.key}\n"]

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


def found_by(ids: Iterable[str], known: Mapping[str, T]) -> T | None:
    """What is known by the first of the ids that is known; None if none is."""
    return next((known[id] for id in ids if id in known), None)


def caption_of(row: Mapping[str, Any], field: str = CAPTION) -> str:
    """The caption that a row has already; empty if it has none."""
    found = row.get(field)
    return found.strip() if isinstance(found, str) else ""


def fill(prompt: str, item: Item) -> str:
    """A prompt with `{name}`, `{folder}`, `{tags}` and columns of the row in their places."""

    def value(place: re.Match[str]) -> str:
        name = place[1]
        if name in ("name", "folder", "tags"):
            return str(getattr(item, name))
        if name not in item.row:
            raise ValueError(f"the prompt has a place for {place[0]}, and there is no such column")
        return str(item.row[name])

    return PLACE.sub(value, prompt)


def ids_of(record: Mapping[str, Any]) -> list[str]:
    """What a record's item may be known by; nothing if it names no image."""
    column = image_column(record)
    if column is None:
        return []
    key = printable(str(record[column]))
    return [f"{key}\n{record.get(PROMPT) or ''}", key]


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
