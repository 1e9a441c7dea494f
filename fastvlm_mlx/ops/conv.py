"""Depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .device import on_cpu


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own, zero-padded by half the kernel.

    With one output channel per input channel, kernels up to 7x7, strides up to 2 and channels in
    multiples of 16, MLX's Metal backend has a fast kernel for it.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        self.bias = mx.zeros((channels,))
        self.stride = stride

    def __call__(self, x: mx.array, then: cpu.Pointwise | None = None) -> mx.array:
        """[B, H, W, C] → [B, ceil(H/stride), ceil(W/stride), C].

        Args:
            x: the input.
            then: what follows position by position, a function of the convolution's output and
                its input (of the same size, so for stride 1 only).
        """
        if on_cpu():
            return cpu.depthwise_conv(x, self.weight, self.bias, self.stride, then)
        y = self._convolve(x) + self.bias
        return y if then is None else then(y, x)

    def with_sum(self, x: mx.array, term: mx.array) -> tuple[mx.array, mx.array]:
        """(y, y + term) where y is what a call gives; both come from one kernel.

        Args:
            x: [B, H, W, C].
            term: [C].
        """
        return _add_both(self._convolve(x), self.bias, term)

    def _convolve(self, x: mx.array) -> mx.array:
        channels, kernel = self.weight.shape[:2]
        return mx.conv2d(x, self.weight, self.stride, kernel // 2, groups=channels)


@mx.compile
def _add_both(x: mx.array, bias: mx.array, term: mx.array) -> tuple[mx.array, mx.array]:
    y = x + bias
    return y, y + term


def in_row_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, stride: int, channels: int
) -> mx.array:
    """function(x), computed on the CPU one band of rows after another, which takes less memory.

    Args:
        function: [B, H, W, C] → [B, H/stride, W/stride, channels]. Each row that it gives may
            depend on the `stride` rows that it comes from and on the one above them.
        x: [B, H, W, C].
        stride: of rows and columns.
        channels: of the output.
    """
    return cpu.in_row_bands(function, x, stride, channels) if on_cpu() else function(x)
