"""Which parameters are trained: each part of the model frozen, with LoRA or DoRA, or in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checks import shown
from ..model.fastvlm import FastVLM
from .dropout import Dropout
from .settings import AUTO, DORA, FROZEN, FULL, LORA, PARTS, TrainOptions

MODULES = {
    "vision": ("vision_tower",),
    "projector": ("mm_projector", "image_newline"),
    "decoder": ("language_model",),
}
HEAD = "language_model.lm_head"  # gets an adapter only by its name
NEVER_DECAYED = (".bias", "norm.weight", ".layer_scale", ".layer_scale_1", ".layer_scale_2")
SEEN = ["running_mean", "running_var"]
MOST_SHOWN = 12


@dataclass(frozen=True)
class Trained:
    """What of a model is trained.

    Attributes:
        adapted: the paths of the layers with LoRA or DoRA.
        names: of all trained parameters, in the model's order.
        size: how many numbers they hold.
        total: how many numbers the model holds, packed ones counted singly.
    """

    adapted: list[str]
    names: list[str]
    size: int
    total: int

    def lines(self) -> list[str]:
        """For a person: counts, and the layers that the patterns matched."""
        share = self.size / max(1, self.total)
        said = [f"Training {self.size:,} of {self.total:,} parameters ({share:.2%})."]
        if self.adapted:
            more = len(self.adapted) - MOST_SHOWN
            shortened = ", ".join(self.adapted[:MOST_SHOWN]) + (f" and {more} more" * (more > 0))
            said.append(f"Adapters on {len(self.adapted)} layers: {shortened}.")
        return said


def prepare(model: FastVLM, options: TrainOptions) -> Trained:
    """Freeze a model, put adapters in, unfreeze what is to be trained, and set it to training.

    Args:
        model: changed in place; its layers are unfused (`checkpoint.load.load_for_training`).
        options: says what is trained; new adapters are drawn from MLX's random state.

    Raises:
        ValueError: a pattern of `layers` matches nothing, or a part is quantized and to be trained
            in full.
    """
    model.freeze()
    modes = modes_of(model, options)
    adapted = find_layers(model, options)
    layers = dict(model.named_modules())
    total = sum(count_numbers(layers[""]).values())
    for path in adapted:
        _put(model, path, _adapter(layers[path], modes[part_of(path)], options))
    for part, mode in modes.items():
        if mode == FULL:
            _unfreeze(model, part)
    train_mode(model)
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    return Trained(adapted, list(trained), sum(p.size for p in trained.values()), total)


def train_mode(model: FastVLM) -> None:
    """Set a model to training; a frozen encoder, through which no gradient passes, stays as it
    answers: it is faster so, and its BatchNorms learn nothing."""
    model.train()
    if not tree_flatten(model.vision_tower.trainable_parameters()):
        model.vision_tower.eval()


def modes_of(model: FastVLM, options: TrainOptions) -> dict[str, str]:
    """How each part is trained."""
    modes = {part: str(getattr(options, part)) for part in PARTS}
    if modes["projector"] == AUTO:
        modes["projector"] = FULL if _first_quantized(model.mm_projector) is None else LORA
    return modes


def find_layers(model: FastVLM, options: TrainOptions) -> list[str]:
    """The paths of the linear layers that get an adapter; errors as `prepare`."""
    wanted = [part for part, mode in modes_of(model, options).items() if mode in (LORA, DORA)]
    linear = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.QuantizedLinear)) and part_of(path) in wanted
    ]
    if not options.layers:
        found = sorted((path for path in linear if path != HEAD), key=_natural)
        empty = next((part for part in wanted if part not in map(part_of, found)), None)
        if empty is not None:
            raise ValueError(f"The {empty} has no linear layers for LoRA; train it in full.")
        return found
    for pattern in options.layers:
        if not any(fnmatchcase(path, pattern) for path in linear):
            raise ValueError(_no_match(pattern, linear, model))
    matched = {p for p in linear if any(fnmatchcase(p, pattern) for pattern in options.layers)}
    return sorted(matched, key=_natural)


def _no_match(pattern: str, linear: list[str], model: FastVLM) -> str:
    others = [path for path, _ in model.named_modules() if path and fnmatchcase(path, pattern)]
    if others:
        return (
            f"layers: {shown(pattern)} matches {others[0]}, which is no linear layer of a part "
            "with LoRA or DoRA."
        )
    like = linear[0] if linear else "language_model.layers.0.self_attn.q_proj"
    return (
        f"layers: {shown(pattern)} matches no linear layer of the parts with LoRA or DoRA; "
        f"patterns match whole paths, such as {like}."
    )


def part_of(path: str) -> str:
    """The part of the model that a parameter or layer belongs to."""
    top = path.split(".", 1)[0]
    return next((part for part, names in MODULES.items() if top in names), "")


def _adapter(layer: nn.Module, mode: str, options: TrainOptions) -> nn.Module:
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    kind = DoRALinear if mode == DORA else LoRALinear
    rows, columns = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        columns = columns * 32 // layer.bits
    # Not `from_base`, which miscounts a DoRA's inputs at 3, 5 and 6 bits.
    adapter = kind(columns, rows, r=options.rank, scale=options.scale)
    adapter.dropout = Dropout(options.dropout)
    if kind is DoRALinear:
        adapter.set_linear(layer)
    else:
        adapter.linear = layer
    adapter.linear.freeze()
    return adapter


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    model.update_modules(tree_unflatten([(path, layer)]))


def _unfreeze(model: FastVLM, part: str) -> None:
    for name in MODULES[part]:
        if name not in model:
            continue
        if isinstance(model[name], mx.array):
            model.unfreeze(recurse=False, keys=[name])
            continue
        if (packed := _first_quantized(model[name])) is not None:
            where = f"{name}.{packed}".rstrip(".")
            raise ValueError(
                f"{where} is quantized, and packed weights can't be trained: use {part} lora, "
                "or a checkpoint of full precision."
            )
        model[name].unfreeze()
        model[name].freeze(keys=SEEN)  # by BatchNorms: no gradient changes it


def _first_quantized(module: nn.Module) -> str | None:
    """The path of a quantized layer, if there is one."""
    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return next((p for p, layer in module.named_modules() if isinstance(layer, quantized)), None)


def count_numbers(module: nn.Module) -> dict[str, int]:
    """How many numbers each leaf module of a model holds; packed weights count singly."""
    return dict(_counts(module))


def _counts(module: nn.Module) -> Iterator[tuple[str, int]]:
    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    packed = {path: m for path, m in module.named_modules() if isinstance(m, quantized)}
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    for name, parameter in parameters.items():
        path, _, key = name.rpartition(".")
        if path not in packed:
            yield name, parameter.size
        elif key in ("weight", "bias"):
            yield name, parameter.size * (32 // packed[path].bits if key == "weight" else 1)


def is_decayed(name: str, parameter: mx.array) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms and scales."""
    return parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)


def is_matrix(name: str, parameter: mx.array) -> bool:
    """Whether Muon fits: hidden matrices, neither embeddings nor the head."""
    ends = ("embed_tokens.weight", "lm_head.weight")
    return parameter.ndim == 2 and not name.endswith(ends)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in path.split(".")]


def frozen(options: TrainOptions, part: str) -> bool:
    """Whether a part stays as it is."""
    return bool(getattr(options, part) == FROZEN)
