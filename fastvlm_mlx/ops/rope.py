"""Rotary position embeddings (RoFormer paper)."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from .device import on_cpu


class RoPE:
    """The rotation of queries and keys [..., T, D] at positions from an offset on.

    It is made once per pass and serves all layers.

    Args:
        x: an array of the model's dtype, whose first axis is the batch.
        length: T.
        dims: D.
        base: of the frequencies (`rope_theta`).
        offset: the first position; an array holds one per row.
    """

    def __init__(
        self, x: mx.array, length: int, dims: int, base: float, offset: int | mx.array
    ) -> None:
        self.dims, self.base, self.offset = dims, base, offset
        self.tables: tuple[mx.array, mx.array] | None = None
        if on_cpu():  # where MLX would compute the tables anew in every layer
            if isinstance(offset, mx.array) and offset.size > 1:  # one per row: [B, 1] or [B, 1, 1]
                offset = offset[:, None] if x.shape[0] != offset.size else offset[:, None, None]
            cos, sin = _tables(mx.arange(length, dtype=mx.float32) + offset, dims, base)
            self.tables = cos.astype(x.dtype), sin.astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., T, D] → [..., T, D], rotated."""
        if self.tables is not None:
            a, b = mx.split(x, 2, axis=-1)
            return mx.concatenate(_rotate(a, b, *self.tables), axis=-1)
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=1.0, offset=self.offset
        )


def _tables(positions: mx.array, dims: int, base: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines [..., T, D/2] of the angles at positions [..., T]."""
    frequencies = mx.exp(
        mx.arange(0, -dims // 2, -1, dtype=mx.float32) * (math.log(base) / (dims // 2))
    )
    angles = positions[..., None] * frequencies
    return mx.cos(angles), mx.sin(angles)


@partial(mx.compile, shapeless=True)
def _rotate(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> list[mx.array]:
    dtype = a.dtype
    return [(a * cos - b * sin).astype(dtype), (a * sin + b * cos).astype(dtype)]
