"""The Qwen2 decoder (Qwen2 technical report, section 2.2), and Qwen3, which instead of biases on
queries, keys and values has norms on queries and keys (Qwen3 technical report, section 2).

Docstrings name the modules of transformers' `modeling_qwen2.py`. Shapes: B sequences, T tokens,
S tokens seen so far, D = head_dim. The caches of `mlx_lm.models.cache` fit wherever a `KVCache`
does, and the model fits `mlx_lm`'s generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..config import TextConfig
from ..ops import RMSNorm, RoPE, linear, swiglu
from .batch_kv_cache import BatchLayer
from .kv_cache import KVCache, LayerCache, Mask
from .segments import Segments


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (`Qwen2Attention`); queries, keys and values
    come from one product."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = D**-0.5
        width = (self.num_heads + 2 * self.num_kv_heads) * D
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * D, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(D, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache | None,
        rope: RoPE,
        segments: Segments | None,
        residual: mx.array,
    ) -> mx.array:
        B, T, _ = x.shape
        if _is_step(cache, T):
            heads = self.num_heads + 2 * self.num_kv_heads
            qkv = rope(self._project(x).reshape(B * heads, 1, -1)).reshape(B, heads, 1, -1)
            queries, keys_and_values = mx.split(qkv, [self.num_heads], axis=1)
            keys_and_values = keys_and_values.reshape(B, 2, self.num_kv_heads, 1, -1)
            keys, values = cache.append(keys_and_values.swapaxes(0, 1))
        else:
            queries, keys, values = self._rotated(x, rope, segments)
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
        y = ops.causal_attention(queries, keys, values, cache, self.scale, mask)
        y = y.transpose(0, 2, 1, 3)
        if segments is not None:
            y = segments.together(y)
        return linear(self.o_proj, y.reshape(B, T, -1), residual)

    def unfuse(self) -> None:
        """Have the three projections apart, under the names of `Qwen2Attention`."""
        fused = self.pop("qkv_proj")
        weight, has_bias = fused.weight, "bias" in fused
        D = weight.shape[0] // (self.num_heads + 2 * self.num_kv_heads)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(weight.shape[1], n * D, bias=has_bias) for n in heads
        )

    def _rotated(self, x: mx.array, rope: RoPE, segments: Segments | None) -> list[mx.array]:
        """[B, T, C] → queries, keys and values [B, heads, T, D], the first two rotated; of segments
        [N, heads, L, D]."""

        def headed(y: mx.array) -> mx.array:
            return (y if segments is None else segments.apart(y)).transpose(0, 2, 1, 3)

        ends = [self.num_heads, self.num_heads + self.num_kv_heads]
        if "qkv_proj" in self:
            qkv = headed(self._project(x))
            queries, keys = mx.split(rope(qkv[:, : ends[1]]), ends[:1], axis=1)
            return [queries, keys, qkv[:, ends[1] :]]
        # Apart from the start: for gradients, a part of one array would hold all of it.
        queries, keys, values = map(headed, self._parts(x))
        return [rope(queries), rope(keys), values]

    def _project(self, x: mx.array) -> mx.array:
        """[B, T, C] → queries, keys and values, one after the other: [B, T, heads, D]."""
        if "qkv_proj" not in self:
            return mx.concatenate(self._parts(x), axis=2)
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = linear(self.qkv_proj, x).reshape(*x.shape[:2], heads, -1)
        return self._normalise(qkv) if "q_norm" in self else qkv

    def _parts(self, x: mx.array) -> list[mx.array]:
        """[B, T, C] → queries, keys and values [B, T, heads, D], after `unfuse`."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        queries, keys, values = (
            linear(part, x).reshape(*x.shape[:2], n, -1)
            for part, n in zip((self.q_proj, self.k_proj, self.v_proj), heads, strict=True)
        )
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return [queries, keys, values]

    def _normalise(self, qkv: mx.array) -> mx.array:
        """[B, T, heads, D] with each head of queries and keys normalised (`Qwen3Attention`)."""
        ends = [self.num_heads, self.num_heads + self.num_kv_heads]
        queries, keys, values = mx.split(qkv, ends, axis=2)
        return mx.concatenate([self.q_norm(queries), self.k_norm(keys), values], axis=2)


