"""Beam search: several answers are followed at once and the likeliest one wins."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache
from ..ops import wired
from .decode import prefill
from .options import Options


class Beam(NamedTuple):
    """An answer so far and the sum of its tokens' log-probabilities."""

    tokens: tuple[int, ...]
    logprob: float

    def score(self, length_penalty: float) -> float:
        """Log-probability over the length to the power of `length_penalty`."""
        return self.logprob / len(self.tokens) ** length_penalty

    def bound(self, length_penalty: float, max_tokens: int) -> float:
        """The best score that any continuation can have."""
        lengths = (len(self.tokens) + 1, max_tokens)
        return max(self.logprob / length**length_penalty for length in lengths)


@wired
def search_tokens(
    model: FastVLM,
    embeddings: mx.array,
    eos_token_ids: Collection[int],
    options: Options,
    limit: int,
) -> Iterator[int]:
    """As `decode.generate_tokens`, but the tokens of the likeliest answer, all at once."""
    yield from beam_search(
        model,
        embeddings,
        eos_token_ids,
        num_beams=options.num_beams,
        max_tokens=limit,
        prefill_step_size=options.prefill_step_size,
    )


def beam_search(
    model: FastVLM,
    embeddings: mx.array,
    eos_token_ids: Collection[int],
    *,
    num_beams: int,
    max_tokens: int = Options.max_tokens,
    length_penalty: float = 1.0,
    prefill_step_size: int = Options.prefill_step_size,
) -> list[int]:
    """The best answer among those that a beam of this width finds.

    The search goes on until no open answer can beat the best finished one, so a beam as wide as
    the vocabulary's tree finds the likeliest answer of all.

    Args:
        model: the model.
        embeddings: [1, T, hidden_size] of the prompt.
        eos_token_ids: tokens that end an answer.
        num_beams: answers followed at once.
        max_tokens: the most tokens of an answer, its end included.
        length_penalty: exponent of the length that scores are divided by, as in transformers.
        prefill_step_size: prompt tokens processed at a time.

    Returns:
        Token ids, with the end-of-sequence token if it came.

    Raises:
        ValueError: `num_beams` or `max_tokens` is not a whole number from 1.
    """
    check_whole_number("num_beams", num_beams)
    check_whole_number("max_tokens", max_tokens)
    cache = model.make_kv_cache()
    decoder = model.language_model
    hidden_states = prefill(decoder, embeddings, cache, prefill_step_size)
    logits = decoder.logits(hidden_states[:, -1])
    beams: list[Beam] = [Beam((), 0.0)]
    finished: list[Beam] = []
    for step in range(1, max_tokens + 1):
        candidates = expand(beams, logits, 2 * num_beams)
        # As in transformers, an ending counts if it is among the num_beams likeliest steps.
        finished += [beam for _, beam in candidates[:num_beams] if beam.tokens[-1] in eos_token_ids]
        alive = [c for c in candidates if c[1].tokens[-1] not in eos_token_ids][:num_beams]
        beams = [beam for _, beam in alive]
        if step == max_tokens:
            finished += beams
            break
        best = max((beam.score(length_penalty) for beam in finished), default=-math.inf)
        if all(best >= beam.bound(length_penalty, max_tokens) for beam in beams):
            break
        select(cache, [parent for parent, _ in alive])
        tokens = mx.array([[beam.tokens[-1]] for beam in beams])
        logits = decoder.logits(decoder.hidden_states(tokens, cache)[:, -1])
    return list(max(finished, key=lambda beam: beam.score(length_penalty)).tokens)


def expand(beams: list[Beam], logits: mx.array, count: int) -> list[tuple[int, Beam]]:
    """The `count` likeliest continuations by one token, each with the index of its beam."""
    vocab_size = logits.shape[-1]
    logits = logits.astype(mx.float32)
    so_far = mx.array([beam.logprob for beam in beams])[:, None]
    logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) + so_far).flatten()
    count = min(count, logprobs.size)
    likeliest = mx.argpartition(-logprobs, count - 1)[:count]
    likeliest = likeliest[mx.argsort(-logprobs[likeliest])]
    expanded = []
    indices: Any = likeliest.tolist()
    values: Any = logprobs[likeliest].tolist()
    for index, logprob in zip(indices, values, strict=True):
        parent, token = divmod(index, vocab_size)
        expanded.append((parent, Beam((*beams[parent].tokens, token), logprob)))
    return expanded


def select(cache: list[KVCache], parents: list[int]) -> None:
    """Give each beam the keys and values of the beam it continues."""
    rows = mx.array(parents)
    for layer_cache in cache:
        keys, values, offset = layer_cache.state
        assert keys is not None and values is not None
        layer_cache.state = keys[rows], values[rows], offset
