"""Rows of JSONL, CSV and Parquet files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..checks import brief, reason, shown

Record = dict[str, Any]
JSONL, CSV, PARQUET = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".parquet",)
TABLES = (*JSONL, *CSV, *PARQUET)
ROWS_AT_ONCE = 1024
csv.field_size_limit(2**31 - 1)


def read_rows(file: Path) -> Iterator[Record | ValueError]:
    """The rows of a table in order; an error in the place of a row that is broken."""
    kind = file.suffix.lower()
    return (_read_jsonl if kind in JSONL else _read_csv if kind in CSV else _read_parquet)(file)


def count_rows(file: Path) -> int:
    """How many rows a table has."""
    kind = file.suffix.lower()
    if kind in PARQUET:
        count: int = open_parquet(file).metadata.num_rows
        return count
    return sum(1 for _ in read_rows(file))


# JSONL


def parse_line(line: bytes) -> Record | None:
    """The object that a line holds; None if it holds no whole one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_jsonl(file: Path) -> Iterator[Record | ValueError]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                row = parse_line(line)
                yield ValueError(f"line {number} is no JSON object") if row is None else row


def to_line(record: Record) -> bytes:
    """A record as one line of JSON."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # JSON's own escapes for surrogates


# CSV


def delimiter_of(file: Path) -> str:
    """What stands between two fields."""
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _read_csv(file: Path) -> Iterator[Record | ValueError]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter_of(file))
        header = next(reader, [])
        for fields in filter(None, reader):
            if len(fields) > len(header):
                yield ValueError(
                    f"the record that ends on line {reader.line_num} has {len(fields)} fields for "
                    f"{len(header)} columns"
                )
            else:
                yield dict(zip(header, fields, strict=False))


def csv_header(file: Path) -> list[str]:
    """The columns of a CSV file; none if it is empty."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        return next(csv.reader(lines, delimiter=delimiter_of(file)), [])


def to_csv(fields: Iterable[Any], delimiter: str = ",") -> bytes:
    """One CSV record; every field is quoted, so that half a record is never taken for a whole."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(map(_cell, fields))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _cell(value: Any) -> str:
    if isinstance(value, (list, dict)):
        strings = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return "; ".join(value) if strings else json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


# Parquet


def open_parquet(file: Path) -> Any:
    """A Parquet file; ImportError without pyarrow, ValueError if it is none."""
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(file)
    except (ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{shown(str(file))} is no Parquet file ({reason(error)}).") from None


def import_parquet() -> Any:
    """pyarrow's module for Parquet files."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "Parquet files need pyarrow: pip install 'fastvlm-mlx[parquet]'."
        ) from None
    return pyarrow.parquet


def _read_parquet(file: Path) -> Iterator[Record | ValueError]:
    for batch in open_parquet(file).iter_batches(batch_size=ROWS_AT_ONCE):
        for row in range(batch.num_rows):  # not all at once: rows may hold whole images
            yield batch.slice(row, 1).to_pylist()[0]


def columns_said(names: Iterable[str]) -> str:
    """Names of columns, for an error."""
    return brief(", ".join(map(str, names))) or "none"
