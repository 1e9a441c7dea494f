"""Names and axes of the mlx-vlm layout ↔ parameters in memory."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import ops
from ..config import CheckpointError, FastVLMConfig
from ..model.fastvlm import FastVLM
from . import fold
from .files import Weights
from .layouts.mlx_vlm import DECODER, ENCODER, HEAD, LM_HEAD, VISION_TOWER, is_folded
from .quantize import LayerSettings, layer_settings

LAYERS = "mm_projector.layers."  # of the projector, in memory
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def quantized_linears(
    weights: Weights, config: FastVLMConfig
) -> Iterator[tuple[str, LayerSettings]]:
    """(name, settings) of each quantized layer of a checkpoint.

    Raises:
        CheckpointError: config.json has settings that do not exist.
    """
    base = {k: v for k, v in config.quantization.items() if k in ("group_size", "bits", "mode")}
    for name in weights:
        if name.endswith(".scales"):
            linear = name.removesuffix(".scales")
            own = config.quantization.get(linear)
            try:
                yield linear, layer_settings(own if isinstance(own, dict) else base)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"config.json, {linear}: {error}") from None


def fuse(weights: Weights, config: FastVLMConfig, *, apart: bool = False) -> Weights:
    """A checkpoint in the mlx-vlm layout → the parameters of `FastVLM`; empties `weights`.

    Args:
        weights: the checkpoint.
        config: of the model.
        apart: leave the decoder's projections apart, as after `FastVLM.unfuse`.
    """
    parameters: Weights = {}
    if not is_folded(weights):
        encoder = fold.fold_encoder(lambda name: weights.pop(ENCODER + name), config.vision)
        parameters = {VISION_TOWER + name: value for name, value in encoder.items()}
    weights.pop(HEAD, None)
    for i in range(config.projector_depth):
        source = _projector_name(config, i)
        for key in _keys_of(weights, source):
            parameters[f"{LAYERS}{i}.{key}"] = weights.pop(f"{source}.{key}")
    unfused = unfused_layers(weights, config)
    for i in range(0 if apart else config.text.num_hidden_layers):
        for whole in FUSED:
            layer = f"layers.{i}.{whole}"
            parameters |= _fuse_layer(weights, i, whole, is_fused=layer not in unfused)
    for name in list(weights):
        parameters[name.replace(DECODER, "language_model.", 1)] = weights.pop(name)
    return parameters


def _fuse_layer(weights: Weights, i: int, whole: str, *, is_fused: bool) -> Weights:
    """The parameters of one fused layer, or of its parts where they stay apart."""
    target = f"language_model.layers.{i}.{whole}"
    sources = [f"{DECODER}layers.{i}.{part}" for part in FUSED[whole]]
    parameters: Weights = {}
    if is_fused:
        for key in _keys_of(weights, sources[0]):
            tensors = [weights.pop(f"{source}.{key}") for source in sources]
            parameters[f"{target}.{key}"] = mx.concatenate(tensors)
        return parameters
    for n, source in enumerate(sources):
        for key in _keys_of(weights, source):
            parameters[f"{target}.layers.{n}.{key}"] = weights.pop(f"{source}.{key}")
    return parameters


def unfuse(model: FastVLM, *, folded: bool = False) -> Weights:
    """The inverse of `fuse`, with neutral BatchNorms, layer scales and head, and with zeros for the
    biases that `vision_tower.fold_biases` left to other layers. Parallel branches of an encoder in
    training form become one convolution each.

    Args:
        model: the model.
        folded: leave the encoder as it is in memory.
    """
    config = model.config
    parameters: Weights = dict(tree_flatten(model.parameters()))
    weights: Weights = {}
    if not folded:
        encoder = _unfold(parameters, config)
        weights = {ENCODER + name: value for name, value in encoder.items()}
        weights[HEAD] = mx.zeros((config.vision.hidden_size, config.vision.projection_dim))
    for name, value in parameters.items():
        if name.startswith(LAYERS):
            i, key = name.removeprefix(LAYERS).split(".")
            weights[f"{_projector_name(config, int(i))}.{key}"] = value
        elif name.startswith("language_model.") and not name.startswith(LM_HEAD):
            weights |= _split_fused(name.replace("language_model.", DECODER, 1), value, config)
        elif folded or not name.startswith(VISION_TOWER):
            weights[name] = value
    return weights


def _unfold(parameters: Weights, config: FastVLMConfig) -> Weights:
    """The encoder's parameters → the inference form, without the prefix of its names."""
    encoder = {
        name.removeprefix(VISION_TOWER): value
        for name, value in parameters.items()
        if name.startswith(VISION_TOWER)
    }
    if fold.is_training_form(encoder):
        return fold.reparameterize(encoder)
    for name, value in list(encoder.items()):
        if name.endswith(".convffn.conv.weight"):
            zeros = mx.zeros(len(value), value.dtype)
            encoder.setdefault(name.replace(".weight", ".bias"), zeros)
    return fold.unfold_encoder(encoder.__getitem__, config.vision)


