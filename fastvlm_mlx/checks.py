"""Checks of what a person gives, and short wordings of what is wrong."""

from __future__ import annotations

import re
import sys
from typing import Any


def is_whole_number(value: Any, least: int = 1) -> bool:
    """Whether a value is an int from `least` on; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an int or a finite float, and not too large for a float."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -sys.float_info.max <= value <= sys.float_info.max


def check_whole_number(name: str, value: Any, least: int = 1) -> None:
    """ValueError, naming the argument, unless its value is a whole number from `least` on."""
    if not is_whole_number(value, least):
        raise ValueError(f"{name} must be a whole number from {least}, found {value!r}.")


def reason(error: BaseException) -> str:
    """The first line of what an exception says, in brief, without error number or full stop."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return brief(re.sub(r"^\[Errno -?\d+\] ", "", said.partition("\n")[0])).rstrip(".")


def brief(text: str, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def is_litter(name: str) -> bool:
    """Whether a file is one that macOS adds beside others on exFAT and network drives."""
    return name == ".DS_Store" or name.startswith("._")
