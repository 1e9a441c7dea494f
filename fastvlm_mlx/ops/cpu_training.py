"""Forms for training on MLX's CPU backend, in float32; each equals MLX's own up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple, cast

import mlx.core as mx

from . import cpu

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that arrays leave for those to come.

    Otherwise glibc gives all that is large back to the system at once, and a step of training takes
    half its time to get it again, page by page. Elsewhere nothing is done.
    """
    import ctypes

    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# --- Depthwise convolutions ---

BLOCK = 4  # inputs in a row and in a column whose gradients are computed at a time


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
        return conv_gradients(x, weight, cotangent, stride)

    return cast("Callable[[mx.array, mx.array], mx.array]", convolve)


def conv_gradients(
    x: mx.array, weight: mx.array, cotangent: mx.array, stride: int
) -> tuple[mx.array, mx.array]:
    """The gradients of a depthwise convolution's input and weight.

    A block of inputs and the cotangents that it meets make one row of two matrices per channel,
    and both gradients are products of these. Most of what is multiplied does not count, and yet it
    is several times as fast as a pass over memory for each place of the kernel.

    Args:
        x, weight, stride: as `depthwise_conv` takes them.
        cotangent: of its output.
    """
    B, H, W, C = x.shape
    kernel = weight.shape[1]
    rows, columns = (_blocks(n, kernel, stride) for n in (H, W))
    met = _cut(cotangent, *((a.number, a.met, a.side // stride, a.first) for a in (rows, columns)))
    inputs = _cut(x, *((a.number, a.side, a.side, 0) for a in (rows, columns)))
    tap_of, pairs_of = _meetings(rows, columns, kernel, stride)
    taps = mx.pad(weight.reshape(C, -1), [(0, 0), (0, 1)])  # the last is 0, for no meeting
    to_x = met @ mx.take(taps, tap_of, axis=1).reshape(C, met.shape[-1], -1)
    to_x = to_x.reshape(C, B, rows.number, columns.number, rows.side, columns.side)
    to_x = to_x.transpose(1, 2, 4, 3, 5, 0)
    to_x = to_x.reshape(B, rows.number * rows.side, columns.number * columns.side, C)
    pairs = mx.take((met.swapaxes(1, 2) @ inputs).reshape(C, -1), pairs_of, axis=1)
    to_weight = pairs.reshape(C, kernel**2, -1).sum(axis=-1)
    return to_x[:, :H, :W], to_weight.reshape(weight.shape)


class _Blocks(NamedTuple):
    """How rows or columns are cut into blocks.

    Attributes:
        number: of the blocks.
        side: inputs in each, a multiple of the stride.
        met: outputs that have a part in them.
        first: the number of the first of these outputs in the first block; it may be negative.
    """

    number: int
    side: int
    met: int
    first: int

    def taps(self, kernel: int, stride: int) -> dict[tuple[int, int], int]:
        """(output, input) of a block → the place of the kernel where they meet."""
        ahead = {
            (o, i): i + kernel // 2 - stride * (o + self.first)
            for o in range(self.met)
            for i in range(self.side)
        }
        return {pair: tap for pair, tap in ahead.items() if 0 <= tap < kernel}


def _blocks(length: int, kernel: int, stride: int) -> _Blocks:
    count = -(-length // BLOCK)
    side = -(-length // (count * stride)) * stride
    first = -(kernel // 2 // stride)
    return _Blocks(count, side, (side - 1 + kernel // 2) // stride - first + 1, first)


def _cut(x: mx.array, *axes: tuple[int, int, int, int]) -> mx.array:
    """Cut [B, H, W, C] into blocks that may overlap: [C, B blocks, positions of a block].

    Args:
        x: what lies beyond it counts as zeros.
        axes: of rows and of columns: how many blocks, their length, the distance from one to the
            next, and where the first starts.
    """
    around = [
        (-first, max(0, (count - 1) * step + first + side - length))
        for (count, side, step, first), length in zip(axes, x.shape[1:3], strict=True)
    ]
    # Within rows first: reading all of the array for each channel would be slower.
    by_row = mx.contiguous(mx.pad(x, [(0, 0), *around, (0, 0)]).swapaxes(2, 3))
    B, H, C, W = by_row.shape
    (rows, height, down, _), (columns, width, right, _) = axes
    shape = (C, B, rows, columns, height, width)
    strides = (W, H * C * W, down * C * W, right, C * W, 1)
    cut = mx.contiguous(mx.as_strided(by_row, shape, strides))
    return cut.reshape(C, B * rows * columns, height * width)


@cache
def _meetings(
    rows: _Blocks, columns: _Blocks, kernel: int, stride: int
) -> tuple[mx.array, mx.array]:
    """For each pair (output, input) of a block the place of the kernel where they meet, or k² for
    none; and for each place of the kernel its pairs, all places one after the other."""
    inputs = rows.side * columns.side
    tap_of = [kernel**2] * (rows.met * columns.met * inputs)
    pairs_of: list[list[int]] = [[] for _ in range(kernel**2)]
    for (o, i), row in rows.taps(kernel, stride).items():
        for (p, j), column in columns.taps(kernel, stride).items():
            pair = (o * columns.met + p) * inputs + i * columns.side + j
            tap_of[pair] = row * kernel + column
            pairs_of[row * kernel + column].append(pair)
    return mx.array(tap_of), mx.array(pairs_of).flatten()


# --- GELU ---

# With s = |x|, GELU's derivative at -s is this polynomial of s times the 1 / q^8 of `cpu.gelu`, and
# at s it is 1 less that: the terms with the smallest greatest error.
GELU_DERIVATIVE = (
    0.5000003578739425,
    -0.3989746569121416,
    -0.31801866923461564,
    -0.05547402988839189,
    0.011141551705922658,
    -0.0013064468370389344,
    6.468758871192689e-05,
)


def gelu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    """cotangent times the derivative of GELU at x, within 4e-7 of 1, for |x| up to 10^6."""
    return _times_derivative(x, _erfc_tail(x), cotangent)


@mx.compile
def _erfc_tail(x: mx.array) -> mx.array:
    root = cpu.erfc_root(mx.abs(x), x * x)
    return 1 / (root * root)


@mx.compile
def _times_derivative(x: mx.array, tail: mx.array, cotangent: mx.array) -> mx.array:
    size, square = mx.abs(x), x * x
    a, b, c, d, e, f, g = GELU_DERIVATIVE
    below = ((a + b * size) + square * (c + d * size)) + square * square * (
        (e + f * size) + g * square
    )
    # x / size is its sign, which is a branch and would not be vectorised.
    return cotangent * (0.5 + (x / (size + 1e-30)) * (0.5 - below * tail))


# --- Sums and products ---


def row_sum(x: mx.array) -> mx.array:
    """The sum of all rows, [..., C] → [C], as a product, which BLAS computes on all cores."""
    rows = x.reshape(-1, x.shape[-1])
    return (mx.ones((1, len(rows))) @ rows).squeeze(0)


def first_conv_gradient(
    x: mx.array, cotangent: mx.array, shape: tuple[int, ...], stride: int
) -> mx.array:
    """The gradient of a small convolution's weight [outputs, k, k, inputs], padded by half k."""
    kernel = shape[1]
    pad = kernel // 2
    padded = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    slices = mx.concatenate(cpu.shifted(padded, kernel, stride), axis=-1)
    return (cotangent.flatten(0, -2).T @ slices.flatten(0, -2)).reshape(shape)


# --- BatchNorm and scales ---


def channel_statistics(x: mx.array) -> tuple[mx.array, mx.array]:
    """(mean, variance) of each channel, [C]."""
    count = x.size // x.shape[-1]
    mean = row_sum(x) / count
    return mean, row_sum(_squared_distance(x, mean)) / count


@mx.compile
def scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """scale x + shift, by channel."""
    return x * scale + shift


def batch_norm_gradients(
    x: mx.array, mean: mx.array, root: mx.array, weight: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradients of the input, the weight and the bias of a BatchNorm by a batch's statistics.

    Args:
        x: [..., C].
        mean: of each channel.
        root: 1 / sqrt(variance + eps).
        weight: [C].
        cotangent: of the output.
    """
    count = x.size // x.shape[-1]
    to_bias = row_sum(cotangent)
    to_weight = row_sum(_product(cotangent, x, root, -mean * root))
    scale = weight * root
    slope = scale * root * to_weight / count
    to_x = _without_trend(cotangent, x, scale, slope, scale * to_bias / count - slope * mean)
    return to_x, to_weight, to_bias


@mx.compile
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x - mean)


@mx.compile
def _product(cotangent: mx.array, x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return cotangent * (x * scale + shift)


@mx.compile
def _without_trend(
    cotangent: mx.array, x: mx.array, scale: mx.array, slope: mx.array, offset: mx.array
) -> mx.array:
    return cotangent * scale - x * slope - offset
