"""The layout of the MLX community's FastVLM folders, which is also the one this project writes."""

from __future__ import annotations

from ..fold import Weights

ENCODER = ("vision_tower.vision_model.", "vision_tower.stem.")  # the second where it is quantized
OLD_PROJECTOR = (
    ("multi_modal_projector.linear_0.", "mm_projector.0."),
    ("multi_modal_projector.linear_1.", "mm_projector.0."),
    ("multi_modal_projector.linear_2.", "mm_projector.2."),
)


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith(ENCODER) for name in names)


def to_mlx(weights: Weights) -> Weights:
    """The same tensors; older folders call the projector's layers linear_1 and linear_2."""
    renamed = dict(weights)
    for name in weights:
        for old, new in OLD_PROJECTOR:
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = renamed.pop(name)
    return renamed


def from_mlx(weights: Weights) -> Weights:
    return dict(weights)
