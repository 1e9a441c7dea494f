"""Records → figures with intervals, by task; what two runs have in common and how they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checks import brief
from .metrics import (
    METRICS,
    Score,
    check_metrics,
    figures_of,
    mean_score,
    score_answers,
)
from .metrics.captions import check_images
from .run import Record
from .statistics import Difference, Interval, difference, interval, percentiles

VERSION = 1
ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class Scored:
    """An answered record and its score."""

    record: Record
    score: Score

    @property
    def text(self) -> str:
        """What the model said."""
        return self.record.answer.text.strip() if self.record.answer else ""

    @property
    def is_cut_off(self) -> bool:
        """Whether the answer ended by its length."""
        return self.record.answer is not None and self.record.answer.finish_reason == "length"


@dataclass(frozen=True)
class Row:
    """The figures of a task.

    Attributes:
        count: of answers.
        figures: by name, the metric's own first.
        unparsed: answers from which no choice, yes or no could be taken; they count as wrong.
        cut_off: answers that ended by their length.
    """

    task: str
    count: int
    figures: Mapping[str, Interval]
    unparsed: int
    cut_off: int


@dataclass
class Result:
    """One model's answers to one set of items.

    Attributes:
        name: of the items.
        model: that answered.
        metric: by name.
        scored: the items that have an answer.
        failed: why each of the others has none.
        published: figures that the model's makers published, by size.
    """

    name: str
    model: str
    metric: str
    scored: list[Scored]
    failed: dict[str, str] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks that the items name."""
        return list(dict.fromkeys(each.record.task for each in self.scored))

    @cached_property
    def rows(self) -> list[Row]:
        """A row per task, and one of all answers if there are several tasks."""
        tasks = self.tasks
        rows = [
            self._row(task, [each for each in self.scored if each.record.task == task])
            for task in tasks
        ]
        return rows if len(tasks) <= 1 else [*rows, self._row(ALL_TASKS, self.scored)]

    def _row(self, task: str, scored: Sequence[Scored]) -> Row:
        scores = [each.score for each in scored]
        groups = [each.record.group for each in scored]
        return Row(
            task,
            len(scored),
            {
                name: interval(figure, scores, groups)
                for name, figure in figures_of(self.metric).items()
            },
            sum(score.unparsed for score in scores),
            sum(each.is_cut_off for each in scored),
        )

    def mistakes(self) -> list[Scored]:
        """The answers that are not fully right; of captions the worst ones come first."""
        metric = METRICS[self.metric]
        if metric.percent:
            return [each for each in self.scored if metric.is_mistake(each.score)]
        return sorted(self.scored, key=lambda each: each.score.value)

    def ttft(self) -> dict[str, float]:
        """Median and 95th percentile of the seconds to the first token, of answers for which
        images were encoded."""
        answers = [each.record.answer for each in self.scored if each.record.answer]
        times = [answer.ttft for answer in answers if answer.encoded]
        return dict(zip(("p50", "p95"), percentiles(times, 0.5, 0.95), strict=False))


def score_records(
    name: str,
    model: str,
    metric: str,
    records: Sequence[Record],
    published: Mapping[str, float] | None = None,
) -> Result:
    """Score the answers of a run.

    Args:
        name, model: for the report.
        metric: of all items but those that name their own; the value of such an item is one of many
            in the mean.
        records: from `answer_items`.
        published: figures to stand beside the measured one.

    Raises:
        ValueError: as `check_metrics`, or there are too few images for the metric.
        ImportError: the metric's library is not installed.
    """
    check_metrics(metric, (record.metric for record in records))
    answered = [record for record in records if record.answer is not None]
    scores: dict[str, Score] = {}
    for used in dict.fromkeys(record.metric or metric for record in answered):
        alike = [record for record in answered if (record.metric or metric) == used]
        for record, score in zip(alike, _scores(used, alike), strict=True):
            scores[record.id] = score if used == metric else _as_mean(score)
    failed = {record.id: record.error for record in records if record.error is not None}
    scored = [Scored(record, scores[record.id]) for record in answered]
    return Result(name, model, metric, scored, failed, published or {})


def _scores(metric: str, records: Sequence[Record]) -> list[Score]:
    if metric == "cider":
        check_images(len({record.group for record in records}))
    answers = [record.answer.text.strip() if record.answer else "" for record in records]
    references = [record.references for record in records]
    return score_answers(metric, answers, references, [record.choices for record in records])


def _as_mean(score: Score) -> Score:
    return mean_score(score.value, score.parsed, unparsed=score.unparsed)


def compare(first: Result, second: Result) -> dict[str, Difference]:
    """How the second run's figures differ from the first's, on the items that both answered.

    Raises:
        ValueError: they have no item in common, or other metrics.
    """
    if first.metric != second.metric:
        raise ValueError(f"{first.metric} and {second.metric} can't be compared.")
    theirs = {each.record.id: each.score for each in second.scored}
    both = [each for each in first.scored if each.record.id in theirs]
    if not both:
        raise ValueError(f"{first.model} and {second.model} answered no question in common.")
    scores = [each.score for each in both], [theirs[each.record.id] for each in both]
    groups = [each.record.group for each in both]
    return {
        name: difference(figure, *scores, groups)
        for name, figure in figures_of(first.metric).items()
    }


def as_json(result: Result) -> dict[str, Any]:
    """Everything of a result that JSON can hold, each item among it."""
    return {
        "fastvlm_eval_result": VERSION,
        "name": result.name,
        "model": result.model,
        "metric": result.metric,
        "tasks": [asdict(row) for row in result.rows],
        "time_to_first_token": result.ttft(),
        "published": dict(result.published),
        "failed": result.failed,
        "items": [_item_json(each) for each in result.scored],
    }


def _item_json(scored: Scored) -> dict[str, Any]:
    record, score = scored.record, scored.score
    return {
        "id": record.id,
        "task": record.task,
        "prompt": record.prompt,
        "references": list(record.references),
        "answer": scored.text,
        "value": score.value,
        "parsed": score.parsed,
        "unparsed": score.unparsed,
        "cut_off": scored.is_cut_off,
    }


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results in a folder, by the items' name; files of another kind are passed over."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if result["fastvlm_eval_result"] == VERSION and result["tasks"]:  # something answered
                found.setdefault(brief(result["name"]), []).append(result)
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return found
