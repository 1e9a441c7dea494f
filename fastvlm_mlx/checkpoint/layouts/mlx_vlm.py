"""The layout of the MLX community's FastVLM folders, which is also the one this project writes.

All reading and writing goes through its names and axes.
"""

from __future__ import annotations

import mlx.core as mx

from ..files import Weights

VISION_TOWER = "vision_tower."
ENCODER = f"{VISION_TOWER}vision_model."
# A quantized encoder is stored folded, in the names of `vision.FastViTHD`.
FOLDED_STEM = f"{VISION_TOWER}stem."
HEAD = f"{ENCODER}head.proj"  # carried for other readers; nothing computes with it
PROJECTOR = "mm_projector."
DECODER = "language_model.model."
LM_HEAD = "language_model.lm_head."
# Older folders name the projector's layers so.
OLD_PROJECTOR = (
    ("multi_modal_projector.linear_0.", "mm_projector.0."),
    ("multi_modal_projector.linear_1.", "mm_projector.0."),
    ("multi_modal_projector.linear_2.", "mm_projector.2."),
)


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith((ENCODER, FOLDED_STEM)) for name in names)


def to_mlx(weights: Weights) -> Weights:
    """The same tensors, with the projector's layers under their present names."""
    renamed = dict(weights)
    for name in weights:
        for old, new in OLD_PROJECTOR:
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = renamed.pop(name)
    return renamed


def from_mlx(weights: Weights) -> Weights:
    """The same tensors."""
    return dict(weights)


def is_folded(weights: Weights) -> bool:
    """Whether the encoder is stored folded."""
    return any(name.startswith(FOLDED_STEM) for name in weights)


def dtype_of(weights: Weights) -> mx.Dtype:
    """The dtype of what is not quantized, in which norms always are."""
    return weights[f"{DECODER}norm.weight"].dtype
