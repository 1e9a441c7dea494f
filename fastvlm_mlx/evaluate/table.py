"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .metrics import METRICS
from .presets import SIZES, Preset
from .results import Result
from .statistics import Difference, Interval


def said(found: Interval, *, percent: bool) -> str:
    """A figure and its interval, as a person reads it."""
    scale, digits, unit = (100, 1, " %") if percent else (1, 2, "")
    value = f"{scale * found.value:.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return value
    return f"{value} [{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"


def result_table(result: Result) -> Any:
    """A `rich` table with a row per task."""
    from rich.table import Table

    percent = METRICS[result.metric].percent
    names = list(result.rows[0].figures) if result.rows else []
    table = Table("Task", "Answers", title=f"{result.name}: {result.model}", title_justify="left")
    for name in names:
        table.add_column(f"{name} [95 %]")
    for name in ("Unparsed", "Cut off"):
        table.add_column(name, justify="right")
    for row in result.rows:
        figures = [said(row.figures[name], percent=percent) for name in names]
        table.add_row(row.task, str(row.count), *figures, str(row.unparsed), str(row.cut_off))
    return table


def result_lines(result: Result) -> list[str]:
    """What stands below the table: times, published figures, items without an answer."""
    lines = []
    if times := result.ttft():
        p50, p95 = (f"{1000 * times[name]:.0f} ms" for name in ("p50", "p95"))
        lines.append(f"Time to first token: {p50} (median), {p95} (95th percentile).")
    if result.published:
        figures = ", ".join(f"{size} {value}" for size, value in result.published.items())
        lines.append(f"Published: {figures}.")
    if result.failed:
        some = list(result.failed.items())[:3]
        named = "; ".join(f"{id}: {error}" for id, error in some)
        more = f"; {len(result.failed) - len(some)} more" if len(result.failed) > len(some) else ""
        lines.append(f"{len(result.failed)} without an answer, not counted: {named}{more}.")
    return lines


def difference_lines(
    first: Result, second: Result, differences: Mapping[str, Difference]
) -> list[str]:
    """A sentence per figure: how much the second model is above the first, and how sure that is."""
    percent = METRICS[first.metric].percent
    unit = "points" if percent else ""
    lines = []
    for name, found in differences.items():
        scale = 100 if percent else 1
        value, low, high = (
            None if bound is None else scale * bound
            for bound in (found.interval.value, found.interval.low, found.interval.high)
        )
        within = "" if low is None else f" [95 %: {low:+.1f}, {high:+.1f}]"
        lines.append(
            f"{name}: {second.model} − {first.model} = {value:+.1f} {unit}{within}, "
            f"p = {found.p_value:.3g} (paired permutation over {found.images} images); "
            f"{found.better} answers better, {found.worse} worse."
        )
    return lines


def preset_table(presets: Mapping[str, Preset], results: Mapping[str, list[dict[str, Any]]]) -> Any:
    """A `rich` table of presets: data, metric, published figures, and what was measured here."""
    from rich.table import Table

    table = Table("Preset", "Data set on the Hub", "Split", "Metric", *SIZES, "Measured here")
    for name, preset in presets.items():
        published = [str(preset.published.get(size, "–")) for size in SIZES]
        table.add_row(
            name,
            preset.source,
            preset.split,
            ", ".join([preset.metric, *preset.own_metrics]),
            *published,
            _measured(results.get(name)),
        )
    return table


def _measured(results: list[dict[str, Any]] | None) -> str:
    """The main figure of each result; or that there is none."""
    if not results:
        return "not run"
    lines = []
    for result in results:
        row = result["tasks"][-1]
        figure = next(iter(row["figures"].values()))
        percent = METRICS[result["metric"]].percent
        value = said(Interval(**figure), percent=percent)
        lines.append(f"{result['model']}: {value}, {row['count']} answers")
    return "\n".join(lines)
