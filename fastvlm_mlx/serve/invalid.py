"""What pydantic finds wrong with a request → a sentence, without what stood there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError, bad

MOST_SHOWN = 3  # faults of a request
# What pydantic adds to a place for each kind of value that could stand there
KINDS = {"str", "int", "float", "bool", "none", "dict", "list"}
FIELD = re.compile(r"[a-z][a-z0-9_]*")


def explain(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a request with these faults.

    Where a value could be of several kinds, each has its faults; those that lie deepest are of the
    kind that was meant.
    """
    places = [_place(fault["loc"]) for fault in faults]
    deepest = [
        (place, fault)
        for place, fault in zip(places, faults, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]
    said = dict.fromkeys(_say(".".join(place), fault) for place, fault in deepest)
    shown = "; ".join(list(said)[:MOST_SHOWN])
    place, first = deepest[0]
    param = None if first["type"] == "json_invalid" else ".".join(place) or None
    return bad(f"The request is wrong: {shown}.", param)


def _say(place: str, fault: Mapping[str, Any]) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "json_invalid":
        return "its body is not valid JSON"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags", "one of the known ones")
        return f"{place}: type must be one of {tags}"
    message = re.sub(r"^Input should", "it should", fault["msg"])
    return f"{place or 'body'}: {message[0].lower()}{message[1:]}"


def _place(loc: Sequence[Any]) -> tuple[str, ...]:
    """Where in a body something stands, without the kinds of values that were tried there."""
    steps: list[str] = []
    for step in map(str, loc[1:]):
        is_field = FIELD.fullmatch(step) is not None and step not in KINDS
        if (is_field or step.isdecimal()) and steps[-1:] != [step]:
            steps.append(step)
    return tuple(steps)
