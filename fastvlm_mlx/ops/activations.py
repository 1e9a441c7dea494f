"""GELU and SwiGLU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .device import on_cpu


def gelu(x: mx.array) -> mx.array:
    """The exact GELU: x times the normal distribution function."""
    return cpu.gelu(x) if on_cpu() and x.dtype == mx.float32 else nn.gelu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return cpu.swiglu(gate, up) if on_cpu() and gate.dtype == mx.float32 else _swiglu(gate, up)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up