def _split_fused(name: str, value: mx.array, config: FastVLMConfig) -> Weights:
    rows = fused_rows(config)
    for whole, parts in FUSED.items():
        if side := re.search(rf"\.{whole}\.layers\.(\d)\.", name):
            return {name.replace(side.group(), f".{parts[int(side.group(1))]}."): value}
        if f".{whole}." in name:
            ends = [sum(rows[whole][: i + 1]) for i in range(len(parts) - 1)]
            pieces = mx.split(value, ends)
            return {name.replace(whole, part): p for part, p in zip(parts, pieces, strict=True)}
    return {name: value}


def fused_rows(config: FastVLMConfig) -> dict[str, list[int]]:
    """The outputs of each part of a fused layer."""
    text = config.text
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    return {
        "self_attn.qkv_proj": [n * text.head_dim for n in heads],
        "mlp.gate_up_proj": [text.intermediate_size] * 2,
    }


def unfused_layers(weights: Weights, config: FastVLMConfig) -> set[str]:
    """The fused layers ("layers.0.mlp.gate_up_proj") whose parts stay apart in memory: those of
    different precisions, and those that are no faster as one product."""
    settings = dict(quantized_linears(weights, config))
    unfused = set()
    for i in range(config.text.num_hidden_layers):
        for whole, parts in FUSED.items():
            first, *others = (settings.get(f"{DECODER}layers.{i}.{part}") for part in parts)
            gains = ops.gains_from_fusing(whole == "mlp.gate_up_proj", first is not None)
            if not gains or any(other != first for other in others):
                unfused.add(f"layers.{i}.{whole}")
    return unfused


def stored_name(path: str, config: FastVLMConfig) -> str:
    """The name in a checkpoint of a layer in memory; that of the first part for a fused layer."""
    if path.startswith(LAYERS):
        return _projector_name(config, int(path.removeprefix(LAYERS)))
    if path.startswith((VISION_TOWER, LM_HEAD[:-1])):
        return path
    path = path.replace("language_model.", DECODER, 1)
    for whole, parts in FUSED.items():
        before, found, side = path.partition(whole)
        if found:
            return before + parts[int(side.removeprefix(".layers.") or 0)]
    return path


def memory_name(layer: str, config: FastVLMConfig, modules: Container[str]) -> tuple[str, int]:
    """(path, first row) in memory of a layer of a checkpoint, which may be part of a fused one.

    Args:
        layer: in the mlx-vlm layout; of the encoder, folded.
        config: the model's.
        modules: the paths that the model has.
    """
    if layer.startswith(VISION_TOWER):
        return layer, 0
    for i in range(config.projector_depth):
        if layer == _projector_name(config, i):
            return f"{LAYERS}{i}", 0
    path = layer.replace(DECODER, "language_model.", 1)
    for whole, parts in FUSED.items():
        for n, part in enumerate(parts):
            before = path.removesuffix(part)
            if before == path or path in modules:
                continue
            apart = f"{before}{whole}.layers.{n}"
            first = sum(fused_rows(config)[whole][:n])
            return (apart, 0) if apart in modules else (before + whole, first)
    return path, 0


def _projector_name(config: FastVLMConfig, layer: int) -> str:
    """The projector's layers are numbered as in the original's Sequential, which counts GELUs."""
    linear = config.mm_projector_type == "linear"
    return "mm_projector" if linear else f"mm_projector.{2 * layer}"


def _keys_of(weights: Weights, module: str) -> list[str]:
    keys = ("weight", "bias", "scales", "biases")
    return [key for key in keys if f"{module}.{key}" in weights]
