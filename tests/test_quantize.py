import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint import fold
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.quantize import (
    MIXED,
    MODES,
    is_sensitive,
    layer_settings,
    parse_quantize,
    quantize_checkpoint,
)
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.convert import convert
from fastvlm_mlx.ops import UnfusedLinear

IDS = mx.array([[5, 9, 11, -200, -200, -200, -200, 17, 23]])


def outputs(model):
    pixel_values = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(1))
    return model.vision_tower(pixel_values), model(IDS, pixel_values=pixel_values)


def leaves(model, kind):
    found = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {name for name, module in found if isinstance(module, kind)}


QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_loads_from_a_folder_as_while_loading(small_folder, tmp_path, mode):
    given = {"mode": mode, "group_size": 32 if mode == "affine" else None, "vision": mode}
    if mode == "affine":
        given["vision"] = {"bits": 8, "group_size": 32}
    folder = convert(small_folder, tmp_path / "q", quantize=given, progress=False)
    features, logits = outputs(load_model(folder))
    direct_features, direct_logits = outputs(load_model(small_folder, quantize=given))
    assert mx.array_equal(features, direct_features) and mx.array_equal(logits, direct_logits)
    exact_features, exact_logits = outputs(load_model(small_folder))
    assert 0 < mx.abs(logits - exact_logits).mean() < mx.std(exact_logits)
    assert 0 < mx.abs(features - exact_features).mean() < mx.std(exact_features)


def test_dequantized_weights_give_the_same_model(small_folder):
    """Quantized layers compute with what `mx.dequantize` gives, in their places in memory."""
    quantized = load_model(small_folder, quantize={"bits": 8, "group_size": 32, "vision": 8})
    with ops.assume("cpu"):  # so that no bias was multiplied by a weight that is replaced below
        plain = load_model(small_folder, dtype="float32")
    modules = dict(tree_flatten(plain.leaf_modules(), is_leaf=nn.Module.is_module))
    for name, packed in tree_flatten(quantized.leaf_modules(), is_leaf=nn.Module.is_module):
        if isinstance(packed, QUANTIZED):
            kept = {"group_size": packed.group_size, "bits": packed.bits}
            weight = mx.dequantize(packed.weight, packed.scales, packed.biases, **kept)
            apart = [m for n, m in modules.items() if n.startswith(f"{name}.layers.")]
            parts = apart or [modules[name]]
            for part, rows in zip(parts, mx.split(weight, len(parts)), strict=True):
                part.weight = rows
    assert len(leaves(quantized, QUANTIZED)) > 20
    for found, wanted in zip(outputs(quantized), outputs(plain), strict=True):
        assert mx.abs(found - wanted).max() < 1e-3 * mx.std(wanted)


def test_parts_have_their_own_settings(small_folder):
    group = {"group_size": 32}
    given = {
        **group,
        "bits": 4,
        "vision": {"bits": 8, **group},
        "projector": False,
        "embeddings": {"bits": 6, **group},
    }
    model = load_model(small_folder, quantize=given)
    bits = {
        name: module.bits
        for name, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
        if isinstance(module, QUANTIZED)
    }
    assert {b for n, b in bits.items() if n.startswith("vision_tower")} == {8}
    assert {b for n, b in bits.items() if ".layers." in n} == {4}
    assert bits["language_model.embed_tokens"] == 6
    assert not any(n.startswith("mm_projector") for n in bits)


def test_layers_that_no_group_divides_stay_and_are_listed(small_folder):
    config, tensors = read_checkpoint(small_folder)
    given = {"vision": {"bits": 8, "group_size": 32}}
    packed, entry, kept = quantize_checkpoint(tensors, config, given)
    assert "vision_tower.stem.pointwise" in kept  # 16 channels
    assert "vision_tower.stem.pointwise.scales" not in packed
    assert all(name.startswith("vision_tower.") for name in kept)
    assert not any(name.endswith(".scales") for name in packed if name.startswith("language"))
    assert entry["bits"] == 8


@pytest.mark.parametrize("preset", MIXED)
def test_mixed_presets_give_sensitive_layers_more_bits(small_folder, tmp_path, preset):
    low, high = MIXED[preset]
    given = {"preset": preset, "group_size": 32}
    folder = convert(small_folder, tmp_path / "q", quantize=given, progress=False)
    written = json.loads((folder / "config.json").read_text())["quantization"]
    sensitive = [n for n, s in written.items() if isinstance(s, dict) and s["bits"] == high]
    assert sensitive and all(n.endswith(("v_proj", "down_proj", "lm_head")) for n in sensitive)
    assert written["bits"] == low
    model = load_model(folder)
    assert leaves(model, UnfusedLinear) or any(
        isinstance(layer.self_attn.qkv_proj, UnfusedLinear) for layer in model.layers
    )
    assert mx.isfinite(outputs(model)[1]).all()


def test_sensitive_layers_are_those_of_mlx_lm():
    down = "language_model.model.layers.{}.mlp.down_proj.weight"
    found = [i for i in range(24) if is_sensitive(down.format(i), 24)]
    assert found == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert not is_sensitive("language_model.model.layers.0.mlp.up_proj.weight", 24)
    assert is_sensitive("language_model.lm_head.weight", 24)


def test_quantizing_commutes_with_folding(small_folder):
    """Scaling the rows of packed weights is scaling their scales and biases."""
    _, tensors = read_checkpoint(small_folder)
    name = "vision_tower.vision_model.network.7.0.convffn.fc2.weight"
    matrix = tensors[name].flatten(1)
    scale = mx.random.uniform(0.1, 2, (matrix.shape[0], 1))
    q, s, b = mx.quantize(matrix, group_size=32, bits=8)
    folded_after = mx.dequantize(q, s * scale, b * scale, group_size=32, bits=8)
    folded_before = mx.dequantize(
        *mx.quantize(matrix * scale, group_size=32, bits=8), group_size=32, bits=8
    )
    step = mx.abs(s * scale).max()
    assert mx.abs(folded_after - folded_before).max() <= 1.01 * step  # at most a rounding apart
    assert mx.abs(folded_after - matrix * scale).max() <= 1.01 * step
    assert fold.BATCH_NORM_EPS > 0


@pytest.mark.parametrize(
    "given",
    [
        1,
        7,
        "magic",
        "mixed-9-9",
        {},
        {"bits": 4, "group_size": 48},
        {"mode": "mxfp4", "bits": 8},
        {"mode": "nvfp4", "group_size": 64},
        {"speed": 3},
        {"vision": 7},
        {"preset": "mixed"},
    ],
)
def test_settings_that_do_not_exist(small_folder, given):
    with pytest.raises(ValueError, match="quantize:"):
        load_model(small_folder, quantize=given)


def test_settings_by_name():
    assert parse_quantize("4") == {"bits": 4} and parse_quantize("mxfp8") == {"mode": "mxfp8"}
    assert parse_quantize("mixed-4-6") == {"preset": "mixed-4-6"}
    assert layer_settings({"mode": "mxfp4"}) == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_nano_answers_with_a_quantized_encoder(tmp_path):
    model, processor = fv.load()
    with pytest.raises(ValueError, match="quantized already"):
        fv.load(quantize=8)
    assert processor.image_size == 256 and model.config.quantization["bits"] == 8
