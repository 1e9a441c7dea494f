"""The loss of a batch: cross entropy of the supervised tokens, as a sum and a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.fastvlm import FastVLM
from ..model.qwen2 import Qwen2

AT_ONCE = 1024  # positions whose logits are held together: 600 MB with Qwen2's vocabulary
LEAST_POSITIONS = 16
Arrays = dict[str, Any]
"""What of a batch is computed on: arrays by name."""


def arrays_of(batch: Any) -> Arrays:
    """A batch as the compiled step takes it.

    Supervised positions are gathered here, where they are known, and padded to few different
    lengths, so that logits are computed for them only and few shapes are compiled.
    """
    weights = np.array(batch.weights).reshape(-1)
    positions = np.flatnonzero(weights)
    length = bucket(len(positions))
    padded = np.zeros((2, length), np.int32)
    padded[0, : len(positions)] = positions
    padded[1, : len(positions)] = np.array(batch.targets).reshape(-1)[positions]
    supervision = np.zeros(length, np.float32)
    supervision[: len(positions)] = weights[positions]
    arrays = {
        "input_ids": batch.input_ids,
        "places": batch.places,
        "positions": mx.array(padded[0]),
        "targets": mx.array(padded[1]),
        "weights": mx.array(supervision),
    }
    named = {name: getattr(batch, name, None) for name in ("pixel_values", "features", "segments")}
    return arrays | {name: value for name, value in named.items() if value is not None}


def bucket(count: int) -> int:
    """The next length of a few: of each power of two, it and one and a half of it."""
    length = LEAST_POSITIONS
    while length < count:
        length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
    return length


def loss(model: FastVLM, arrays: Arrays) -> tuple[mx.array, mx.array]:
    """(sum of the cross entropy over supervised tokens, their number), both float32."""
    states = hidden_states(model, arrays)
    states = states.flatten(0, 1)[arrays["positions"]]
    targets, weights = arrays["targets"], arrays["weights"]
    total = mx.array(0.0)
    run = _in_parts(model.language_model, len(states))
    for start in range(0, len(states), AT_ONCE):
        end = start + AT_ONCE
        total = total + run(states[start:end], targets[start:end], weights[start:end])
    return total, weights.sum()


def hidden_states(model: FastVLM, arrays: Arrays) -> mx.array:
    """[B, T, hidden_size] of a batch, what the output layer reads."""
    decoder, input_ids = model.language_model, arrays["input_ids"]
    tokens = visual_tokens(model, arrays)
    embeddings = (
        decoder.embed(input_ids)
        if tokens is None
        else model.embed_at(input_ids, tokens, arrays["places"])
    )
    return decoder.hidden_states(None, None, embeddings, segments=arrays.get("segments"))


def visual_tokens(model: FastVLM, arrays: Arrays) -> mx.array | None:
    """[V, hidden_size] of a batch's images, in reading order; None if there are none."""
    if (features := arrays.get("features")) is not None:
        joined = features if isinstance(features, mx.array) else mx.concatenate(features)
        return model.mm_projector(joined.reshape(-1, joined.shape[-1]))
    if (pixels := arrays.get("pixel_values")) is None:
        return None
    images = [pixels] if isinstance(pixels, mx.array) else pixels
    return mx.concatenate([model.encode_image(each).flatten(0, 1) for each in images])


def _in_parts(decoder: Qwen2, count: int) -> Callable[..., mx.array]:
    """`_cross_entropy` of a decoder; in several parts, their logits are computed again for the
    gradients instead of held."""

    def run(states: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return _cross_entropy(decoder, states, targets, weights)

    tied = decoder.config.tie_word_embeddings
    head = decoder.embed_tokens if tied else decoder.lm_head
    return run if count <= AT_ONCE else nn.utils.checkpoint(head, run)


def _cross_entropy(
    decoder: Qwen2, states: mx.array, targets: mx.array, weights: mx.array
) -> mx.array:
    logits = decoder.logits(states).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, targets) * weights).sum()
