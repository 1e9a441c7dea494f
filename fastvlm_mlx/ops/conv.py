"""Depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from . import cpu, cpu_training
from .activations import gelu, gelu_in_float32
from .device import on_cpu


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own, zero-padded by half the kernel.

    With one output channel per input channel, kernels up to 7x7, strides up to 2 and channels in
    multiples of 16, MLX's Metal backend has a fast kernel for it. That kernel adds no bias: a
    bias is another launch, so it is better left to what follows (`drop_bias`, `gelu`, `join`).
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
        if on_cpu() and not self.training:
            bias = self.bias if "bias" in self else mx.zeros(len(self.weight), self.weight.dtype)
            return cpu.depthwise_conv(x, self.weight, bias, self.stride, then)
        y = self.without_bias(x)
        y = y + self.bias if "bias" in self else y
        return y if then is None else then(y, x)

    def gelu(self, x: mx.array) -> mx.array:
        """The GELU of what a call gives."""
        if on_cpu():
            return gelu(self(x), training=self.training)
        return gelu(self.without_bias(x), self.bias)

    def without_bias(self, x: mx.array) -> mx.array:
        """What a call gives, less the bias."""
        if self.training:
            return _depthwise(x, self.weight, self.stride)
        channels, kernel = self.weight.shape[:2]
        return mx.conv2d(x, self.weight, self.stride, kernel // 2, groups=channels)

    def drop_bias(self) -> mx.array:
        """The bias, which is added no more: the caller adds it elsewhere."""
        bias: mx.array = self.pop("bias")
        return bias


def depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """Convolve each channel with kernels of its own, zero-padded by half the kernel, to train them.

    Args:
        x: [B, H, W, C].
        weight: [ways C, k, k, 1]; the outputs of one channel are neighbours.
        stride: of rows and columns.

    Returns:
        [B, ceil(H/stride), ceil(W/stride), ways C].
    """
    channels, kernel = x.shape[-1], weight.shape[1]
    ways = len(weight) // channels
    if kernel == stride == 1:
        return (mx.expand_dims(x, -1) * weight.reshape(channels, ways)).flatten(-2)
    # One output per channel at a time, which Metal's depthwise kernel needs.
    outputs = [_depthwise(x, weight[i::ways], stride) for i in range(ways)]
    return outputs[0] if ways == 1 else mx.stack(outputs, axis=-1).flatten(-2)


def _depthwise(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    if on_cpu():
        return cpu_training.depthwise_conv(x, weight, stride)
    channels, kernel = weight.shape[:2]
    return mx.conv2d(x, weight, stride, kernel // 2, groups=channels)


def concatenated_gelu(convs: Sequence[DepthwiseConv], x: mx.array) -> mx.array:
    """The GELU of several convolutions of x, one after the other: [B, H, W, convs * C]."""
    if on_cpu():
        outputs = mx.concatenate([conv(x) for conv in convs], axis=-1)
        return gelu(outputs, training=convs[0].training)
    return _join(convs, x, -2, _join_gelu)


def interleaved(convs: Sequence[DepthwiseConv], x: mx.array) -> mx.array:
    """Several convolutions of x, channel by channel: [B, H, W, C * convs]."""
    if on_cpu():
        return mx.stack([conv(x) for conv in convs], axis=-1).flatten(-2)
    return _join(convs, x, -1, _join_biased)


def _join(
    convs: Sequence[DepthwiseConv], x: mx.array, axis: int, join: Callable[..., mx.array]
) -> mx.array:
    """Stack the outputs of convolutions along a new axis, -2 or -1, and flatten it.

    One kernel adds the biases and chooses each value's source, instead of two for each source.
    """
    outputs = [mx.expand_dims(conv.without_bias(x), axis) for conv in convs]
    biases = [mx.expand_dims(conv.bias, axis) for conv in convs]
    place = mx.array(list(range(len(convs))))
    return join(place if axis == -1 else place[:, None], outputs, biases).flatten(-2)


def _chosen(place: mx.array, outputs: list[mx.array], biases: list[mx.array]) -> mx.array:
    """In float32, of each place the output of that number, with its bias."""
    chosen, *others = (
        y.astype(mx.float32) + bias.astype(mx.float32)
        for y, bias in zip(outputs, biases, strict=True)
    )
    for i, other in enumerate(others, 1):
        chosen = mx.where(place == i, other, chosen)
    return chosen


@partial(mx.compile, shapeless=True)
def _join_biased(place: mx.array, outputs: list[mx.array], biases: list[mx.array]) -> mx.array:
    return _chosen(place, outputs, biases).astype(outputs[0].dtype)


@partial(mx.compile, shapeless=True)
def _join_gelu(place: mx.array, outputs: list[mx.array], biases: list[mx.array]) -> mx.array:
    return gelu_in_float32(_chosen(place, outputs, biases)).astype(outputs[0].dtype)


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
