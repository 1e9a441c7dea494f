"""The loss of a batch: cross entropy of the supervised tokens, as a sum and a count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.fastvlm import FastVLM
from ..model.qwen2 import Qwen2
from ..model.segments import Segments
from .features import encode_in_parts
from .order import bucket as length_bucket

AT_ONCE = 1024  # positions whose logits are held together: 600 MB with Qwen2's vocabulary
LEAST_POSITIONS = 16
Arrays = dict[str, Any]
"""What of a batch is computed on: arrays by name."""


def arrays_of(batch: Any) -> Arrays:
    """A batch as the compiled step takes it.

    Supervised positions are gathered here, where they are known, and padded to few different
    lengths, so that logits are computed for them only and few shapes are compiled.
    """
    import numpy as np

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
    named = {name: getattr(batch, name, None) for name in ("pixel_values", "features")}
    if any(isinstance(value, list) for value in named.values()):  # tiles, merged by their sizes
        named["image_sizes"] = batch.image_sizes
    arrays |= {name: value for name, value in named.items() if value is not None}
    return arrays if getattr(batch, "segments", None) is None else arrays | _packed(batch, arrays)


def _packed(batch: Any, arrays: Arrays) -> Arrays:
    """Where the sequences of a packed batch stand, and as many features as several numbers of
    images have together, since it varies; those behind the last image go nowhere."""
    lengths = getattr(batch, "lengths", None)
    found = Segments.of(batch.segments, lengths, count=bucket, length=length_bucket)
    packed = {"segment_tokens": found.tokens, "segment_places": found.places}
    features = arrays.get("features")
    if not isinstance(features, mx.array):
        return packed
    more = bucket(len(features)) - len(features)
    nowhere = mx.full(more * features.shape[1], batch.input_ids.size, mx.int32)
    return packed | {
        "features": mx.pad(features, [(0, more), (0, 0), (0, 0)]),
        "places": mx.concatenate([batch.places, nowhere]),
    }


def encoded(model: FastVLM, arrays: Arrays) -> Arrays:
    """A batch with the features of its images, if the encoder is frozen.

    As a part of the step the encoder would hold twice as much, and on the CPU be in slower forms.
    """
    encoder = model.vision_tower
    if "pixel_values" not in arrays or tree_flatten(encoder.trainable_parameters()):
        return arrays
    rest = dict(arrays)
    pixels = rest.pop("pixel_values")
    is_one = isinstance(pixels, mx.array)
    each = [encode_in_parts(encoder, part) for part in ([pixels] if is_one else pixels)]
    features = each[0] if is_one else each
    return rest | {"features": features}


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
    sums = [
        _cross_entropy(model.language_model, states[at], targets[at], weights[at], again=again)
        for at, again in _parts(len(states))
    ]
    return mx.stack(sums).sum(), weights.sum()


def _parts(count: int) -> Iterator[tuple[slice, bool]]:
    """Slices of at most AT_ONCE, and whether there are several: then their logits are computed
    again for the gradients instead of held."""
    for start in range(0, count, AT_ONCE):
        yield slice(start, start + AT_ONCE), count > AT_ONCE


def hidden_states(model: FastVLM, arrays: Arrays) -> mx.array:
    """[B, T, hidden_size] of a batch, what the output layer reads."""
    decoder, input_ids = model.language_model, arrays["input_ids"]
    tokens, is_packed = visual_tokens(model, arrays), "segment_tokens" in arrays
    embeddings = (
        decoder.embed(input_ids)
        if tokens is None
        else model.embed_at(input_ids, tokens, arrays["places"], with_spare=is_packed)
    )
    segments = None
    if is_packed:
        segments = Segments(arrays["segment_tokens"], arrays["segment_places"])
    return decoder.hidden_states(None, None, embeddings, segments)


def visual_tokens(model: FastVLM, arrays: Arrays) -> mx.array | None:
    """[V, hidden_size] of a batch's images, in reading order; None if there are none."""
    sizes = arrays.get("image_sizes")
    if (features := arrays.get("features")) is None:
        pixels = arrays.get("pixel_values")
        return None if pixels is None else mx.concatenate(model.encode_images(pixels, sizes))
    if isinstance(features, mx.array):
        return model.mm_projector(features).flatten(0, 1)
    tiles = [model.mm_projector(each) for each in features]
    merged = [model.merge_tiles(*each) for each in zip(tiles, sizes or (), strict=True)]
    return mx.concatenate(merged)


def _cross_entropy(
    decoder: Qwen2, states: mx.array, targets: mx.array, weights: mx.array, *, again: bool
) -> mx.array:
    def run(states: mx.array) -> mx.array:
        logits = decoder.logits(states).astype(mx.float32)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    if not again:
        return run(states)
    tied = decoder.config.tie_word_embeddings
    head = decoder.embed_tokens if tied else decoder.lm_head
    found: mx.array = nn.utils.checkpoint(head, run)(states)
    return found
