"""Metrics of captions, whose figures are computed over all images together: BLEU and CIDEr."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from .score import Score

ORDERS = 4  # n-grams of 1 to 4 words
SPREAD = 6.0  # of CIDEr-D's penalty for another length, in words
SCALE = 10.0
Ngram: TypeAlias = tuple[str, ...]
WORD = re.compile(r"\w+(?:['’]\w+)*")


def score_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """sacreBLEU's sentence score of each answer, and the counts that make the corpus's score.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    metric = _bleu(effective_order=True)
    scores = []
    for answer, texts in zip(answers, references, strict=True):
        found = metric.sentence_score(answer, list(texts))
        lengths = float(found.sys_len), float(found.ref_len)
        scores.append(
            Score(found.score, (*map(float, chain(found.counts, found.totals)), *lengths))
        )
    return scores


def corpus_bleu(parts: Sequence[float]) -> float:
    """BLEU, 0 to 100, from the sums of counts."""
    metric = _bleu(effective_order=False)
    counts, totals = parts[:ORDERS], parts[ORDERS : 2 * ORDERS]
    found = metric.compute_bleu(
        correct=list(counts),
        total=list(totals),
        sys_len=int(parts[-2]),
        ref_len=int(parts[-1]),
        smooth_method="exp",
    )
    return float(found.score)


def _bleu(*, effective_order: bool) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ImportError(
            "BLEU is scored by sacrebleu; install it with pip install 'fastvlm-mlx[eval]'."
        ) from None
    return BLEU(effective_order=effective_order)


def score_cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """CIDEr-D of each caption, 0 to 10, weighing n-grams by how few images' references have them.

    Words are lower case without punctuation; the COCO server's tokens come from a Java program and
    differ slightly ("don't" is two there).

    Raises:
        ValueError: there are fewer than two images, so that no n-gram tells them apart.
    """
    check_images(len(answers))
    known = [[_ngrams(text) for text in texts] for texts in references]
    images = Counter(ngram for texts in known for ngram in set(chain.from_iterable(texts)))
    rarity = {ngram: math.log(len(answers) / count) for ngram, count in images.items()}
    most = math.log(len(answers))  # of an n-gram that no reference has
    values = [
        sum(_alike(_ngrams(answer), text, rarity, most) for text in texts) / max(1, len(texts))
        for answer, texts in zip(answers, known, strict=True)
    ]
    return [Score(SCALE * value, (SCALE * value, 1.0)) for value in values]


def check_images(count: int) -> None:
    """ValueError if there are too few images for CIDEr."""
    if count < 2:
        raise ValueError(f"CIDEr compares images and needs two or more, not {count}.")


def _ngrams(text: str) -> Counter[Ngram]:
    words = WORD.findall(text.lower())
    return Counter(
        tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)
    )


def _alike(
    said: Counter[Ngram], wanted: Counter[Ngram], rarity: Mapping[Ngram, float], most: float
) -> float:
    """The cosine of two captions' weighted n-grams, averaged over their lengths; what is said more
    often than wanted counts only as often, and another length lowers the whole."""
    vectors = [
        [
            {n: count * rarity.get(n, most) for n, count in text.items() if len(n) == order}
            for text in (said, wanted)
        ]
        for order in range(1, ORDERS + 1)
    ]
    apart = _length(said) - _length(wanted)
    cosine = sum(_clipped_cosine(*pair) for pair in vectors) / ORDERS
    return cosine * math.exp(-(apart**2) / (2 * SPREAD**2))


def _clipped_cosine(said: Mapping[Ngram, float], wanted: Mapping[Ngram, float]) -> float:
    product = sum(
        min(weight, wanted.get(n, 0.0)) * wanted.get(n, 0.0) for n, weight in said.items()
    )
    norms = math.hypot(*said.values()) * math.hypot(*wanted.values())
    return product / norms if norms else 0.0


def _length(ngrams: Counter[Ngram]) -> int:
    """Pairs of words, as the original counts a length."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
