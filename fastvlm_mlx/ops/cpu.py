"""Forms for MLX's CPU backend, in float32; each equals MLX's own up to rounding.

Four things make that backend slow, and each form avoids some of them: there are no fused kernels,
so that every step passes over memory; loops are vectorised only where the compiler can tell that
arrays don't overlap; exp and erf are scalar loops; and its BLAS repacks large matrices before it
multiplies.

What runs on prompts, of any length, compiles once for all shapes (`shapeless`); what runs on
images, of few sizes, once for each, which passes over memory faster.

Gradients pass through all of them. Where that of a form would overflow, its own stands beside it
(`gelu`, `swiglu`), which is also the place of a form made for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

# --- Exponentials without a scalar loop ---

# exp(-x) is 1 / q(x)^4, where q is the polynomial of degree 8 with the smallest greatest error,
# given as the quadratics 1 + b x + c x^2 whose product it is: free of branches, and shallow enough
# to compile to few kernels.
EXP_QUADRATICS = (
    (-0.0490418821795418, 0.002048998013033526),
    (-0.003946849161990235, 0.004619180002777338),
    (0.09752089722310578, 0.008452690314660312),
    (0.20546781535802852, 0.011953298227567686),
)

# In the same way erfc(x / sqrt 2) is 1 / q(x)^8, with q the product of two quartics 1 + a x + …,
# given as their coefficients from a on.
ERFC_QUARTICS = (
    (-0.170857689, 0.06370624209, -0.01136089943, 0.001273986242),
    (0.27059018, 0.02731497181, 0.007381219363, 0.002301829003),
)


@partial(mx.compile, shapeless=True)
def exp_negative(x: mx.array) -> mx.array:
    """exp(-x) for x from 0 on, within 5e-7."""
    # The factors and their first products lack the leading 1, so that near 0, where it counts,
    # little is rounded away.
    a, b, c, d = (x * (b + c * x) for b, c in EXP_QUADRATICS)
    ab, cd = a + b + a * b, c + d + c * d
    root = 1 + (ab + cd + ab * cd)
    square = root * root
    return 1 / (square * square)


def erfc_root(x: mx.array, square: mx.array) -> mx.array:
    """q(x)^4, the root of 1 / erfc(x / sqrt 2), for x from 0 on; `square` is its square."""
    q, r = (
        ((1 + a * x) + b * square) + square * (c * x + d * square) for a, b, c, d in ERFC_QUARTICS
    )
    q = q * r
    q = q * q
    return q * q


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """The exact GELU, within 4e-7."""
    return _gelu(x)


@gelu.vjp
def _gelu_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    # That of the rational form would overflow where x is large.
    distribution = 0.5 * (1 + mx.erf(x * 0.5**0.5))
    return cotangent * (distribution + x * mx.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5)


@mx.compile
def _gelu(x: mx.array) -> mx.array:
    # The positive part of x, less |x| / 2 erfc(|x| / sqrt 2). With a branch, or one operation more,
    # this would compile to several kernels, each of which fills memory of its own.
    size, square = mx.abs(x), x * x
    q = erfc_root(size, square)
    half = 0.5 * size
    return (0.5 * x + half) - half / (q * q)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return _swiglu(gate, up)


@swiglu.vjp
def _swiglu_gradient(
    primals: list[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    # That of the rational form would overflow where the gate is large.
    gate, up = primals
    share = mx.sigmoid(gate)
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    # The positive part of the gate, less |gate| / (1 + exp |gate|).
    size = mx.abs(gate)
    small = exp_negative(size)
    return (0.5 * gate + 0.5 * size - size * small / (1 + small)) * up


# --- Norms in fewer steps ---


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm in three steps, where MLX takes seven."""
    return _normalise(x, mx.square(x).sum(axis=-1, keepdims=True), x.shape[-1], weight, eps)


