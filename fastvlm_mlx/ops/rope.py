"""Rotary positions."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import cpu
from .device import on_cpu


class RoPE:
    """The rotation of queries and keys [..., T, D] at positions from an offset on.

    It is made once for all layers of a pass.

    Args:
        x: of the model's dtype.
        length: T.
        dims, base: D and theta.
        offset: of the first position; an array gives one to each row.
    """

    def __init__(self, x: mx.array, length: int, dims: int, base: float, offset: Any):
        self.dims, self.base, self.offset = dims, base, offset
        self.tables = cpu.rope_tables(x, length, dims, base, offset) if on_cpu() else None

    def __call__(self, x: mx.array) -> mx.array:
        if self.tables is not None:
            return cpu.rotate(x, *self.tables)
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=1.0, offset=self.offset
        )
