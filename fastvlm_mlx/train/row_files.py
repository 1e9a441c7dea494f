"""JSON, JSONL and CSV files and folders of captioned images → records, each with its place."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

from ..checks import brief, reason, shown
from ..image.load import image_files

LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
KINDS = (".json", *LINES, *TABLES)
SPACE = re.compile(r"[ \t\r\n]*")
MAX_FIELD = 2**31 - 1  # characters; csv's own limit is 131,072


@dataclass(frozen=True)
class BadRow:
    """What stands in the place of a row that can't be used.

    Attributes:
        where: file and line or row.
        problem: what is wrong with it, as the end of a sentence.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}."


@dataclass(frozen=True)
class Record:
    """A row as its file has it.

    Attributes:
        value: its fields by name.
        where: file and line or row.
        key: what tells it from the others, if it has no id of its own.
        root: where the paths of its images start.
    """

    value: dict[str, Any]
    where: str
    key: str
    root: Path


def read_records(source: Path) -> Iterator[Record | BadRow]:
    """The records of a file or folder, in order.

    Raises:
        ValueError: the file is of no known kind, or can't be read as a whole.
    """
    if source.is_dir():
        return _read_folder(source)
    kind = source.suffix.lower()
    if kind in LINES:
        return _read_lines(source, _read_text(source))
    if kind in TABLES:
        return _read_table(source, TABLES[kind])
    if kind == ".json":
        return _read_json(source)
    raise ValueError(
        f"{shown(str(source))} is no data file: rows are read from {', '.join(KINDS)} and from "
        "folders with a .txt beside each image."
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{shown(str(file))}, line {line} is not in UTF-8: save it so.") from None


def _read_json(file: Path) -> Iterator[Record | BadRow]:
    text = _read_text(file)
    try:
        rows = list(_elements(text))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # one object a line
            return _read_lines(file, text)
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{shown(str(file))} is broken JSON at {where} ({error.msg}).") from None
    except RecursionError:
        raise ValueError(f"{shown(str(file))} is no list of rows: it is nested deeply.") from None
    if text.lstrip()[:1] not in ("[", "{"):
        found = shown(rows[0][1])
        raise ValueError(f"{shown(str(file))} must hold a list of rows, found {found}.")
    return _of_json(file, rows)


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """The values in a list, or one that stands alone, each with the line that it begins in."""
    decode, line, counted = json.JSONDecoder().raw_decode, 1, 0
    at = _behind_space(text, 0)
    is_list = text[at : at + 1] == "["
    at = _behind_space(text, at + is_list)
    is_over = is_list and text[at : at + 1] == "]"
    while not is_over:
        line, counted = line + text.count("\n", counted, at), at
        value, at = decode(text, at)
        yield line, value
        at = _behind_space(text, at)
        is_over = not is_list or text[at : at + 1] == "]"
        if not is_over:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _behind_space(text, at + 1)
    end = _behind_space(text, at + is_list)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _behind_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


def _of_json(file: Path, rows: list[tuple[int, Any]]) -> Iterator[Record | BadRow]:
    for number, (line, row) in enumerate(rows, 1):
        yield _record(row, file, f"row {number}, line {line}", number)


def _record(row: Any, file: Path, place: str, number: int) -> Record | BadRow:
    where = f"{file.name}, {place}"
    if not isinstance(row, dict):
        return BadRow(where, f"a row must be an object, found {shown(row)}")
    return Record(row, where, f"{file.stem}-{number}", file.parent)


def _read_lines(file: Path, text: str) -> Iterator[Record | BadRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _record(json.loads(line), file, f"line {number}", number)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else reason(error)
            yield BadRow(f"{file.name}, line {number}", f"it is broken JSON ({said})")


def _read_table(file: Path, delimiter: str) -> Iterator[Record | BadRow]:
    csv.field_size_limit(MAX_FIELD)
    lines = StringIO(_read_text(file), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"{shown(str(file))}, line 1 is broken ({error}).") from None
    if twice := [name for name, times in Counter(filter(None, header)).items() if times > 1]:
        raise ValueError(f"{shown(str(file))} has two columns named {shown(twice[0])}.")
    return _of_table(file, header, reader)


def _of_table(file: Path, header: list[str], reader: Any) -> Iterator[Record | BadRow]:
    for number in count(1):
        where = f"{file.name}, line {reader.line_num + 1}"  # it may go on over several
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(where, f"its quotes are not closed or not doubled ({error})")
            continue
        if len(fields) > len(header):
            many = f"it has {len(fields)} fields for {len(header)} columns"
            yield BadRow(where, f"{many}; put a field with commas in quotes")
        elif fields:
            row = dict(zip(header, fields, strict=False))
            yield Record(row, where, f"{file.stem}-{number}", file.parent)


def _read_folder(folder: Path) -> Iterator[Record | BadRow]:
    images = image_files(folder, recursive=True)
    if not any(image.with_suffix(".txt").is_file() for image in images):
        found = f"{len(images)} image(s) and no .txt beside one" if images else "no image"
        raise ValueError(f"The folder {shown(str(folder))} has {found}.")
    return _of_folder(folder, images)


def _of_folder(folder: Path, images: list[Path]) -> Iterator[Record | BadRow]:
    for image in images:
        name, file = image.relative_to(folder).as_posix(), image.with_suffix(".txt")
        try:
            caption = _read_text(file).strip()
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            said = "there is no such file" if missing else reason(error)
            yield BadRow(brief(name), f"its caption {brief(file.name)} can't be read ({said})")
        else:
            yield Record({"image": name, "answer": caption}, brief(name), name, folder)
