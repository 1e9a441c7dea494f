"""OpenAI's penalties of tokens that an answer already has."""

from __future__ import annotations

import mlx.core as mx


class Penalties:
    """Makes tokens of the answer less likely: a `logits_processor` for one answer.

    Unlike the repetition penalty, these leave the prompt alone, and are subtracted.

    Args:
        frequency: taken from a token's logit for every time it was said.
        presence: taken from it once, if it was said at all.
    """

    def __init__(self, frequency: float, presence: float):
        self._frequency = frequency
        self._presence = presence
        self._prompt: int | None = None  # tokens of it, known from the first call

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._prompt is None:
            self._prompt = len(tokens)
        said = tokens[self._prompt :]
        counts = mx.zeros(logits.shape[-1]).at[said].add(1.0)
        penalty = self._frequency * counts + self._presence * (counts > 0)
        return logits - penalty.astype(logits.dtype)
