"""The Qwen2 decoder and its KV cache.

Shapes: B sequences, T tokens, S tokens seen so far, D = head_dim. The caches of
`mlx_lm.models.cache` fit wherever a `KVCache` does, and the model fits `mlx_lm`'s generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn

from .config import TextConfig
from .linear import SideBySide, is_row, project, times_row
from .vision import average, exp_negative, on_cpu, one_by_one, with_ones

Rotation: TypeAlias = Callable[[mx.array], mx.array]

ROWS = 32  # of queries that attend at a time, on the CPU


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
        return None if self.stored is None else self.stored[:1].squeeze(0)

    @property
    def values(self) -> mx.array | None:
        return None if self.stored is None else self.stored[1:].squeeze(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, kv_heads, T, D] keys and values and return all of them."""
        stored, start = self._make_room(keys)
        stored[:1, ..., start : self.offset, :] = keys[None]
        stored[1:, ..., start : self.offset, :] = values[None]
        return self._fetch()

    def append(self, keys_and_values: mx.array) -> tuple[mx.array, mx.array]:
        """As `update_and_fetch`, given both in one [2, B, kv_heads, T, D]."""
        stored, start = self._make_room(keys_and_values[:1].squeeze(0))
        stored[..., start : self.offset, :] = keys_and_values
        return self._fetch()

    def _make_room(self, keys: mx.array) -> tuple[mx.array, int]:
        """Count in the positions of `keys`; the array with room for them, and where they start."""
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

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The attention mask for N more tokens, as `mx.fast.scaled_dot_product_attention` takes."""
        if N == 1 and window_size is None:
            return None
        if return_array or window_size is not None:
            rows = mx.arange(self.offset, self.offset + N)[:, None]
            columns = mx.arange(self.offset + N)[None]
            mask = rows >= columns
            return mask if window_size is None else mask & (rows < columns + window_size)
        return "causal"

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens and return how many were forgotten."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.stored is None

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
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
        return 0 if self.stored is None else self.stored.nbytes

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """The same content as mlx_lm's `QuantizedKVCache`, as its generation loop asks for."""
        from mlx_lm.models import cache

        growing = cache.KVCache()
        growing.state = self.state
        return growing.to_quantized(group_size=group_size, bits=bits)


