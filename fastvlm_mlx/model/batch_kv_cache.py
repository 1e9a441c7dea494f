"""The KV cache of a batch of sequences of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class BatchKVCache:
    """Keys and values of all layers, with a row per sequence.

    Attributes:
        layers: what the decoder takes as caches, to process one more token of each row.
        lengths: of the sequences.
        offsets: the same, int32 [B].
    """

    def __init__(self, num_layers: int):
        self.layers = [_Layer(self) for _ in range(num_layers)]
        self._resize([])

    @property
    def arrays(self) -> list[mx.array]:
        """All keys and values."""
        return [array for layer in self.layers for array in (layer.keys, layer.values)]

    def add(self, caches: Sequence[Any], lengths: Sequence[int]) -> None:
        """Add rows.

        Args:
            caches: one per layer, with `keys` and `values` [B, kv_heads, max(lengths) or more, D].
            lengths: of the sequences; what lies beyond is padding.
        """
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.add(cache.keys[:, :, : max(lengths)], cache.values[:, :, : max(lengths)])
        self._resize([*self.lengths, *lengths])

    def keep(self, kept: Sequence[bool]) -> list[int]:
        """Drop the other rows, and fill the gaps with the last ones.

        Args:
            kept: one entry per row.

        Returns:
            the old index of each row.
        """
        count = sum(kept)
        beyond = [i for i in range(count, len(kept)) if kept[i]]
        order = [i if kept[i] else beyond.pop() for i in range(count)]
        gaps = [i for i in range(count) if not kept[i]]
        self._move([order[i] for i in gaps], gaps)
        self._resize([self.lengths[i] for i in order])
        if not order:
            self.layers = [_Layer(self) for _ in self.layers]
        return order

    def advance(self) -> None:
        """Count the token that each row was given."""
        self._resize([length + 1 for length in self.lengths])

    def _resize(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.offsets = mx.array(lengths, dtype=mx.int32)

    def _move(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        index = mx.array(sources)
        moved = [(layer.keys[index], layer.values[index]) for layer in self.layers]
        mx.eval(moved)  # while they are still to be read, the arrays can't be written in place
        for layer, (keys, values) in zip(self.layers, moved, strict=True):
            layer.keys[mx.array(targets)] = keys
            layer.values[mx.array(targets)] = values


class _Layer:
    """One layer of a `BatchKVCache`, with the interface of mlx_lm's caches."""

    step = 128

    def __init__(self, cache: BatchKVCache):
        self.cache = cache
        self.keys = self.values = mx.zeros((0, 0, 0, 0))

    @property
    def offset(self) -> mx.array:
        return self.cache.offsets

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """[B, 1, 1, S], true where a row has a token; None if all have the same length."""
        lengths = self.cache.lengths
        if min(lengths) == max(lengths):
            return None
        return mx.arange(max(lengths) + 1) <= self.offset[:, None, None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, kv_heads, 1, D] keys and values to the rows and return all of them."""
        B, end = len(keys), max(self.cache.lengths) + 1
        self._make_room(B, end, keys)
        rows = mx.arange(B)
        self.keys[rows, :, self.offset] = keys[:, :, 0]
        self.values[rows, :, self.offset] = values[:, :, 0]
        return self.keys[:B, :, :end], self.values[:B, :, :end]

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Put [B, kv_heads, T, D] keys and values in new rows."""
        B, T, start = keys.shape[0], keys.shape[2], len(self.cache.lengths)
        self._make_room(start + B, T, keys)
        self.keys[start : start + B, :, :T] = keys
        self.values[start : start + B, :, :T] = values

    def _make_room(self, rows: int, length: int, like: mx.array) -> None:
        """Make room for rows of a length; it grows in steps, so that it rarely has to."""
        had_rows, _, had_length, _ = self.keys.shape
        if rows <= had_rows and length <= had_length:
            return
        rows = max(rows, 2 * had_rows) if rows > had_rows else had_rows
        length = max(had_length, -(-length // self.step) * self.step)
        shape = (rows, like.shape[1], length, like.shape[3])
        keys, values = mx.zeros(shape, like.dtype), mx.zeros(shape, like.dtype)
        if had_rows:
            keys[:had_rows, :, :had_length] = self.keys
            values[:had_rows, :, :had_length] = self.values
        self.keys, self.values = keys, values
