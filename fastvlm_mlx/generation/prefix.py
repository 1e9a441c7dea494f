"""The keys and values of what a prompt begins with, to begin other prompts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..model.kv_cache import KVCache


@dataclass(eq=False)
class Prefix:
    """Token ids, and their keys and values.

    Attributes:
        ids: the tokens.
        stored: of each layer, [2, 1, kv_heads, len(ids), D], as a `KVCache` stores them.
    """

    ids: list[int]
    stored: list[mx.array]

    @classmethod
    def of(cls, ids: Sequence[int], cache: Sequence[KVCache]) -> Prefix:
        """A copy of the first keys and values of a cache, which are those of `ids`."""
        kept = [layer.stored[..., : len(ids), :] for layer in cache if layer.stored is not None]
        stored = [mx.contiguous(a) for a in kept]  # without the room that the cache grows into
        mx.async_eval(stored)
        return cls(list(ids), stored)

    def shared(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are those of `ids`."""
        return common_prefix(self.ids, ids)

    def fill(self, cache: Sequence[KVCache], known: int, rows: int = 1) -> None:
        """Put the first `known` tokens into an empty cache of so many rows."""
        for layer, stored in zip(cache, self.stored, strict=True):
            held = stored[..., :known, :]
            layer.stored = mx.broadcast_to(held, (2, rows, *held.shape[2:])) if rows > 1 else held
            layer.offset = known


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first items that two sequences share."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
