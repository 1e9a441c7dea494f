"""Scaled dot-product attention, of all positions to all and of a decoder to its KV cache."""

from __future__ import annotations

import sys
from typing import Any, cast

import mlx.core as mx

from . import cpu
from .device import is_exported, on_cpu, on_metal

FUSED_HEAD_DIM = 64  # the narrowest heads that Metal's attention kernel takes
# What Metal's kernel for few queries (`sdpa_vector`) takes, from `has_fused_kernel` in MLX's
# scaled_dot_product_attention.cpp, where the rest is computed step by step:
#     if (query_sequence_length > 8) { … } else { …
#       if (query_sequence_length * gqa_factor > 32) { … return {false, msg.str()}; }
# and of the heads, "the vector attention kernel supports head dims {64, 96, 128, 192, 256}", of
# which `use_fallback` leaves out 192.
VECTOR_QUERIES, VECTOR_QUERIES_PER_GROUP = 8, 32
VECTOR_HEAD_DIMS = (64, 96, 128, 256)


def attention(qkv: mx.array, scale: float, *, training: bool = False) -> mx.array:
    """Attention of all positions to all.

    On Metal, narrower heads are padded with zeros, which change nothing, to the width that its
    kernel takes: the scores, 100 MB per block for an image of 1024 pixels, then never reach memory.

    Args:
        qkv: queries, keys and values of all heads, [B, N, 3 heads, D].
        scale: of the scores.
        training: whether gradients pass through it; Metal's kernel has none.

    Returns:
        [B, N, heads, D].
    """
    D = qkv.shape[-1]
    if on_metal() and D < FUSED_HEAD_DIM and not training:
        qkv = mx.pad(qkv, [(0, 0), (0, 0), (0, 0), (0, FUSED_HEAD_DIM - D)])
    q, k, v = mx.split(qkv.swapaxes(1, 2), 3, axis=1)
    if on_cpu() and q.dtype == mx.float32 and not training:
        return cpu.attention(q, k, v, scale).swapaxes(1, 2)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    return y.swapaxes(1, 2)[..., :D]


def takes_quantized_caches() -> bool:
    """Whether a KV cache may be quantized: MLX on CUDA lacks the products that attention over one
    is made of."""
    return on_cpu() or on_metal()


def most_queries(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """The most new positions of a sequence whose attention is as fast as that of one."""
    if not on_metal() or head_dim not in VECTOR_HEAD_DIMS:
        return sys.maxsize
    return min(VECTOR_QUERIES, VECTOR_QUERIES_PER_GROUP // (num_heads // num_kv_heads))


def spread_mask(mask: mx.array | str | None, num_heads: int) -> mx.array | str | None:
    """The mask of all layers as Metal's attention takes it: an array is written out for each head.

    Otherwise the kernel for few queries would do so in every layer (`mask_copy_unless` in MLX's
    scaled_dot_product_attention.cpp).
    """
    if not isinstance(mask, mx.array) or not on_metal() or mask.ndim < 4 or len(mask) == 1:
        return mask
    B, _, T, S = mask.shape
    return mx.contiguous(mx.broadcast_to(mask, (B, num_heads, T, S)))


def causal_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention of new positions to those of a KV cache, themselves included.

    Args:
        queries: [B, heads, T, D].
        keys, values: [B, kv_heads, S, D], as the cache gave them; a quantized cache of mlx_lm gives
            its packed parts.
        cache: the KV cache, ours or one of mlx_lm's, or None.
        scale: of the scores.
        mask: which scores count: "causal", an array that broadcasts to [B, heads, T, S], or None
            for all.

    Returns:
        [B, heads, T, D].
    """
    if hasattr(cache, "bits"):
        from mlx_lm.models.base import quantized_scaled_dot_product_attention

        return quantized_scaled_dot_product_attention(
            queries, keys, values, scale, mask, group_size=cache.group_size, bits=cache.bits
        )
    is_causal = isinstance(mask, str) and mask == "causal"
    if is_causal and cache is not None and on_cpu() and queries.dtype == mx.float32:
        return cpu.causal_attention(queries, keys, values, scale)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def rearranged(x: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
    """Rows in other places, as sequences that attend apart need them.

    Its gradient takes rows as well, from where they went, instead of adding each up where it came
    from, which is slow on a CPU and not repeatable on a GPU.

    Args:
        x: [A, B, ...], whose rows are numbered through both axes.
        sources: int32 [C, D], the number of the row that comes to each place, none twice; -1 where
            any may come, which is then used for nothing.
        targets: int32 [A, B], the number of the place that each row goes to; -1 for none.

    Returns:
        [C, D, ...].
    """
    if is_exported():
        return _take(x, sources)
    return cast(mx.array, _rearranged(x, sources, targets))


def _take(x: mx.array, rows: mx.array) -> mx.array:
    return x.flatten(0, 1)[mx.maximum(rows, 0)]


@mx.custom_function
def _rearranged(x: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
    return _take(x, sources)


@_rearranged.vjp
def _(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
    _, sources, targets = primals
    came_from = _take(cotangent, targets)
    went = (targets >= 0).reshape(*targets.shape, *[1] * (came_from.ndim - 2))
    to_x = mx.where(went, came_from, mx.zeros((), came_from.dtype))
    return [to_x, mx.zeros_like(sources), mx.zeros_like(targets)]
