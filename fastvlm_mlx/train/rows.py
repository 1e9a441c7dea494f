"""What a data set holds: conversations about images, from files, folders and `datasets`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import shown
from ..evaluate.questions import DEFAULT_QUESTION
from ..image.load import ImageSource
from ..text.messages import read_messages
from .hub_rows import is_hub_name, read_hub_records
from .row_fields import Columns, check_columns, read_fields
from .row_files import BadRow, Record, read_records

MANY = 2000  # rows, for which a bar shows how far work has come
SHOWN_AT_ONCE = 5  # bad rows in the sentence of an error


class Question(NamedTuple):
    """An answer of the assistant's, and what `generate` is given to compare with it."""

    messages: list[dict[str, Any]]
    images: list[ImageSource]
    answer: str


@dataclass(frozen=True)
class Row:
    """A conversation, whose images stand where its messages have marks or parts for them.

    `generate(model, processor, row.messages, image=row.images)` reads it as training does.

    Attributes:
        id: unique in its data set.
        messages: as `generate` takes them, with a place for each image.
        images: in the order of their places: paths, URLs, bytes, or objects with a method `read`.
        where: file and line or row, for errors.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[ImageSource]
    where: str

    def questions(self) -> Iterator[Question]:
        """Each answer of the assistant's with all that stands before it."""
        turns, slots = read_messages(self.messages)
        has_system = turns[0]["role"] == "system"
        for n, turn in enumerate(turns):
            if turn["role"] == "assistant" and n > has_system:
                seen = sum(slot.turn <= n for slot in slots)
                yield Question(self.messages[:n], self.images[:seen], turn["content"])


class BadRows(ValueError):
    """Rows that can't be used.

    Attributes:
        bad: all of them.
    """

    def __init__(self, bad: Sequence[BadRow]):
        first = "; ".join(f"{row.where}: {row.problem}" for row in bad[:SHOWN_AT_ONCE])
        more = len(bad) - SHOWN_AT_ONCE
        super().__init__(
            f"{len(bad)} row(s) can't be used: {first}"
            + (f"; and {more} more." * (more > 0) or ".")
        )
        self.bad = list(bad)


def find_rows(
    source: str | Path,
    *,
    images: str | Path | None = None,
    columns: Columns | None = None,
    question: str = DEFAULT_QUESTION,
    subset: str | None = None,
    split: str | None = None,
) -> Iterator[Row | BadRow]:
    """The rows of a data set in order, with a `BadRow` in the place of each that can't be used.

    Args:
        source: a file of conversations in LLaVA's JSON or JSONL, of messages in JSONL, of questions
            and answers in CSV or JSONL; a folder of images with a .txt beside each; a folder that
            `datasets` saved, or the id of a data set on the Hub.
        images: the folder in which the paths of images start; by default that of the file.
        columns: the names of fields: "image", "question", "answer", "id", "conversations",
            "messages" or "system" → the column's own.
        question: asked in rows without one, which have only captions.
        subset, split: of a data set of `datasets`; the split is "train" by default.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it can't be read as a whole, or an unknown field in `columns`.
        ImportError: it needs `datasets`, which is not installed.
    """
    columns = columns or {}
    check_columns(columns)
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {shown(str(images))}.")
    records = _records(source, subset, split)
    return _to_rows(records, folder, columns, question)


def read_rows(source: str | Path, **options: Any) -> list[Row]:
    """The rows of a data set, as `find_rows` with its options.

    Raises:
        BadRows: some can't be used.
        ValueError: there is none, or as `find_rows`.
        FileNotFoundError, ImportError: as `find_rows`.
    """
    good, bad = sort_rows(find_rows(source, **options))
    if bad:
        raise BadRows(bad)
    if not good:
        raise ValueError(f"{shown(str(source))} holds no rows.")
    return good


def sort_rows(found: Iterable[Row | BadRow]) -> tuple[list[Row], list[BadRow]]:
    """The good and the bad ones of what `find_rows` gives, each in their order."""
    every = list(found)
    good = [row for row in every if isinstance(row, Row)]
    return good, [row for row in every if isinstance(row, BadRow)]


def distinct_images(rows: Iterable[Row]) -> dict[Hashable, ImageSource]:
    """Each image of rows once, under what `image_name` calls it."""
    return {image_name(image): image for row in rows for image in row.images}


def image_name(image: Any) -> Hashable:
    """What tells an image from others without reading it."""
    return image if isinstance(image, Hashable) else id(image)


def _records(
    source: str | Path, subset: str | None, split: str | None
) -> Iterator[Record | BadRow]:
    path = Path(source).expanduser()
    if is_hub_name(source, path):
        return read_hub_records(source, path, subset, split)
    if subset is not None or split is not None:
        raise ValueError(f"{shown(str(source))} is a file or folder, which has no subset or split.")
    if not path.exists():
        raise FileNotFoundError(f"There is no data file or folder {shown(str(source))}.")
    return read_records(path)


def _to_rows(
    records: Iterator[Record | BadRow], folder: Path | None, columns: Columns, question: str
) -> Iterator[Row | BadRow]:
    seen: Counter[str] = Counter()
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        try:
            id, messages, images = read_fields(
                record, images=folder, columns=columns, question=question
            )
        except ValueError as error:
            yield BadRow(record.where, str(error))
            continue
        yield Row(_new_id(id or record.key, seen), messages, images, record.where)


def _new_id(id: str, seen: Counter[str]) -> str:
    """An id, or with a number if it was there before, as some in LLaVA's own data."""
    seen[id] += 1
    return id if seen[id] == 1 else _new_id(f"{id}#{seen[id]}", seen)
