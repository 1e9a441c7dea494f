"""Dropout that draws the same numbers again where activations are computed again."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Dropout(nn.Module):
    """As `mlx.nn.Dropout`, but it may be told to remember what it drew.

    MLX draws from a state that moves on. What computes a layer's activations a second time, for the
    gradients, would drop other inputs than the first time, and the gradients would be wrong.

    Args:
        share: of the inputs that is dropped.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        self._memory = _Memory()

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or not self.share:
            return x
        kept = mx.random.bernoulli(1 - self.share, x.shape, key=self._memory.key)
        return x * kept / (1 - self.share)

    def draw(self) -> None:
        """Drop other inputs from now on, and the same ones until the next `draw`."""
        self._memory.key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)


class _Memory:
    """A key that is no parameter of a module's."""

    key: mx.array | None = None


def draw_all(module: nn.Module) -> None:
    """`draw` of each dropout in a module."""
    for each in module.modules():
        if isinstance(each, Dropout) and each.share:
            each.draw()
