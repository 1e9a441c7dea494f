"""Folders of LLaVA training that hold only what was trained on top of a base model.

LoRA training leaves `adapter_model.*` and `non_lora_trainables.bin`; training only the projector
leaves `mm_projector.bin`. All are applied to the base's tensors, in the mlx-vlm layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checks import brief, is_number, reason, shown
from ...config import CheckpointError, read_json
from ..files import Weights
from . import llava

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = ("non_lora_trainables.bin", "mm_projector.bin")
# Settings of peft with which a layer is more than its base and a scaled B A.
UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "trainable_token_indices",
    "target_parameters",
    "monteclora_config",
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # before training starts


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds trained parts and no whole model."""
    whole = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return not whole and any((folder / name).is_file() for name in (*ADAPTER, *TRAINED))


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that the folder names, and its revision if it is on the Hub and has one.

    Raises:
        CheckpointError: it names none, or the revision is no text.
    """
    for file, field in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        if (folder / file).is_file() and (name := read_json(folder / file).get(field)):
            return str(name), _revision(folder / file, str(name))
    raise CheckpointError(
        f"{folder} holds only trained parts and names no base model: "
        "set base_model_name_or_path in adapter_config.json."
    )


def _revision(settings: Path, base: str) -> str | None:
    """The revision of the base in adapter_config.json; a folder has none."""
    found = read_json(settings).get("revision") or None
    if settings.name != "adapter_config.json" or Path(base).expanduser().is_dir():
        return None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{settings}: revision must be a text, found {shown(found)}.")
    return found


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
    if any(name in files for name in ADAPTER):
        _check_settings(settings, [name for tensors in files.values() for name in tensors])
    for name in ADAPTER:
        _add_lora(weights, files.get(name, {}), settings)
    return weights


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of peft (`base_model.model.`) and of LLaVA's scripts."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    return re.sub(r"^model\.(?=model\.|lm_head\.)", "", name)


def _add_lora(weights: Weights, tensors: Weights, settings: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name and name.replace("lora_B", "lora_A") in tensors:
            continue  # added with its other half
        if "lora_A" in name:
            _add_pair(weights, name, tensors, settings)
        elif _is_saved_whole(name, settings):
            plain = re.sub(r"\.modules_to_save(\.default)?\.|\.base_layer\.", ".", name)
            weights |= _fitting(llava.to_mlx({plain_name(plain): tensor}), weights, name)
        else:
            raise CheckpointError(f"The adapter holds {brief(name)}, which is no LoRA matrix.")


def _check_settings(settings: dict[str, Any], names: list[str]) -> None:
    """Raise a CheckpointError if adapter_config.json asks for more than plain LoRA, or for modules
    of which no tensor is among `names`."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"adapter_config.json: peft_type must be LORA, found {shown(kind)}.")
    init = str(settings.get("init_lora_weights"))
    asked = [name for name in UNSUPPORTED if settings.get(name)]
    asked += [f"init_lora_weights={init}"] if init.lower().startswith(CHANGE_THE_BASE) else []
    if asked:
        raise CheckpointError(
            f"adapter_config.json asks for {brief(', '.join(asked))}, which is not supported; "
            "merge the adapter with peft (merge_and_unload) and convert the result."
        )
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{name}" for name in names):
            raise CheckpointError(
                f"The adapter does not hold {brief(str(module))}, which is one of the "
                "modules_to_save of adapter_config.json."
            )


def _is_saved_whole(name: str, settings: dict[str, Any]) -> bool:
    """Whether an adapter holds a tensor as it is, since training changed all of it."""
    if settings.get("bias", "none") != "none" and name.endswith(".bias"):
        return "lora_" not in name
    modules = settings.get("modules_to_save") or ()
    return any(f".{module}." in f".{name}" for module in modules) and "lora_" not in name


def _add_pair(weights: Weights, name: str, tensors: Weights, settings: dict[str, Any]) -> None:
    """Add B A, scaled, to the layer that the matrix A called `name` belongs to."""
    down, up = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
    module = re.sub(r"\.lora_A(\.\w+)?\.weight$", "", name)
    target = llava.to_mlx_name(f"{plain_name(module)}.weight")
    if up is None or target not in weights:
        raise CheckpointError(f"The adapter's {brief(name)} fits no layer of the base model.")
    weight = weights[target]
    rank = down.shape[0] if down.ndim else 0
    if (up.shape, down.shape) != ((weight.shape[0], rank), (rank, *weight.shape[1:])):
        raise CheckpointError(
            f"The adapter's {brief(name)} is {down.shape} and its lora_B {up.shape}, "
            f"which does not fit the base's {weight.shape}."
        )
    scale = _scale(re.sub(r"^base_model\.model\.", "", module), rank, settings)
    delta = scale * (up.astype(mx.float32) @ down.astype(mx.float32))
    weights[target] = weight + delta.astype(weight.dtype)


def _scale(module: str, rank: int, settings: dict[str, Any]) -> float:
    """alpha / r of a module, or alpha / sqrt(r) for rank-stabilized LoRA.

    As in peft, a pattern is a regular expression for the end of a module's name, from the start of
    one of its parts, and the first that fits counts.
    """
    expected = _setting(module, "r", "rank_pattern", settings)
    if expected != rank:
        raise CheckpointError(
            f"adapter_config.json gives {module} the rank {shown(expected)}; "
            f"its matrices have {rank}."
        )
    alpha = _setting(module, "lora_alpha", "alpha_pattern", settings)
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _setting(module: str, name: str, patterns: str, settings: dict[str, Any]) -> float:
    """The value of a setting for a module: that of the first pattern that fits, or the default."""
    own = settings.get(patterns) or {}
    try:
        fitting = [own[key] for key in own if re.match(rf"(.*\.)?({key})$", module)]
    except (TypeError, re.error) as error:
        raise CheckpointError(
            f"adapter_config.json: {patterns} must be an object of numbers by regular expressions "
            f"({reason(error)})."
        ) from None
    value: Any = fitting[0] if fitting else settings.get(name)
    if not is_number(value):
        raise CheckpointError(
            f"adapter_config.json: {name} of {module} must be a number, found {brief(repr(value))}."
        )
    return float(value)


def _fitting(found: Weights, base: Weights, name: str) -> Weights:
    """Tensors that replace some of the base's."""
    for target, tensor in found.items():
        if target not in base or base[target].shape != tensor.shape:
            raise CheckpointError(f"The adapter's {brief(name)} fits no layer of the base model.")
    return found
