"""The operations that the models are written in, each under its plain name.

An operation has one signature on all devices and chooses its form itself: MLX's own, which is the
one for a GPU, or for float32 on the CPU the one in `cpu`.
"""

from .activations import gated_gelu, gelu, swiglu
from .attention import (
    attention,
    causal_attention,
    most_queries,
    rearranged,
    spread_mask,
    takes_quantized_caches,
)
from .conv import DepthwiseConv, concatenated_gelu, depthwise, in_row_bands, interleaved
from .cpu_training import keep_freed_memory
from .device import (
    assume,
    clear_large_cache,
    differentiates_by_layer,
    exported,
    fast_dtype,
    images_at_once,
    on_cpu,
    on_metal,
    wired,
    wired_memory,
)
from .linear import (
    AdaptedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    UnfusedLinear,
    add_both,
    adds_early,
    as_linear,
    gains_from_fusing,
    linear,
    quantize,
    split_linear,
)
from .norm import BatchNorm, RMSNorm, mean_over_positions
from .process import check_process, note_computation
from .rope import RoPE

__all__ = [
    "AdaptedLinear",
    "BatchNorm",
    "DepthwiseConv",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RoPE",
    "UnfusedLinear",
    "add_both",
    "adds_early",
    "as_linear",
    "assume",
    "attention",
    "causal_attention",
    "check_process",
    "clear_large_cache",
    "concatenated_gelu",
    "depthwise",
    "differentiates_by_layer",
    "exported",
    "fast_dtype",
    "gains_from_fusing",
    "gated_gelu",
    "gelu",
    "images_at_once",
    "in_row_bands",
    "interleaved",
    "keep_freed_memory",
    "linear",
    "mean_over_positions",
    "most_queries",
    "note_computation",
    "on_cpu",
    "on_metal",
    "quantize",
    "rearranged",
    "split_linear",
    "spread_mask",
    "swiglu",
    "takes_quantized_caches",
    "wired",
    "wired_memory",
]
