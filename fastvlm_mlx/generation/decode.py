"""Embeddings → tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..model.fastvlm import FastVLM
from ..model.qwen2 import Qwen2
from ..ops import takes_quantized_caches, wired
from .constrain import Constraint, mask_logits
from .options import LogitsProcessor, Options
from .sampling import (
    LazyLogprobs,
    Logprobs,
    Sampler,
    find_logprobs,
    make_logits_processor,
    make_sampler,
)


def make_kv_cache(model: FastVLM, options: Options) -> list[Any]:
    """An empty KV cache per layer, of the kind that the options ask for."""
    if options.max_kv_size is not None:
        from mlx_lm.models.cache import RotatingKVCache

        return [RotatingKVCache(max_size=options.max_kv_size, keep=4) for _ in model.layers]
    if options.kv_bits is not None:
        from mlx_lm.models.cache import QuantizedKVCache

        D = model.config.text.head_dim
        group_size = next((size for size in (64, 32) if D % size == 0), None)
        if group_size is None:
            raise ValueError(f"kv_bits needs heads in multiples of 32, and the model's are {D}.")
        if not takes_quantized_caches():
            raise ValueError("kv_bits does not work with MLX on CUDA; use max_kv_size instead.")
        return [QuantizedKVCache(group_size, options.kv_bits) for _ in model.layers]
    return model.make_kv_cache()


def prefill(decoder: Qwen2, embeddings: mx.array, cache: list[Any], step: int) -> mx.array:
    """Run the decoder over a prompt; the hidden states [B, t, hidden_size] of its last step.

    Args:
        decoder: the model's.
        embeddings: [B, T, hidden_size] of what the cache does not hold.
        cache: updated in place.
        step: positions processed at a time.
    """
    while embeddings.shape[1] > step:
        decoder.hidden_states(None, cache, embeddings[:, :step])
        mx.eval([layer.state for layer in cache])
        embeddings = embeddings[:, step:]
    return decoder.hidden_states(None, cache, embeddings)


def hidden_states_at(
    model: FastVLM, places: Sequence[int], embeddings: mx.array, caches: list[Any], step: int
) -> mx.array:
    """Prefill of several sequences; [B, hidden_size] at one place of each.

    Args:
        places: of what is given here of each sequence.
        embeddings: [B, T, hidden_size] of what the caches don't hold, padded at the end.
        caches: updated in place.
        step: tokens to process at a time.
    """
    B, T, _ = embeddings.shape
    index = mx.array(list(places))[:, None, None]
    found = mx.zeros((B, 1, embeddings.shape[2]), embeddings.dtype)
    columns = max(1, step // B)
    for start in range(0, T, columns):
        chunk = embeddings[:, start : start + columns]
        hidden_states = model.language_model.hidden_states(None, caches, chunk)
        at = mx.clip(index - start, 0, chunk.shape[1] - 1)
        reached = mx.take_along_axis(hidden_states, at, axis=1)
        found = mx.where(index >= start, reached, found)
        if start + columns < T:
            mx.eval(found, [cache.state for cache in caches])
    return found[:, 0]


@wired
def generate_tokens(
    model: FastVLM,
    input_ids: Sequence[int],
    embeddings: mx.array,
    cache: list[Any],
    options: Options,
    limit: int,
    sampler: Sampler | None = None,
    process: LogitsProcessor | None = None,
    constraint: Constraint | None = None,
    logprobs: deque[Logprobs] | None = None,
) -> Iterator[int]:
    """Prefill, then one token after the other, each computed while the previous one is read.

    Args:
        input_ids: the whole prompt.
        embeddings: [1, T, hidden_size] of the part that the cache does not hold.
        cache: updated in place.
        options: see `Options`.
        limit: the most tokens to generate.
        sampler, process: what chooses tokens, and what changes the logits before; without a
            sampler, both are made from the options.
        constraint: rules tokens out; it has accepted each token that is yielded.
        logprobs: to append those of each token to, before the token comes.
    """
    if sampler is None:
        sampler, process = make_sampler(options), make_logits_processor(options)
    seen = mx.array([i for i in input_ids if i >= 0])
    found: deque[LazyLogprobs] = deque()
    decoder = model.language_model

    def next_token(logits: mx.array, previous: mx.array | None = None) -> mx.array:
        nonlocal seen
        processed = logits if process is None else process(seen, logits)
        if constraint is not None:
            mx.async_eval(processed)  # while the grammar works
            if previous is not None:
                constraint.accept(int(previous))
            processed = mask_logits(processed, constraint.mask)
        token = sampler(processed)
        if logprobs is not None:
            found.append(find_logprobs(logits, token, options.logprobs or 0))
        if process is not None:
            seen = mx.concatenate([seen, token])
        mx.async_eval(token, seen)  # nothing is left for another thread that may go on
        return token

    def step(token: mx.array) -> mx.array:
        return decoder.logits(decoder.hidden_states(token[None], cache)[:, -1])

    hidden_states = prefill(decoder, embeddings, cache, options.prefill_step_size)
    logits = decoder.logits(hidden_states[:, -1])
    is_finite = mx.isfinite(logits).all()
    mx.async_eval(is_finite)  # before the next token, so that reading it won't wait for that one
    token = next_token(logits)
    if constraint is not None:  # it would stumble over the token that NaN give
        check_finite(model, is_finite, logits.dtype)
    for i in range(1, limit + 1):
        following = next_token(step(token), token) if i < limit else token
        if i == 1:
            check_finite(model, is_finite, logits.dtype)
        if constraint is not None and i == limit:
            constraint.accept(int(token))
        if logprobs is not None:
            logprobs.append(found.popleft().read())
        yield int(token)
        token = following


def check_finite(model: FastVLM, is_finite: mx.array, dtype: mx.Dtype) -> None:
    """ValueError that says where it comes from if logits, of this dtype, are not finite."""
    if is_finite:
        return
    parameters = dict(tree_flatten(model.parameters()))
    broken = [
        name
        for name, value in parameters.items()
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all()
    ]
    if broken:
        more = f" and {len(broken) - 1} more tensors hold" if len(broken) > 1 else " holds"
        raise ValueError(
            f"The model can't answer: {broken[0]}{more} NaN or infinite values; download or "
            "convert the checkpoint again."
        )
    raise ValueError(
        f'The model can\'t answer: its logits overflow in {dtype}; load it with dtype="float32".'
    )
