"""Which layers are stored in how many bits.

A plan gives each linear layer and embedding of a checkpoint its settings (bits, group_size, mode)
as config.json records them and mlx_lm and mlx-vlm read them. Encoder, projector, decoder and
embeddings can each have their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import mlx.core as mx

from ..checks import brief
from ..config import FastVLMConfig
from . import fold
from .files import NAN_SCALE, Weights
from .layouts.mlx_vlm import DECODER, ENCODER, HEAD, LM_HEAD, PROJECTOR, VISION_TOWER, dtype_of

Quantize: TypeAlias = int | str | Mapping[str, Any]
"""What to quantize how, as `parse_quantize` reads it."""

LayerSettings: TypeAlias = dict[str, Any]
"""group_size, bits and mode of a layer, as `mx.quantize` takes them."""

# (group_size, bits) of each of MLX's modes; only affine has others, too.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# (bits, bits of the sensitive layers), as in mlx_lm's recipes.
MIXED = {"mixed-2-6": (2, 6), "mixed-3-4": (3, 4), "mixed-3-6": (3, 6), "mixed-4-6": (4, 6)}
PARTS = ("vision", "projector", "decoder", "embeddings")


def parse_quantize(quantize: Quantize) -> dict[str, Any]:
    """The mapping that a short form stands for; a mapping is checked for unknown keys.

    Args:
        quantize: bits; a mode or preset by name; or a mapping of `bits`, `group_size` and `mode`,
            of `preset`, and of the same or False (not quantized) for `vision`, `projector`,
            `decoder` and `embeddings`.

    Raises:
        ValueError: a key is unknown.
    """
    if isinstance(quantize, str) and quantize.isdigit():
        quantize = int(quantize)
    if isinstance(quantize, int):
        given: dict[str, Any] = {"bits": quantize}
    elif isinstance(quantize, str):
        given = {"preset" if quantize in MIXED else "mode": quantize}
    else:
        given = {key: value for key, value in quantize.items() if value is not None}
    unknown = given.keys() - {"bits", "group_size", "mode", "preset", *PARTS}
    if unknown:
        raise ValueError(f"quantize: unknown setting {', '.join(sorted(unknown))}.")
    return given


def layer_settings(given: Mapping[str, Any]) -> LayerSettings:
    """Complete and check the settings of a layer.

    Raises:
        ValueError: bits, group size or mode is unknown, or they don't go together.
    """
    mode = given.get("mode", "affine")
    _check_one_of("mode", mode, tuple(MODES))
    group_size, bits = MODES[mode]
    chosen = {
        "group_size": given.get("group_size", group_size),
        "bits": given.get("bits", bits),
        "mode": mode,
    }
    if mode != "affine" and (chosen["group_size"], chosen["bits"]) != (group_size, bits):
        raise ValueError(f"quantize: {mode} is always {bits} bits in groups of {group_size}.")
    _check_one_of("bits", chosen["bits"], BITS)
    known = GROUP_SIZES if mode == "affine" else (group_size,)
    _check_one_of("group_size", chosen["group_size"], known)
    return chosen


def _check_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """ValueError unless a setting has a known value; 4.0 is none, since MLX takes no floats."""
    if isinstance(value, float) or value not in known:
        shown = brief(repr(value))
        raise ValueError(
            f"quantize: {name} must be one of {', '.join(map(str, known))}, found {shown}."
        )


def part_of(name: str) -> str:
    """The part of the model (one of `PARTS`) that a tensor of a checkpoint belongs to."""
    if name.startswith(VISION_TOWER):
        return "vision"
    if name.startswith(PROJECTOR):
        return "projector"
    return "embeddings" if name.startswith((f"{DECODER}embed_tokens.", LM_HEAD)) else "decoder"


def is_sensitive(name: str, num_layers: int) -> bool:
    """Whether mixed presets give a layer the higher bits.

    They do for the output layer, and for v and down in the first and last eighth of the layers and
    in every third one between.
    """
    if name.startswith(LM_HEAD):
        return True
    if not name.endswith(("v_proj.weight", "down_proj.weight")):
        return False
    layer = int(name.split(".")[3])
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def plan(weights: Weights, config: FastVLMConfig, quantize: Quantize) -> dict[str, LayerSettings]:
    """The settings of each layer that will be quantized.

    Layers whose width the group size does not divide stay as they are.

    Args:
        weights: a checkpoint in the mlx-vlm layout, its encoder folded if that is to be quantized.
        config: the model's.
        quantize: as `parse_quantize` takes it.

    Raises:
        ValueError: as `quantize_checkpoint`.
    """
    given = parse_quantize(quantize)
    parts = _part_settings(given)
    low, high = MIXED.get(given.get("preset", ""), (None, None))
    planned: dict[str, LayerSettings] = {}
    for name, tensor in weights.items():
        part = part_of(name)
        chosen = parts.get(part)
        if chosen is None or not _is_matrix(name, tensor):
            continue
        if low and part in ("decoder", "embeddings") and part not in given:
            sensitive = is_sensitive(name, config.text.num_hidden_layers)
            chosen = chosen | {"bits": high if sensitive else low}
        if tensor.shape[-1] % chosen["group_size"] == 0:
            planned[name.removesuffix(".weight")] = chosen
    return planned


def _is_matrix(name: str, tensor: mx.array) -> bool:
    """Whether a tensor is the weight of a linear layer or an embedding."""
    return name.endswith(".weight") and tensor.ndim == 2


def _part_settings(given: Mapping[str, Any]) -> dict[str, LayerSettings]:
    """The settings of each part; the encoder has its own or stays as it is."""
    base = {key: given[key] for key in ("bits", "group_size", "mode") if key in given}
    if "preset" in given:
        if (preset := given["preset"]) not in MIXED:
            names = ", ".join(MIXED)
            raise ValueError(f"quantize: preset must be one of {names}, found {preset!r}.")
        base["bits"] = MIXED[preset][0]
    parts = {}
    for part in PARTS:
        own = given.get(part)
        if own is False:
            continue
        if own is not None:
            parts[part] = layer_settings(parse_quantize(own))
        elif part != "vision" and ("bits" in base or "mode" in base):
            parts[part] = layer_settings(base)
    if not parts:
        raise ValueError("quantize: give bits, a mode, a preset or the settings of a part.")
    return parts


def quantize_checkpoint(
    weights: Weights, config: FastVLMConfig, quantize: Quantize
) -> tuple[Weights, dict[str, Any], list[str]]:
    """Quantize a checkpoint in the mlx-vlm layout.

    A quantized encoder is stored folded, in the names of `vision.FastViTHD`, which only this
    library reads.

    Args:
        weights: not quantized; left as they are.
        config: the model's.
        quantize: as `parse_quantize` takes it.

    Returns:
        The tensors; the `quantization` entry of config.json; the layers of quantized parts that
        stay in float, since the group size does not divide their width.

    Raises:
        ValueError: a setting is unknown, settings don't go together, or the checkpoint is already
            quantized.
    """
    parts = _part_settings(parse_quantize(quantize))
    if any(name.endswith(".scales") for name in weights):
        raise ValueError("The checkpoint is quantized already; quantize a full-precision one.")
    weights = _fold_vision(weights, config) if "vision" in parts else dict(weights)
    planned = plan(weights, config, quantize)
    matrices = [name for name, tensor in weights.items() if _is_matrix(name, tensor)]
    layers = [name.removesuffix(".weight") for name in matrices if part_of(name) in parts]
    for layer, chosen in planned.items():
        packed = _pack(weights[f"{layer}.weight"], chosen)
        names = ("weight", "scales", "biases")[: len(packed)]
        weights |= {f"{layer}.{name}": t for name, t in zip(names, packed, strict=True)}
    base = parts.get("decoder") or next(iter(parts.values()))
    own = {layer: chosen for layer, chosen in planned.items() if chosen != base}
    return weights, base | own, [layer for layer in layers if layer not in planned]


def _pack(weight: mx.array, settings: LayerSettings) -> list[mx.array]:
    """What `mx.quantize` gives; scales are NaN if a weight is not finite, which it would hide."""
    packed, scales, *biases = mx.quantize(weight, **settings)
    nan = mx.array(NAN_SCALE if scales.dtype == mx.uint8 else math.nan, scales.dtype)
    return [packed, mx.where(mx.all(mx.isfinite(weight)), scales, nan), *biases]


def _fold_vision(weights: Weights, config: FastVLMConfig) -> Weights:
    """The checkpoint with its encoder folded, in the dtype of the other parts."""
    weights = {name: tensor for name, tensor in weights.items() if name != HEAD}
    encoder = fold.fold_encoder(lambda name: weights.pop(ENCODER + name), config.vision)
    dtype = dtype_of(weights)
    return weights | {VISION_TOWER + name: tensor.astype(dtype) for name, tensor in encoder.items()}
