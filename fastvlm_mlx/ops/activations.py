"""GELU and SwiGLU."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .device import on_cpu


def gelu(x: mx.array) -> mx.array:
    """The exact GELU: x times the normal distribution function of x."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(mx.array, cpu.gelu(x))
    return nn.gelu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    if on_cpu() and gate.dtype == mx.float32:
        return cast(mx.array, cpu.swiglu(gate, up))
    return _swiglu(gate, up)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up
