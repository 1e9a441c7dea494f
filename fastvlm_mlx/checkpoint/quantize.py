"""Which layers are stored in how many bits.

A plan gives each linear layer and embedding of a checkpoint its settings (bits, group_size, mode)
as config.json records them, in the form that mlx_lm and mlx-vlm read. Encoder, projector, decoder
and embeddings can each have their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..config import FastVLMConfig
from . import fold
from .fold import Weights

Settings = dict[str, Any]
Quantize = int | str | Mapping[str, Any]
# (group_size, bits) that each of MLX's modes starts from; but for affine they are fixed.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# (bits, bits of the sensitive layers), as mlx_lm's recipes.
MIXED = {"mixed-2-6": (2, 6), "mixed-3-4": (3, 4), "mixed-3-6": (3, 6), "mixed-4-6": (4, 6)}
PARTS = ("vision", "projector", "decoder", "embeddings")
VISION = "vision_tower."
SOURCE_VISION = "vision_tower.vision_model."


def settings(quantize: Quantize) -> Settings:
    """Complete and check settings.

    Args:
        quantize: bits; a mode or preset by name; or a mapping of bits, group_size and mode, and of
            `preset`, and of settings for `vision`, `projector`, `decoder` and `embeddings`.

    Raises:
        ValueError: bits, group size, mode or name are not ones that exist, or don't go together.
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


def layer_settings(given: Mapping[str, Any]) -> Settings:
    """{group_size, bits, mode} in full, checked; errors as `settings`."""
    mode = given.get("mode", "affine")
    if mode not in MODES:
        raise ValueError(f"quantize: mode must be one of {', '.join(MODES)}, found {mode!r}.")
    group_size, bits = MODES[mode]
    chosen = {
        "group_size": given.get("group_size", group_size),
        "bits": given.get("bits", bits),
        "mode": mode,
    }
    if mode != "affine" and (chosen["group_size"], chosen["bits"]) != (group_size, bits):
        raise ValueError(f"quantize: {mode} is {bits} bits in groups of {group_size}, no other.")
    if chosen["bits"] not in BITS:
        raise ValueError(f"quantize: bits must be one of {BITS}, found {chosen['bits']!r}.")
    if mode == "affine" and chosen["group_size"] not in GROUP_SIZES:
        found = chosen["group_size"]
        raise ValueError(f"quantize: group_size must be one of {GROUP_SIZES}, found {found!r}.")
    return chosen


def part_of(name: str) -> str:
    """The part of the model (one of `PARTS`) that a tensor of a checkpoint belongs to."""
    if name.startswith(VISION):
        return "vision"
    if name.startswith("mm_projector"):
        return "projector"
    embeddings = ("language_model.model.embed_tokens.", "language_model.lm_head.")
    return "embeddings" if name.startswith(embeddings) else "decoder"


def is_sensitive(name: str, num_layers: int) -> bool:
    """Whether mixed presets give a layer the higher bits: outer and every third v and down."""
    if name.startswith("language_model.lm_head"):
        return True
    if not name.endswith(("v_proj.weight", "down_proj.weight")):
        return False
    layer = int(name.split(".")[3])
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def plan(weights: Weights, config: FastVLMConfig, quantize: Quantize) -> dict[str, Settings]:
    """The settings of each layer that will be quantized; those a group doesn't divide are not.

    Args:
        weights: a checkpoint in the mlx-vlm layout, its encoder folded if that is to be quantized.
        config: the model's.
        quantize: as `settings` takes.
    """
    given = settings(quantize)
    parts = _part_settings(given)
    low, high = MIXED.get(given.get("preset", ""), (None, None))
    planned: dict[str, Settings] = {}
    for name, tensor in weights.items():
        part = part_of(name)
        chosen = parts.get(part)
        if chosen is None or not is_matrix(name, tensor):
            continue
        if low and part in ("decoder", "embeddings") and part not in given:
            sensitive = is_sensitive(name, config.text.num_hidden_layers)
            chosen = chosen | {"bits": high if sensitive else low}
        if tensor.shape[-1] % chosen["group_size"] == 0:
            planned[name.removesuffix(".weight")] = chosen
    return planned


def is_matrix(name: str, tensor: mx.array) -> bool:
    """Whether a tensor is the weight of a linear layer or an embedding."""
    return name.endswith(".weight") and tensor.ndim == 2


def _part_settings(given: Mapping[str, Any]) -> dict[str, Settings]:
    """Settings of each part; the encoder's are given apart, or it stays as it is."""
    base = {key: given[key] for key in ("bits", "group_size", "mode") if key in given}
    if "preset" in given:
        if given["preset"] not in MIXED:
            raise ValueError(f"quantize: preset must be one of {', '.join(MIXED)}.")
        base["bits"] = MIXED[given["preset"]][0]
    parts = {}
    for part in PARTS:
        own = given.get(part)
        if own is False:
            continue
        if own is not None:
            parts[part] = layer_settings(settings(own))
        elif part != "vision" and ("bits" in base or "mode" in base):
            parts[part] = layer_settings(base)
    if not parts:
        raise ValueError("quantize: give bits, a mode, a preset, or settings of a part.")
    return parts


def quantize_checkpoint(
    weights: Weights, config: FastVLMConfig, quantize: Quantize
) -> tuple[Weights, Settings, list[str]]:
    """Quantize a checkpoint in the mlx-vlm layout.

    A quantized encoder is stored folded, in the names of `vision.FastViTHD`, which this library
    alone reads.

    Returns:
        The tensors; the `quantization` entry of config.json; the layers of quantized parts that
        stay in float, since no group size divides their width.

    Raises:
        ValueError: as `settings`, or the checkpoint is quantized already.
    """
    parts = _part_settings(settings(quantize))
    if any(name.endswith(".scales") for name in weights):
        raise ValueError("The checkpoint is quantized already; quantize a full-precision one.")
    weights = dict(weights)
    if "vision" in parts:
        weights.pop(f"{SOURCE_VISION}head.proj", None)
        encoder = fold.fold_encoder(lambda name: weights.pop(SOURCE_VISION + name), config.vision)
        dtype = weights["language_model.model.norm.weight"].dtype
        weights |= {VISION + name: tensor.astype(dtype) for name, tensor in encoder.items()}
    planned = plan(weights, config, quantize)
    kept = [
        name.removesuffix(".weight")
        for name, tensor in weights.items()
        if part_of(name) in parts and is_matrix(name, tensor)
        if name.removesuffix(".weight") not in planned
    ]
    for layer, chosen in planned.items():
        packed = mx.quantize(weights[f"{layer}.weight"], **chosen)
        names = ("weight", "scales", "biases")[: len(packed)]
        weights |= {f"{layer}.{name}": t for name, t in zip(names, packed, strict=True)}
    base = parts.get("decoder") or next(iter(parts.values()))
    own = {layer: chosen for layer, chosen in planned.items() if chosen != base}
    return weights, base | own, kept
