"""AdamW or Muon with a learning rate for each part; half-precision weights have float32 copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .parts import is_decayed, is_matrix, part_of
from .settings import TrainOptions

Arrays = dict[str, mx.array]
HALF = (mx.float16, mx.bfloat16)


class Optimizer:
    """Changes a model's trained parameters, given by name.

    Parameters of the same part, kind and weight decay are a group with an optimizer of MLX. What
    is held at half precision has a copy in float32, to which small steps still add up.

    Args:
        parameters: by name, as they are at the start.
        options: which optimizer, and its learning rates.

    Attributes:
        copies: the float32 copies by name.
    """

    def __init__(self, parameters: Mapping[str, mx.array], options: TrainOptions):
        self.copies = {n: p.astype(mx.float32) for n, p in parameters.items() if p.dtype in HALF}
        self._groups: dict[tuple[str, bool, bool], list[str]] = {}
        for name, parameter in parameters.items():
            uses_muon = options.optimizer == "muon" and is_matrix(name, parameter)
            key = part_of(name), uses_muon, is_decayed(name, parameter)
            self._groups.setdefault(key, []).append(name)
        self._rates = {key: options.rate(key[0]) for key in self._groups}
        self._optimizers = {key: _make(key, options) for key in self._groups}
        exact = {n: self.copies.get(n, p) for n, p in parameters.items()}
        for key, names in self._groups.items():
            self._optimizers[key].init({n: exact[n] for n in names})

    def set_rates(self, factor: float) -> None:
        """Give each group its learning rate, times a factor of the schedule."""
        for key, optimizer in self._optimizers.items():
            optimizer.state["learning_rate"] = mx.array(self._rates[key] * factor, mx.float32)

    def apply(self, gradients: Arrays, parameters: Arrays) -> Arrays:
        """The parameters after a step; the optimizer's own state moves on."""
        changed: Arrays = {}
        for key, names in self._groups.items():
            steepness = {n: gradients[n].astype(mx.float32) for n in names}
            before = {n: self.copies.get(n, parameters[n]) for n in names}
            changed |= self._optimizers[key].apply_gradients(steepness, before)
        self.copies |= {n: changed[n] for n in self.copies}
        return {n: value.astype(parameters[n].dtype) for n, value in changed.items()}

    @property
    def state(self) -> list[Any]:
        """What `mx.compile` is told to watch: it changes in place."""
        return [self.copies, *(each.state for each in self._optimizers.values())]

    def tensors(self) -> Arrays:
        """All that it remembers, by name, to be saved."""
        found = {f"copy.{name}": value for name, value in self.copies.items()}
        for key, optimizer in self._optimizers.items():
            found[f"step.{_label(key)}"] = optimizer.state["step"]
            for name in self._groups[key]:
                moments = optimizer.state[name]
                found |= {f"{moment}.{name}": value for moment, value in moments.items()}
        return found

    def load(self, tensors: Arrays) -> None:
        """Remember again what `tensors` gave.

        Raises:
            ValueError: they are another optimizer's.
        """
        own = self.tensors()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("the optimizer's state is of other parameters")
        self.copies |= {name: tensors[f"copy.{name}"] for name in self.copies}
        for key, optimizer in self._optimizers.items():
            optimizer.state["step"] = tensors[f"step.{_label(key)}"]
            for name in self._groups[key]:
                moments = optimizer.state[name]
                moments |= {moment: tensors[f"{moment}.{name}"] for moment in moments}


def _label(key: tuple[str, bool, bool]) -> str:
    return "-".join(map(str, key))


def _make(key: tuple[str, bool, bool], options: TrainOptions) -> optim.Optimizer:
    _, uses_muon, decays = key
    decay = options.weight_decay if decays else 0.0
    if uses_muon:
        return optim.Muon(learning_rate=0.0, weight_decay=decay)
    return optim.AdamW(
        learning_rate=0.0,
        betas=[options.beta1, options.beta2],
        eps=options.eps,
        weight_decay=decay,
        bias_correction=True,
    )


def schedule_factor(step: int, total: int, options: TrainOptions) -> float:
    """What the learning rates are multiplied by in an optimizer step, counted from 0."""
    warmup = warmup_steps(total, options)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    left = options.final_rate if options.schedule != "constant" else 0.0
    return left + (1 - left) * shape[options.schedule]


def warmup_steps(total: int, options: TrainOptions) -> int:
    """In how many optimizer steps the learning rates rise."""
    share = options.warmup
    return min(total, math.ceil(share * total) if share < 1 else int(share))


def clip(gradients: Arrays, largest: float) -> tuple[Arrays, mx.array]:
    """Gradients scaled down to a norm of `largest` where theirs is larger, and their norm."""
    squares = [g.astype(mx.float32).square().sum() for g in gradients.values()]
    norm = mx.sqrt(mx.stack(squares).sum())
    if not largest:
        return gradients, norm
    factor = mx.minimum(largest / (norm + 1e-6), 1.0)
    return {name: g * factor.astype(g.dtype) for name, g in gradients.items()}, norm
