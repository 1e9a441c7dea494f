"""The loss: every picture is encoded once, and all its questions go on from the same prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .batches import CHARACTERS, LONGEST_TEXT
from .words import ALL

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM

MOST = 9
BETWEEN = 128  # width of the head that reads


class Heads(nn.Module):
    """Helper heads on the visual features: which emoji, how many, which characters.

    They show the encoder what to look for before the decoder can; the finished model has none.
    """

    def __init__(self, width: int, visual_tokens: int):
        super().__init__()
        self.kinds = nn.Linear(width, len(ALL))
        self.count = nn.Linear(width, MOST + 1)
        self.gather = nn.Linear(width * visual_tokens, BETWEEN)
        self.letters = nn.Linear(BETWEEN, LONGEST_TEXT * (len(CHARACTERS) + 2))

    def __call__(self, features: mx.array, arrays: dict[str, Any]) -> mx.array:
        """The mean loss of a scene."""
        mean, flat = features.mean(axis=1), features.flatten(1)
        present, has_names = arrays["present"], arrays["has_names"]
        kinds = nn.losses.binary_cross_entropy(self.kinds(mean), present, reduction="none").sum(-1)
        count = nn.losses.cross_entropy(self.count(mean), arrays["counts"])
        logits = self.letters(nn.gelu(self.gather(flat))).reshape(len(flat), LONGEST_TEXT, -1)
        letters = nn.losses.cross_entropy(logits, arrays["letters"]).sum(-1)
        return ((kinds + count) * has_names + letters * arrays["has_text"]).mean()


class PrefixCache:
    """Keys and values of one layer of what was read before, which goes on in many ways.

    Nothing is written in place, so that gradients pass through it.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.rows = mx.array([0])
        self.kept: tuple[mx.array, mx.array] | None = None
        self.keeps = True

    def go_on(self, rows: mx.array, keeps: bool) -> None:
        """Row i of what is read next follows `rows[i]` of what is kept; and is kept, or not."""
        self.offset = 0 if self.kept is None else self.kept[0].shape[2]
        self.rows, self.keeps = rows, keeps

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.kept is not None:
            before = (each[self.rows] for each in self.kept)
            pairs = zip(before, (keys, values), strict=True)
            keys, values = (mx.concatenate([a, b], axis=2) for a, b in pairs)
        if self.keeps:
            self.kept = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        rows = mx.arange(self.offset, self.offset + N)[:, None]
        return rows >= mx.arange(self.offset + N)


def loss(model: FastVLM, arrays: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """(sum of the cross entropy over answers, the number of their tokens), as the trainer asks."""
    features = arrays.get("features")
    if features is None:
        features = model.vision_tower(arrays["pixel_values"])
    total, count = answers_loss(model, features, arrays)
    if "helper" in arrays:
        total = total + arrays["helper"] * count * model.heads(features, arrays)
    return total, count


def answers_loss(
    model: FastVLM, features: mx.array, arrays: dict[str, Any]
) -> tuple[mx.array, mx.array]:
    """As `loss`, from visual features [pictures, n, C]."""
    decoder = model.language_model
    caches = [PrefixCache() for _ in model.layers]

    def read(rows: mx.array, keeps: bool, ids: mx.array, embeddings: Any = None) -> mx.array:
        for cache in caches:
            cache.go_on(rows, keeps)
        return decoder.hidden_states(ids, caches, embeddings)

    visual_tokens = model.mm_projector(features).flatten(0, 1)
    read(mx.array([0]), True, arrays["opened"])
    embeddings = model.embed_at(arrays["prefix"], visual_tokens, arrays["places"])
    read(mx.zeros(len(embeddings), mx.int32), True, arrays["prefix"], embeddings)
    total = count = mx.array(0.0)
    for group in arrays["questions"]:
        states = read(group["scenes"], False, group["input_ids"])
        states = states.flatten(0, 1)[group["positions"]]
        each = nn.losses.cross_entropy(decoder.logits(states), group["targets"])
        total = total + (each * group["weights"]).sum()
        count = count + group["weights"].sum()
    return total, count
