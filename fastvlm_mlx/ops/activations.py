"""GELU and SwiGLU.

`training` asks for the form that gradients pass through: under `mx.grad` compiled functions fall
apart into single operations, of which MLX's own form has the fewest. SwiGLU, the widest array of a
decoder, has a gradient of its own, for which only its inputs are held and not what lies between.

Off the CPU each is one kernel, computed in float32 whatever the arrays are: in float16,
1 + erf(x) keeps three digits of GELU's negative side, and 2 x overflows. Compiled functions are
`shapeless`: otherwise MLX would trace and keep them again for each length of a prompt.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import mlx.core as mx

from . import cpu
from .device import is_exported, on_cpu


def gelu(x: mx.array, bias: mx.array | None = None, *, training: bool = False) -> mx.array:
    """The exact GELU, x times the normal distribution function of x; of x + bias, if there is one.

    Args:
        x: [..., C].
        bias: [C].
        training: whether gradients pass through it.
    """
    if on_cpu() and x.dtype == mx.float32 and not training:
        return cast(mx.array, cpu.gelu(x if bias is None else x + bias))
    return _gelu(x) if bias is None else _biased_gelu(x, bias)


def swiglu(gate: mx.array, up: mx.array, *, training: bool = False) -> mx.array:
    """silu(gate) * up."""
    if training:
        return gate * up if is_exported() else cast(mx.array, _trained_swiglu(gate, up))
    if on_cpu() and gate.dtype == mx.float32:
        return cast(mx.array, cpu.swiglu(gate, up))
    return _swiglu(gate, up)


def gated_gelu(x: mx.array, gate: mx.array, *, training: bool = False) -> mx.array:
    """gelu(sigmoid(gate) * x)."""
    if on_cpu() and x.dtype == mx.float32 and not training:
        return cast(mx.array, cpu.gelu(x * mx.sigmoid(gate)))
    return _gated_gelu(x, gate)


def gelu_in_float32(x: mx.array) -> mx.array:
    """The exact GELU of float32, as a part of what is compiled."""
    return 0.5 * x * (1 + mx.erf(x * 0.5**0.5))


@partial(mx.compile, shapeless=True)
def _gelu(x: mx.array) -> mx.array:
    return gelu_in_float32(x.astype(mx.float32)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _biased_gelu(x: mx.array, bias: mx.array) -> mx.array:
    biased = x.astype(mx.float32) + bias.astype(mx.float32)
    return gelu_in_float32(biased).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up.astype(mx.float32)).astype(gate.dtype)


@mx.custom_function
def _trained_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu(gate, up)


@_trained_swiglu.vjp
def _(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
    gate, up = primals
    return _swiglu_gradients(gate, up, cotangent)


@partial(mx.compile, shapeless=True)
def _swiglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> list[mx.array]:
    wide, to_y = gate.astype(mx.float32), cotangent.astype(mx.float32)
    share = mx.sigmoid(wide)
    to_gate = to_y * up.astype(mx.float32) * share * (1 + wide * (1 - share))
    return [to_gate.astype(gate.dtype), (to_y * wide * share).astype(up.dtype)]


@partial(mx.compile, shapeless=True)
def _gated_gelu(x: mx.array, gate: mx.array) -> mx.array:
    scaled = x.astype(mx.float32) * mx.sigmoid(gate.astype(mx.float32))
    return gelu_in_float32(scaled).astype(x.dtype)
