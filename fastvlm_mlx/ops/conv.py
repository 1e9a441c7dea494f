"""Depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from . import cpu
from .device import on_cpu

Pointwise = Callable[[mx.array, mx.array], mx.array]


class DepthwiseConv(nn.Module):
    """A convolution of each channel with itself, zero-padded by half the kernel.

    One output channel an input channel, at most 7x7 and stride at most 2: the form for which
    MLX's Metal backend has a fast kernel (with channels in multiples of 16).
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        self.bias = mx.zeros((channels,))
        self.stride = stride

    def __call__(self, x: mx.array, then: Pointwise | None = None) -> mx.array:
        """[B, H, W, C] → [B, ceil(H/stride), ceil(W/stride), C].

        Args:
            x: the input.
            then: what follows position by position, a function of the convolution's output and
                input (of stride 1); on the CPU it is computed band by band with the convolution.
        """
        if on_cpu():
            return cpu.depthwise_conv(x, self.weight, self.bias, self.stride, then)
        y = self.convolve(x) + self.bias
        return y if then is None else then(y, x)

    def convolve(self, x: mx.array) -> mx.array:
        """As a call, without the bias."""
        channels, kernel = self.weight.shape[:2]
        return mx.conv2d(x, self.weight, self.stride, kernel // 2, groups=channels)


def in_row_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, stride: int, channels: int
) -> mx.array:
    """function(x); on the CPU for a band of rows after the other, so that less memory is needed.

    Args:
        function: [B, H, W, C] → [B, H/stride, W/stride, channels], of which each row depends on
            the `stride` rows of its own and on those of the row above.
    """
    return cpu.in_row_bands(function, x, stride, channels) if on_cpu() else function(x)