class MLP(nn.Module):
    """SwiGLU (`Qwen2MLP`); gate and up come from one product."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = ops.split_linear(self.gate_up_proj, x, 2)
        else:
            gate, up = linear(self.gate_proj, x), linear(self.up_proj, x)
        return linear(self.down_proj, swiglu(gate, up, training=self.training), residual)

    def unfuse(self) -> None:
        """Have gate and up apart, under the names of `Qwen2MLP`."""
        rows, width = self.pop("gate_up_proj").weight.shape
        self.gate_proj, self.up_proj = (nn.Linear(width, rows // 2, bias=False) for _ in range(2))


class Block(nn.Module):
    """Attention and MLP, each of its normalised input and added to it (`Qwen2DecoderLayer`)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache | None,
        rope: RoPE,
        segments: Segments | None = None,
    ) -> mx.array:
        x = self.self_attn(self.input_layernorm(x), mask, cache, rope, segments, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen2(nn.Module):
    """Token ids or embeddings in, logits out (`Qwen2ForCausalLM`, `Qwen3ForCausalLM`).

    It is made for inference; `train()` turns to the forms that gradients pass through.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.eval()

    def __call__(
        self,
        input_ids: mx.array | None,
        cache: Sequence[LayerCache] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits of every position.

        Args:
            input_ids: [B, T] token ids; not read where `input_embeddings` are given.
            cache: one `KVCache` (or an mlx_lm cache) per layer, updated in place.
            input_embeddings: [B, T, hidden_size].

        Returns:
            [B, T, vocab_size] logits.
        """
        return self.logits(self.hidden_states(input_ids, cache, input_embeddings))

    def embed(self, input_ids: mx.array | None) -> mx.array:
        """[B, T] → [B, T, hidden_size], cast to the model's dtype, as quantized tables need it."""
        return self.embed_tokens(input_ids).astype(self.norm.weight.dtype)

    def hidden_states(
        self,
        input_ids: mx.array | None,
        cache: Sequence[LayerCache] | None = None,
        input_embeddings: mx.array | None = None,
        segments: mx.array | Segments | None = None,
    ) -> mx.array:
        """What the output layer reads.

        Args:
            input_ids, cache, input_embeddings: as for a call.
            segments: of sequences packed in rows, without a cache: a token sees only earlier ones
                of its own segment, and positions start anew with each segment. An array is as for
                `Segments.of`.

        Returns:
            [B, T, hidden_size].

        Raises:
            ValueError: there are both segments and a cache.
        """
        if segments is not None and cache is not None:
            raise ValueError("segments are for whole rows, as in training, and take no cache.")
        x = self.embed(input_ids) if input_embeddings is None else input_embeddings
        caches = [None] * len(self.layers) if cache is None else cache
        if isinstance(segments, mx.array):
            segments = Segments.of(segments)
        length = x.shape[1] if segments is None else segments.tokens.shape[1]
        mask = ops.spread_mask(_make_mask(length, caches[0]), self.config.num_attention_heads)
        rope = _make_rope(self.config, x, length, caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache, rope, segments)
        return self.norm(x)

    def logits(self, hidden_states: mx.array) -> mx.array:
        """[..., hidden_size] → [..., vocab_size]."""
        if self.config.tie_word_embeddings:
            return ops.as_linear(self.embed_tokens, hidden_states)
        return linear(self.lm_head, hidden_states)


def _is_step(cache: LayerCache | None, length: int) -> TypeGuard[KVCache | BatchLayer]:
    """Whether one token follows those in a cache of ours, the case with a shorter way."""
    return length == 1 and isinstance(cache, (KVCache, BatchLayer))


def _make_rope(config: TextConfig, x: mx.array, T: int, cache: LayerCache | None) -> RoPE:
    """Rotary positions, the same in all layers, for queries and keys [B, heads, T, D].

    In a step (see `_is_step`) they are for queries, keys and values in one, [B heads, 1, D]. The
    position of the values is 0, which rotates nothing, so that they can stay beside the keys.
    """
    B = len(x)
    offset: int | mx.array = 0 if cache is None else cache.offset
    if _is_step(cache, T):
        kv_heads = config.num_key_value_heads
        turned = config.num_attention_heads + kv_heads
        lengths = cache.lengths if isinstance(cache, BatchLayer) else [cache.offset] * B
        offset = mx.array([n for end in lengths for n in [end] * turned + [0] * kv_heads])
    return RoPE(x, T, config.head_dim, config.rope_theta, offset)


def _make_mask(length: int, cache: LayerCache | None) -> Mask:
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return None if length == 1 else "causal"
