"""A model's answers to a set of questions, scored, and the files that they are kept in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import reason
from ..generation.requests import batch_options
from ..generation.scheduler import MAX_BATCH
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .items import Items
from .log import digest
from .metrics import check_metrics
from .page import mistakes_page
from .results import Result, as_json, score_records
from .run import answer_items, recipe_of


def evaluate(
    model: FastVLM,
    processor: Processor,
    items: Items,
    metric: str = "exact",
    *,
    name: str = "questions",
    label: str = "model",
    log: str | os.PathLike[str] | None = None,
    published: Mapping[str, float] | None = None,
    max_batch: int = MAX_BATCH,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Ask a model questions and score its answers.

        items = read_items(Path("questions.jsonl"))
        result = evaluate(model, processor, items, "anls", max_tokens=32)
        print(result.rows[-1].figures["anls"])

    Args:
        model, processor: from `load`.
        items: from `read_items`, `PresetItems`, or a list.
        metric: by name; see `METRICS`.
        name, label: of the questions and the model, for reports.
        log: the file in which answers are kept, so that a run goes on where it was cut short.
        published: figures to stand beside the measured one, by size.
        max_batch: answers that are decoded together.
        progress: show a bar on stderr.
        **options: the fields of `Options` that batches take; greedy by default.

    Raises:
        ValueError: there is no such metric, those of items can't be averaged, an option is out of
            range, or the log belongs to other weights or options. An item that can't be asked is
            listed in the result instead.
        ImportError: the metric's library is not installed.
    """
    check_metrics(metric, {item.metric for item in items} if isinstance(items, list) else ())
    records = answer_items(
        model,
        processor,
        items,
        None if log is None else Path(log),
        max_batch=max_batch,
        progress=progress,
        **options,
    )
    return score_records(name, label, metric, records, published)


@dataclass(frozen=True)
class Files:
    """Where a run keeps its answers and its reports."""

    log: Path
    result: Path
    page: Path


def files_of(
    folder: Path, name: str, label: str, model: FastVLM, processor: Processor, **options: Any
) -> Files:
    """Files whose names tell the questions, the model and, by a hash, weights and options: a run
    with others starts anew beside them."""
    recipe = recipe_of(model, processor, batch_options(options))
    key = digest(json.dumps(recipe, sort_keys=True))[:8]
    stem = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in (name, label, key))
    return Files(*(folder / f"{stem}{suffix}" for suffix in (".jsonl", ".json", ".html")))


def write_reports(result: Result, items: Items, files: Files, *, page: bool = True) -> None:
    """Write the result as JSON and its mistakes as a page; what was there is replaced whole."""
    _write(files.result, json.dumps(as_json(result), indent=1))
    if page:
        _write(files.page, mistakes_page(result, items))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(file)
    except OSError as error:
        raise OSError(f"Cannot write {file}: {reason(error)}.") from None
    finally:
        part.unlink(missing_ok=True)
