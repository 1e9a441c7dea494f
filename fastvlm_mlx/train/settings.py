"""What to train and how, in one value that stands in every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checks import check_whole_number, is_number, reason, shown
from .examples import TOO_LONG
from .report import REPORTERS

FROZEN, LORA, DORA, FULL = MODES = ("frozen", "lora", "dora", "full")
AUTO = "auto"  # full, or LoRA where weights are quantized
PARTS = ("vision", "projector", "decoder")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")
ADAPTER_RATE, FULL_RATE, PROJECTOR_RATE = 2e-4, 2e-5, 1e-3
PACKED_LENGTH = 512  # tokens of a packed row; its attention grows with the square of them
# The stages of the FastVLM paper (supplementary material, "Training Setup"): the projector first;
# then everything, on captions at the target resolution, on instructions, and on the best of them.
EVERYTHING = dict.fromkeys(PARTS, FULL) | {"learning_rate": FULL_RATE}
STAGES: dict[str, dict[str, Any]] = {
    "1": {
        "vision": FROZEN,
        "projector": FULL,
        "decoder": FROZEN,
        "learning_rate": PROJECTOR_RATE,
    },
    "1.5": EVERYTHING,
    "2": EVERYTHING,
    "3": EVERYTHING,
}
# A new model: its BatchNorms need several images at a time
NEW = EVERYTHING | {"learning_rate": PROJECTOR_RATE, "batch_size": 16}
CHECKPOINTED = (
    "gradient_checkpointing is for an encoder in inference form: the BatchNorms of the training "
    "form would count each batch twice."
)
# What other trainers call an option
OTHER_NAMES = {
    "lr": "learning_rate",
    "mm_projector_lr": "projector_learning_rate",
    "mm_vision_tower_lr": "vision_learning_rate",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "scale",
    "alpha": "scale",
    "lora_dropout": "dropout",
    "target_modules": "layers",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "grad_checkpoint": "gradient_checkpointing",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "iters": "steps",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "save_total_limit": "keep",
    "model_max_length": "max_length",
    "max_seq_length": "max_length",
}


def option(default: Any, help: str) -> Any:
    """A field of `TrainOptions` with its default and what `fastvlm train --help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainOptions:
    """What to train and how; each field says what it is for in its `help`.

    Raises:
        ValueError: a value is out of its range.
    """

    stage: str | None = option(
        None, "A stage of the FastVLM paper, as a preset: 1 trains the projector, 1.5, 2 and 3 all."
    )
    vision: str = option(FROZEN, f"The vision encoder: {', '.join(MODES)}.")
    projector: str = option(
        AUTO, f"The projector: {', '.join(MODES)}, or auto: full, and lora if it is quantized."
    )
    decoder: str = option(LORA, f"The decoder: {', '.join(MODES)}.")
    from_scratch: bool = option(
        False,
        "Draw new weights and train all of them, the encoder in training form (BatchNorms and "
        "branches), which is folded in the result; --model gives geometry and tokenizer.",
    )
    rank: int = option(16, "Of the LoRA or DoRA matrices.")
    scale: float = option(
        2.0, "What the low-rank product is multiplied by; alpha / rank elsewhere."
    )
    dropout: float = option(0.0, "The share of a LoRA layer's inputs that is dropped.")
    layers: tuple[str, ...] = option(
        (),
        "Which linear layers get LoRA or DoRA, by whole path, such as "
        "'language_model.layers.*.self_attn.*_proj'. Repeat it. The default is all of them.",
    )
    learning_rate: float | None = option(
        None, f"The default is {ADAPTER_RATE} with adapters, and {FULL_RATE} for a full decoder."
    )
    projector_learning_rate: float | None = option(
        None, "Of the projector, if not --learning-rate."
    )
    vision_learning_rate: float | None = option(
        None, "Of the vision encoder, if not --learning-rate."
    )
    optimizer: str = option("adamw", f"One of {', '.join(OPTIMIZERS)} (for matrices only).")
    weight_decay: float = option(0.0, "Of the weights; never of biases, norms and scales.")
    beta1: float = option(0.9, "How long AdamW remembers gradients.")
    beta2: float = option(0.999, "How long AdamW remembers their squares.")
    eps: float = option(1e-8, "Of AdamW, added to the root of the squares.")
    clip: float = option(1.0, "The largest norm of a step's gradients; 0 for any.")
    schedule: str = option("cosine", f"Of the learning rates: {', '.join(SCHEDULES)}.")
    warmup: float = option(
        0.03, "Steps in which the learning rates rise: a share below 1, or a number of them."
    )
    final_rate: float = option(0.0, "The share of the learning rates that is left at the end.")
    epochs: float = option(1.0, "Passes over the rows.")
    steps: int | None = option(None, "Optimizer steps, instead of --epochs.")
    batch_size: int = option(4, "Rows computed together, in each process.")
    accumulation: int = option(1, "Batches whose gradients are added up before each step.")
    gradient_checkpointing: bool = option(
        False, "Compute activations twice: about half the memory, a third more time."
    )
    dtype: str | None = option(
        None, "float32, float16 or bfloat16; the default is the checkpoint's, float32 on the CPU."
    )
    quantize: int | None = option(None, "QLoRA: train adapters on weights of 4 or 8 bits.")
    pack: bool = option(
        False,
        f"Put short rows together in one of --max-length tokens, or {PACKED_LENGTH}; they don't "
        "see each other, and --batch-size counts rows of several.",
    )
    max_length: int | None = option(None, "Tokens of a row, the most; the default is the model's.")
    too_long: str = option("error", f"Rows beyond --max-length: {', '.join(TOO_LONG)}.")
    image_size: int | None = option(None, "Side in pixels, a multiple of 64.")
    augment: bool = option(
        False, "Vary colours, crops and angles slightly; pictures are not flipped."
    )
    cache_features: bool = option(
        True,
        "With a frozen encoder, keep its features on disk, so that each image is encoded once.",
    )
    seed: int = option(0, "Of the order of rows, of new adapters and of dropout.")
    validation: str | None = option(
        None, "A file of rows to evaluate on, or a share of --data such as 0.05."
    )
    eval_every: int | None = option(None, "Steps between evaluations; the default is each epoch.")
    eval_samples: int = option(0, "Validation rows that are answered and scored each time.")
    max_tokens: int = option(64, "Of each answer of an evaluation, the most.")
    patience: int | None = option(
        None, "Stop after so many evaluations without a lower validation loss."
    )
    save_every: int | None = option(None, "Steps between checkpoints; the default is each epoch.")
    keep: int = option(2, "The last checkpoints to keep; the best one stays besides.")
    report_to: str | None = option(None, f"Log to {' or '.join(REPORTERS)} too (extras).")
    compiled: bool = option(True, "Compile a step: faster; the first of each shape takes longer.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TrainOptions:
        """From what was given, on top of the presets of the stage and of a new model.

        Raises:
            TypeError: a name is no option; the message has the right one.
        """
        names = [each.name for each in fields(cls)]
        for name in given:
            if name not in names:
                raise TypeError(f"There is no training option {shown(name)}{_hint(name, names)}")
        stage = given.get("stage")
        if stage is not None and str(stage) not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, found {shown(stage)}.")
        preset = NEW if given.get("from_scratch") is True else {}
        preset = preset | (STAGES[str(stage)] if stage is not None else {})
        return cls(**(preset | dict(given)))

    def __post_init__(self) -> None:
        if self.stage is not None:
            object.__setattr__(self, "stage", str(self.stage))
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in (*allowed, *([None] if name in OPTIONAL else [])):
                found = shown(getattr(self, name))
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {found}.")
        for name, least in WHOLE_NUMBERS.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                check_whole_number(name, getattr(self, name), least)
        for name, (wanted, is_right) in NUMBERS.items():
            value = getattr(self, name)
            if (value is not None or name not in OPTIONAL) and not (
                is_number(value) and is_right(value)
            ):
                raise ValueError(f"{name} must be {wanted}, found {shown(value)}.")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        self._check_together()

    def _check_together(self) -> None:
        if all(getattr(self, part) == FROZEN for part in PARTS):
            raise ValueError("Vision, projector and decoder are all frozen: nothing would change.")
        if self.from_scratch and any(getattr(self, part) != FULL for part in PARTS):
            raise ValueError("from_scratch trains everything: vision, projector and decoder full.")
        if self.from_scratch and self.gradient_checkpointing:
            raise ValueError(CHECKPOINTED)
        if self.quantize is not None and self.decoder == FULL:
            raise ValueError("Quantized weights can't be trained; use decoder lora or dora.")
        if self.layers and not any(getattr(self, part) in (LORA, DORA, AUTO) for part in PARTS):
            raise ValueError("layers says where LoRA or DoRA goes, and no part has either.")
        if self.patience is not None and self.validation is None:
            raise ValueError("patience needs validation: a file of rows, or a share of the data.")

    def rate(self, part: str) -> float:
        """The highest learning rate of a part."""
        own = getattr(self, f"{part}_learning_rate", None)
        if own is not None:
            return float(own)
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if FULL in (self.vision, self.decoder) else ADAPTER_RATE

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {**asdict(self), "layers": list(self.layers)}


# The smallest value of each whole number
WHOLE_NUMBERS = {
    "rank": 1,
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "max_length": 8,
    "image_size": 64,
    "seed": 0,
    "eval_every": 1,
    "eval_samples": 0,
    "max_tokens": 1,
    "patience": 1,
    "save_every": 1,
    "keep": 1,
}
CHOICES: dict[str, Sequence[Any]] = dict.fromkeys(PARTS, MODES) | {
    "projector": (*MODES, AUTO),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "too_long": TOO_LONG,
    "report_to": REPORTERS,
}
Check = tuple[str, Callable[[float], bool]]
NOT_NEGATIVE: Check = ("a number from 0", lambda x: x >= 0)
POSITIVE: Check = ("a number above 0", lambda x: x > 0)
SHARE: Check = ("a number from 0 and below 1", lambda x: 0 <= x < 1)
NUMBERS: dict[str, Check] = {
    "scale": POSITIVE,
    "dropout": SHARE,
    "learning_rate": POSITIVE,
    "projector_learning_rate": POSITIVE,
    "vision_learning_rate": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "beta1": SHARE,
    "beta2": SHARE,
    "eps": POSITIVE,
    "clip": NOT_NEGATIVE,
    "warmup": NOT_NEGATIVE,
    "final_rate": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "epochs": POSITIVE,
}
FLAGS = [each.name for each in fields(TrainOptions) if isinstance(each.default, bool)]
OPTIONAL = [each.name for each in fields(TrainOptions) if each.default is None]


def help_of(each: Field[Any]) -> str:
    """What an option is for."""
    return str(each.metadata["help"])


def read_settings(file: Path) -> dict[str, Any]:
    """The options in a JSON file, as a checkpoint's `settings` or a person writes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of settings {file}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({reason(error)}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object of options, found {shown(found)}.")
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The options that differ, each with both values."""
    names = [each.name for each in fields(TrainOptions) if each.default is not MISSING]
    return [
        f"{name} {shown(before.get(name))} → {shown(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _hint(name: str, names: Sequence[str]) -> str:
    known = OTHER_NAMES.get(name)
    near = [known] if known else get_close_matches(str(name), names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "."
