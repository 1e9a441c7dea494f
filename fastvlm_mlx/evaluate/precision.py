"""The cost of a precision: size and error of quantized models against their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.files import Weights
from ..checkpoint.load import load_model, load_processor
from ..checkpoint.quantize import Quantize, quantize_checkpoint
from ..checkpoint.read import read_checkpoint
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .items import Items, read_items
from .metrics import check_metrics, figures_of
from .results import score_records
from .run import answer_items
from .samples import SAMPLES, relative_error, sample_outputs, token_agreement
from .statistics import Interval

QUESTION_TOKENS = 64
# Settings that a report compares when none are given.
COMPARED: dict[str, Quantize] = {
    "8 bits, all": {"bits": 8, "vision": 8},
    "8 bits": 8,
    "6 bits": 6,
    "5 bits": 5,
    "4 bits, encoder 8": {"bits": 4, "vision": 8},
    "4 bits": 4,
    "mixed 4/6": "mixed-4-6",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "3 bits": 3,
    "mixed 3/6": "mixed-3-6",
    "2 bits": 2,
}


@dataclass
class Row:
    """One precision.

    Attributes:
        name: of the setting.
        size: bytes of the weights on disk.
        bits_per_weight: of all weights, scales counted.
        feature_error: root mean square of the visual tokens' difference from the source's, over
            the source's standard deviation.
        logit_error: the same for the logits of the first answer token.
        agreement: share of the source's greedy answer tokens that are the same, place by place.
        accuracy: by task, if questions were given: the metric's figure with its interval.
    """

    name: str
    size: int
    bits_per_weight: float
    feature_error: float = 0.0
    logit_error: float = 0.0
    agreement: float = 1.0
    accuracy: dict[str, Interval] = field(default_factory=dict)


def precision_report(
    source: str | Path | None,
    compared: dict[str, Quantize] | None = None,
    *,
    folders: Mapping[str, Path] | None = None,
    images: Sequence[Any] = SAMPLES,
    questions: Path | None = None,
    metric: str = "exact",
    revision: str | None = None,
) -> Iterator[Row]:
    """Compare a model with itself at other precisions.

    Args:
        source: a full-precision folder or Hub id.
        compared: settings by name; a wide choice by default.
        folders: more quantized models by name, as `convert` writes them.
        images: on which features, logits and answers are compared.
        questions: a .jsonl file of questions; see `read_items`.
        metric: by which their answers are scored.
        revision: branch, tag or commit on the Hub.

    Yields:
        The source's row, then one per setting, then one per folder.

    Raises:
        ValueError: the source is quantized already, a setting is unknown, or answers can't be
            scored by the metric.
        CheckpointError, FileNotFoundError: as `load`.
    """
    folder = resolve(source, revision=revision)
    processor = load_processor(folder)
    asked = read_items(questions) if questions else []
    check_metrics(metric, {item.metric for item in asked})
    config, tensors = read_checkpoint(folder)
    if config.quantization:
        raise ValueError(f"{folder} is quantized already; report on its full-precision source.")
    count = sum(tensor.size for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    model = load_model(folder)
    exact = sample_outputs(model, processor, images)
    name = str(tensors["language_model.model.norm.weight"].dtype).removeprefix("mlx.core.")
    yield Row(name, size, 8 * size / count, accuracy=accuracy(model, processor, asked, metric))
    del model

    def row(name: str, packed: Weights, model: FastVLM) -> Row:
        size = sum(tensor.nbytes for tensor in packed.values())
        packed.clear()
        found = sample_outputs(model, processor, images)
        return Row(
            name,
            size,
            8 * size / count,
            relative_error(found.features, exact.features),
            relative_error(found.logits, exact.logits),
            token_agreement(found.tokens, exact.tokens),
            accuracy(model, processor, asked, metric),
        )

    for name, quantize in (COMPARED if compared is None else compared).items():
        packed, _, _ = quantize_checkpoint(tensors, config, quantize)
        yield row(name, packed, load_model(folder, quantize=quantize))
    for name, written in (folders or {}).items():
        _, packed = read_checkpoint(written)
        yield row(name, packed, load_model(written))


def accuracy(
    model: FastVLM, processor: Processor, items: Items, metric: str
) -> dict[str, Interval]:
    """The figure of a model's greedy answers, by task.

    Raises:
        ValueError: a question can't be asked; the message names it.
    """
    if not len(items):
        return {}
    records = answer_items(model, processor, items, max_tokens=QUESTION_TOKENS)
    result = score_records("questions", "model", metric, records)
    for id, error in result.failed.items():
        raise ValueError(f"Question {id} can't be asked: {error}.")
    main = next(iter(figures_of(metric)))
    return {row.task: row.figures[main] for row in result.rows[: len(result.tasks)]}