@partial(mx.compile, shapeless=True)
def _normalise(
    x: mx.array, square_sum: mx.array, width: int, weight: mx.array, eps: float
) -> mx.array:
    return x * mx.rsqrt(square_sum / width + eps) * weight


# --- Work in pieces, so that what a piece needs stays in the processor's cache ---

BAND = 2**18  # values of a convolution's output at a time
MAX_HIDDEN = 2_000_000  # values at a time in `in_row_bands`

Pointwise = Callable[[mx.array, mx.array], mx.array]


def in_sequence(
    function: Callable[..., mx.array], pieces: Iterable[Sequence[mx.array]]
) -> list[mx.array]:
    """The function of each piece's arrays. None starts before the last one is done, so that memory
    holds what one of them needs."""
    done: list[mx.array] = []
    for piece in pieces:
        done.append(function(*(mx.depends(list(piece), done[-1:]) if done else piece)))
    return done


def in_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, kernel: int, stride: int = 1
) -> mx.array:
    """A function of what a convolution sees, computed one band of output rows after another.

    Args:
        function: rows [B, r, W + kernel - 1, C], padded with zeros → the rows they give.
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


def in_row_bands(
    function: Callable[[mx.array], mx.array], x: mx.array, stride: int, channels: int
) -> mx.array:
    """As `conv.in_row_bands`."""
    # A band starts one output row early, since zeros stand in for what lies above a band; that row
    # is dropped.
    step = max(1, MAX_HIDDEN // (x.shape[2] * channels))
    tops = [max(row - 1, 0) for row in range(0, x.shape[1] // stride, step)]
    bands = [[x[:, stride * top : stride * (i + 1) * step]] for i, top in enumerate(tops)]
    outputs = in_sequence(function, bands)
    return mx.concatenate([outputs[0], *(y[:, 1:] for y in outputs[1:])], axis=1)


# --- Convolutions as sums of shifted slices ---

# Summands at a time: a compiler checks only a few arrays for overlaps, and vectorises a loop over
# no more than those.
TAPS = 5


def depthwise_conv(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int, then: Pointwise | None
) -> mx.array:
    """As `conv.DepthwiseConv`, with `then` computed band by band, too."""
    kernel = weight.shape[1]
    taps, pad = taps_of(weight), kernel // 2

    def run(rows: mx.array) -> mx.array:
        y = weighted_sum(shifted(rows, kernel, stride), taps, bias)
        return y if then is None else then(y, rows[:, pad:-pad, pad:-pad])

    return in_bands(run, x, kernel, stride)


def taps_of(weight: mx.array) -> list[mx.array]:
    """The places of a kernel [C, k, k, 1] row by row, [1, C] each."""
    channels, kernel = weight.shape[:2]
    return list(mx.split(mx.contiguous(weight.reshape(channels, -1).T), kernel**2))


def shifted(x: mx.array, kernel: int, stride: int) -> list[mx.array]:
    """What each place of a kernel meets in a padded [B, H, W, C]."""
    height, width = ((side - kernel) // stride + 1 for side in x.shape[1:3])
    slices = []
    for i in range(kernel):
        strip = x[:, i : i + (height - 1) * stride + 1 : stride]
        slices += [strip[:, :, j : j + (width - 1) * stride + 1 : stride] for j in range(kernel)]
    return slices


def weighted_sum(slices: list[mx.array], taps: list[mx.array], start: mx.array) -> mx.array:
    """start + the sum of slices [B, h, w, C] times taps [1, C]."""
    starts = range(0, len(taps), TAPS)
    parts = [_sum_products(slices[i : i + TAPS], taps[i : i + TAPS]) for i in starts]
    for i in range(0, len(parts), TAPS):
        start = _sum(start, parts[i : i + TAPS])
    return start


@mx.compile
def _sum_products(shifted: list[mx.array], taps: list[mx.array]) -> mx.array:
    return sum(
        (x * tap for x, tap in zip(shifted[1:], taps[1:], strict=True)), shifted[0] * taps[0]
    )


@mx.compile
def _sum(start: mx.array, parts: list[mx.array]) -> mx.array:
    return sum(parts, start)


# --- Attention in pieces ---

ROWS = 32  # of queries that attend at a time


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Attention of all positions to all, [B, heads, N, D], one head at a time."""
    heads = zip(*(mx.split(x, x.shape[1], axis=1) for x in (q, k, _with_ones(v))), strict=True)
    outputs = in_sequence(
        lambda q, k, v: _softmax_weighted(scale * q @ k.swapaxes(-1, -2), v), heads
    )
    return mx.concatenate(outputs, axis=1)


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, some rows at a time, each with only the keys that it may see.

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
    k, v = k[:, :, None], _with_ones(v)[:, :, None]
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
    return _softmax_weighted(mx.where(sees, scores, -mx.inf), v)


