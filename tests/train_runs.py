"""What several tests of training share: a model that takes no time, and batches made in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from models import random_model

import fastvlm_mlx as fv
from fastvlm_mlx.train.loop import Trainer
from fastvlm_mlx.train.parts import prepare
from fastvlm_mlx.train.settings import TrainOptions

GEOMETRY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
LENGTH = 12
QUICK = {"compiled": False, "learning_rate": 1e-2, "warmup": 0, "save_every": 10**6}


def small_model(seed: int = 0, **fields: Any) -> fv.FastVLM:
    """A random model as training has it, with its projections apart."""
    model = random_model(seed, **(GEOMETRY | fields))
    model.unfuse()
    mx.random.seed(seed)
    parts = {n: p for n, p in tree_flatten(model.parameters()) if n.endswith("_proj.weight")}
    drawn = [(n, mx.random.normal(p.shape) * p.shape[1] ** -0.5) for n, p in parts.items()]
    model.load_weights(drawn, strict=False)
    return model


def batch(
    number: int, *, rows: int = 2, supervised: int = 5, images: bool = True, name: str = ""
) -> Any:
    """Random rows, each with one image of one visual token in its second place."""
    random = np.random.default_rng([number, 7])
    ids = random.integers(1, GEOMETRY["vocab_size"], (rows, LENGTH)).astype(np.int32)
    weights = np.zeros((rows, LENGTH), np.float32)
    weights[:, LENGTH - 1 - supervised : LENGTH - 1] = 1
    pixels = random.random((rows, 64, 64, 3), dtype=np.float32)
    places = np.arange(rows, dtype=np.int32) * LENGTH + 1
    return SimpleNamespace(
        ids=[f"{name or number}-{row}" for row in range(rows)],
        input_ids=mx.array(ids),
        targets=mx.array(np.roll(ids, -1, axis=1)),
        weights=mx.array(weights),
        places=mx.array(places if images else places[:0]),
        pixel_values=mx.array(pixels) if images else None,
        segments=None,
    )


def joined(batches: Sequence[Any]) -> Any:
    """The rows of several batches in one."""
    starts = np.cumsum([0, *(b.input_ids.size for b in batches)])
    places = [b.places + int(start) for b, start in zip(batches, starts, strict=False)]
    arrays = {
        name: mx.concatenate([getattr(b, name) for b in batches])
        for name in ("input_ids", "targets", "weights", "pixel_values")
    }
    ids = [name for b in batches for name in b.ids]
    return SimpleNamespace(ids=ids, places=mx.concatenate(places), segments=None, **arrays)


def packed(found: Any) -> Any:
    """The rows of a batch one after the other in one row, as segments."""
    rows, length = found.input_ids.shape
    arrays = {
        name: getattr(found, name).reshape(1, -1) for name in ("input_ids", "targets", "weights")
    }
    segments = mx.array(np.repeat(np.arange(rows, dtype=np.int32), length)[None])
    kept = {"ids": found.ids, "places": found.places, "pixel_values": found.pixel_values}
    return SimpleNamespace(segments=segments, **arrays, **kept)


class InMemory:
    """The same batches in every epoch, in an order of the epoch's own."""

    def __init__(self, batches: Sequence[Any]):
        self.found = list(batches)

    def count(self, epoch: int) -> int:
        return len(self.found)

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(len(self.found))
        return (self.found[i] for i in order[start:])


def trainer(
    out: Path, data: Any = None, model: fv.FastVLM | None = None, **options: Any
) -> Trainer:
    """A run over four batches of a small model, uncompiled, at a high learning rate."""
    read, named = split(options)
    model = model or small_model()
    settings = TrainOptions.of(QUICK | read)
    mx.random.seed(settings.seed)
    prepare(model, settings)
    data = data or InMemory([batch(i) for i in range(4)])
    named = {"run": {"settings": settings.as_dict()}, "progress": False} | named
    return Trainer(model, settings, data, out, **named)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `TrainOptions`, and the others."""
    known = set(TrainOptions.__dataclass_fields__)
    return (
        {name: value for name, value in options.items() if name in known},
        {name: value for name, value in options.items() if name not in known},
    )


def weights_of(run: Trainer) -> dict[str, mx.array]:
    """The trained weights by name."""
    return {name: mx.array(value) for name, value in run.parameters().items()}


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    """Whether tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]).item() for n in one)


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference of any number, relative to the largest of its tensor."""
    assert one.keys() == other.keys()
    return max(
        (mx.abs(one[n] - other[n]).max() / mx.maximum(mx.abs(one[n]).max(), 1e-6)).item()
        for n in one
    )
