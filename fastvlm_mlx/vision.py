"""FastViTHD, the vision encoder, in the folded form in which it runs.

BatchNorm, layer scales and parallel branches are gone (`convert.fold` does the arithmetic), every
1x1 convolution is a matrix product on channels-last data, and what remains are depthwise
convolutions, matrix products, GELU and attention. Comments name the modules of the original
`mci.py`. Shapes: B images, H x W positions, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from .config import VisionConfig

CONV_FFN_KERNEL = 7
STEM_KERNEL = 3
STEM_STRIDE = 4
SE_REDUCTION = 16
FUSED_HEAD_DIM = 64  # the narrowest heads that Metal's attention kernel takes
MAX_HIDDEN = 2_000_000  # values at a time, on the CPU, in the stem
BAND = 2**18  # values of a convolution's output at a time, on the CPU
# Taps that are summed at a time there: compilers vectorise a loop over few enough arrays alone,
# which they check for overlaps.
TAPS = 5


def on_cpu() -> bool:
    """Whether arrays are computed on the CPU, where MLX has other fast forms than on a GPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def on_metal() -> bool:
    """Whether arrays are computed by Metal kernels."""
    return mx.metal.is_available() and not on_cpu()


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


def one_by_one(
    function: Callable[..., mx.array], pieces: Iterable[Sequence[mx.array]]
) -> list[mx.array]:
    """The function of each piece's arrays; none is begun before the one before it is done, so that
    memory holds what is needed for one."""
    done: list[mx.array] = []
    for piece in pieces:
        done.append(function(*(mx.depends(list(piece), done[-1:]) if done else piece)))
    return done


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x times the normal distribution function, elementwise."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(mx.array, _gelu_on_cpu(x))
    return nn.gelu(x)


@mx.custom_function
def _gelu_on_cpu(x: mx.array) -> mx.array:
    return _gelu_rational(x)


@_gelu_on_cpu.vjp
def _gelu_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    # That of the rational form would overflow where x is large.
    distribution = 0.5 * (1 + mx.erf(x * 0.5**0.5))
    return cotangent * (distribution + x * mx.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5)


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

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] → [B, ceil(H/stride), ceil(W/stride), C]."""
        if on_cpu():
            return in_bands(self.from_padded(), x, self.weight.shape[1], self.stride)
        return self.convolve(x) + self.bias

    def from_padded(self) -> Callable[[mx.array], mx.array]:
        """The convolution of rows that are padded already, as `in_bands` takes it."""
        channels, kernel = self.weight.shape[:2]
        taps = list(mx.split(mx.contiguous(self.weight.reshape(channels, -1).T), kernel**2))
        return lambda x: _shifted_conv(x, taps, self.bias, self.stride)

    def convolve(self, x: mx.array) -> mx.array:
        """As a call, without the bias."""
        channels, kernel = self.weight.shape[:2]
        return mx.conv2d(x, self.weight, self.stride, kernel // 2, groups=channels)


def attend(qkv: mx.array, scale: float) -> mx.array:
    """Attention of all positions to all.

    On Metal with heads padded by zeros, which changes nothing, to the width that its kernel takes:
    the scores, 100 MB a block for an image of 1024 pixels, are then never written to memory. On
    the CPU one head at a time, so that they stay in the processor's cache.

    Args:
        qkv: queries, keys and values of all heads, [B, N, 3 heads, D].
        scale: of the scores.

    Returns:
        [B, N, heads, D].
    """
    D = qkv.shape[-1]
    if on_metal() and D < FUSED_HEAD_DIM:
        qkv = mx.pad(qkv, [(0, 0), (0, 0), (0, 0), (0, FUSED_HEAD_DIM - D)])
    q, k, v = mx.split(qkv.swapaxes(1, 2), 3, axis=1)
    if not on_cpu() or q.dtype != mx.float32:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
        return y.swapaxes(1, 2)[..., :D]

    heads = zip(*(mx.split(x, x.shape[1], axis=1) for x in (q, k, with_ones(v))), strict=True)
    outputs = one_by_one(lambda q, k, v: average(scale * q @ k.swapaxes(-1, -2), v), heads)
    return mx.concatenate(outputs, axis=1).swapaxes(1, 2)


def with_ones(values: mx.array) -> mx.array:
    """[..., S, D] → [..., S, D + 1], as `average` takes them."""
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def average(scores: mx.array, values: mx.array) -> mx.array:
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


class ConvFFN(nn.Module):
    """Depthwise 7x7 (BatchNorm folded in), expand, GELU, project (layer scale folded in); all of it
    added to the input."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.conv = DepthwiseConv(dim, CONV_FFN_KERNEL)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        if not on_cpu():
            return x + self.fc2(self.expand(self.conv(x)))
        convolve, pad = self.conv.from_padded(), CONV_FFN_KERNEL // 2

        def run(rows: mx.array) -> mx.array:
            return rows[:, pad:-pad, pad:-pad] + self.fc2(self.expand(convolve(rows)))

        return in_bands(run, x, CONV_FFN_KERNEL)

    def expand(self, x: mx.array) -> mx.array:
        return gelu(self.fc1(x))


