"""Folders of what was trained on top of a base model, as PEFT and LLaVA write them.

LoRA and DoRA leave `adapter_model.*` with what else was trained, and LLaVA's scripts put the latter
into `non_lora_trainables.*`; training only the projector leaves `mm_projector.*`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx

from ...checks import brief, is_number, reason, shown
from ...config import CheckpointError, read_json
from ..files import Weights
from . import llava, transformers
from .mlx_vlm import DECODER

SETTINGS = "adapter_config.json"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE, PROJECTOR = "non_lora_trainables", "mm_projector"
TRAINED = tuple(f"{name}.{end}" for name in (WHOLE, PROJECTOR) for end in ("safetensors", "bin"))
BLOCK = 2**20  # bytes read at once
MAGNITUDE = "lora_magnitude_vector"
# In `Adapter.about`: whether the base's encoder was folded, the layers with LoRA beside DoRA, and
# whether the table of embeddings was trained while the output layer kept the base's
FOLDED, PLAIN, UNTIED = "folded", "plain", "untied"
# Settings of peft with which a layer is more than its base and a scaled B A.
UNSUPPORTED = (
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


@dataclass(frozen=True)
class LowRank:
    """What was trained on top of a linear layer: scale · up · down, added to its weight.

    Attributes:
        down: [rank, inputs].
        up: [outputs, rank].
        scale: of their product.
        magnitude: with DoRA, the length that each row of the sum is given, [outputs].
    """

    down: mx.array
    up: mx.array
    scale: float
    magnitude: mx.array | None = None

    def added_to(self, weight: mx.array) -> mx.array:
        """The weight [outputs, …, inputs] with it, in float32."""
        delta = self.scale * (self.up.astype(mx.float32) @ self.down.astype(mx.float32))
        found = weight.astype(mx.float32) + delta.reshape(weight.shape)
        if self.magnitude is None:
            return found
        ratio = self.ratio(weight.flatten(1))
        return found * ratio.reshape(-1, *[1] * (weight.ndim - 1))

    def ratio(self, weight: mx.array) -> mx.array:
        """What DoRA multiplies each output with, [outputs], for a weight [outputs, inputs]."""
        assert self.magnitude is not None
        up, down = (matrix.astype(mx.float32) for matrix in (self.up, self.down))
        lengths = mx.linalg.norm(weight.astype(mx.float32) + self.scale * (up @ down), axis=1)
        return self.magnitude.astype(mx.float32) / lengths


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, in the names of the mlx-vlm layout.

    Attributes:
        low_rank: LoRA or DoRA of each layer, by the layer's name, without `.weight`.
        whole: tensors that replace the base's.
        about: what the files say of their base, if this library wrote them; see
            `checkpoint.adapt.marks_of`.
    """

    low_rank: dict[str, LowRank]
    whole: Weights
    about: dict[str, str] = field(default_factory=dict)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds trained parts and no whole model."""
    whole = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return not whole and any((folder / name).is_file() for name in (*ADAPTER, *TRAINED))


def no_adapter(folder: Path) -> CheckpointError:
    """What to raise for a folder that is not one: with its place in that of a training run."""
    inside = next((f for f in sorted(folder.glob("*/")) if is_adapter(f)), None)
    hint = "" if inside is None else f"; the one in it is {inside}"
    return CheckpointError(
        f"{folder} is no adapter: it has neither {ADAPTER[0]} nor {TRAINED[0]}{hint}."
    )


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that the folder names, and its revision if it is on the Hub and has one.

    Raises:
        CheckpointError: it names none, or the revision is no text.
    """
    for file, name_field in (
        (SETTINGS, "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        if (folder / file).is_file() and (name := read_json(folder / file).get(name_field)):
            return str(name), _revision(folder / file, str(name))
    raise CheckpointError(
        f"{folder} holds only trained parts and names no base model: "
        f"set base_model_name_or_path in {SETTINGS}."
    )


def read_about(folder: Path) -> dict[str, str]:
    """What an adapter's files say of their base; nothing where another trainer wrote them."""
    for name in (*ADAPTER, *TRAINED):
        if name.endswith(".safetensors") and (folder / name).is_file():
            _, found = cast(Any, mx.load(str(folder / name), return_metadata=True))
            return {str(key): str(value) for key, value in found.items()}
    return {}


def identity_of(folder: Path) -> str:
    """What tells one adapter from all others, wherever it lies."""
    found = hashlib.sha256()
    for file in (folder / name for name in (*ADAPTER, *TRAINED)):
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    found.update(block)
    return found.hexdigest()


def _revision(settings: Path, base: str) -> str | None:
    """The revision of the base in adapter_config.json; a folder has none."""
    found = read_json(settings).get("revision") or None
    if settings.name != SETTINGS or Path(base).expanduser().is_dir():
        return None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{settings}: revision must be a text, found {shown(found)}.")
    return found


def parse(files: dict[str, Weights], settings: dict[str, Any]) -> Adapter:
    """What the files of an adapter hold.

    Args:
        files: the tensors of each file of the folder, by its name.
        settings: adapter_config.json; only LoRA and DoRA read it.

    Raises:
        CheckpointError: a tensor is no part of an adapter, half of a pair is missing, or the
            settings ask for what is not supported.
    """
    whole: Weights = {}
    for name in TRAINED:
        trained = {plain_name(key): tensor for key, tensor in files.get(name, {}).items()}
        whole |= layout_of(trained).to_mlx(trained)
    adapted = {key: tensor for name in ADAPTER for key, tensor in files.get(name, {}).items()}
    if not any(name in files for name in ADAPTER):
        return Adapter({}, whole)
    check_settings(settings, [key for tensors in files.values() for key in tensors])
    if table := next((name for name in adapted if "embed_tokens.lora_" in name), None):
        raise CheckpointError(
            f"The adapter has LoRA of the embeddings ({brief(table)}), which is not supported; "
            "merge it with peft (merge_and_unload) and convert the result."
        )
    low_rank: dict[str, LowRank] = {}
    saved: Weights = {}
    for name, tensor in adapted.items():
        if "lora_B" in name and name.replace("lora_B", "lora_A") in adapted:
            continue  # read with its other half
        if MAGNITUDE in name or _is_tied_copy(name, settings):
            continue
        if "lora_A" in name:
            layer, found = _pair(name, adapted, settings)
            low_rank[layer] = found
        elif _is_saved_whole(name, settings):
            plain = plain_name(re.sub(r"\.modules_to_save(\.default)?\.|\.base_layer\.", ".", name))
            saved |= layout_of([plain]).to_mlx({plain: tensor})
        else:
            raise CheckpointError(f"The adapter holds {brief(name)}, which is no LoRA matrix.")
    _check_magnitudes(adapted, settings)
    # peft trains a copy of the table, and an output layer that is tied stays the base's, unless:
    apart = f"{DECODER}embed_tokens.weight" in saved and not settings.get("ensure_weight_tying")
    return Adapter(low_rank, whole | saved, {UNTIED: "true"} if apart else {})


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of peft (`base_model.model.`) and of LLaVA's scripts."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    return re.sub(r"^model\.(?=model\.|lm_head\.)", "", name)


def layout_of(names: Iterable[str]) -> ModuleType:
    """The layout whose names a base's modules have: LLaVA's, or that of transformers."""
    marks = ("model.language_model.", "model.multi_modal_projector.", transformers.ENCODER)
    return transformers if any(name.startswith(marks) for name in names) else llava


def check_settings(settings: dict[str, Any], names: list[str]) -> None:
    """Raise a CheckpointError if adapter_config.json asks for more than LoRA and DoRA, or for
    modules of which no tensor is among `names`."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{SETTINGS}: peft_type must be LORA, found {shown(kind)}.")
    init = str(settings.get("init_lora_weights"))
    asked = [name for name in UNSUPPORTED if settings.get(name)]
    asked += [f"init_lora_weights={init}"] if init.lower().startswith(CHANGE_THE_BASE) else []
    if asked:
        raise CheckpointError(
            f"{SETTINGS} asks for {brief(', '.join(asked))}, which is not supported; "
            "merge the adapter with peft (merge_and_unload) and convert the result."
        )
    for module in _saved_modules(settings):
        if not any(_is_in(name, module) for name in names):
            raise CheckpointError(
                f"The adapter does not hold {brief(module)}, which is one of the "
                f"modules_to_save of {SETTINGS}."
            )


def _check_magnitudes(tensors: Weights, settings: dict[str, Any]) -> None:
    """Raise a CheckpointError if DoRA would be read as LoRA, or LoRA as DoRA."""
    uses_dora = bool(settings.get("use_dora"))
    found = next((name for name in tensors if MAGNITUDE in name), None)
    if found is not None and not uses_dora:
        raise CheckpointError(
            f"The adapter holds {brief(found)}, which is of DoRA, and {SETTINGS} does not say "
            "use_dora: as LoRA it would be another model; set use_dora to true."
        )
    for name in tensors:
        module = re.sub(r"\.lora_A(\.\w+)?\.weight$", "", name)
        if uses_dora and module != name and _magnitude(module, tensors) is None:
            raise CheckpointError(
                f"{SETTINGS} says use_dora, and the adapter has no {MAGNITUDE} of {brief(module)}."
            )


def _magnitude(module: str, tensors: Weights) -> mx.array | None:
    """The lengths of a module's rows; each version of peft has another name for them."""
    ends = ("", ".weight", ".default", ".default.weight")
    names = (f"{module}.{MAGNITUDE}{end}" for end in ends)
    return next((tensors[name].flatten() for name in names if name in tensors), None)


def _is_saved_whole(name: str, settings: dict[str, Any]) -> bool:
    """Whether an adapter holds a tensor as it is, since training changed all of it."""
    if settings.get("bias", "none") != "none" and name.endswith(".bias"):
        return "lora_" not in name
    return any(_is_in(name, each) for each in _saved_modules(settings)) and "lora_" not in name


def _is_tied_copy(name: str, settings: dict[str, Any]) -> bool:
    """Whether a tensor is the table of embeddings once more, as peft saves a tied output layer."""
    is_asked = any(_is_in("lm_head.weight", each) for each in _saved_modules(settings))
    return bool(settings.get("ensure_weight_tying")) and "lm_head." in name and not is_asked


def _saved_modules(settings: dict[str, Any]) -> list[str]:
    found = settings.get("modules_to_save") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{SETTINGS}: modules_to_save must be a list of texts, found {shown(found)}."
        )
    return found


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor is in one of the modules that an entry of modules_to_save means: as in peft,
    all whose names end so, such as each `input_layernorm` for `norm`."""
    return f"{module}." in name


def _pair(name: str, tensors: Weights, settings: dict[str, Any]) -> tuple[str, LowRank]:
    """(layer, LoRA) that the matrix A called `name` belongs to."""
    down, up = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
    module = re.sub(r"\.lora_A(\.\w+)?\.weight$", "", name)
    if up is None:
        raise CheckpointError(
            f"The adapter's {brief(name)} has no lora_B beside it and fits no layer."
        )
    plain = f"{plain_name(module)}.weight"
    layer = next(iter(layout_of([plain]).to_mlx({plain: mx.zeros(1)}))).removesuffix(".weight")
    if down.ndim == up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)  # of a 1x1 convolution
    for matrix in (down, up):
        if matrix.ndim != 2:
            raise CheckpointError(
                f"The adapter's {brief(name)} or its lora_B is {matrix.shape}, where a matrix is "
                "expected."
            )
    scale = _scale(re.sub(r"^base_model\.model\.", "", module), len(down), settings)
    return layer, LowRank(down, up, scale, _magnitude(module, tensors))


def _scale(module: str, rank: int, settings: dict[str, Any]) -> float:
    """alpha / r of a module, or alpha / sqrt(r) for rank-stabilized LoRA.

    As in peft, a pattern is a regular expression for the end of a module's name, from the start of
    one of its parts, and the first that fits counts.
    """
    expected = _setting(module, "r", "rank_pattern", settings)
    if expected != rank:
        raise CheckpointError(
            f"{SETTINGS} gives {module} the rank {shown(expected)}; its matrices have {rank}."
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
            f"{SETTINGS}: {patterns} must be an object of numbers by regular expressions "
            f"({reason(error)})."
        ) from None
    value: Any = fitting[0] if fitting else settings.get(name)
    if not is_number(value):
        raise CheckpointError(
            f"{SETTINGS}: {name} of {module} must be a number, found {brief(repr(value))}."
        )
    return float(value)
