"""Names, shapes and axes of tensors: those of the released checkpoints, and those in memory."""

import gzip
import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import MIB, peak_memory
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint.layouts import llava, mlx_vlm
from fastvlm_mlx.checkpoint.names import fuse, unfuse
from fastvlm_mlx.checkpoint.quantize import quantize_checkpoint
from fastvlm_mlx.checkpoint.read import check_tensors, trust_tensors
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.model.fastvlm import FastVLM

# The decoders of the released checkpoints.
TEXT = {
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864},
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def released_config(size: str, **changes) -> FastVLMConfig:
    fields = {
        "model_type": "llava_qwen2",
        "mm_vision_tower": "mobileclip_l_1024",
        "mm_projector_type": "mlp2x_gelu",
        "vocab_size": 151936,
    }
    return FastVLMConfig.from_dict(fields | TEXT[size] | changes)


def manifest(data: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released checkpoint."""
    content = json.loads(gzip.decompress((data / "manifests" / f"{name}.json.gz").read_bytes()))
    return {name: tuple(shape) for name, (shape, _) in content.items()}


def shapes_of(tensors: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


# --- the released checkpoints ---


@pytest.mark.parametrize("size", TEXT)
def test_tensors_of_the_original_checkpoints(data, size):
    with peak_memory() as used:
        found = llava.from_mlx(unfuse(FastVLM(released_config(size))))
    assert shapes_of(found) == manifest(data, f"llava-fastvithd_{size}")
    assert used[0] < MIB


def test_tensors_of_the_mlx_layout(data):
    with peak_memory() as used:
        found = unfuse(FastVLM(released_config("0.5b")))
    assert shapes_of(found) == manifest(data, "mlx-vlm_0.5b_fp16")
    assert used[0] < MIB


def test_tensors_of_the_mlx_layout_quantized(data):
    with peak_memory() as used:
        found = quantize_checkpoint(
            unfuse(FastVLM(released_config("0.5b"))), released_config("0.5b"), 4
        )[0]
    assert shapes_of(found) == manifest(data, "mlx-vlm_0.5b_q4")
    assert used[0] < MIB


@pytest.mark.parametrize("name, fields", [("fp16", {}), ("q4", {"bits": 4, "group_size": 64})])
def test_released_tensors_in_the_mlx_layout_are_taken(data, name, fields):
    tensors = {k: mx.zeros(shape) for k, shape in manifest(data, f"mlx-vlm_0.5b_{name}").items()}
    config = released_config("0.5b", quantization=fields)
    with peak_memory() as used:
        check_tensors(tensors, config, mlx_vlm, Path("folder"))
    assert used[0] < MIB


@pytest.mark.parametrize("size", TEXT)
def test_released_tensors_in_the_original_layout_are_taken(data, size):
    names = manifest(data, f"llava-fastvithd_{size}")
    tensors = llava.to_mlx({name: mx.zeros(shape) for name, shape in names.items()})
    config = trust_tensors(released_config(size), tensors)
    assert config.text.tie_word_embeddings is (size != "7b")
    check_tensors(tensors, config, llava, Path("folder"))


def test_the_encoder_has_125_1_million_parameters():
    tensors = unfuse(FastVLM(released_config("0.5b")))
    count = sum(math.prod(t.shape) for n, t in tensors.items() if n.startswith("vision_tower."))
    assert round(count / 1e6, 1) == 125.1


# --- in memory ---


def test_unfusing_is_the_inverse_of_fusing(small_folder):
    with ops.assume("cpu"):  # for a GPU some biases would go into their neighbours too
        model = fv.load_model(small_folder)
        tensors = unfuse(model)
        again = fuse(dict(tensors), model.config)
    parameters = dict(tree_flatten(model.parameters()))
    assert again.keys() == parameters.keys()
    assert all(mx.allclose(again[k], parameters[k], rtol=1e-6, atol=0) for k in again)
