"""Measure how much memory an answer takes beyond a quantized model's weights.

    python benchmarks/memory.py 7b --bits 4

Activations cost the same in a decoder of two layers as in one of twenty-eight: what grows with
depth is the KV cache, by the same for each layer. So by default the peak is measured with two
layers, and the weights and the KV cache of the others are added. Weights are zeros, and everything
has the form in which it runs on a GPU. On the CPU, where half precision is slow, what is not
quantized is float32: activations then take twice their bytes, and the peak is an upper bound.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from machine import command_line, describe_machine, write_result
from mlx.utils import tree_flatten
from mlx_sides import device_name
from random_checkpoint import SIZES, make_config
from worker import DTYPES

from fastvlm_mlx.checkpoint.load import quantize_like
from fastvlm_mlx.checkpoint.names import fuse, unfuse
from fastvlm_mlx.checkpoint.quantize import quantize_checkpoint
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.ops import assume, on_cpu

TEXT_TOKENS = 32
NEW_TOKENS = 4


def zero_model(size: str, layers: int, bits: int, dtype: mx.Dtype) -> FastVLM:
    """A model of a released size with so many layers, quantized as the library does, all zeros."""
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
    features = model.encode_images(pixel_values)
    mx.eval(features)
    encoding = mx.get_peak_memory() - weights
    mx.clear_cache()
    mx.reset_peak_memory()
    input_ids = [0] * (TEXT_TOKENS // 2) + [-200] * len(features[0]) + [0] * (TEXT_TOKENS // 2)
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=features)
    cache = model.make_kv_cache()
    for _ in generate_tokens(model, input_ids, embeddings, cache, Options(), NEW_TOKENS):
        pass
    return {
        "weights": weights,
        "encoding": encoding,
        "answering": mx.get_peak_memory() - weights,
        "layer_weights": nbytes(model.layers[0].parameters()),
        "layer_cache": nbytes([cache[0].keys, cache[0].values]),
    }


def nbytes(arrays: Any) -> int:
    """Of a tree of arrays."""
    return sum(array.nbytes for array in dict(tree_flatten(arrays)).values())


def deeper(found: dict[str, int], layers: int) -> dict[str, int]:
    """The same with so many layers more."""
    return found | {
        "weights": found["weights"] + layers * found["layer_weights"],
        "answering": found["answering"] + layers * found["layer_cache"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="memory.py", description="Measure the memory of an answer beyond the weights."
    )
    parser.add_argument("size", choices=SIZES, help="of the model")
    parser.add_argument("--bits", type=int, default=4, help="a weight of the decoder; default: 4")
    parser.add_argument("--image-size", type=int, default=1024, help="in pixels; default: 1024")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the rest; default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument(
        "--layers", type=int, default=2, help="of the decoder to measure with; default: 2"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    args = parser.parse_args()
    dtype = args.dtype or ("float32" if on_cpu() else "bfloat16")
    depth = SIZES[args.size]["num_hidden_layers"]
    if not 1 <= args.layers <= depth:
        parser.error(f"--layers must be from 1 to {depth}.")
    try:
        with assume("cuda"):
            model = zero_model(args.size, args.layers, args.bits, getattr(mx, dtype))
            found = peaks(model, args.image_size)
    except ValueError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "command": command_line(parser, args),
        "kind": "memory",
        "size": args.size,
        "bits": args.bits,
        "dtype": dtype,
        "image_size": args.image_size,
        "device": device_name(),
        "machine": describe_machine(),
        "layers": args.layers,
        "measured": found,
        "whole": deeper(found, depth - args.layers),
    }
    write_result(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
