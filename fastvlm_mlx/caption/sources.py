"""Folders, patterns, lists, tables and archives → images in a fixed order."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import is_litter, shown
from ..image.load import IMAGE_SUFFIXES, dragged_path, image_files
from . import tables
from .items import CAPTION, IMAGE_COLUMNS, Item, TarMember, image_column, printable

LISTS = (".txt", ".lst", ".list")
SIDECARS = (".xmp", ".tags", ".caption")
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """Something that holds images.

    Attributes:
        name: as the person gave it.
        items: gives them in order, each time it is called.
        count: how many there are.
        file: that is read, if it is one.
    """

    name: str
    items: Callable[[], Iterator[Item]]
    count: Callable[[], int]
    file: Path | None = None


def find_sources(names: Iterable[str | os.PathLike[str] | Source]) -> list[Source]:
    """What the names stand for: folders, patterns such as `photos/**/*.jpg`, images, URLs, text
    lists, JSONL, CSV and Parquet files, WebDataset tars, and `-` for a list on standard input.

    Raises:
        FileNotFoundError: there is no such file or folder, or a pattern matches nothing.
        ValueError: a file of an unknown kind.
    """
    return [source for name in names for source in _find(name) if not _is_sidecar(source)]


def _find(named: str | os.PathLike[str] | Source) -> list[Source]:
    if isinstance(named, Source):
        return [named]
    name = os.fspath(named)
    if name == STDIN:
        return [_of_lines("standard input", sys.stdin.read().splitlines(), Path())]
    if "://" in name and not name.lower().startswith("file:"):
        return [_of_items(name, [Item(printable(name), name)])]
    path = Path(dragged_path(name))
    if path.is_dir():
        files = image_files(path, recursive=True)
        return [_of_items(name, [_file_item(file) for file in files])]
    if path.exists():
        return [_of_file(path)]
    found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in found if file.is_file() and not is_litter(file.name)]
    if not files:
        raise FileNotFoundError(f"There is no file, folder or match for {shown(name)}.")
    return [_of_file(file) for file in files]


def _is_sidecar(source: Source) -> bool:
    """Whether a file only belongs to an image beside it, as where a shell wrote photos/* out."""
    file = source.file
    if file is None or file.suffix.lower() not in (*LISTS, *SIDECARS):
        return False
    stems = (file.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)
    whole = file.with_suffix("")
    return any(map(Path.exists, stems)) or (whole.suffix in IMAGE_SUFFIXES and whole.exists())


def _of_file(file: Path) -> Source:
    kind, name = file.suffix.lower(), str(file)
    if kind in tables.TABLES:
        return Source(name, lambda: _table_items(file), lambda: tables.count_rows(file), file)
    if kind in LISTS:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        return _of_lines(name, text.splitlines(), file.parent, file)
    if kind == ".tar":
        return Source(name, lambda: _tar_items(file), lambda: sum(1 for _ in _members(file)), file)
    if name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz")):
        raise ValueError(f"{shown(name)} is compressed, and can't be read at any place: unpack it.")
    return _of_items(name, [_file_item(file)], file)


def _of_items(name: str, items: Sequence[Item], file: Path | None = None) -> Source:
    return Source(name, lambda: iter(items), lambda: len(items), file)


def _of_lines(name: str, lines: Iterable[str], root: Path, file: Path | None = None) -> Source:
    named = [line.strip() for line in lines if line.strip()]
    items = [_named_item(line, root) for line in named]
    return Source(name, lambda: iter(items), lambda: len(items), file)


def _file_item(file: Path) -> Item:
    return Item(printable(str(file)), str(file), path=file)


def _named_item(name: str, root: Path, row: dict[str, Any] | None = None) -> Item:
    """The image that a list names: a URL, or a path from the list's folder or from here."""
    if "://" in name and not name.lower().startswith("file:"):
        return Item(printable(name), name, row or {})
    path = Path(dragged_path(name) if "://" in name else os.path.expanduser(name))
    beside = root / path
    file = beside if beside.exists() or not path.exists() else path
    return Item(printable(name), str(file), row or {}, file)


# Tables


def _table_items(file: Path) -> Iterator[Item]:
    for number, row in enumerate(tables.read_rows(file), 1):
        place = f"{file}:{number}"
        if isinstance(row, ValueError):
            yield Item(printable(place), row)
        else:
            yield _row_item(row, place, file.parent)


def _row_item(row: dict[str, Any], place: str, root: Path) -> Item:
    column = image_column(row)
    found = row[column] if column else None
    others = {k: v for k, v in row.items() if k not in (column, "image") and not _is_bulky(v)}
    if isinstance(found, dict):  # as the datasets library keeps images
        data, name = found.get("bytes"), found.get("path") or place
        if data is None and isinstance(found.get("path"), str):
            return _named_item(found["path"], root, others)
        return Item(printable(f"{place}/{name}" if name != place else place), data, others)
    if isinstance(found, (bytes, bytearray)):
        return Item(printable(place), bytes(found), others)
    if not isinstance(found, str):
        wanted = ", ".join(IMAGE_COLUMNS)
        columns = tables.columns_said(row)
        error = ValueError(f"its row names no image as {wanted}; the columns are {columns}")
        return Item(printable(place), error, others)
    if found[:5].lower() == "data:":
        return Item(printable(place), found, others)
    return _named_item(found, root, others)


def _is_bulky(value: Any) -> bool:
    """Whether a value is the bytes of a file, which no output repeats."""
    return isinstance(value, bytes) or (
        isinstance(value, dict) and isinstance(value.get("bytes"), bytes)
    )


# WebDataset tars: the files of a sample share their name up to the first dot


def _tar_items(file: Path) -> Iterator[Item]:
    for name, member, texts in _members(file):
        row = tables.parse_line(texts["json"].read()) or {} if "json" in texts else {}
        row.pop("image", None)
        if "txt" in texts:
            row[CAPTION] = texts["txt"].read().decode("utf-8", "replace").strip()
        yield Item(printable(f"{file}/{name}"), member, row)


def _members(file: Path) -> Iterator[tuple[str, TarMember, dict[str, TarMember]]]:
    """(name, image, texts about it by suffix) of each image of a tar."""
    for key, sample in _samples(file):
        for name, member in sample.items():
            stem, _, suffix = name.rpartition(".")
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                named = {kind: (f"{stem}.{kind}", f"{key}.{kind}") for kind in ("json", "txt")}
                found = {kind: [n for n in names if n in sample] for kind, names in named.items()}
                yield name, member, {kind: sample[n[0]] for kind, n in found.items() if n}


def _samples(file: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """The key of each sample, and its files by name.

    A sample's files follow one another and share their name up to its first dot. That makes one
    sample of 22.05.png and 22.06.png; `_members` takes each image by itself all the same.
    """
    import tarfile

    key, sample = "", dict[str, TarMember]()
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                folder, slash, base = info.name.rpartition("/")
                if not info.isfile() or base.startswith("."):
                    continue
                if (found := f"{folder}{slash}{base.partition('.')[0]}") != key:
                    if sample:
                        yield key, sample
                    key, sample = found, {}
                sample[info.name] = TarMember(file, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shown(os.fspath(file))} is no whole tar ({error}).") from None
    if sample:
        yield key, sample


def all_items(sources: Sequence[Source]) -> Iterator[Item]:
    """The images of all sources, those that are named twice only once for each prompt of a row."""
    seen: set[str] = set()
    for source in sources:
        for item in source.items():
            if (id := item.ids[0]) not in seen:
                seen.add(id)
                yield item
