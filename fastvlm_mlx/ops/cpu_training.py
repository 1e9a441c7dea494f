"""Forms for training on MLX's CPU backend, in float32; each equals MLX's own up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from . import cpu


def depthwise_conv(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """A depthwise convolution, zero-padded by half the kernel, with gradients of its own.

    Args:
        x: [B, H, W, C].
        weight: [C, k, k, 1], k odd.
        stride: of rows and columns.

    Returns:
        [B, ceil(H/stride), ceil(W/stride), C].
    """
    return _depthwise_conv(stride)(x, weight)


@cache
def _depthwise_conv(stride: int) -> Callable[[mx.array, mx.array], mx.array]:
    @mx.custom_function
    def convolve(x: mx.array, weight: mx.array) -> mx.array:
        pad = weight.shape[1] // 2
        padded = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
        slices = cpu.shifted(padded, weight.shape[1], stride)
        return cpu.weighted_sum(slices, cpu.taps_of(weight), mx.array(0.0))

    @convolve.vjp
    def gradients(
        primals: list[mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        x, weight = primals
        return (
            conv_input_gradient(cotangent, weight, stride, x.shape),
            conv_weight_gradient(x, cotangent, weight.shape[1], stride),
        )

    return cast("Callable[[mx.array, mx.array], mx.array]", convolve)


def conv_input_gradient(
    cotangent: mx.array, weight: mx.array, stride: int, shape: tuple[int, ...]
) -> mx.array:
    """The gradient of a depthwise convolution's input [B, H, W, C].

    Input p meets output (p + pad - i) / stride at place i of the kernel, where that is whole. So
    the inputs of each remainder p % stride have places of their own, and are computed apart.
    """
    B, H, W, C = shape
    kernel, taps = weight.shape[1], cpu.taps_of(weight)
    margin, height, width = kernel // 2 + 1, -(-H // stride), -(-W // stride)
    padded = mx.pad(cotangent, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    parts = []
    for row in range(stride):
        for column in range(stride):
            met = [
                (i * kernel + j, margin + down, margin + right)
                for i, down in _meeting(row, kernel, stride)
                for j, right in _meeting(column, kernel, stride)
            ]
            slices = [padded[:, top : top + height, left : left + width] for _, top, left in met]
            part = cpu.weighted_sum(slices, [taps[place] for place, _, _ in met], mx.array(0.0))
            parts.append(part)
    if stride == 1:
        return parts[0]
    grid = mx.stack(parts, axis=3).reshape(B, height, width, stride, stride, C)
    return grid.swapaxes(2, 3).reshape(B, height * stride, width * stride, C)[:, :H, :W]


def _meeting(remainder: int, kernel: int, stride: int) -> list[tuple[int, int]]:
    """(place of the kernel, number of the output less p // stride) for each output that an input
    p of this remainder has a part in."""
    ahead = [(i, remainder + kernel // 2 - i) for i in range(kernel)]
    return [(i, distance // stride) for i, distance in ahead if distance % stride == 0]


def conv_weight_gradient(x: mx.array, cotangent: mx.array, kernel: int, stride: int) -> mx.array:
    """The gradient of a depthwise convolution's weight [C, k, k, 1]."""
    C, pad = x.shape[-1], kernel // 2
    padded = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    ones = mx.ones((1, cotangent.size // C))
    slices = cpu.shifted(padded, kernel, stride)
    sums = [ones @ (slice * cotangent).reshape(-1, C) for slice in slices]
    return mx.concatenate(sums).T.reshape(C, kernel, kernel, 1)
