"""Rotary position embeddings (RoFormer paper)."""

from __future__ import annotations

import mlx.core as mx

from . import cpu
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
        self.tables = cpu.rope_tables(x, length, dims, base, offset) if on_cpu() else None

    def __call__(self, x: mx.array) -> mx.array:
        """[..., T, D] → [..., T, D], rotated."""
        if self.tables is not None:
            return cpu.rotate(x, *self.tables)
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=1.0, offset=self.offset
        )
