"""Folders of LLaVA training that hold only what was trained on top of a base model.

LoRA training leaves `adapter_model.*` and `non_lora_trainables.bin`; training only the projector
leaves `mm_projector.bin`. All are applied to the base's tensors, in the mlx-vlm layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...config import CheckpointError, read_json
from ..files import Weights
from . import llava

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = ("non_lora_trainables.bin", "mm_projector.bin")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds trained parts and no whole model."""
    whole = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return not whole and any((folder / name).is_file() for name in (*ADAPTER, *TRAINED))


def base_of(folder: Path) -> str:
    """The base model that the folder names.

    Raises:
        CheckpointError: it names none.
    """
    for file, field in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        if (folder / file).is_file() and (name := read_json(folder / file).get(field)):
            return str(name)
    raise CheckpointError(
        f"{folder} holds only trained parts and names no base model: "
        "set base_model_name_or_path in adapter_config.json."
    )


def apply(base: Weights, files: dict[str, Weights], settings: dict[str, Any]) -> Weights:
    """The base with its trained parts.

    Args:
        base: in the mlx-vlm layout, not quantized.
        files: the tensors of each file of the folder, by its name.
        settings: adapter_config.json; only LoRA reads it.

    Raises:
        CheckpointError: a part fits no layer of the base, or is of an unknown kind.
    """
    weights = dict(base)
    for name in TRAINED:
        trained = {plain_name(key): tensor for key, tensor in files.get(name, {}).items()}
        weights |= llava.to_mlx(trained)
    for name in ADAPTER:
        _add_lora(weights, files.get(name, {}), settings)
    return weights


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of peft (`base_model.model.`) and of LLaVA's scripts."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    return re.sub(r"^model\.(?=model\.|lm_head\.)", "", name)


def _add_lora(weights: Weights, tensors: Weights, settings: dict[str, Any]) -> None:
    for name, down in tensors.items():
        if "lora_A" not in name:
            if not re.search(r"lora_B", name):
                raise CheckpointError(f"The adapter holds {name}, which is no LoRA matrix.")
            continue
        up = tensors.get(name.replace("lora_A", "lora_B"))
        module = re.sub(r"\.lora_A(\.\w+)?\.weight$", "", plain_name(name))
        target = llava.to_mlx_name(f"{module}.weight")
        if up is None or target not in weights:
            raise CheckpointError(f"The adapter's {name} fits no layer of the base model.")
        weights[target] = weights[target] + _delta(up, down, settings).astype(weights[target].dtype)


def _delta(up: mx.array, down: mx.array, settings: dict[str, Any]) -> mx.array:
    """B A scaled by alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
    rank = down.shape[0]
    alpha = settings.get("lora_alpha", rank)
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return scale * (up.astype(mx.float32) @ down.astype(mx.float32))
