"""The KV cache of one layer, and what the decoder asks of any cache.

Shapes: B sequences, T tokens, S tokens seen so far, D = head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

Mask = mx.array | str | None  # as `mx.fast.scaled_dot_product_attention` takes it


class LayerCache(Protocol):
    """What the decoder asks of the cache of a layer; mlx_lm's caches have it, too."""

    @property
    def offset(self) -> int | mx.array:
        """The tokens seen so far; an array [B] has a number per sequence."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append [B, kv_heads, T, D] keys and values and return all of them."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The attention mask of N more tokens."""


class KVCache:
    """Keys and values of one layer, growing in steps; the interface is that of mlx_lm's caches.

    Both are in one array, [2, B, kv_heads, S, D], so that those of a token are written at once.
    """

    step = 256

    def __init__(self) -> None:
        self.stored: mx.array | None = None
        self.offset = 0

    @property
    def keys(self) -> mx.array | None:
        """[B, kv_heads, S and room for more, D]."""
        return None if self.stored is None else self.stored[:1].squeeze(0)

    @property
    def values(self) -> mx.array | None:
        """As `keys`."""
        return None if self.stored is None else self.stored[1:].squeeze(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, kv_heads, T, D] keys and values and return all of them."""
        stored, start = self._make_room(keys)
        stored[:1, ..., start : self.offset, :] = keys[None]
        stored[1:, ..., start : self.offset, :] = values[None]
        return self._fetch()

    def append(self, keys_and_values: mx.array) -> tuple[mx.array, mx.array]:
        """As `update_and_fetch`, with both in one [2, B, kv_heads, T, D]."""
        stored, start = self._make_room(keys_and_values[:1].squeeze(0))
        stored[..., start : self.offset, :] = keys_and_values
        return self._fetch()

    def _make_room(self, keys: mx.array) -> tuple[mx.array, int]:
        """Advance by the positions of `keys`; (the array with room for them, where they start)."""
        B, heads, T, D = keys.shape
        start, end = self.offset, self.offset + T
        if self.stored is None or end > self.stored.shape[3]:
            room = mx.zeros((2, B, heads, -(-end // self.step) * self.step - start, D), keys.dtype)
            if self.stored is not None:
                room = mx.concatenate([self.stored[..., :start, :], room], axis=3)
            self.stored = room
        self.offset = end
        return self.stored, start

    def _fetch(self) -> tuple[mx.array, mx.array]:
        assert self.stored is not None
        keys, values = mx.split(self.stored[..., : self.offset, :], 2)
        return keys.squeeze(0), values.squeeze(0)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The attention mask of N more tokens."""
        if N == 1 and window_size is None:
            return None
        if return_array or window_size is not None:
            rows = mx.arange(self.offset, self.offset + N)[:, None]
            columns = mx.arange(self.offset + N)[None]
            mask = rows >= columns
            return mask if window_size is None else mask & (rows < columns + window_size)
        return "causal"

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be forgotten."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens and return how many were forgotten."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    def size(self) -> int:
        """The tokens seen so far."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing has been stored."""
        return self.stored is None

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        """(keys, values, offset), to save a cache and to restore it."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: tuple[mx.array | None, mx.array | None, int]) -> None:
        keys, values, self.offset = value
        if keys is None or values is None:
            self.stored = None
        else:
            self.stored = mx.stack([keys, values])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room for further tokens included."""
        return 0 if self.stored is None else self.stored.nbytes

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """The same content in mlx_lm's `QuantizedKVCache`, which its generation loop asks for."""
        from mlx_lm.models import cache

        growing = cache.KVCache()
        growing.state = self.state
        return growing.to_quantized(group_size=group_size, bits=bits)
