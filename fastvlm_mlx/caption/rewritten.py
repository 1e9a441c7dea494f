"""Tables that are written anew now and then, whole: Parquet, and rows that replace others."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import shown
from . import tables
from .appended import existing_rows, in_columns, is_csv
from .files import replacing
from .items import FLAGS, PROMPT, Item, caption_of, found_by, ids_of
from .outputs import Fields, Row

PERIOD = 2.0  # seconds between two times of writing, at least
SHARE = 20  # writing takes at most one in so many seconds
ROW = "row"


class RewrittenTable:
    """A table that is replaced by one with the new rows in it: in the places of rows about the same
    images, or at its end. Its file is whole at any time.

    Args:
        file: JSONL or CSV, as `mend` leaves it.
        names: the columns that take captions.
    """

    changes_images = False

    def __init__(self, file: Path, names: Sequence[str]):
        self.file, self.names = file, names
        self._existing = self._read_existing()
        self._pending: dict[str, Row] = {}
        self._next = time.monotonic() + PERIOD

    def existing(self, item: Item) -> Fields | None:
        return found_by(item.ids, self._existing)

    def write(self, row: Row) -> None:
        known = [id for id in row.item.ids if id in self._existing]
        self._pending[(known or row.item.ids)[0]] = row

    def flush(self, *, now: bool = False) -> bool:
        if self._pending and (now or time.monotonic() >= self._next):
            start = time.monotonic()
            with replacing(self.file) as draft:
                self._write(draft, {k: row.record() for k, row in self._pending.items()})
            self._pending.clear()
            self._next = time.monotonic() + max(PERIOD, SHARE * (time.monotonic() - start))
        return not self._pending

    def close(self) -> None:
        pass

    def _read_existing(self) -> Mapping[str, Fields | None]:
        return existing_rows(self.file, self.names)

    def _write(self, draft: Path, new: dict[str, dict[str, Any]]) -> None:
        """Write the old rows, changed where there are new ones, and the rest of these."""
        with draft.open("wb") as out:
            for line in self._csv_lines(new) if is_csv(self.file) else self._json_lines(new):
                out.write(line)

    def _json_lines(self, new: dict[str, dict[str, Any]]) -> Iterator[bytes]:
        if self.file.exists():
            with self.file.open("rb") as lines:
                for line in lines:
                    record = tables.parse_line(line) or {}
                    change = _take(new, record)
                    yield line if change is None else tables.to_line(record | change)
        yield from map(tables.to_line, new.values())

    def _csv_lines(self, new: dict[str, dict[str, Any]]) -> Iterator[bytes]:
        delimiter, header = tables.delimiter_of(self.file), list[str]()
        if self.file.exists():
            with self.file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as old:
                for number, fields in enumerate(csv.reader(old, delimiter=delimiter)):
                    header = header if number else fields
                    record = dict(zip(header, fields, strict=False))
                    change = _take(new, record) if number else None
                    fields = fields if change is None else in_columns(record | change, header)
                    yield tables.to_csv(fields, delimiter)
        for record in new.values():
            if not header:
                header = list(record)
                yield tables.to_csv(header, delimiter)
            yield tables.to_csv(in_columns(record, header), delimiter)


def _take(new: dict[str, dict[str, Any]], record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The new record in the place of an old one, which is then none of the new ones any more."""
    known = next((id for id in ids_of(record) if id in new), None)
    return None if known is None else new.pop(known)


class ParquetTable(RewrittenTable):
    """As above, in Parquet, with the same schema however the rows come: the image, the captions,
    the prompt, the flags, and as JSON the row that named the image."""

    def __init__(self, file: Path, names: Sequence[str]):
        self._parquet = tables.import_parquet()
        import pyarrow

        self._arrow = pyarrow
        text = pyarrow.string()
        columns = {"image": text, **dict.fromkeys(names, text), PROMPT: text}
        columns |= {FLAGS: pyarrow.list_(text), ROW: text}
        self.schema = pyarrow.schema(columns)
        super().__init__(file, names)

    def _read_existing(self) -> Mapping[str, Fields | None]:
        found: dict[str, Fields | None] = {}
        if not self.file.exists():
            return found
        with tables.open_parquet(self.file) as old:
            if not old.schema_arrow.equals(self.schema):
                raise ValueError(
                    f"{shown(str(self.file))} has the columns "
                    f"{tables.columns_said(old.schema_arrow.names)}, not "
                    f"{', '.join(self.schema.names)}: choose another file."
                )
            for batch in old.iter_batches(columns=["image", PROMPT, *self.names]):
                for row in batch.to_pylist():
                    captions = {name: caption_of(row, name) for name in self.names}
                    known = captions if all(captions.values()) else None
                    found |= dict.fromkeys(ids_of(row), known)
        return found

    def _write(self, draft: Path, new: dict[str, dict[str, Any]]) -> None:
        rows = {key: self._row(record) for key, record in new.items()}
        with self._parquet.ParquetWriter(draft, self.schema) as writer:
            if self.file.exists():
                with tables.open_parquet(self.file) as old:
                    for batch in old.iter_batches(batch_size=2**16):
                        writer.write_batch(self._changed(batch, rows))
            if rows:
                writer.write_batch(self._batch(list(rows.values())))

    def _changed(self, batch: Any, new: dict[str, dict[str, Any]]) -> Any:
        records = batch.select(["image", PROMPT]).to_pylist()
        if not any(id in new for record in records for id in ids_of(record)):
            return batch
        return self._batch([_take(new, row) or row for row in batch.to_pylist()])

    def _batch(self, rows: list[dict[str, Any]]) -> Any:
        return self._arrow.RecordBatch.from_pylist(rows, schema=self.schema)

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        own = {name: record.get(name) for name in self.schema.names if name != ROW}
        rest = {name: value for name, value in record.items() if name not in own}
        return own | {ROW: json.dumps(rest, default=str) if rest else None}
