"""RMSNorm, and means over positions."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .device import on_cpu


class RMSNorm(nn.RMSNorm):
    """MLX's, with a form of fewer steps on the CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., dims] → [..., dims]."""
        if on_cpu() and x.dtype == mx.float32:
            return cpu.rms_norm(x, self.weight, self.eps)
        return mx.fast.rms_norm(x, self.weight, self.eps)


class BatchNorm(nn.BatchNorm):
    """MLX's, as PyTorch has it: statistics in float32, and the variance that it remembers is that
    of all values, estimated from those of the batch."""

    def __init__(self, dims: int):
        super().__init__(dims)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., dims] → [..., dims]."""
        wide = x.astype(mx.float32)
        mean, variance = self.running_mean, self.running_var
        if self.training:
            axes = list(range(x.ndim - 1))
            mean, variance = mx.mean(wide, axis=axes), mx.var(wide, axis=axes)
            self.remember(mean, variance, x.size // x.shape[-1])
        scale = self.weight * mx.rsqrt(variance + self.eps)
        return (wide * scale + (self.bias - mean * scale)).astype(x.dtype)

    def remember(self, mean: mx.array, variance: mx.array, count: int) -> None:
        """Take a batch of so many values per channel into account."""
        if count < 2:
            raise ValueError(
                "A BatchNorm can't be trained on one value per channel: give it larger images or "
                "more of them at a time."
            )
        mean, variance = mx.stop_gradient(mean), mx.stop_gradient(variance * count / (count - 1))
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * variance


def mean_over_positions(x: mx.array) -> mx.array:
    """[B, H, W, C] → [B, 1, 1, C].

    In float32 inside, since the sum overflows float16 from a mean of 255 on for 16x16 positions.
    """
    return x.astype(mx.float32).mean(axis=(1, 2), keepdims=True).astype(x.dtype)
