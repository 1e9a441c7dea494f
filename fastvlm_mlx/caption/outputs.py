"""What every output has in common: rows, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .items import FLAGS, PROMPT, Item, caption_of

Fields = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """What is written about one image.

    Attributes:
        item: the image.
        fields: the captions by column.
        prompt: the one that was drawn, if there are prompts.
        flags: what looks wrong.
    """

    item: Item
    fields: Fields
    prompt: str | None = None
    flags: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """As one object: the row that named the image, and then what is new, the flags last."""
        prompt = {} if self.prompt is None else {PROMPT: self.prompt}
        own = {**self.fields, **prompt, FLAGS: list(self.flags)}
        rest = {name: value for name, value in self.item.row.items() if name not in own}
        return {"image": self.item.key, **rest, **own}


class Output(Protocol):
    """Where captions go. `write` may keep rows for a while; `flush` says whether it has none."""

    changes_images: bool
    """Whether the image files are other ones once it has written."""

    def existing(self, item: Item) -> Fields | None:
        """The captions that the output has of an image; None if it lacks one."""

    def write(self, row: Row) -> None:
        """Take a row; ValueError for an image that can't be written about."""

    def flush(self, *, now: bool = False) -> bool:
        """Write what is due, or everything; whether all rows are now in the output."""

    def close(self) -> None:
        """End it; what `flush` has not written is lost."""


def fields_of(record: Mapping[str, Any], names: Iterable[str]) -> Fields | None:
    """The captions of a record; None unless all are there."""
    found = {name: caption_of(dict(record), name) for name in names}
    return found if all(found.values()) else None