def _with_ones(values: mx.array) -> mx.array:
    """[..., S, D] → [..., S, D + 1], as `_softmax_weighted` takes them."""
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def _softmax_weighted(scores: mx.array, values: mx.array) -> mx.array:
    """softmax(scores) @ values; the product sums the weights up as well.

    Args:
        scores: float32 [..., T, S].
        values: [..., S, D + 1], the last column ones.

    Returns:
        [..., T, D].
    """
    below = scores.max(axis=-1, keepdims=True) - scores
    sums = exp_negative(below) @ values
    # Kept until here though no longer needed: otherwise the exponentials would be written over it,
    # and a loop that writes where it reads is not vectorised.
    sums = mx.depends(sums, below)
    return sums[..., :-1] / sums[..., -1:]


# --- Products that BLAS would repack ---

# A product of one row with at least LARGE weights is computed BLOCK outputs at a time.
BLOCK = 128
LARGE = 2**18
# A quantized product takes time in proportion to its rows. From MANY_ROWS on it costs less to write
# the weights out in float32, WRITTEN_OUT values at a time, which is little beside the model.
MANY_ROWS = 8
WRITTEN_OUT = 2**24


def is_row(x: mx.array, weight: mx.array) -> bool:
    """Whether `row_matmul` is the faster product: x is one row, the weight is large."""
    return x.size == x.shape[-1] and weight.size >= LARGE


def row_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """One row x, [..., inputs], times weight [outputs, inputs] transposed.

    Where it can, a block of outputs at a time: repacking a large matrix costs more than the product
    itself, and a small one is not repacked.
    """
    outputs, inputs = weight.shape
    if outputs % BLOCK:
        return x @ weight.T
    blocks = weight.reshape(-1, BLOCK, inputs).swapaxes(-1, -2)
    return (x.reshape(1, 1, inputs) @ blocks).reshape(*x.shape[:-1], outputs)


def has_many_rows(x: mx.array) -> bool:
    """Whether `dequantized_matmul` is the faster product: x is float32 and has many rows."""
    return x.dtype == mx.float32 and x.size >= MANY_ROWS * x.shape[-1]


def dequantized_matmul(x: mx.array, layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> mx.array:
    """x, [..., inputs], times the layer's weight [outputs, inputs] transposed."""
    quantized = [a for a in (layer.weight, layer.scales, layer.get("biases")) if a is not None]
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, WRITTEN_OUT // x.shape[-1])
    pieces = [[a[i : i + step] for a in quantized] for i in range(0, len(layer.weight), step)]

    def product(weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        written_out = mx.dequantize(weight, scales, biases, dtype=mx.float32, **settings)
        # A plain BLAS takes half as long again for a transposed view as for a copy of it, so the
        # smaller matrix is copied.
        if len(rows) < len(written_out):
            return (written_out @ mx.contiguous(rows.T)).T
        return rows @ mx.contiguous(written_out.T)

    y = mx.concatenate(in_sequence(product, pieces), axis=-1)
    return mx.contiguous(y).reshape(*x.shape[:-1], -1)
