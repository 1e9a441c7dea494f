"""The layout of the ready-made Apple silicon checkpoints, which the original's demo app loads.

Decoder and projector are safetensors; the encoder is a Core ML program (`model_export/` in the
original), which `coreml` reads and writes.
"""

from __future__ import annotations

from pathlib import Path

from ...config import VisionConfig
from ..files import Weights
from . import mlx_vlm
from .coreml import reader

PROJECTOR = "multi_modal_projector.linear_"


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith(PROJECTOR) for name in names)


def to_mlx(weights: Weights) -> Weights:
    """Names of the mlx-vlm layout. The encoder is in the Core ML package; see `read_encoder`."""
    return {name.replace(PROJECTOR, mlx_vlm.PROJECTOR): tensor for name, tensor in weights.items()}


def from_mlx(weights: Weights) -> Weights:
    """The inverse of `to_mlx`; tensors of the encoder keep their names."""
    return {name.replace(mlx_vlm.PROJECTOR, PROJECTOR): tensor for name, tensor in weights.items()}


def read_encoder(folder: Path, config: VisionConfig) -> Weights:
    """The encoder in the folder's Core ML package; see `coreml.reader.read_encoder`."""
    return reader.read_encoder(folder, config)
