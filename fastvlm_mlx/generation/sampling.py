"""Logits → tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .options import LogitsProcessor, Options

Sampler = Callable[[mx.array], mx.array]
MIN_TEMPERATURE = 1e-6  # below it float32 has no room for the quotients, and sampling is greedy
MIN_TOP_P = 1e-7  # below it float32 may round to 0, and no token would be left


def is_greedy(options: Options) -> bool:
    """Whether the likeliest token is always taken."""
    return options.temperature < MIN_TEMPERATURE


def make_sampler(options: Options) -> Sampler:
    """Logits [B, vocab_size] → tokens [B]; with a seed, each call draws with the next key of it."""
    if is_greedy(options):
        return lambda logits: mx.argmax(logits, axis=-1)
    key = None if options.seed is None else mx.random.key(options.seed)

    def sample(logits: mx.array) -> mx.array:
        nonlocal key
        logits = filter_logits(logits, options)
        if key is None:
            tokens = mx.random.categorical(logits)
            mx.async_eval(mx.random.state)
        else:
            key, drawn = mx.random.split(key)
            tokens = mx.random.categorical(logits, key=drawn)
            mx.async_eval(key)  # like the state above: another thread may draw next
        return tokens

    return sample


def filter_logits(logits: mx.array, options: Options) -> mx.array:
    """The logits to sample from, [B, vocab_size] in float32.

    Tokens that `top_p`, `min_p` and `top_k` rule out are -inf; the filters come before the
    temperature, as in mlx_lm, whose they are when `min_p` or `top_k` is set.
    """
    if options.top_k or options.min_p:
        return _filter_as_mlx_lm(logits, options)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    # From the maximum and in float32, so that no temperature is too low.
    logits = (logits - logits.max(axis=-1, keepdims=True)).astype(mx.float32)
    return logits / options.temperature


def _filter_as_mlx_lm(logits: mx.array, options: Options) -> mx.array:
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    logits = logits.astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if options.top_p < 1:
        logits = apply_top_p(logits, max(options.top_p, MIN_TOP_P))
    if options.min_p:
        logits = apply_min_p(logits, options.min_p)
    if 0 < options.top_k < logits.shape[-1]:
        logits = apply_top_k(logits, options.top_k)
    return logits * (1 / options.temperature)


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """-inf for all but the most likely tokens whose probabilities first reach `top_p`."""
    order = mx.argsort(-logits, axis=-1)
    ordered = mx.take_along_axis(logits, order, axis=-1).astype(mx.float32)
    probabilities = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = before < max(top_p, MIN_TOP_P)
    kept = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, kept, axis=-1)
    return mx.where(kept, logits, -mx.inf)


class Logprobs(NamedTuple):
    """The log probability of a token, and the likeliest (token, log probability) in its place."""

    logprob: float
    top: list[tuple[int, float]]


class LazyLogprobs(NamedTuple):
    """Log probabilities of tokens that are not yet read: [B], and of the likeliest [B, n] each."""

    chosen: mx.array
    tokens: mx.array
    top: mx.array

    def read(self, row: int = 0) -> Logprobs:
        """Those of one row."""
        logprob: Any = self.chosen[row].item()
        tokens: Any = self.tokens[row].tolist()
        top: Any = self.top[row].tolist()
        return Logprobs(logprob, list(zip(tokens, top, strict=True)))


def find_logprobs(logits: mx.array, chosen: mx.array, top: int) -> LazyLogprobs:
    """Log probabilities of `chosen` [B], and of the `top` likeliest, by logits [B, vocab_size]."""
    top = min(top, logits.shape[-1])
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = mx.argpartition(-logprobs, max(0, top - 1), axis=-1)[:, :top]
    values = mx.take_along_axis(logprobs, tokens, axis=-1)
    order = mx.argsort(-values, axis=-1)
    found = LazyLogprobs(
        mx.take_along_axis(logprobs, chosen[:, None], axis=-1)[:, 0],
        mx.take_along_axis(tokens, order, axis=-1),
        mx.take_along_axis(values, order, axis=-1),
    )
    mx.async_eval(*found)  # nothing is left for another thread
    return found


class Penalties:
    """Makes tokens less likely that an answer already has: a `logits_processor` for one answer.

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


def make_logits_processor(options: Options) -> LogitsProcessor | None:
    """The penalties and the caller's own processor, in the order of `Options`; None for none.

    It belongs to one answer: its first call is with the prompt, and each has what was said since.
    """
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty not in (None, 1.0):
        from mlx_lm.sample_utils import make_logits_processors

        processors += make_logits_processors(repetition_penalty=options.repetition_penalty)
    if options.frequency_penalty or options.presence_penalty:
        processors.append(Penalties(options.frequency_penalty, options.presence_penalty))
    if options.logits_processor is not None:
        processors.append(options.logits_processor)
    if not processors:
        return None

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        logits = logits[:]  # processors may write into theirs
        for processor in processors:
            processed = processor(tokens, logits)
            if not isinstance(processed, mx.array) or processed.shape != logits.shape:
                found = getattr(processed, "shape", type(processed).__name__)
                raise ValueError(
                    f"logits_processor must return logits of shape {logits.shape}, found {found}."
                )
            logits = processed
        return logits

    return process
