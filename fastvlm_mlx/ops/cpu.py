"""Forms for MLX's CPU backend, in float32.

It has no fused kernels, its elementwise loops are vectorised only where the compiler can tell that
arrays don't overlap, its exp and erf are scalar loops, and its BLAS repacks large matrices. These
forms avoid all that; each is equal to MLX's own but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

BAND = 2**18  # values of a convolution's output at a time
MAX_HIDDEN = 2_000_000  # values at a time in `in_row_bands`
# Taps that are summed at a time: compilers vectorise a loop over few enough arrays alone, which
# they check for overlaps.
TAPS = 5
ROWS = 32  # of queries that attend at a time
# A product of one row is taken this many outputs at a time, of weights of this size.
BLOCK = 128
LARGE = 2**18
# A quantized product takes time by the row, and from this many on it costs less to write the
# weights out in float32, so many values at a time that memory does not notice.
MANY_ROWS = 8
WRITTEN_OUT = 2**24

# exp(-x) is 1 / q(x)^4, where q is the polynomial of degree 8 with the smallest greatest error,
# given as the quadratics 1 + b x + c x^2 whose product it is: no branches, and shallow enough to
# compile to few kernels, where MLX's CPU exp is a scalar loop.
EXP_QUADRATICS = (
    (-0.0490418821795418, 0.002048998013033526),
    (-0.003946849161990235, 0.004619180002777338),
    (0.09752089722310578, 0.008452690314660312),
    (0.20546781535802852, 0.011953298227567686),
)


# erfc(x / sqrt 2) is in the same way 1 / q(x)^8, given as the quartics 1 + p x + … whose product q
# is: their coefficients from p on.
ERFC_QUARTICS = (
    (-0.170857689, 0.06370624209, -0.01136089943, 0.001273986242),
    (0.27059018, 0.02731497181, 0.007381219363, 0.002301829003),
)


@mx.compile
def _gelu_rational(x: mx.array) -> mx.array:
    # Within 4e-7: the positive part of x, less |x| / 2 erfc(|x| / sqrt 2). No branches and not
    # one operation more, or it compiles to several kernels, each with pages of its own to fill.
    size, square = mx.abs(x), x * x
    q, r = (
        ((1 + a * size) + b * square) + square * (c * size + d * square)
        for a, b, c, d in ERFC_QUARTICS
    )
    q = q * r
    q = q * q
    q = q * q
    half = 0.5 * size
    return (0.5 * x + half) - half / (q * q)


@mx.compile
def exp_negative(x: mx.array) -> mx.array:
    # exp(-x) for x from 0, within 5e-7. The ones are left out of the factors and of the first
    # products, so that little is rounded away near 0, where it counts.
    a, b, c, d = (x * (b + c * x) for b, c in EXP_QUADRATICS)
    ab, cd = a + b + a * b, c + d + c * d
    root = 1 + (ab + cd + ab * cd)
    square = root * root
    return 1 / (square * square)


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    return _gelu_rational(x)


@gelu.vjp
def _gelu_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    # That of the rational form would overflow where x is large.
    distribution = 0.5 * (1 + mx.erf(x * 0.5**0.5))
    return cotangent * (distribution + x * mx.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu_rational(gate, up)


@swiglu.vjp
def _swiglu_gradient(
    primals: list[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    # That of the rational form would overflow where the gate is large.
    gate, up = primals
    share = mx.sigmoid(gate)
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


@mx.compile
def _swiglu_rational(gate: mx.array, up: mx.array) -> mx.array:
    # The positive part of the gate, less |gate| / (1 + exp |gate|).
    size = mx.abs(gate)
    small = exp_negative(size)
    return (0.5 * gate + 0.5 * size - size * small / (1 + small)) * up


@mx.compile
def _normalise(x: mx.array, square_sum: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt(square_sum / x.shape[-1] + eps) * weight


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """In three steps, where MLX takes seven."""
    return _normalise(x, mx.square(x).sum(axis=-1, keepdims=True), weight, eps)


def in_sequence(
    function: Callable[..., mx.array], pieces: Iterable[Sequence[mx.array]]
) -> list[mx.array]:
    """The function of each piece's arrays; none is begun before the one before it is done, so that
    memory holds what is needed for one."""
    done: list[mx.array] = []
    for piece in pieces:
        done.append(function(*(mx.depends(list(piece), done[-1:]) if done else piece)))
    return done


def in_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, kernel: int, stride: int = 1
) -> mx.array:
    """A function of what a convolution sees, computed for one band of its output's rows after the
    other, so that all that a band needs stays in the processor's cache.

    Args:
        function: some rows [B, r, W + kernel - 1, C], padded by zeros → rows that they give.
        x: [B, H, W, C].
        kernel: odd.
        stride: of the rows.

    Returns:
        [B, ceil(H/stride), ...].
    """
    B, H, W, C = x.shape
    pad, height = kernel // 2, (H - 1) // stride + 1
    step = max(1, BAND * stride // (B * W * C))
    done: list[mx.array] = []
    for top in range(0, height, step):
        first = top * stride - pad
        end = (min(top + step, height) - 1) * stride + pad + 1
        rows = x[:, max(first, 0) : end]
        rows = mx.depends(rows, done[-1:]) if done else rows
        outside = (max(-first, 0), max(end - H, 0))
        done.append(function(mx.pad(rows, [(0, 0), outside, (pad, pad), (0, 0)])))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=1)


@mx.compile
def _sum_products(shifted: list[mx.array], taps: list[mx.array]) -> mx.array:
    return sum(
        (x * tap for x, tap in zip(shifted[1:], taps[1:], strict=True)), shifted[0] * taps[0]
    )


@mx.compile
def _sum(start: mx.array, parts: list[mx.array]) -> mx.array:
    return sum(parts, start)


def _shifted_conv(x: mx.array, taps: list[mx.array], bias: mx.array, stride: int) -> mx.array:
    """A depthwise convolution as a sum of shifted slices.

    Args:
        x: [B, H, W, C], padded.
        taps: of each place in the kernel, row by row, [C].
        bias: [C].
        stride: of rows and columns.
    """
    kernel = math.isqrt(len(taps))
    height, width = ((side - kernel) // stride + 1 for side in x.shape[1:3])
    shifted = []
    for i in range(kernel):
        strip = x[:, i : i + (height - 1) * stride + 1 : stride]
        shifted += [strip[:, :, j : j + (width - 1) * stride + 1 : stride] for j in range(kernel)]
    starts = range(0, len(taps), TAPS)
    parts = [_sum_products(shifted[i : i + TAPS], taps[i : i + TAPS]) for i in starts]
    for i in range(0, len(parts), TAPS):
        bias = _sum(bias, parts[i : i + TAPS])
    return bias


def depthwise_conv(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    stride: int,
    then: Callable[[mx.array, mx.array], mx.array] | None,
) -> mx.array:
    """As `conv.DepthwiseConv` takes them."""
    channels, kernel = weight.shape[:2]
    taps = list(mx.split(mx.contiguous(weight.reshape(channels, -1).T), kernel**2))
    pad = kernel // 2

    def run(rows: mx.array) -> mx.array:
        y = _shifted_conv(rows, taps, bias, stride)
        return y if then is None else then(y, rows[:, pad:-pad, pad:-pad])

    return in_bands(run, x, kernel, stride)


def in_row_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, stride: int, channels: int
) -> mx.array:
    """As `conv.in_row_bands`."""
    # The first row of a band is one too much, since what lies above the band counts as zero in it.
    step = max(1, MAX_HIDDEN // (x.shape[2] * channels))
    tops = [max(row - 1, 0) for row in range(0, x.shape[1] // stride, step)]
    bands = [[x[:, stride * top : stride * (i + 1) * step]] for i, top in enumerate(tops)]
    outputs = in_sequence(function, bands)
    return mx.concatenate([outputs[0], *(y[:, 1:] for y in outputs[1:])], axis=1)


def with_ones(values: mx.array) -> mx.array:
    """[..., S, D] → [..., S, D + 1], as `softmax_weighted` takes them."""
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def softmax_weighted(scores: mx.array, values: mx.array) -> mx.array:
    """softmax(scores) @ values, on the CPU.

    Args:
        scores: float32 [..., T, S].
        values: [..., S, D + 1], the last column ones, which sum the weights up.

    Returns:
        [..., T, D].
    """
    below = scores.max(axis=-1, keepdims=True) - scores
    sums = exp_negative(below) @ values
    # Needed no more, but kept until here: else the exponentials would be written over it, and a
    # loop that writes where it reads is not vectorised.
    sums = mx.depends(sums, below)
    return sums[..., :-1] / sums[..., -1:]


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """One head at a time, so that the scores stay in the processor's cache: [B, heads, N, D]."""
    heads = zip(*(mx.split(x, x.shape[1], axis=1) for x in (q, k, with_ones(v))), strict=True)
    outputs = in_sequence(
        lambda q, k, v: softmax_weighted(scale * q @ k.swapaxes(-1, -2), v), heads
    )
    return mx.concatenate(outputs, axis=1)


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention on the CPU, some rows at a time, each with the keys that it may see.

    Args:
        q: [B, heads, T, D], the last T of S positions.
        k, v: [B, kv_heads, S, D].
        scale: of the scores.

    Returns:
        [B, heads, T, D].
    """
    B, heads, T, D = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - T
    q = (scale * q).reshape(B, kv_heads, heads // kv_heads, T, D)
    k, v = k[:, :, None], with_ones(v)[:, :, None]
    ends = [min(start + ROWS, T) for start in range(0, T, ROWS)]
    pieces = [
        (q[..., i * ROWS : end, :], k[..., : before + end, :], v[..., : before + end, :])
        for i, end in enumerate(ends)
    ]
    return mx.concatenate(in_sequence(_attend_rows, pieces), axis=-2).reshape(B, heads, T, D)


def _attend_rows(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    scores = q @ k.swapaxes(-1, -2)
    rows, seen = scores.shape[-2:]
    sees = mx.arange(seen - rows, seen)[:, None] >= mx.arange(seen)
    return softmax_weighted(mx.where(sees, scores, -mx.inf), v)


def rope_tables(
    x: mx.array, length: int, dims: int, base: float, offset: Any
) -> tuple[mx.array, mx.array]:
    """Cosines and sines, as `rotate` takes them."""
    if isinstance(offset, mx.array) and offset.size > 1:  # one for each row: [B, 1] or [B, 1, 1]
        offset = offset[:, None] if x.shape[0] != offset.size else offset[:, None, None]
    positions = mx.arange(length, dtype=mx.float32) + offset
    frequencies = mx.exp(
        mx.arange(0, -dims // 2, -1, dtype=mx.float32) * (math.log(base) / (dims // 2))
    )
    angles = positions[..., None] * frequencies
    return mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate(_rotate(a, b, cos, sin), axis=-1)


@mx.compile
def _rotate(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> list[mx.array]:
    return [a * cos - b * sin, a * sin + b * cos]


def is_row(x: mx.array, weight: mx.array) -> bool:
    """Whether `row_matmul` is for x and a weight: one row, times a large one."""
    return x.size == x.shape[-1] and weight.size >= LARGE


def row_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """One row x, [..., inputs], times weight [outputs, inputs] transposed.

    Where it can, a block of outputs at a time: BLAS libraries repack a large matrix before they
    multiply, which costs more than the product itself, but not a small one.
    """
    outputs, inputs = weight.shape
    if outputs % BLOCK:
        return x @ weight.T
    blocks = weight.reshape(-1, BLOCK, inputs).swapaxes(-1, -2)
    return (x.reshape(1, 1, inputs) @ blocks).reshape(*x.shape[:-1], outputs)


def has_many_rows(x: mx.array) -> bool:
    """Whether `dequantized_matmul` is for x: in float32, and of enough rows."""
    return x.dtype == mx.float32 and x.size >= MANY_ROWS * x.shape[-1]


def dequantized_matmul(x: mx.array, layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> mx.array:
    """x, [..., inputs], times the layer's weight [outputs, inputs] transposed, in float32."""
    quantized = [a for a in (layer.weight, layer.scales, layer.get("biases")) if a is not None]
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, WRITTEN_OUT // x.shape[-1])
    pieces = [[a[i : i + step] for a in quantized] for i in range(0, len(layer.weight), step)]

    def product(weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        written_out = mx.dequantize(weight, scales, biases, dtype=mx.float32, **settings)
        # A plain BLAS takes half as long again for a transposed view as for the copy of one, so
        # that the smaller matrix is copied.
        if len(rows) < len(written_out):
            return (written_out @ mx.contiguous(rows.T)).T
        return rows @ mx.contiguous(written_out.T)

    y = mx.concatenate(in_sequence(product, pieces), axis=-1)
    return mx.contiguous(y).reshape(*x.shape[:-1], -1)
