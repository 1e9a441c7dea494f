"""The layout of the original PyTorch checkpoints (LLaVA), with or without parallel branches."""

from __future__ import annotations

import re

import mlx.core as mx

from ..files import Weights
from . import mlx_vlm

ENCODER = "model.vision_tower.vision_tower.model."
UNUSED = re.compile(r".*(num_batches_tracked|rotary_emb\.inv_freq)$")


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith(ENCODER) for name in names)


def to_mlx_name(name: str) -> str:
    """The name in the mlx-vlm layout."""
    if name.startswith(ENCODER):
        name = name.removeprefix(ENCODER).replace("patch_embed.", "patch_embed.blocks.", 1)
        return mlx_vlm.ENCODER + name
    if name.startswith(("model.mm_projector.", "model.image_newline")):
        return name.removeprefix("model.")
    return f"language_model.{name}"


def from_mlx_name(name: str) -> str:
    """The inverse of `to_mlx_name`."""
    if name.startswith(mlx_vlm.ENCODER):
        name = name.removeprefix(mlx_vlm.ENCODER)
        return ENCODER + name.replace("patch_embed.blocks.", "patch_embed.", 1)
    if name.startswith(("mm_projector.", "image_newline")):
        return f"model.{name}"
    return name.removeprefix("language_model.")


def to_mlx(weights: Weights) -> Weights:
    """Names and axes of the mlx-vlm layout: channels last, without counters."""
    return {
        to_mlx_name(name): channels_last(name, tensor)
        for name, tensor in weights.items()
        if not UNUSED.match(name)
    }


def from_mlx(weights: Weights) -> Weights:
    """The inverse of `to_mlx` without parallel branches; BatchNorms get their counters back."""
    source: Weights = {}
    for name, tensor in weights.items():
        source[from_mlx_name(name)] = channels_first(name, tensor)
        if name.endswith("running_mean"):
            counter = from_mlx_name(name).replace("running_mean", "num_batches_tracked")
            source[counter] = mx.array(0, mx.int64)
    return source


def channels_last(name: str, tensor: mx.array) -> mx.array:
    """A tensor of the encoder with its axes in MLX's order: [out, height, width, in]."""
    if tensor.ndim == 4:
        return tensor.transpose(0, 2, 3, 1)
    return tensor.reshape(1, 1, -1) if "layer_scale" in name else tensor


def channels_first(name: str, tensor: mx.array) -> mx.array:
    """The inverse of `channels_last`: [out, in, height, width]."""
    if tensor.ndim == 4:
        return tensor.transpose(0, 3, 1, 2)
    return tensor.reshape(-1, 1, 1) if "layer_scale" in name else tensor
