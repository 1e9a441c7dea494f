"""What a training run leaves in its folder, for the card of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import brief, is_number
from .files import write_json

OPTIONS, LOG, PLOT, DATA = "options.json", "log.jsonl", "loss.png", "data.json"  # of a run
TRAINING = "training.json"  # of an adapter or a model: what the run's files say
LOSS, VALIDATION = "loss", "validation_loss"  # of the log's lines
KEPT = ("step", LOSS, VALIDATION)
PLACES = ("model", "data")  # options that may be paths
MOST_LINES = 1000


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


def read_run(folder: Path) -> Record | None:
    """The record of the run in a folder; None if there is none."""
    if not any((folder / name).is_file() for name in (OPTIONS, LOG)):
        return None
    lines = [{key: line[key] for key in KEPT if key in line} for line in _lines(folder / LOG)]
    lines = [line for line in lines if _has_number(line, LOSS) or _has_number(line, VALIDATION)]
    every = -(-len(lines) // MOST_LINES) or 1
    chosen = [line for i, line in enumerate(lines) if i % every == 0 or VALIDATION in line]
    if lines and chosen[-1] is not lines[-1]:
        chosen.append(lines[-1])
    options, data = (_public(_object(folder / name)) for name in (OPTIONS, DATA))
    return Record(options, data, chosen, _plot(folder))


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """Without where files are on this machine, which is no one else's concern: their names."""
    return {name: _named(value) if name in PLACES else value for name, value in values.items()}


def _named(value: Any) -> Any:
    is_path = isinstance(value, str) and (value.startswith(("~", ".")) or Path(value).is_absolute())
    return Path(value).name if is_path else value


def read_record(folder: Path) -> Record | None:
    """The record in the folder of an adapter or a model; None if there is none."""
    found = _object(folder / TRAINING)
    options, data, lines = (found.get(name) for name in ("options", "data", "log"))
    if not isinstance(options, dict) or not isinstance(data, dict) or not isinstance(lines, list):
        return None
    return Record(options, data, [x for x in lines if isinstance(x, dict)], _plot(folder))


def write_record(record: Record | None, target: Path) -> None:
    """Write what `read_record` reads, for the next card."""
    if record is None:
        return
    written = {"options": record.options, "data": record.data, "log": record.lines}
    write_json(target / TRAINING, written)
    if record.plot is not None:
        shutil.copyfile(record.plot, target / PLOT)


def _plot(folder: Path) -> Path | None:
    return folder / PLOT if (folder / PLOT).is_file() else None


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
    for line in text.split("\n"):  # and not at U+2028, which may stand within a text
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
    """The losses in a sentence or two."""
    losses = [line for line in lines if _has_number(line, LOSS)]
    tested = [line for line in lines if _has_number(line, VALIDATION)]
    said = []
    if losses:
        first, last, steps = losses[0][LOSS], losses[-1][LOSS], losses[-1].get("step")
        said.append(f"The loss was {first:.3f} at first and {last:.3f} after {steps} steps.")
    if tested:
        best = min(tested, key=lambda line: float(line[VALIDATION]))
        lowest = f"The validation loss was lowest, {best[VALIDATION]:.3f},"
        said.append(f"{lowest} after step {best.get('step')}.")
    return " ".join(said)


def _has_number(line: Mapping[str, Any], name: str) -> bool:
    return is_number(line.get(name))
