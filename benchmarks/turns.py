"""Sides that are measured in turns, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def in_turns(
    sides: Mapping[str, Callable[[], T]], rounds: int, what: str, *, warm_up: int = 1
) -> dict[str, list[T]]:
    """What each side gives in every round: A B C, then C B A, and so on.

    Args:
        sides: what to call, by name.
        rounds: calls of each.
        what: is measured, for the notes on stderr.
        warm_up: rounds before them, which don't count.
    """
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        note(f"{what}: " + (f"round {number + 1} of {rounds}" if number >= 0 else "warming up"))
        for name in list(sides)[:: -1 if number % 2 else 1]:
            value = sides[name]()
            if number >= 0:
                found[name].append(value)
    return found


def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def note(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)
