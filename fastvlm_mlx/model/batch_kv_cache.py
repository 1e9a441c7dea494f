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
        self.layers = [BatchLayer(self) for _ in range(num_layers)]
        self._places: tuple[mx.array, ...] | None = None
        self._resize([])

    @property
    def arrays(self) -> list[mx.array]:
        """All keys and values."""
        return [layer.stored for layer in self.layers]

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
            self.layers = [BatchLayer(self) for _ in self.layers]
        return order

    def advance(self) -> None:
        """Count the token that each row was given."""
        self._resize([length + 1 for length in self.lengths])

    def places(self, kv_heads: int) -> tuple[mx.array, ...]:
        """Where the next token of each row goes in what the layers store: indices of its first
        four axes, [B, 2, kv_heads] together. They are the same in all layers."""
        if self._places is None or self._places[2].size != kv_heads:
            sides, rows = mx.array([0, 1])[:, None], mx.array(list(range(len(self.lengths))))
            heads = mx.array(list(range(kv_heads)))
            self._places = sides, rows[:, None, None], heads, self.offsets[:, None, None]
        return self._places

    def _resize(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.offsets = mx.array(lengths, dtype=mx.int32)
        self._places = None

    def _move(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        index = mx.array(sources)
        moved = [layer.stored[:, index] for layer in self.layers]
        mx.eval(moved)  # while they are still to be read, the arrays can't be written in place
        for layer, rows in zip(self.layers, moved, strict=True):
            layer.stored[:, mx.array(targets)] = rows


class BatchLayer:
    """One layer of a `BatchKVCache`, with the interface of mlx_lm's caches.

    Keys and values are in one array, [2, rows, kv_heads, S, D], as those of a `KVCache`. With
    the rows further out, Metal's attention would copy them: it takes heads that lie at equal
    distances across rows (`kv_copy_unless` in MLX's scaled_dot_product_attention.cpp).
    """

    step = 128

    def __init__(self, cache: BatchKVCache):
        self.cache = cache
        self.stored = mx.zeros((2, 0, 0, 0, 0))

    @property
    def offset(self) -> mx.array:
        return self.cache.offsets

    @property
    def lengths(self) -> list[int]:
        """As `offset`, known without computing."""
        return self.cache.lengths

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
        return self.append(mx.stack([keys, values]))

    def append(self, keys_and_values: mx.array) -> tuple[mx.array, mx.array]:
        """As `update_and_fetch`, with both in one [2, B, kv_heads, 1, D]."""
        _, B, kv_heads, _, _ = keys_and_values.shape
        end = max(self.cache.lengths) + 1
        self._make_room(B, end, keys_and_values)
        self.stored[self.cache.places(kv_heads)] = keys_and_values.squeeze(3).swapaxes(0, 1)
        keys, values = mx.split(self.stored[:, :B, :, :end], 2)
        return keys.squeeze(0), values.squeeze(0)

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Put [B, kv_heads, T, D] keys and values in new rows."""
        B, T, start = keys.shape[0], keys.shape[2], len(self.cache.lengths)
        self._make_room(start + B, T, keys[None])
        self.stored[0, start : start + B, :, :T] = keys
        self.stored[1, start : start + B, :, :T] = values

    def _make_room(self, rows: int, length: int, like: mx.array) -> None:
        """Make room for rows of a length; it grows in steps, so that it rarely has to."""
        _, had_rows, _, had_length, _ = self.stored.shape
        if rows <= had_rows and length <= had_length:
            return
        rows = max(rows, 2 * had_rows) if rows > had_rows else had_rows
        length = max(had_length, -(-length // self.step) * self.step)
        stored = mx.zeros((2, rows, like.shape[2], length, like.shape[4]), like.dtype)
        if had_rows:
            stored[:, :had_rows, :, :had_length] = self.stored
        self.stored = stored
