"""Metrics by name: what an answer is worth, and the figures of many answers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ...checks import shown
from .captions import corpus_bleu, score_bleu, score_cider
from .choices import score_choice
from .open_ended import open_ended
from .score import Score, mean_score
from .text import (
    anls,
    caseless,
    contains,
    exact,
    formula,
    score_cer,
    score_relaxed,
    score_yes_no,
)
from .vqa import textvqa, vqa

Texts: TypeAlias = Sequence[str]
# Answers, the references of each, the choices of each → their scores
ScoreAll: TypeAlias = Callable[[Texts, Sequence[Texts], Sequence[Texts]], list[Score]]
# A figure from the sums of scores' parts
Figure: TypeAlias = Callable[[Sequence[float]], float]


def ratio(parts: Sequence[float], place: int = 0) -> float:
    """One sum over the second: a mean, or a rate."""
    return parts[place] / parts[1] if parts[1] else 0.0


def _f1(parts: Sequence[float]) -> float:
    _, _, true_positives, false_positives, positives = parts
    said = true_positives + false_positives + positives
    return 2 * true_positives / said if said else 0.0


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        help: a sentence.
        score: of all answers; some metrics look at them together.
        figures: by name, from sums of parts; the first one is the metric's.
        percent: figures are shares.
        lower_is_better: figures count faults.
    """

    help: str
    score: ScoreAll
    figures: Mapping[str, Figure] = field(default_factory=dict)
    percent: bool = True
    lower_is_better: bool = False

    @property
    def is_share(self) -> bool:
        """Whether values are shares of what is right, as a mean over metrics needs them."""
        return self.percent and not self.lower_is_better

    def is_mistake(self, score: Score) -> bool:
        """Whether an answer is not fully right; captions never are, and are not called so."""
        if not self.percent:
            return False
        return score.value > 0 if self.lower_is_better else score.value < 1


def _each(score: Callable[[str, Texts], float]) -> ScoreAll:
    return lambda answers, references, _: [
        mean_score(score(answer, texts)) for answer, texts in zip(answers, references, strict=True)
    ]


def _scored(score: Callable[[str, Texts], Score]) -> ScoreAll:
    return lambda answers, references, _: list(map(score, answers, references))


METRICS: dict[str, Metric] = {
    "exact": Metric("Equal to a reference, to the letter.", _each(exact)),
    "caseless": Metric("Equal but for case and punctuation, as GQA counts.", _each(caseless)),
    "vqa": Metric("VQA accuracy: agreement with ten people.", _each(vqa)),
    "textvqa": Metric("VQA accuracy with TextVQA's own tokens.", _each(textvqa)),
    "anls": Metric("1 − edits / length, from one half on: DocVQA, InfoVQA.", _each(anls)),
    "relaxed": Metric(
        "Numbers within 5 % of the reference: ChartQA.",
        _scored(score_relaxed),
        {"relaxed": ratio, "strict years": lambda parts: ratio(parts, 2)},
    ),
    "mcq": Metric("The right choice, by letter or text.", lambda *a: list(map(score_choice, *a))),
    "open": Metric("MMMU's rule for open questions.", _each(open_ended)),
    "yesno": Metric(
        "Yes or no, as a word of its own: POPE.",
        _scored(score_yes_no),
        {"yesno": ratio, "F1 of yes": _f1},
    ),
    "contains": Metric("A reference stands in the answer: OCRBench.", _each(contains)),
    "formula": Metric("As contains, without spaces, with case.", _each(formula)),
    "cer": Metric(
        "Character error rate: edits per character.",
        _scored(score_cer),
        {"cer": ratio},
        lower_is_better=True,
    ),
    "bleu": Metric(
        "BLEU by sacrebleu, 0 to 100.",
        lambda answers, references, _: score_bleu(answers, references),
        {"bleu": corpus_bleu},
        percent=False,
    ),
    "cider": Metric(
        "CIDEr-D of captions, 0 to 10; two images or more.",
        lambda answers, references, _: score_cider(answers, references),
        percent=False,
    ),
}


def find_metric(name: str) -> Metric:
    """The metric of a name; ValueError, with all names, if there is none."""
    if name not in METRICS:
        raise ValueError(f"There is no metric {shown(name)}; there are {', '.join(METRICS)}.")
    return METRICS[name]


def check_metrics(metric: str, own: Iterable[str | None] = ()) -> None:
    """Find out before anything is asked whether answers can be scored.

    Args:
        metric: of all questions but those that name their own.
        own: metrics that questions name.

    Raises:
        ValueError: there is no such metric, or the values of two can't be averaged.
        ImportError: the library that one needs is not installed.
    """
    others = dict.fromkeys(name for name in own if name not in (None, metric))
    for name in (metric, *filter(None, others)):
        score_answers(name, ["a", "b"], [["a"], ["b"]])
        means = METRICS[metric].is_share and not METRICS[metric].figures
        if name != metric and not (means and METRICS[name].is_share):
            raise ValueError(
                f"Questions whose own metric is {name} can't be counted among those of {metric}; "
                "put them in a file of their own."
            )


def score_answers(
    name: str,
    answers: Texts,
    references: Sequence[Texts],
    choices: Sequence[Texts] | None = None,
) -> list[Score]:
    """The score of each answer.

    Args:
        name: of the metric.
        answers: what the model said.
        references: of each answer, of which the best one counts.
        choices: of each answer, for multiple choice.

    Raises:
        ValueError: there is no such metric, or too few answers for it.
        ImportError: the library that it needs is not installed.
    """
    return find_metric(name).score(answers, references, choices or [()] * len(answers))


def figures(name: str, scores: Sequence[Score]) -> dict[str, float]:
    """The figures of many scores, the metric's own first; none without scores."""
    if not scores:
        return {}
    sums = [sum(column) for column in zip(*(score.parts for score in scores), strict=True)]
    return {label: figure(sums) for label, figure in figures_of(name).items()}


def figures_of(name: str) -> Mapping[str, Figure]:
    """How the figures of a metric are computed from sums; a mean where nothing else is said."""
    return find_metric(name).figures or {name: ratio}
