"""Captions in files of their own beside the images: text, or XMP descriptions."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..checks import is_litter, reason, shown
from ..image.load import IMAGE_SUFFIXES
from . import xmp
from .files import replace_bytes
from .items import CAPTION, Item
from .outputs import Fields, Row

XMP = ".xmp"


class Sidecars:
    """`photo.txt` beside `photo.jpg`; where several images of a folder share their name up to the
    suffix, `photo.jpg.txt` and `photo.png.txt`.

    Args:
        suffix: of the files, such as `.txt`; `.xmp` holds XMP, any other plain text.
        names: the columns that take captions.

    Raises:
        ValueError: the suffix is one of images, or there are several columns.
    """

    changes_images = False

    def __init__(self, suffix: str, names: Sequence[str]):
        if suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(
                f"A file with the suffix {suffix} beside a picture may be the picture itself: "
                "choose another, such as .txt."
            )
        check_single(f"A {suffix} file", names)
        self.suffix = suffix
        self._shared: dict[Path, Counter[str]] = {}

    def existing(self, item: Item) -> Fields | None:
        if item.path is None or not (file := self.file_of(item)).exists():
            return None
        try:
            data = file.read_bytes()
            text = xmp.description_of(data) if self.suffix == XMP else data.decode("utf-8-sig")
        except ValueError as error:
            raise ValueError(f"{shown(str(file))} can't be read ({reason(error)})") from None
        return {CAPTION: text.strip()} if text.strip() else None

    def write(self, row: Row) -> None:
        file, text = self.file_of(row.item), row.fields[CAPTION]
        try:
            if self.suffix == XMP:
                old = file.read_bytes() if file.exists() else b""
                replace_bytes(file, xmp.with_description(old, text))
            else:
                replace_bytes(file, text.encode("utf-8", "replace") + b"\n")
        except (PermissionError, FileNotFoundError) as error:  # another folder may do
            raise ValueError(f"{shown(str(file))} can't be written ({reason(error)})") from None

    def flush(self, *, now: bool = False) -> bool:
        return True

    def close(self) -> None:
        pass

    def file_of(self, item: Item) -> Path:
        """Where an image's caption stands; ValueError for an image that is no file by itself."""
        if item.path is None:
            raise ValueError(
                f"it is no file of its own, beside which a {self.suffix} file could stand; write "
                "to a .jsonl, .csv, .parquet or .tar file"
            )
        shared = self._shared_names(item.path.parent)[_alike(item.path.stem)] > 1
        name = item.path.name if shared else item.path.stem
        return item.path.with_name(name + self.suffix)

    def _shared_names(self, folder: Path) -> Counter[str]:
        """How many images of a folder have each name without its suffix."""
        if folder not in self._shared:
            names = [
                os.path.splitext(name)
                for name in (os.listdir(folder) if folder.is_dir() else [])
                if not is_litter(name)
            ]
            self._shared[folder] = Counter(
                _alike(stem) for stem, suffix in names if suffix.lower() in IMAGE_SUFFIXES
            )
        return self._shared[folder]


def check_single(holder: str, names: Sequence[str]) -> None:
    """ValueError unless there is one caption for each image, and no questions."""
    if list(names) != [CAPTION]:
        raise ValueError(
            f"{holder} holds one caption, and there are questions: {', '.join(names)}; write them "
            "to a .jsonl, .csv or .parquet file."
        )


def _alike(name: str) -> str:
    """The same for names that some file systems take for the same."""
    return unicodedata.normalize("NFC", name).casefold()
