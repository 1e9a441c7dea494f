"""What is asked in an evaluation: questions about images with their references, from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

from ..checks import brief, shown
from .metrics.choices import named_by

ALL = "all"  # the task of questions that name none
SHAPE = (
    'an object with "image" or "images", "question", "answer" or "answers" (or a list of such '
    '"questions" about one image)'
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique among the items.
        images: paths, URLs or bytes, in the order of the prompt.
        prompt: what the model is asked, to the letter.
        references: right answers.
        choices: the texts of A, B, C and so on, if the question has choices.
        task: under which it is counted.
        metric: of this question, if it is not the others'.
    """

    id: str
    images: tuple[str | bytes, ...]
    prompt: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    task: str = ALL
    metric: str | None = None


class Items(Protocol):
    """Items in a fixed order, as often as they are asked for."""

    def __iter__(self) -> Iterator[Item]: ...

    def __len__(self) -> int: ...


def read_items(file: Path, *, suffix: str = "") -> list[Item]:
    """The questions of a JSONL file, in which images' paths are relative to the file.

    A line is an object: {"image": "a.png", "question": "…", "answer": "…"}. "images" holds several,
    "answers" several right ones, "choices" the texts of A, B, C; "task", "id" and "metric" are
    optional. Several questions of one image may stand in a line as "questions", a list of such
    objects without the image.

    Args:
        file: in UTF-8.
        suffix: what every question ends with, such as "Answer with a single word.", after a line
            break.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else; the message says which and why.
    """
    items: dict[str, Item] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a JSONL file in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        for item in _items_of(line, number, where, file.parent, suffix):
            if item.id in items:
                raise ValueError(f"{where}: the id {shown(item.id)} stands above already.")
            items[item.id] = item
    if not items:
        raise ValueError(f"{file} holds no questions.")
    return list(items.values())


def _items_of(line: str, number: int, where: str, root: Path, suffix: str) -> Iterator[Item]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {brief(str(error))}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not {SHAPE}.")
    if "questions" not in row:
        yield _item(row, str(number), where, root, suffix)
        return
    asked = row["questions"]
    if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
        raise ValueError(f'{where}: "questions" is not a list of objects.')
    common = {name: value for name, value in row.items() if name not in ("questions", "id")}
    for place, each in enumerate(asked, 1):
        own_id = f"{row.get('id', number)}.{place}"
        yield _item(common | each, own_id, f"{where}, question {place}", root, suffix)


def _item(row: Mapping[str, Any], id: str, where: str, root: Path, suffix: str) -> Item:
    images = row.get("images", row.get("image", []))
    images = [images] if isinstance(images, str) else images
    references = row.get("answers", row.get("answer"))
    references = references if isinstance(references, list) else [references]
    texts = [row.get("question"), row.get("task", ALL), *_list(images, "images", where)]
    texts += [*_list(row.get("choices", []), "choices", where), row.get("metric", "exact")]
    if not all(isinstance(text, str) for text in texts) or not references:
        raise ValueError(f"{where} is not {SHAPE}.")
    choices = tuple(row.get("choices", []))
    references = tuple(_reference(each, where) for each in references)
    if choices and row.get("metric", "mcq") == "mcq":
        _check_choices(choices, references, where)
    return Item(
        id=str(row.get("id", id)),
        images=tuple(_placed(image, root) for image in images),
        prompt=with_choices(row["question"], choices, suffix),
        references=references,
        choices=choices,
        task=row.get("task", ALL),
        metric=row.get("metric"),
    )


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'{where}: "{name}" is {shown(value)}, not a list of texts.')
    return value


def _reference(value: Any, where: str) -> str:
    """A right answer; numbers may stand as such."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: the answer {shown(value)} is neither a text nor a number.")
    return str(value)


def _check_choices(choices: Sequence[str], references: Sequence[str], where: str) -> None:
    """ValueError if choices have no letters, or no answer could be right."""
    if len(choices) > len(ascii_uppercase):
        raise ValueError(f"{where} has {len(choices)} choices; A to Z are {len(ascii_uppercase)}.")
    for reference in references:
        if named_by(reference, choices) is None:
            raise ValueError(f"{where}: the answer {shown(reference)} is none of the choices.")


def _placed(image: str, root: Path) -> str:
    return image if "://" in image or image.startswith("data:") else str(root / image)


def with_choices(question: str, choices: Sequence[str], suffix: str = "") -> str:
    """A question, its choices on lettered lines, and what it ends with."""
    lettered = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *lettered, *filter(None, [suffix])])


def first_items(items: Items, limit: int | None) -> Items:
    """The first few of some items."""
    if limit is None or isinstance(items, list):
        return items[:limit] if isinstance(items, list) else items
    return _First(items, limit)


class _First:
    def __init__(self, items: Items, limit: int):
        self._items, self._limit = items, limit

    def __iter__(self) -> Iterator[Item]:
        for _, item in zip(range(self._limit), self._items, strict=False):
            yield item

    def __len__(self) -> int:
        return min(self._limit, len(self._items))


def by_images(items: list[Item]) -> Iterator[Item]:
    """Items about the same images one after another, in the order of the first of each."""
    groups: dict[tuple[str | bytes, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.images, []).append(item)
    return chain.from_iterable(groups.values())
