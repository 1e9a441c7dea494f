"""The layout of the MLX community's FastVLM folders, which is also the one this project writes."""

from __future__ import annotations

from fastvlm_mlx.convert.fold import Weights


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith("vision_tower.vision_model.") for name in names)


def to_mlx(weights: Weights) -> Weights:
    return dict(weights)


def from_mlx(weights: Weights) -> Weights:
    return dict(weights)
