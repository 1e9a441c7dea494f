"""Names and axes of the mlx-vlm layout ↔ parameters in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import CheckpointError, FastVLMConfig
from ..model.fastvlm import FastVLM
from ..ops import on_cpu
from . import fold
from .fold import Weights
from .quantize import Settings, layer_settings

VISION = "vision_tower.vision_model."
FOLDED = "vision_tower.stem."  # a folder with a quantized encoder has the names of `FastViTHD`
HEAD = f"{VISION}head.proj"
DECODER = "language_model.model."
LM_HEAD = "language_model.lm_head."
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def is_folded(weights: Weights) -> bool:
    """Whether a checkpoint holds the encoder in the names of `vision.FastViTHD`."""
    return any(name.startswith(FOLDED) for name in weights)


def quantized_linears(weights: Weights, config: FastVLMConfig) -> Iterator[tuple[str, Settings]]:
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


def fuse(weights: Weights, config: FastVLMConfig) -> Weights:
    """A checkpoint in the mlx-vlm layout → the parameters of `FastVLM`; empties `weights`."""
    parameters: Weights = {}
    if not is_folded(weights):
        encoder = fold.fold_encoder(lambda name: weights.pop(VISION + name), config.vision)
        parameters = {f"vision_tower.{name}": value for name, value in encoder.items()}
    weights.pop(HEAD, None)
    for i in range(config.projector_depth):
        source = projector_name(config, i)
        for key in _keys_of(weights, source):
            parameters[f"mm_projector.layers.{i}.{key}"] = weights.pop(f"{source}.{key}")
    apart = _apart(weights, config)
    for i in range(config.text.num_hidden_layers):
        for whole, parts in FUSED.items():
            target = f"language_model.layers.{i}.{whole}"
            sources = [f"{DECODER}layers.{i}.{part}" for part in parts]
            if f"layers.{i}.{whole}" in apart:
                for n, source in enumerate(sources):
                    for key in _keys_of(weights, source):
                        parameters[f"{target}.layers.{n}.{key}"] = weights.pop(f"{source}.{key}")
            for key in _keys_of(weights, sources[0]):
                tensors = [weights.pop(f"{source}.{key}") for source in sources]
                parameters[f"{target}.{key}"] = mx.concatenate(tensors)
    for name in list(weights):
        parameters[name.replace(DECODER, "language_model.", 1)] = weights.pop(name)
    return parameters


def unfuse(model: FastVLM, *, folded: bool = False) -> Weights:
    """The inverse of `fuse`, with neutral BatchNorms, layer scales and head.

    Args:
        model: the model.
        folded: leave the encoder as it is in memory.
    """
    config = model.config
    parameters: Weights = dict(tree_flatten(model.parameters()))
    weights: Weights = {}
    if not folded:
        encoder = fold.unfold_encoder(
            lambda name: parameters[f"vision_tower.{name}"], config.vision
        )
        weights = {VISION + name: value for name, value in encoder.items()}
        weights[HEAD] = mx.zeros((config.vision.hidden_size, config.vision.projection_dim))
    for name, value in parameters.items():
        if name.startswith("mm_projector.layers."):
            _, _, i, key = name.split(".")
            weights[f"{projector_name(config, int(i))}.{key}"] = value
        elif name.startswith("language_model.") and not name.startswith(LM_HEAD):
            weights |= _split_fused(name.replace("language_model.", DECODER, 1), value, config)
        elif folded or not name.startswith("vision_tower."):
            weights[name] = value
    return weights


def _split_fused(name: str, value: mx.array, config: FastVLMConfig) -> Weights:
    rows = _fused_rows(config)
    for whole, parts in FUSED.items():
        if side := re.search(rf"\.{whole}\.layers\.(\d)\.", name):
            return {name.replace(side.group(), f".{parts[int(side.group(1))]}."): value}
        if f".{whole}." in name:
            ends = [sum(rows[whole][: i + 1]) for i in range(len(parts) - 1)]
            pieces = mx.split(value, ends)
            return {name.replace(whole, part): p for part, p in zip(parts, pieces, strict=True)}
    return {name: value}


def _fused_rows(config: FastVLMConfig) -> dict[str, list[int]]:
    """Outputs of each part of a fused layer."""
    text = config.text
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    return {
        "self_attn.qkv_proj": [n * text.head_dim for n in heads],
        "mlp.gate_up_proj": [text.intermediate_size] * 2,
    }


def projector_name(config: FastVLMConfig, layer: int) -> str:
    """The projector's layers are numbered as in the original's Sequential, GELUs counted."""
    linear = config.mm_projector_type == "linear"
    return "mm_projector" if linear else f"mm_projector.{2 * layer}"


def _keys_of(weights: Weights, module: str) -> list[str]:
    keys = ("weight", "bias", "scales", "biases")
    return [key for key in keys if f"{module}.{key}" in weights]


def _apart(weights: Weights, config: FastVLMConfig) -> set[str]:
    """The layers ("layers.0.mlp.gate_up_proj") whose parts stay apart: those of unlike precision,
    and on the CPU the large ones in float, which are not faster joined and take time to join."""
    settings = dict(quantized_linears(weights, config))
    apart = set()
    for i in range(config.text.num_hidden_layers):
        for whole, parts in FUSED.items():
            found = [settings.get(f"{DECODER}layers.{i}.{part}") for part in parts]
            large_float = whole == "mlp.gate_up_proj" and found[0] is None and on_cpu()
            if large_float or any(other != found[0] for other in found):
                apart.add(f"layers.{i}.{whole}")
    return apart


def source_name(path: str, config: FastVLMConfig) -> str:
    """A checkpoint's name of a layer in memory; the first part's of a fused one."""
    if path.startswith("mm_projector.layers."):
        return projector_name(config, int(path.rsplit(".", 1)[1]))
    if path.startswith(("vision_tower.", LM_HEAD[:-1])):
        return path
    path = path.replace("language_model.", DECODER, 1)
    for whole, parts in FUSED.items():
        before, found, side = path.partition(whole)
        if found:
            return before + parts[int(side.removeprefix(".layers.") or 0)]
    return path
