"""What a metric says of one answer, in a form that adds up over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One answer's score.

    Attributes:
        value: of this answer alone, for lists of mistakes.
        parts: numbers that add up over answers; every figure of the metric is computed from their
            sums.
        parsed: what was taken for the answer, where it had to be found in a longer text.
        unparsed: nothing could be taken for it; it counts as wrong.
    """

    value: float
    parts: tuple[float, ...]
    parsed: str | None = None
    unparsed: bool = False


def mean_score(value: float, parsed: str | None = None, *, unparsed: bool = False) -> Score:
    """A score that counts as one of many in a mean."""
    return Score(value, (value, 1.0), parsed, unparsed)


def best(values: Sequence[float]) -> float:
    """The largest; 0 without references."""
    return max(values, default=0.0)
