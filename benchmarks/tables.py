"""From samples to medians, ratios and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastvlm_mlx.bench.machine import OWN_CHOICE
from fastvlm_mlx.bench.table import Stage

from .worker import OURS

Result = dict[str, Any]
Samples = dict[str, dict[str, list[float]]]  # by figure, then by side
Series = dict[str, list[float]]  # by point

MOST_DRIFT = 0.02  # that memory may grow

FIGURES = {
    "encode": Stage("encoder and projector", "s"),
    "ttft": Stage("time to first token", "s"),
    "decode": Stage("decoding", "tokens/s", more=True),
    "load": Stage("loading", "s"),
    "resident": Stage("peak memory of the process", "GB"),
    "arrays": Stage("peak memory of arrays", "GB"),
}


def advantage(key: str, samples: Samples, peer: str) -> float | None:
    """How many times better this library is: the median over the rounds, each a pair.

    None where the peer has no such figure.
    """
    ours, theirs = samples[key][OURS], samples[key][peer]
    if not theirs or not ours:
        return None
    return ratio(ours, theirs) if FIGURES[key].more else ratio(theirs, ours)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def departure(costs: Sequence[float]) -> float:
    """How far from proportional: the largest departure of a unit's cost from the median one."""
    middle = statistics.median(costs)
    return max(abs(cost / middle - 1) for cost in costs)


def unit_costs(series: Series, units: Callable[[int], float] = float) -> list[float]:
    """The median of each point over its number of the units that should set the cost."""
    return [statistics.median(values) / units(int(point)) for point, values in series.items()]


def drift(values: Sequence[float]) -> float:
    """How far the maximum of the last tenth is above that of the second; the first warms up.

    The maximum, since an allocator gives free memory back to the system at one moment or another.
    """
    tenth = max(1, len(values) // 10)
    early, late = values[tenth : 2 * tenth] or values[:1], values[-tenth:]
    return max(late) / max(early) - 1


def spread(values: Sequence[float]) -> str:
    """The median, with least and most in brackets; a dash for no values."""
    if not values:
        return "–"
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g}–{max(values):.3g})"


def kernels_of(machine: dict[str, Any]) -> str:
    """What a heading says of OpenBLAS's kernels, where it was preloaded and they were recorded."""
    kernels = machine.get("openblas_coretype")
    if "openblas" not in machine["preloaded"] or kernels is None:
        return ""
    own = ", kernels of OpenBLAS's own choice"
    return own if kernels == OWN_CHOICE else f", OpenBLAS forced to {kernels} kernels"


def in_short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, whose columns after the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def markdown_list(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines)
