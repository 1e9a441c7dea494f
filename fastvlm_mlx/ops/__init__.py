"""The operations that the models are written in.

Each has a portable form, which is MLX's own and the one for a GPU; where MLX's CPU backend has a
faster form for float32, `cpu` holds it, and the choice is made here.
"""

from .activations import gelu, swiglu
from .attention import attention, causal_attention
from .conv import DepthwiseConv, in_row_bands
from .device import assume, on_cpu, on_metal
from .linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    UnfusedLinear,
    as_linear,
    linear,
    quantize,
    split_linear,
)
from .norm import RMSNorm
from .rope import RoPE

__all__ = [
    "DepthwiseConv",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RoPE",
    "UnfusedLinear",
    "as_linear",
    "assume",
    "attention",
    "causal_attention",
    "gelu",
    "in_row_bands",
    "linear",
    "on_cpu",
    "on_metal",
    "quantize",
    "split_linear",
    "swiglu",
]
