"""Checks of what a person gives."""

from __future__ import annotations

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
