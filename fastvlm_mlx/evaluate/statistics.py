"""How sure a figure is: bootstrap intervals, and a paired test between two runs.

Answers about the same images are not independent, so images are drawn, with all their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .metrics.score import Score

if TYPE_CHECKING:
    import numpy as np

SAMPLES = 2000  # of the bootstrap
SWAPS = 10_000  # of the paired test
MOST_EXACT = 12  # images that differ, of which all 2¹² swaps are tried
CONFIDENCE = 0.95

Figure = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; none with fewer than two images."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """The second run's figure minus the first's, on the same items.

    Attributes:
        interval: of the difference, by the paired bootstrap.
        p_value: two-sided, of a permutation test: how often a difference at least as large comes
            about if each image's answers are swapped between the runs by the toss of a coin.
        images: that were drawn from.
        better, worse: answers with a higher and a lower value in the second run.
    """

    interval: Interval
    p_value: float
    images: int
    better: int
    worse: int


def interval(
    figure: Figure, scores: Sequence[Score], groups: Sequence[str], *, seed: int = 0
) -> Interval:
    """A figure with its interval by the percentile bootstrap over images.

    Args:
        figure: from the sums of the scores' parts.
        scores: of all answers, at least one.
        groups: the images of each answer.
        seed: of the draws.
    """
    sums = _by_group(scores, groups)
    value = figure(sums.sum(axis=0).tolist())
    if len(sums) < 2:
        return Interval(value)
    return Interval(value, *_percentiles([figure(drawn) for drawn in _draws(sums, seed)]))


def difference(
    figure: Figure,
    first: Sequence[Score],
    second: Sequence[Score],
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> Difference:
    """How two runs differ, and whether that is more than chance.

    Args:
        figure: from the sums of the scores' parts.
        first, second: scores of the same items in the same order.
        groups: the images of each item.
        seed: of the draws.
    """
    import numpy as np

    a, b = _by_group(first, groups), _by_group(second, groups)
    parts = a.shape[1]
    value = figure(b.sum(axis=0).tolist()) - figure(a.sum(axis=0).tolist())
    found = Interval(value)
    if len(a) > 1:
        draws = _draws(np.concatenate([a, b], axis=1), seed)
        drawn = [figure(both[parts:]) - figure(both[:parts]) for both in draws]
        found = Interval(value, *_percentiles(drawn))
    pairs = list(zip(first, second, strict=True))
    return Difference(
        found,
        _p_value(figure, a, b, abs(value), seed),
        len(a),
        sum(y.value > x.value for x, y in pairs),
        sum(y.value < x.value for x, y in pairs),
    )


def percentiles(values: Sequence[float], *shares: float) -> list[float]:
    """The values below which these shares of all values lie, interpolated."""
    import numpy as np

    return [float(each) for each in np.quantile(values, shares)] if values else []


def _by_group(scores: Sequence[Score], groups: Sequence[str]) -> np.ndarray[Any, Any]:
    """The sums of parts [images, parts], of each image in the order of its first answer."""
    import numpy as np

    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(places), len(scores[0].parts)))
    for score, group in zip(scores, groups, strict=True):
        sums[places[group]] += score.parts
    return sums


def _draws(sums: np.ndarray[Any, Any], seed: int) -> list[list[float]]:
    """Sums over as many images as there are, drawn with replacement, again and again."""
    import numpy as np

    random = np.random.default_rng(seed)
    count = len(sums)
    draws = (
        np.bincount(random.integers(count, size=count), minlength=count) for _ in range(SAMPLES)
    )
    return [(drawn @ sums).tolist() for drawn in draws]


def _percentiles(values: Sequence[float]) -> list[float]:
    outside = (1 - CONFIDENCE) / 2
    return percentiles(values, outside, 1 - outside)


def _p_value(
    figure: Figure,
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    observed: float,
    seed: int,
) -> float:
    """The share of swaps that part the runs as far; images that don't differ change nothing."""
    import numpy as np

    moved = (b - a)[(a != b).any(axis=1)]
    total_a, total_b = a.sum(axis=0), b.sum(axis=0)
    exact = len(moved) <= MOST_EXACT
    random = np.random.default_rng(seed)
    # One at a time: together they would take as much memory as swaps times images.
    swaps = (
        (n >> np.arange(len(moved))) & 1 if exact else random.integers(2, size=len(moved))
        for n in range(2 ** len(moved) if exact else SWAPS)
    )
    apart = [
        abs(figure((total_b - shift).tolist()) - figure((total_a + shift).tolist()))
        for shift in (swap @ moved for swap in swaps)
    ]
    hits = sum(each >= observed * (1 - 1e-9) - 1e-12 for each in apart)
    return hits / len(apart) if exact else (hits + 1) / (len(apart) + 1)
