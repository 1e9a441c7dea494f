"""The Qwen2 decoder and its KV cache.

Shapes: B sequences, T tokens, S tokens seen so far, D = head_dim. The caches of
`mlx_lm.models.cache` fit wherever a `KVCache` does, and the model fits `mlx_lm`'s generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import TextConfig


class KVCache:
    """Keys and values of one layer, growing in steps; the interface is that of mlx_lm's caches."""

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, kv_heads, T, D] keys and values and return all of them."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._write(self.keys, keys, start)
        self.values = self._write(self.values, values, start)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _write(self, stored: mx.array | None, added: mx.array, start: int) -> mx.array:
        end = start + added.shape[2]
        if stored is None or end > stored.shape[2]:
            B, heads, _, D = added.shape
            room = mx.zeros((B, heads, -(-end // self.step) * self.step - start, D), added.dtype)
            stored = room if stored is None else mx.concatenate([stored[..., :start, :], room], 2)
        stored[..., start:end, :] = added
        return stored

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
        return self.keys is None

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: tuple[mx.array | None, mx.array | None, int]) -> None:
        self.keys, self.values, self.offset = value

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.keys, self.values) if a is not None)

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
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


class SideBySide(nn.Module):
    """Linear layers of one input that stay apart, their outputs joined."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([layer(x) for layer in self.layers], axis=-1)


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
        self.rope = nn.RoPE(D, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        B, T, _ = x.shape
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(x).reshape(B, T, heads, -1).transpose(0, 2, 1, 3)
        rotated, values = qkv[:, : -self.num_kv_heads], qkv[:, -self.num_kv_heads :]
        rotated = self.rope(rotated, offset=0 if cache is None else cache.offset)
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = _attend(queries, keys, values, cache, self.scale, mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU; gate and up come from one product."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self.gate_up_proj, SideBySide):
            gate, up = (layer(x) for layer in self.gate_up_proj.layers)
        else:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(_swiglu(gate, up))


class Block(nn.Module):
    """Attention and MLP, each on normalised input and added to it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """Token ids or embeddings in, logits out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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

    def hidden_states(
        self,
        input_ids: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """As a call, but what comes before the output layer: [B, T, hidden_size]."""
        x = self.embed_tokens(input_ids) if input_embeddings is None else input_embeddings
        caches = [None] * len(self.layers) if cache is None else cache
        mask = _make_mask(x.shape[1], caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        return self.norm(x)

    def logits(self, hidden_states: mx.array) -> mx.array:
        """[..., hidden_size] → [..., vocab_size]."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.as_linear(hidden_states)
        return self.lm_head(hidden_states)


def _make_mask(length: int, cache: Any) -> Any:
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return None if length == 1 else "causal"
