"""Measure how much memory an answer takes beyond a quantized model's weights.

Activations cost the same in a decoder of two layers as in one of twenty-eight: only the KV cache
grows with depth, by the same amount per layer. So by default the peak is measured with two layers,
and the weights and the KV cache of the others are added. Weights are zeros, and every operation has
its form for a GPU. On a CPU, where half precision is slow, what is not quantized is float32:
activations then take twice their bytes, and the peak is an upper bound.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.bench.machine import device_name
from fastvlm_mlx.bench.work import size_of
from fastvlm_mlx.checkpoint.load import quantize_like
from fastvlm_mlx.checkpoint.names import fuse, unfuse
from fastvlm_mlx.checkpoint.quantize import quantize_checkpoint
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.ops import assume, on_cpu

from .random_checkpoint import SIZES, make_config
from .tables import Result

OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"choices": SIZES, "help": "of the model"},
    "--bits": {"type": int, "default": 4, "help": "per weight of the decoder"},
    "--image-size": {"default": 1024},
    "--dtype": {"help": "of the rest; by default float32 on a CPU, bfloat16 on a GPU"},
    "--layers": {"type": int, "default": 2, "help": "of the decoder to measure with"},
}
TEXT_TOKENS = 32
NEW_TOKENS = 4


def measure(args: argparse.Namespace) -> Result:
    """Bytes as measured, and of the whole depth."""
    dtype = args.dtype or ("float32" if on_cpu() else "bfloat16")
    depth = SIZES[args.size].get("num_hidden_layers")
    if not 1 <= args.layers <= depth:
        raise ValueError(f"--layers must be from 1 to {depth}.")
    with assume("cuda"):
        model = zero_model(args.size, args.layers, args.bits, getattr(mx, dtype))
        found = peaks(model, args.image_size)
    return {
        "kind": "memory",
        "size": args.size,
        "bits": args.bits,
        "dtype": dtype,
        "image_size": args.image_size,
        "device": device_name(),
        "layers": args.layers,
        "measured": found,
        "whole": deeper(found, depth - args.layers),
    }


def zero_model(size: str, layers: int, bits: int, dtype: mx.Dtype) -> FastVLM:
    """A model of a released size with that many layers, quantized, all zeros."""
    config = FastVLMConfig.from_dict(make_config(size, "bfloat16") | {"num_hidden_layers": layers})
    tensors = {
        name: mx.zeros(tensor.shape, dtype) for name, tensor in unfuse(FastVLM(config)).items()
    }
    tensors, quantization, _ = quantize_checkpoint(tensors, config, bits)
    model = FastVLM(replace(config, quantization=quantization))
    quantize_like(model, tensors)
    model.load_weights(list(fuse(tensors, model.config).items()))
    mx.eval(model.parameters())
    return model


def peaks(model: FastVLM, image_size: int) -> dict[str, int]:
    """Bytes beyond the weights, at most, while an image is encoded and while it is answered."""
    mx.clear_cache()
    weights = mx.get_active_memory()
    pixel_values = mx.zeros((1, image_size, image_size, 3))
    mx.reset_peak_memory()
    visual_tokens = model.encode_images(pixel_values)
    mx.eval(visual_tokens)
    encoding = mx.get_peak_memory() - weights
    mx.clear_cache()
    mx.reset_peak_memory()
    text, image = [0] * (TEXT_TOKENS // 2), [model.config.image_token_index]
    input_ids = [*text, *image * len(visual_tokens[0]), *text]
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=visual_tokens)
    cache = model.make_kv_cache()
    for _ in generate_tokens(model, input_ids, embeddings, cache, Options(), NEW_TOKENS):
        pass
    arrays = dict(tree_flatten([cache[0].keys, cache[0].values])).values()
    return {
        "weights": weights,
        "encoding": encoding,
        "answering": mx.get_peak_memory() - weights,
        "layer_weights": size_of(model.layers[0]),
        "layer_cache": sum(array.nbytes for array in arrays),
    }


def deeper(found: dict[str, int], layers: int) -> dict[str, int]:
    """The same bytes with that many layers more."""
    return found | {
        "weights": found["weights"] + layers * found["layer_weights"],
        "answering": found["answering"] + layers * found["layer_cache"],
    }
