"""One step of training: gradients summed over batches, then one change of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..model.fastvlm import FastVLM
from ..model.vision import FastViTHD
from ..model.vision_gradients import trains_by_layer, value_and_grad
from .dropout import draw_all
from .loss import Arrays, encoded, loss
from .optimizer import Optimizer, clip
from .settings import CHECKPOINTED

Loss = Callable[[FastVLM, Arrays], tuple[mx.array, mx.array]]


class Sums(NamedTuple):
    """What one batch or several give: sums over their supervised tokens.

    Attributes:
        loss: of the cross entropy.
        tokens: how many there are.
        gradients: of `loss`, by parameter.
    """

    loss: mx.array
    tokens: mx.array
    gradients: dict[str, mx.array]


class Step:
    """Gradients and changes of a model's trained parameters.

    Args:
        model: prepared by `parts.prepare`.
        optimizer: of its trained parameters.
        largest_norm: to which gradients are clipped; 0 for any.
        compiled: whether both halves are compiled, once per shape of a batch.
        loss: (sum, count) of a batch's arrays.

    Attributes:
        shapes: how often the first half was compiled, or called where nothing is.
    """

    def __init__(
        self,
        model: FastVLM,
        optimizer: Optimizer,
        largest_norm: float,
        *,
        compiled: bool = True,
        loss: Loss = loss,
    ):
        self.shapes = 0
        self._model, self._optimizer, self._largest_norm = model, optimizer, largest_norm
        self._loss_and_gradients = value_and_grad(model, loss)
        self._compute: Callable[..., Sums] = self._sums
        self._change: Callable[..., mx.array] = self._apply
        if compiled:
            # The model's state is also an output: BatchNorms remember what they saw.
            state = [model.state, mx.random.state]
            if not trains_by_layer(model):  # in forms that are compiled already
                self._compute = mx.compile(self._sums, inputs=state, outputs=state)
            state = [model.state, optimizer.state]
            self._change = mx.compile(self._apply, inputs=state, outputs=state)

    def compute(self, arrays: Arrays) -> Sums:
        """What one batch gives, not computed yet."""
        return Sums(*self._compute(encoded(self._model, arrays)))

    def apply(self, sums: Sums, factor: float) -> mx.array:
        """Change the parameters by the mean gradient; its norm, before it is clipped.

        Args:
            sums: of all batches of the step, in all processes.
            factor: of the learning rates.
        """
        self._optimizer.set_rates(factor)
        return self._change(sums.gradients, sums.tokens)

    def _sums(self, arrays: Arrays) -> Sums:
        self.shapes += 1
        (total, count), gradients = self._loss_and_gradients(self._model, arrays)
        return Sums(total, count, dict(tree_flatten(gradients)))

    def _apply(self, gradients: dict[str, mx.array], tokens: mx.array) -> mx.array:
        share = 1 / mx.maximum(tokens, 1)
        gradients = {name: g.astype(mx.float32) * share for name, g in gradients.items()}
        gradients, norm = clip(gradients, self._largest_norm)
        parameters = dict(tree_flatten(self._model.trainable_parameters()))
        changed = self._optimizer.apply(gradients, parameters)
        self._model.update(tree_unflatten(list(changed.items())))
        return norm


def add(sums: Sums | None, found: Sums) -> Sums:
    """Both together; gradients of several batches in float32."""
    if sums is None:
        return found
    gradients = {
        name: sums.gradients[name].astype(mx.float32) + g for name, g in found.gradients.items()
    }
    return Sums(sums.loss + found.loss, sums.tokens + found.tokens, gradients)


def layers_of(encoder: nn.Module) -> list[Any]:
    """Those that `checkpoint_activations` takes.

    Raises:
        ValueError: the encoder is in training form, whose BatchNorms would count each batch twice.
    """
    if not isinstance(encoder, FastViTHD):
        raise ValueError(CHECKPOINTED)
    return encoder.network


def checkpoint_activations(layers: Iterable[Any]) -> None:
    """Let layers compute their activations again for the gradients instead of keeping them.

    Each gets a class of its own: other models of the process keep theirs.
    """
    for layer in layers:
        layer.__class__ = _checkpointed(layer.__class__)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> mx.array:
        draw_all(self)

        def run(x: mx.array) -> mx.array:
            return kind.__call__(self, x, *others, **named)

        return nn.utils.checkpoint(self, run)(x)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})
