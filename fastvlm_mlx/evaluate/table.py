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


def result_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """The heads of a table, and its cells: a line per task."""
    percent = METRICS[result.metric].percent
    figures = list(result.rows[0].figures) if result.rows else []
    heads = ["Task", "Answers", *(f"{name} [95 %]" for name in figures), "Unparsed", "Cut off"]
    lines = [
        [
            row.task,
            str(row.count),
            *(said(row.figures[name], percent=percent) for name in figures),
            str(row.unparsed),
            str(row.cut_off),
        ]
        for row in result.rows
    ]
    return heads, lines


def result_table(result: Result) -> Any:
    """A `rich` table with a row per task."""
    from rich.markup import escape
    from rich.table import Table

    heads, lines = result_cells(result)
    table = Table(title=escape(f"{result.name}: {result.model}"), title_justify="left")
    for name in heads:
        table.add_column(escape(name), justify="left" if name == "Task" else "right")
    for line in lines:
        table.add_row(*map(escape, line))
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
    scale, digits, unit = (100, 1, " points") if METRICS[first.metric].percent else (1, 2, "")
    lines = []
    for name, found in differences.items():
        value, low, high = (
            None if bound is None else scale * bound
            for bound in (found.interval.value, found.interval.low, found.interval.high)
        )
        within = "" if low is None else f" [95 %: {low:+.{digits}f}, {high:+.{digits}f}]"
        lines.append(
            f"{name}: {second.model} − {first.model} = {value:+.{digits}f}{unit}{within}, "
            f"p = {found.p_value:.3g} (paired permutation over {found.images} images); "
            f"{found.better} answers better, {found.worse} worse."
        )
    return lines


def preset_table(presets: Mapping[str, Preset], results: Mapping[str, list[dict[str, Any]]]) -> Any:
    """A `rich` table of presets: data, metric, published figures, and what was measured here."""
    from rich.markup import escape
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
            escape(_measured(results.get(name))),
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
