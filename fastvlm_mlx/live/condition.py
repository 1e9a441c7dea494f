"""A question that is answered by yes or no, and when the answer turns."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..generation.generate import generate
from ..generation.prompt_cache import PromptCache
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.tokenizer import Tokenizer

ASKED = "{question} Answer yes or no."
# Probabilities at which the answer turns; between them it stays what it was.
TURNS_YES, TURNS_NO = 0.6, 0.4


class YesNo:
    """How likely a model is to answer yes rather than no, from the logits of one token.

    Args:
        model, processor: from `load`.
        question: one that yes or no answers.

    Raises:
        ValueError: the model's tokens don't tell yes from no.
    """

    def __init__(self, model: FastVLM, processor: Processor, question: str):
        self.model, self.processor = model, processor
        self.prompt = ASKED.format(question=question.strip())
        yes, no = (_first_tokens(processor.tokenizer, word) for word in ("yes", "no"))
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise ValueError("This model's tokens don't tell yes from no, which a condition needs.")

    def probability(
        self, image: Any, *, prompt_cache: PromptCache | None = None, **options: Any
    ) -> float:
        """The probability of yes, of all that is yes or no.

        Args:
            image: what is asked about.
            prompt_cache: as `generate` takes it.
            **options: of reading an image and a prompt.
        """
        seen: list[mx.array] = []

        def keep(tokens: mx.array, logits: mx.array) -> mx.array:
            seen.append(logits)
            return logits

        generate(
            self.model,
            self.processor,
            self.prompt,
            image=image,
            prompt_cache=prompt_cache,
            **options | {"max_tokens": 1, "logits_processor": keep},
        )
        logits = seen[0].astype(mx.float32)
        yes, no = (self._logit(logits, ids) for ids in (self.yes, self.no))
        return float(mx.sigmoid(yes - no))

    @staticmethod
    def _logit(logits: mx.array, ids: list[int]) -> mx.array:
        return mx.logsumexp(logits[0, mx.array(ids)])


def _first_tokens(tokenizer: Tokenizer, word: str) -> set[int]:
    """The first tokens of all the ways in which an answer may begin with a word."""
    cases = (word, word.capitalize(), word.upper())
    return {tokenizer.encode(before + text)[0] for text in cases for before in ("", " ")}


class Hysteresis:
    """An answer that turns only where it is clear, so that it does not flicker."""

    def __init__(self) -> None:
        self.yes = False

    def turns(self, probability: float) -> bool:
        """Whether the answer, at first no, turns with the next probability of yes."""
        before = self.yes
        self.yes = probability > (TURNS_NO if before else TURNS_YES)
        return self.yes != before
