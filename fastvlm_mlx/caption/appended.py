"""JSONL and CSV files to which rows are appended, each whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..checks import shown
from . import tables
from .files import AppendedFile
from .items import IMAGE_COLUMNS, Item, found_by, ids_of
from .outputs import Fields, Row, fields_of

CHUNK = 2**20


class AppendedTable:
    """A table that only grows; its rows so far stay as they are, to the byte.

    Args:
        file: JSONL or CSV, as `mend` leaves it.
        existing: the captions that it has.
    """

    changes_images = False

    def __init__(self, file: Path, existing: dict[str, Fields | None]):
        self.file = file
        self._existing = existing
        self._is_csv = is_csv(file)
        self._header = tables.csv_header(file) if self._is_csv and file.exists() else []
        self._appended = AppendedFile(file)

    @property
    def size(self) -> int:
        """Of the file, so far."""
        return self._appended.size

    def existing(self, item: Item) -> Fields | None:
        return found_by(item.ids, self._existing)

    def write(self, row: Row) -> None:
        record = row.record()
        self._appended.append(self._csv_record(record) if self._is_csv else tables.to_line(record))

    def flush(self, *, now: bool = False) -> bool:
        return True

    def close(self) -> None:
        self._appended.close()

    def _csv_record(self, record: dict[str, Any]) -> bytes:
        delimiter, line = tables.delimiter_of(self.file), b""
        if not self._header:
            self._header = list(record)
            line = tables.to_csv(self._header, delimiter)
        return line + tables.to_csv(in_columns(record, self._header), delimiter)


def is_csv(file: Path) -> bool:
    """Whether a table is CSV, rather than JSONL."""
    return file.suffix.lower() in tables.CSV


def in_columns(record: dict[str, Any], header: Sequence[str]) -> list[Any]:
    """The values of a record in the order of a header, which may call the image otherwise."""
    named = next(name for name in IMAGE_COLUMNS if name in header)
    return [record["image"] if name == named else record.get(name) for name in header]


def existing_rows(file: Path, names: Sequence[str]) -> dict[str, Fields | None]:
    """The captions in a table by the images' ids; None for an image that lacks one.

    Raises:
        ValueError: the table has a header without a column that takes captions.
    """
    found: dict[str, Fields | None] = {}
    if not file.exists() or file.stat().st_size == 0:
        return found
    if is_csv(file):
        _check_header(file, names)
    for row in tables.read_rows(file):
        if not isinstance(row, ValueError):
            found |= dict.fromkeys(ids_of(row), fields_of(row, names))
    return found


def _check_header(file: Path, names: Sequence[str]) -> None:
    header = tables.csv_header(file)
    missing = [name for name in names if name not in header]
    if missing or not set(IMAGE_COLUMNS) & set(header):
        raise ValueError(
            f"{shown(str(file))} has the columns {tables.columns_said(header)} and lacks "
            f"{', '.join(missing) or 'image'}: choose another file."
        )


# What a run that was killed, or a person's editor, left at the end of a file


def mend(file: Path, ours: int | None) -> None:
    """Take half a record from the end of a table, and end the last whole one with a newline.

    Args:
        file: JSONL or CSV.
        ours: how far a run of ours had written the file, if it did; what is broken behind that is
            ours.

    Raises:
        ValueError: a CSV file ends in half a record that is not ours.
    """
    if not file.exists():
        return
    with file.open("r+b") as stream:
        end, whole = (_end_of_csv if is_csv(file) else _end_of_jsonl)(stream, file)
        size = stream.seek(0, 2)
        if end < size and is_csv(file) and (ours is None or end < ours):
            raise ValueError(
                f"{shown(str(file))} ends in half a record (an open quote, or too few fields): "
                "mend it, or choose another file."
            )
        stream.truncate(end)
        if not whole:
            stream.seek(end)
            stream.write(b"\n")


def _end_of_jsonl(stream: BinaryIO, file: Path) -> tuple[int, bool]:
    """Where the last whole record ends, and whether a newline follows it."""
    start, tail = _last_line(stream)
    if not tail:
        return start, True
    return (start + len(tail), False) if tables.parse_line(tail) is not None else (start, True)


def _end_of_csv(stream: BinaryIO, file: Path) -> tuple[int, bool]:
    """As for JSONL; records end at newlines behind an even number of quotes."""
    end = position = quotes = 0
    stream.seek(0)
    while chunk := stream.read(CHUNK):
        for line in chunk.splitlines(keepends=True):
            quotes += line.count(b'"')
            position += len(line)
            if line.endswith(b"\n") and quotes % 2 == 0:
                end = position
    stream.seek(end)
    tail = stream.read()
    if tail and quotes % 2 == 0 and _fields(tail, file) == len(tables.csv_header(file)):
        return position, False
    return end, True


def _fields(tail: bytes, file: Path) -> int:
    text = io.StringIO(tail.decode("utf-8", "surrogateescape"), newline="")
    return len(next(csv.reader(text, delimiter=tables.delimiter_of(file)), []))


def _last_line(stream: BinaryIO) -> tuple[int, bytes]:
    """Where what stands behind a file's last newline begins, and this."""
    end = position = stream.seek(0, 2)
    tail = b""
    while position:
        start = max(0, position - CHUNK)
        stream.seek(start)
        tail = stream.read(position - start) + tail
        position = start
        if (at := tail.rfind(b"\n")) >= 0:
            return end - len(tail) + at + 1, tail[at + 1 :]
    return 0, tail
