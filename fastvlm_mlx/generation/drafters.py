"""Drafts of the next tokens: from prompt look-up, or from a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from .decode import prefill
from .options import Options

MAX_NGRAM_SIZE = 3


class Drafter:
    """Proposes the next tokens of an answer.

    Attributes:
        num_draft_tokens: the most tokens proposed at a time.
        drafted, accepted: tokens proposed so far, and those that the model agreed with.

    Raises:
        ValueError: `num_draft_tokens` is not a whole number from 1.
    """

    def __init__(self, num_draft_tokens: int):
        check_whole_number("num_draft_tokens", num_draft_tokens)
        self.num_draft_tokens = num_draft_tokens
        self.drafted = 0
        self.accepted = 0

    def propose(self, answer: list[int], count: int) -> mx.array:
        """A draft of what follows.

        Args:
            answer: the tokens so far, at least one; it begins with those of the previous call.
            count: the most tokens to propose, from 0.

        Returns:
            [k] token ids, k ≤ count, perhaps not computed yet.
        """
        raise NotImplementedError


class PromptLookup(Drafter):
    """Proposes what followed the last tokens at their previous occurrence in prompt or answer.

    The longest run of last tokens that occurred before is looked up at its latest occurrence
    (prompt lookup decoding, Saxena 2023, which takes the first one). The copy may run into itself,
    so a short loop is continued at any length.

    Args:
        input_ids: the whole prompt; visual tokens are negative and match nothing.
        num_draft_tokens: the most tokens to propose (`prompt_lookup_num_tokens` in transformers).
        max_ngram_size: the longest run to look up (`max_matching_ngram_size` there).
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        num_draft_tokens: int,
        max_ngram_size: int = MAX_NGRAM_SIZE,
    ):
        super().__init__(num_draft_tokens)
        self.max_ngram_size = max_ngram_size
        self._prompt_tokens = len(input_ids)
        self._tokens: list[int] = []
        self._next: dict[
            tuple[int, ...], int
        ] = {}  # n-gram → the position after its latest occurrence
        self._add(input_ids)

    def propose(self, answer: list[int], count: int) -> mx.array:
        self._add(answer[len(self._tokens) - self._prompt_tokens :])
        places = (self._next[ngram] for ngram in self._last_ngrams() if ngram in self._next)
        return mx.array(self._copy(next(places, len(self._tokens)), count), mx.uint32)

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._next.update(dict.fromkeys(self._last_ngrams(), len(self._tokens)))
            self._tokens.append(token)

    def _last_ngrams(self) -> Iterator[tuple[int, ...]]:
        """The last tokens, longest run first."""
        last = tuple(self._tokens[-self.max_ngram_size :])
        runs = (last[start:] for start in range(len(last)))
        return (run for run in runs if min(run) >= 0)

    def _copy(self, start: int, count: int) -> list[int]:
        """The tokens from a position on, as far as they are text."""
        end = len(self._tokens)
        copied: list[int] = []
        for place in range(start, start + count if start < end else start):
            token = self._tokens[place] if place < end else copied[place - end]
            if token < 0:
                break
            copied.append(token)
        return copied


class DraftModel(Drafter):
    """Proposes what a smaller model would say, which sees the same images through its own encoder.

    Args:
        model: the smaller model.
        embed: gives the embeddings [1, T, hidden_size] of the prompt, by the smaller model; called
            with the first draft.
        num_draft_tokens: the most tokens to propose.
        vocab_size: only ids below are proposed; the models' tables may differ in padding.
        prefill_step_size: prompt tokens processed at a time.
    """

    def __init__(
        self,
        model: FastVLM,
        embed: Callable[[], mx.array],
        num_draft_tokens: int,
        vocab_size: int,
        prefill_step_size: int = Options.prefill_step_size,
    ):
        super().__init__(num_draft_tokens)
        self._decoder = model.language_model
        self._vocab_size = vocab_size
        self._cache = model.make_kv_cache()
        self._embed = embed
        self._prefill_step_size = prefill_step_size
        self._prompt_tokens = 0

    def _read_prompt(self) -> None:
        embeddings = self._embed()
        self._prompt_tokens = embeddings.shape[1]
        prefill(self._decoder, embeddings, self._cache, self._prefill_step_size)
        mx.eval([layer.state for layer in self._cache])

    def propose(self, answer: list[int], count: int) -> mx.array:
        if not self._prompt_tokens:
            self._read_prompt()
        held = self._cache[0].offset - self._prompt_tokens
        kept = min(held, len(answer) - 1)  # of the previous draft, what the model agreed with
        trim(self._cache, held - kept)
        tokens = mx.array(answer[kept:], mx.uint32)
        draft = [mx.array([], mx.uint32)]
        for _ in range(count):
            tokens = mx.minimum(tokens, self._decoder.config.vocab_size - 1)
            hidden_states = self._decoder.hidden_states(tokens[None], self._cache)
            logits = self._decoder.logits(hidden_states[:, -1])
            tokens = mx.argmax(logits[:, : self._vocab_size], axis=-1)
            mx.async_eval(tokens)
            draft.append(tokens)
        return mx.concatenate(draft)


def trim(cache: Sequence[Any], count: int) -> None:
    """Drop the last tokens from every layer."""
    for layer_cache in cache:
        layer_cache.trim(count)
