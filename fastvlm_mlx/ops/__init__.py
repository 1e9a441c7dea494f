"""The operations that the models are written in, each under its plain name.

An operation has one signature on all devices and chooses its form itself: MLX's own, which is the
one for a GPU, or for float32 on the CPU the one in `cpu`.
"""

from .activations import gelu, swiglu
from .attention import attention, causal_attention
from .conv import DepthwiseConv, in_row_bands
from .device import assume, fast_dtype, on_cpu, on_metal, wire_memory
from .linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    UnfusedLinear,
    adds_early,
    as_linear,
    gains_from_fusing,
    linear,
    quantize,
    split_linear,
)
from .norm import RMSNorm
from .process import check_process, note_computation
from .rope import RoPE

__all__ = [
    "DepthwiseConv",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RoPE",
    "UnfusedLinear",
    "adds_early",
    "as_linear",
    "assume",
    "attention",
    "causal_attention",
    "check_process",
    "fast_dtype",
    "gains_from_fusing",
    "gelu",
    "in_row_bands",
    "linear",
    "note_computation",
    "on_cpu",
    "on_metal",
    "quantize",
    "split_linear",
    "swiglu",
    "wire_memory",
]
