"""A record's fields → the messages and images of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import brief, reason, shown
from ..image.load import ImageSource
from ..text.messages import IMAGE_MARK, IMAGE_PARTS, check_messages, read_messages
from .row_files import Record

# The names that a field may have, the first that is there; a column mapping gives others.
FIELDS = {
    "id": ("id", "question_id"),
    "image": ("image", "images", "file_name"),
    "question": ("question", "prompt", "query"),
    "answer": ("answer", "caption", "text", "response"),
    "conversations": ("conversations",),
    "messages": ("messages",),
    "system": ("system",),
}
# What LLaVA's and other data sets call the roles
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"model": "assistant", "system": "system"}

URL = re.compile(r"data:|[a-z0-9]+://", re.IGNORECASE)

Message = dict[str, Any]
Columns = Mapping[str, str]


def check_columns(columns: Columns) -> None:
    """ValueError unless a column mapping is of known fields."""
    if unknown := sorted(set(columns) - set(FIELDS)):
        raise ValueError(
            f"There is no field {shown(unknown[0])} for a column: choose from {', '.join(FIELDS)}."
        )


def read_fields(
    record: Record, *, images: Path | None, columns: Columns, question: str
) -> tuple[str, list[Message], list[ImageSource]]:
    """The id, messages and images of a record; "" for no id.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence.
    """
    fields = {name: _field(record.value, name, columns) for name in FIELDS}
    messages = _messages(fields, question, list(record.value))
    if isinstance(fields["system"], str) and fields["system"]:
        messages = [{"role": "system", "content": fields["system"]}, *messages]
    try:
        messages = check_messages(messages)
        _, slots = read_messages(messages)
    except ValueError as error:
        raise ValueError(_as_end(error)) from None
    _check_answers(messages)
    root = record.root if images is None else images
    given = [resolve_image(image, root) for image in _listed(fields["image"])]
    own = [None if slot.image is None else resolve_image(slot.image, root) for slot in slots]
    found = _placed(own, given)
    messages = [_without_sources(message) for message in messages]
    if not slots and found:
        messages = _mark_first(messages, len(found))
    return "" if fields["id"] is None else str(fields["id"]), messages, found


def _as_end(error: ValueError) -> str:
    said = str(error).rstrip(".")
    return said[:1].lower() + said[1:]


def _field(value: Mapping[str, Any], name: str, columns: Columns) -> Any:
    if name in columns:
        if columns[name] not in value:
            raise ValueError(f"it has no column {shown(columns[name])}; {_columns_said(value)}")
        return value[columns[name]]
    found = [value[key] for key in FIELDS[name] if value.get(key) not in (None, "", [])]
    several = [_listed(found) for found in map(value.get, ("image", "images")) if found]
    if name == "image" and len(several) > 1 and several[0] != several[1]:
        raise ValueError("it has different images under image and images; leave one out")
    present = (value[key] for key in FIELDS[name] if key in value)
    return found[0] if found else next(present, None)


def _columns_said(names: Any) -> str:
    return f"its columns are {brief(', '.join(map(str, names))) or 'none'}"


# Messages


def _messages(fields: Mapping[str, Any], question: str, names: Sequence[str]) -> list[Any]:
    for name in ("conversations", "messages"):
        if (turns := fields[name]) is not None:
            turns = _parsed(turns)
            if not isinstance(turns, (list, tuple)) or not turns:
                raise ValueError(f"its {name} must be a list of turns, found {shown(turns)}")
            return [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    if fields["answer"] is None:
        raise ValueError(
            f"it has neither conversations nor messages nor an answer; {_columns_said(names)}"
        )
    asked = question if fields["question"] in (None, "") else fields["question"]
    return [
        {"role": "user", "content": _text(asked, "question")},
        {"role": "assistant", "content": _text(fields["answer"], "answer")},
    ]


def _parsed(turns: Any) -> Any:
    """A list that stands as JSON in a table."""
    try:
        return json.loads(turns) if isinstance(turns, str) else turns
    except ValueError:
        return turns


def _turn(turn: Any, number: int) -> Message:
    """A turn of LLaVA's, {"from": …, "value": …}, or a message, {"role": …, "content": …}."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} must be an object, found {shown(turn)}")
    role = turn.get("from") if "from" in turn else turn.get("role")
    content = turn.get("value") if "value" in turn else turn.get("content")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"turn {number} is from {shown(role)}; known are {', '.join(ROLES)}")
    if isinstance(content, (list, tuple)):
        # In a table every part has the keys of all, those that it lacks with None.
        content = [
            {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    elif not isinstance(content, str):
        raise ValueError(f"turn {number} must have a text, found {shown(content)}")
    return {"role": ROLES[role.lower()], "content": content}


def _text(value: Any, name: str) -> str:
    """A text, or the first of a list of them."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"its {name} must be a text, found {shown(value)}")
    return value


def _check_answers(messages: Sequence[Message]) -> None:
    turns, _ = read_messages(messages)
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise ValueError(f"turn {number} is an empty answer of the assistant's")


# Images


def _listed(images: Any) -> list[Any]:
    if images is None or images == "" or (isinstance(images, (list, tuple)) and not images):
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _placed(own: list[Any], given: list[ImageSource]) -> list[ImageSource]:
    """The images in the order of their places: those in their parts, and the next given one."""
    waiting = sum(image is None for image in own)
    if own and waiting != len(given):
        have = f"{waiting} {IMAGE_MARK} mark(s) or part(s) without a source"
        raise ValueError(f"it has {have} for {len(given)} image(s)")
    rest = iter(given)
    return [next(rest) if image is None else image for image in own] or given


def resolve_image(image: Any, root: Path) -> ImageSource:
    """An image as it is read later, its path from `root`.

    Raises:
        ValueError: there is no such file, or it is no image at all.
    """
    if isinstance(image, Mapping):  # as the datasets library keeps images
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, str) and image:
        return image if URL.match(image) else _resolve_path(image, root)
    if isinstance(image, (Path, bytes)) or hasattr(image, "read"):
        return image
    raise ValueError(f"an image must be a path or URL, found {shown(image)}")


def _resolve_path(image: str, root: Path) -> Path:
    try:
        path = root / Path(image).expanduser()
        if path.is_file():
            return path
        what = "is a folder" if path.is_dir() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # too long, hidden, of an unknown user
        what = f"can't be found ({reason(error)})"
    raise ValueError(f"its image {shown(image)} {what} in {brief(str(root))}")


def _without_sources(message: Message) -> Message:
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image"} if part["type"] in IMAGE_PARTS else {"type": "text", "text": part["text"]}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _mark_first(messages: list[Message], count: int) -> list[Message]:
    """Messages with places for images before the first question, as `build_prompt` has them."""
    for n, message in enumerate(messages):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                content = f"{IMAGE_MARK}\n" * count + content
            else:
                content = [{"type": "image"}] * count + content
            return [*messages[:n], {**message, "content": content}, *messages[n + 1 :]]
    raise ValueError("it has an image and no question for it to stand before")
