"""Answers to held-out questions, and what they are worth, while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..evaluate.metrics.text import anls, cer, exact
from ..generation.generate import generate
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .parts import train_mode
from .rows import Question, Row

METRICS = {"exact": exact, "anls": anls, "cer": cer}
SHOWN = 3  # answers in the log


class Scored(NamedTuple):
    """What an evaluation by generation found.

    Attributes:
        scores: the mean of each metric.
        samples: some questions with the answers that were wanted and given.
    """

    scores: dict[str, float]
    samples: list[dict[str, str]]


def scorer(
    processor: Processor, rows: Sequence[Row], count: int, **options: Any
) -> Callable[[FastVLM], Scored] | None:
    """What answers the last question of each of `count` rows; None for no rows.

    Args:
        processor: the model's.
        rows: held out.
        count: of them, evenly spread.
        options: of `generate`.
    """
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    last = (list(row.questions())[-1:] for row in chosen)
    questions = [question for found in last for question in found]
    if not questions:
        return None

    def score(model: FastVLM) -> Scored:
        model.eval()
        try:
            return score_answers(model, processor, questions, **options)
        finally:
            train_mode(model)

    return score


def score_answers(
    model: FastVLM, processor: Processor, questions: Sequence[Question], **options: Any
) -> Scored:
    """The answers to questions, greedily decoded, and their scores."""
    given = [
        generate(model, processor, question.messages, image=question.images or None, **options)
        for question in questions
    ]
    pairs = [(answer, [q.answer]) for answer, q in zip(given, questions, strict=True)]
    scores = {
        name: sum(metric(answer, wanted) for answer, wanted in pairs) / len(pairs)
        for name, metric in METRICS.items()
    }
    samples = [
        {"question": _text_of(q.messages), "wanted": q.answer, "given": answer}
        for answer, q in zip(given[:SHOWN], questions, strict=False)
    ]
    return Scored(scores, samples)


def _text_of(messages: Sequence[dict[str, Any]]) -> str:
    """The text of the last message."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
