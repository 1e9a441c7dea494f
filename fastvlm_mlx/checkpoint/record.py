"""What a training run leaves in its folder, for the card of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import brief

OPTIONS, LOG, PLOT, DATA = "options.json", "log.jsonl", "loss.png", "data.json"
LOSS, VALIDATION = "loss", "validation_loss"  # of the log's lines


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        options: how it was trained.
        data: what it was trained on: counts, names, by name.
        lines: of the log: the loss of a step, or the validation loss of an evaluation.
        plot: the picture of both, if there is one.
    """

    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    plot: Path | None = None


def read_record(folder: Path) -> Record | None:
    """The record of the run that left an adapter or model, in its folder or the one around it; None
    if there is none."""
    for place in (folder, folder.parent):
        if any((place / name).is_file() for name in (OPTIONS, LOG)):
            plot = place / PLOT
            return Record(
                _object(place / OPTIONS),
                _object(place / DATA),
                _lines(place / LOG),
                plot if plot.is_file() else None,
            )
    return None


def copy_record(record: Record | None, target: Path) -> None:
    """Copy the picture of a run's losses, which its card shows."""
    if record is not None and record.plot is not None:
        shutil.copyfile(record.plot, target / PLOT)


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing: a card does without what can't be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the last may be half written
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def paragraphs(record: Record) -> Iterator[str]:
    """What a card says of a run: recipe, data, curves."""
    yield "## Training"
    if record.options:
        yield "How it was trained:\n\n" + _table("option", record.options)
    if record.data:
        yield "What it was trained on:\n\n" + _table("data", record.data)
    if said := _course(record.lines):
        yield said
    if record.plot is not None:
        yield f"![Loss by step]({PLOT})"


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {title} | |", "|---|---|"]
    for name, value in values.items():
        if value not in (None, "", [], {}):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append(f"| {name} | {brief(shown).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _course(lines: list[dict[str, Any]]) -> str:
    """The losses in a sentence."""
    losses = [line for line in lines if _is_number(line.get(LOSS))]
    tested = [line for line in lines if _is_number(line.get(VALIDATION))]
    said = []
    if losses:
        steps = losses[-1].get("step", len(losses))
        said.append(
            f"The loss fell from {losses[0][LOSS]:.3f} to {losses[-1][LOSS]:.3f} in {steps} steps."
        )
    if tested:
        best = min(tested, key=lambda line: float(line[VALIDATION]))
        lowest = f"The validation loss was lowest, {best[VALIDATION]:.3f},"
        said.append(f"{lowest} after step {best.get('step')}.")
    return " ".join(said)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
