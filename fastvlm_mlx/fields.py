"""Fields of a model folder's JSON files: reading them, and saying which one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from .checks import brief, is_number, is_whole_number

MAX_SIZE = 2**29  # of any dimension: three of them side by side are less than MLX's limit
MAX_SHOWN = 80  # characters of a value in an error


class CheckpointError(ValueError):
    """A model folder can't be used: a file, a field or a tensor is missing or wrong."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or no object in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}.")
    try:
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content))
        value = json.loads(text)
        if "\\u" in text:  # as it will be written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path} has a text with half of a surrogate pair.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def is_positive_int(value: Any) -> bool:
    """Whether a value may be a dimension."""
    return is_whole_number(value) and value <= MAX_SIZE


def is_size(pair: Any) -> bool:
    """Whether a value is a pair of dimensions."""
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2
    return whole and all(is_positive_int(side) for side in pair)


def is_odd_square(shape: Any) -> bool:
    """Whether a value is a pair of the same odd dimension."""
    return is_size(shape) and shape[0] == shape[1] and shape[0] % 2 == 1


def is_moderate_number(value: Any) -> bool:
    """Whether a value is a finite number no larger than a dimension may be."""
    return is_number(value) and -MAX_SIZE <= value <= MAX_SIZE


def check_positive_ints(config: Any, where: str, *names: str) -> None:
    """`reject` the first of some attributes that can't be a dimension."""
    for name in names:
        if not is_positive_int(getattr(config, name)):
            reject(f"{where}.{name}", "a positive integer", getattr(config, name))


def token_ids(value: Any, file: str = "config.json") -> tuple[int, ...]:
    """The ids that an `eos_token_id` lists; none if it is None.

    Raises:
        CheckpointError: naming the file, if it is neither an id nor a list of them.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_whole_number(i, 0) and i <= MAX_SIZE for i in ids):
        reject("eos_token_id", "a token's id or a list of them", value, file)
    return tuple(ids)


def reject(name: str, wanted: str, found: Any, file: str = "config.json") -> NoReturn:
    """Raise a CheckpointError about a field."""
    try:
        shown = brief(repr(found), MAX_SHOWN)
    except (ValueError, RecursionError):  # an int of thousands of digits; lists in lists in lists
        shown = f"one {type(found).__name__} too large to show"
    raise CheckpointError(f"{file}: {name} must be {wanted}, found {shown}.")
