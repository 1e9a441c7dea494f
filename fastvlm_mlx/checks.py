"""Checks of what a person gives, and short wordings of what is wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any


def masked(text: str) -> str:
    """`text` without the user names and passwords of the URLs in it."""
    return re.sub(r"(?<=://)[^/?#\s'\"]*@", "***@", text)


def is_whole_number(value: Any, least: int = 1) -> bool:
    """Whether a value is an int from `least` on; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an int or a finite float, and not too large for a float."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -sys.float_info.max <= value <= sys.float_info.max


def check_whole_number(name: str, value: Any, least: int = 1) -> None:
    """ValueError, naming the argument, unless it is a whole number from `least` on, below 2⁶⁴."""
    if not is_whole_number(value, least):
        raise ValueError(f"{name} must be a whole number from {least}, found {shown(value)}.")
    if value >= 2**64:  # more than MLX can count
        raise ValueError(f"{name} must be a whole number below 2⁶⁴, found {shown(value)}.")


def reason(error: BaseException) -> str:
    """The first line of what an exception says, in brief, without error number or full stop."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return brief(re.sub(r"^\[Errno -?\d+\] ", "", said.partition("\n")[0])).rstrip(".")


def shown(value: Any) -> str:
    """A value as Python writes it, in brief."""
    try:
        return brief(repr(value))
    except ValueError:  # of Python itself, beyond 4,300 digits
        return "a number with thousands of digits"


def brief(text: str, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters that can be printed anywhere, `masked`."""
    line = " ".join(masked(text)[: 4 * limit].split())
    line = line.encode(errors="backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def is_litter(name: str) -> bool:
    """Whether a file is one that macOS adds beside others on exFAT and network drives."""
    return name == ".DS_Store" or name.startswith("._")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but litter."""
    return all(is_litter(path.name) for path in folder.iterdir())