def _attend(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any
) -> mx.array:
    if hasattr(cache, "bits"):
        from mlx_lm.models.base import quantized_scaled_dot_product_attention

        return quantized_scaled_dot_product_attention(
            queries, keys, values, scale, mask, group_size=cache.group_size, bits=cache.bits
        )
    is_causal = isinstance(mask, str) and mask == "causal"
    if is_causal and cache is not None and on_cpu() and queries.dtype == mx.float32:
        return attend_causally(queries, keys, values, scale)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attend_causally(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention on the CPU, some rows at a time, each with the keys that it may see.

    Args:
        q: [B, heads, T, D], the last T of S positions.
        k, v: [B, kv_heads, S, D].
        scale: of the scores.

    Returns:
        [B, heads, T, D].
    """
    B, heads, T, D = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - T
    q = (scale * q).reshape(B, kv_heads, heads // kv_heads, T, D)
    k, v = k[:, :, None], with_ones(v)[:, :, None]
    ends = [min(start + ROWS, T) for start in range(0, T, ROWS)]
    pieces = [
        (q[..., i * ROWS : end, :], k[..., : before + end, :], v[..., : before + end, :])
        for i, end in enumerate(ends)
    ]
    return mx.concatenate(one_by_one(_attend_rows, pieces), axis=-2).reshape(B, heads, T, D)


def _attend_rows(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    scores = q @ k.swapaxes(-1, -2)
    rows, seen = scores.shape[-2:]
    sees = mx.arange(seen - rows, seen)[:, None] >= mx.arange(seen)
    return average(mx.where(sees, scores, -mx.inf), v)


def is_step(length: int, cache: Any) -> bool:
    """Whether one token follows those in a `KVCache`, the case with the shortest way."""
    return length == 1 and isinstance(cache, KVCache) and isinstance(cache.offset, int)


def make_rotation(config: TextConfig, x: mx.array, cache: Any) -> Rotation:
    """Rotary positions, the same in all layers, for queries and keys [B, heads, T, D].

    In a step (see `is_step`) for queries, keys and values [B heads, 1, D]: the values' position
    is 0, where the rotation is none, so that they stay beside the keys.
    """
    B, T, _ = x.shape
    offset: Any = 0 if cache is None else cache.offset
    if is_step(T, cache):
        kv_heads = config.num_key_value_heads
        turned = config.num_attention_heads + kv_heads
        offset = mx.array(([offset] * turned + [0] * kv_heads) * B)
    D, base = config.head_dim, config.rope_theta
    if not on_cpu():
        return lambda x: mx.fast.rope(x, D, traditional=False, base=base, scale=1.0, offset=offset)
    positions = mx.arange(T, dtype=mx.float32)
    if isinstance(offset, mx.array) and offset.size > 1:
        positions = positions + (offset[:, None] if is_step(T, cache) else offset[:, None, None])
    else:
        positions = positions + offset
    frequencies = mx.exp(mx.arange(0, -D // 2, -1, dtype=mx.float32) * (math.log(base) / (D // 2)))
    angles = positions[..., None] * frequencies
    cos, sin = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)

    def rotate(x: mx.array) -> mx.array:
        a, b = mx.split(x, 2, axis=-1)
        return mx.concatenate(_rotate(a, b, cos, sin), axis=-1)

    return rotate


@mx.compile
def _rotate(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> list[mx.array]:
    return [a * cos - b * sin, a * sin + b * cos]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU of one, times the other, elementwise."""
    if on_cpu() and gate.dtype == mx.float32:
        return cast(mx.array, _swiglu_on_cpu(gate, up))
    return _swiglu(gate, up)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


@mx.custom_function
def _swiglu_on_cpu(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu_rational(gate, up)


@_swiglu_on_cpu.vjp
def _swiglu_gradient(
    primals: list[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    # That of the rational form would overflow where the gate is large.
    gate, up = primals
    share = mx.sigmoid(gate)
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


@mx.compile
def _swiglu_rational(gate: mx.array, up: mx.array) -> mx.array:
    # The positive part of the gate, less |gate| / (1 + exp |gate|).
    size = mx.abs(gate)
    small = exp_negative(size)
    return (0.5 * gate + 0.5 * size - size * small / (1 + small)) * up


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square; on the CPU in three steps, where MLX takes seven."""

    def __call__(self, x: mx.array) -> mx.array:
        if on_cpu() and x.dtype == mx.float32:
            return _normalise(x, mx.square(x).sum(axis=-1, keepdims=True), self.weight, self.eps)
        return mx.fast.rms_norm(x, self.weight, self.eps)


@mx.compile
def _normalise(x: mx.array, square_sum: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt(square_sum / x.shape[-1] + eps) * weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q, k and v come from one product."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = D**-0.5
        width = (self.num_heads + 2 * self.num_kv_heads) * D
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=True)
        self.o_proj = nn.Linear(self.num_heads * D, config.hidden_size, bias=False)

    def __call__(
        self, x: mx.array, mask: Any, cache: Any, rotate: Rotation, residual: mx.array
    ) -> mx.array:
        B, T, _ = x.shape
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = project(self.qkv_proj, x).reshape(B, T, heads, -1)
        if is_step(T, cache):
            qkv = rotate(qkv.reshape(B * heads, 1, -1)).reshape(B, heads, 1, -1)
            queries, keys_and_values = mx.split(qkv, [self.num_heads], axis=1)
            keys_and_values = keys_and_values.reshape(B, 2, self.num_kv_heads, 1, -1)
            keys, values = cache.append(keys_and_values.swapaxes(0, 1))
        else:
            qkv = qkv.transpose(0, 2, 1, 3)
            rotated, values = rotate(qkv[:, : -self.num_kv_heads]), qkv[:, -self.num_kv_heads :]
            queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
        y = _attend(queries, keys, values, cache, self.scale, mask)
        return project(self.o_proj, y.transpose(0, 2, 1, 3).reshape(B, T, -1), residual)


class MLP(nn.Module):
    """SwiGLU; gate and up come from one product."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        if isinstance(self.gate_up_proj, SideBySide):
            gate, up = (project(layer, x) for layer in self.gate_up_proj.layers)
        else:
            gate, up = mx.split(project(self.gate_up_proj, x), 2, axis=-1)
        return project(self.down_proj, swiglu(gate, up), residual)


class Block(nn.Module):
    """Attention and MLP, each on normalised input and added to it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: Any, cache: Any, rotate: Rotation) -> mx.array:
        x = self.self_attn(self.input_layernorm(x), mask, cache, rotate, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen2(nn.Module):
    """Token ids or embeddings in, logits out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        input_ids: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits of every position.

        Args:
            input_ids: [B, T] token ids; not read where `input_embeddings` are given.
            cache: one `KVCache` (or an mlx_lm cache) a layer, updated in place.
            input_embeddings: [B, T, hidden_size].

        Returns:
            [B, T, vocab_size] logits.
        """
        return self.logits(self.hidden_states(input_ids, cache, input_embeddings))

    def embed(self, input_ids: mx.array | None) -> mx.array:
        """[B, T] → [B, T, hidden_size], in the model's dtype, which some quantized tables lack."""
        return self.embed_tokens(input_ids).astype(self.norm.weight.dtype)

    def hidden_states(
        self,
        input_ids: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """As a call, but what comes before the output layer: [B, T, hidden_size]."""
        x = self.embed(input_ids) if input_embeddings is None else input_embeddings
        caches = [None] * len(self.layers) if cache is None else cache
        mask = _make_mask(x.shape[1], caches[0])
        rotate = make_rotation(self.config, x, caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache, rotate)
        return self.norm(x)

    def logits(self, hidden_states: mx.array) -> mx.array:
        """[..., hidden_size] → [..., vocab_size]."""
        if self.config.tie_word_embeddings:
            if is_row(hidden_states, self.embed_tokens):
                return times_row(hidden_states, self.embed_tokens.weight)
            return self.embed_tokens.as_linear(hidden_states)
        return project(self.lm_head, hidden_states)


def _make_mask(length: int, cache: Any) -> Any:
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return None if length == 1 else "causal"