@mx.compile
def _add_both(x: mx.array, bias: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    y = x + bias
    return y, y + second


class RepMixerBlock(nn.Module):
    """Token mixing by one depthwise convolution, then a ConvFFN (FastViT paper, section 3.1)."""

    def __init__(self, dim: int, mlp_ratio: float, kernel_size: int):
        super().__init__()
        self.token_mixer = DepthwiseConv(dim, kernel_size)
        self.convffn = ConvFFN(dim, mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        ffn = self.convffn
        if on_cpu() or not isinstance(ffn.fc2, nn.Linear):
            return ffn(self.token_mixer(x))
        # Both biases in one kernel, and the residual in that of the last product.
        x, residual = _add_both(self.token_mixer.convolve(x), self.token_mixer.bias, ffn.fc2.bias)
        return mx.addmm(residual, ffn.expand(ffn.conv(x)), ffn.fc2.weight.T)


class Attention(nn.Module):
    """Multi-head self-attention over all positions (`MHSA`); layer scale folded into `proj`."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        x = attend(self.qkv(x).reshape(B, H * W, 3 * self.num_heads, -1), self.scale)
        return self.proj(x.reshape(B, H, W, C))


class AttentionBlock(nn.Module):
    """Attention on normalised channels, then a ConvFFN."""

    def __init__(self, dim: int, mlp_ratio: float, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = Attention(dim, head_dim)
        self.convffn = ConvFFN(dim, mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        return self.convffn(x + self.token_mixer(self.norm(x)))


class Stem(nn.Module):
    """Pixels to stage 0 at a quarter of the resolution (`convolutional_stem`)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, STEM_KERNEL, stride=2, padding=1)
        self.depthwise = DepthwiseConv(dim, STEM_KERNEL, stride=2)
        self.pointwise = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        if not on_cpu():
            return self._run(x)
        # In bands of rows: whole, these would be the largest arrays of all. The first row of a
        # band is one too much, since what lies above the band counts as zero in it.
        step = max(1, MAX_HIDDEN // (x.shape[2] * self.pointwise.bias.size))
        tops = [max(row - 1, 0) for row in range(0, x.shape[1] // STEM_STRIDE, step)]
        bands = [
            [x[:, STEM_STRIDE * top : STEM_STRIDE * (i + 1) * step]] for i, top in enumerate(tops)
        ]
        outputs = one_by_one(self._run, bands)
        return mx.concatenate([outputs[0], *(y[:, 1:] for y in outputs[1:])], axis=1)

    def _run(self, x: mx.array) -> mx.array:
        return gelu(self.pointwise(gelu(self.depthwise(gelu(self.conv(x))))))


class Downsample(nn.Module):
    """Half the resolution, wider channels (`PatchEmbed`).

    The original's grouped convolution makes several outputs of each input channel. Here it is
    one depthwise convolution for each; `pointwise` has its inputs permuted to match.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        self.convs = [DepthwiseConv(in_dim, kernel_size, stride) for _ in range(out_dim // in_dim)]
        self.pointwise = nn.Linear(out_dim, out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.concatenate([conv(x) for conv in self.convs], axis=-1)
        return gelu(self.pointwise(gelu(x)))


class Expand(nn.Module):
    """The last widening (`conv_exp`), with squeeze-and-excitation.

    Split as in `Downsample`, and interleaved again, since its channels leave the encoder.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.convs = [DepthwiseConv(in_dim, STEM_KERNEL) for _ in range(out_dim // in_dim)]
        self.reduce = nn.Linear(out_dim, out_dim // SE_REDUCTION)
        self.expand = nn.Linear(out_dim // SE_REDUCTION, out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, _ = x.shape
        x = mx.stack([conv(x) for conv in self.convs], axis=-1).reshape(B, H, W, -1)
        squeezed = x.mean(axis=(1, 2), keepdims=True)
        gate = mx.sigmoid(self.expand(nn.relu(self.reduce(squeezed))))
        return gelu(x * gate)


class FastViTHD(nn.Module):
    """The encoder: pixels in, visual tokens out (FastVLM paper, section 3.2)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.stem = Stem(config.embed_dims[0])
        self.network = build_network(config)
        self.conv_exp = Expand(config.embed_dims[-1], config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Encode images.

        Args:
            pixel_values: [B, S, S, 3] in [0, 1] as float or 0 to 255 as uint8; S any multiple of
                the patch size (64).

        Returns:
            [B, (S/64)², C] features, row by row; C = `config.hidden_size`.

        Raises:
            ValueError: the shape is not that of channels-last images of such a size.
        """
        self._check(pixel_values)
        x = self.stem(_as_input(pixel_values, self.stem.conv.weight))
        for layer in self.network:
            x = layer(x)
        return self.conv_exp(x).flatten(1, 2)

    def _check(self, pixel_values: mx.array) -> None:
        shape, patch = pixel_values.shape, self.config.patch_size
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"pixel_values must be [B, S, S, 3] (channels last), found {shape}.")
        if shape[1] % patch or shape[2] % patch or not shape[1] or not shape[2]:
            raise ValueError(f"image size must be a multiple of {patch}, found {shape[1:3]}.")


def _as_input(pixel_values: mx.array, weight: mx.array) -> mx.array:
    if pixel_values.dtype == mx.uint8:
        return _rescale(pixel_values, weight)
    return pixel_values.astype(weight.dtype)


@mx.compile
def _rescale(pixel_values: mx.array, like: mx.array) -> mx.array:
    return pixel_values.astype(like.dtype) / 255


def build_network(config: VisionConfig) -> list[Callable[[mx.array], mx.array]]:
    """The stages, flat: position encodings (`RepCPE`), blocks and downsampling in order."""
    network: list[Callable[[mx.array], mx.array]] = []
    for i, (depth, dim, ratio) in enumerate(
        zip(config.layers, config.embed_dims, config.mlp_ratios, strict=True)
    ):
        if (shape := config.pos_embs_shapes[i]) is not None:
            network.append(DepthwiseConv(dim, shape[0]))
        for _ in range(depth):
            if config.token_mixers[i] == "attention":
                network.append(AttentionBlock(dim, ratio, config.head_dim))
            else:
                network.append(RepMixerBlock(dim, ratio, config.repmixer_kernel_size))
        if i + 1 < len(config.layers) and config.has_downsample(i):
            kernel, stride = config.down_patch_size, config.down_stride
            network.append(Downsample(dim, config.embed_dims[i + 1], kernel, stride))
    return network
