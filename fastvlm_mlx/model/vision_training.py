"""FastViTHD in training form, to be trained from scratch.

Where the form that runs has one convolution, here are parallel branches, each with a BatchNorm, and
layer scales (FastViT paper, section 3). Parameters have the names and axes that the original's
`mci.py` gives them, channels last, as in the mlx-vlm layout, so that `checkpoint.fold` turns them
into those of `vision.FastViTHD`. Shapes: B images, H x W positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..config import VisionConfig
from ..ops import BatchNorm, depthwise, gelu
from .vision import CONV_FFN_KERNEL, SE_REDUCTION, STEM_KERNEL, as_float, check_pixel_values

Layer = Callable[[mx.array], mx.array]

LAYER_SCALE = 0.1  # where layer scales start
SMALL_KERNEL = 3  # beside a large one


class Conv(nn.Module):
    """A convolution, zero-padded by half its kernel: of all channels together, or each on its own.

    Args:
        in_dim, out_dim: channels; if they stay apart, the outputs of a channel are neighbours.
        kernel_size: 1 or odd.
        stride: of rows and columns.
        apart: whether each channel has its own.
        bias: whether there is one.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        apart: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        width = 1 if apart else in_dim
        bound = (kernel_size**2 * width) ** -0.5
        shape = (out_dim, kernel_size, kernel_size, width)
        self.weight = mx.random.uniform(-bound, bound, shape)
        if bias:
            self.bias = mx.zeros((out_dim,))
        self.stride, self.apart = stride, apart

    def __call__(self, x: mx.array) -> mx.array:
        kernel = self.weight.shape[1]
        if self.apart:
            y = depthwise(x, self.weight, self.stride)
        elif kernel == 1:
            y = x @ self.weight.flatten(1).T
        else:
            y = mx.conv2d(x, self.weight, self.stride, kernel // 2)
        return y + self.bias if "bias" in self else y


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, *, apart: bool):
        super().__init__()
        self.conv = Conv(in_dim, out_dim, kernel_size, stride, apart=apart)
        self.bn = BatchNorm(out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.bn(self.conv(x))


class MobileOne(nn.Module):
    """The sum of a convolution, a 1x1 convolution and the input, each with a BatchNorm
    (`MobileOneBlock`, without its activation)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        apart: bool = False,
        scale: bool = False,
    ):
        super().__init__()
        self.rbr_conv = [ConvNorm(in_dim, out_dim, kernel_size, stride, apart=apart)]
        if scale:
            self.rbr_scale = ConvNorm(in_dim, out_dim, 1, stride, apart=apart)
        if in_dim == out_dim and stride == 1:
            self.rbr_skip = BatchNorm(in_dim)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.rbr_conv[0](x)
        if "rbr_scale" in self:
            y = y + self.rbr_scale(x)
        return y + self.rbr_skip(x) if "rbr_skip" in self else y


class Norm(nn.Module):
    """Only a BatchNorm, under the name it has in the original (a `MobileOneBlock` without
    convolutions)."""

    def __init__(self, dim: int):
        super().__init__()
        self.rbr_skip = BatchNorm(dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.rbr_skip(x)


class RepMixer(nn.Module):
    """x + layer_scale (mixer(x) - norm(x)) (`RepMixer`)."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.norm = Norm(dim)
        self.mixer = MobileOne(dim, dim, kernel_size, apart=True, scale=True)
        self.layer_scale = _layer_scale(dim)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class ConvFFN(nn.Module):
    """Depthwise 7x7, expand, GELU and project (`ConvFFN`)."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.conv = ConvNorm(dim, dim, CONV_FFN_KERNEL, 1, apart=True)
        self.fc1 = Conv(dim, hidden, bias=True)
        self.fc2 = Conv(hidden, dim, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(self.conv(x)), training=self.training))


class RepMixerBlock(nn.Module):
    """Token mixing, then a ConvFFN (`RepMixerBlock`)."""

    def __init__(self, dim: int, mlp_ratio: float, kernel_size: int):
        super().__init__()
        self.token_mixer = RepMixer(dim, kernel_size)
        self.convffn = ConvFFN(dim, mlp_ratio)
        self.layer_scale = _layer_scale(dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class Attention(nn.Module):
    """Multi-head self-attention over all positions (`MHSA`)."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3 * self.num_heads, -1)
        return self.proj(ops.attention(qkv, self.scale, training=self.training).reshape(B, H, W, C))


class AttentionBlock(nn.Module):
    """Attention on normalised channels, then a ConvFFN (`AttentionBlock`)."""

    def __init__(self, dim: int, mlp_ratio: float, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = Attention(dim, head_dim)
        self.convffn = ConvFFN(dim, mlp_ratio)
        self.layer_scale_1, self.layer_scale_2 = _layer_scale(dim), _layer_scale(dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class Stem(nn.Module):
    """Pixels to stage 0, a quarter as high and wide (`convolutional_stem`)."""

    def __init__(self, dim: int):
        super().__init__()
        self.blocks = [
            MobileOne(3, dim, STEM_KERNEL, 2),
            MobileOne(dim, dim, STEM_KERNEL, 2, apart=True),
            MobileOne(dim, dim),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = gelu(block(x), training=self.training)
        return x


class LargeKernel(nn.Module):
    """A large kernel and a small one, each with a BatchNorm (`ReparamLargeKernelConv`)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        self.lkb_origin = ConvNorm(in_dim, out_dim, kernel_size, stride, apart=True)
        self.small_conv = ConvNorm(in_dim, out_dim, SMALL_KERNEL, stride, apart=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lkb_origin(x) + self.small_conv(x)


class Downsample(nn.Module):
    """Half as high and wide, with more channels (`PatchEmbed`)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        large = LargeKernel(in_dim, out_dim, kernel_size, stride)
        self.proj: list[Any] = [large, MobileOne(out_dim, out_dim)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.proj:
            x = gelu(layer(x), training=self.training)
        return x


class Position(nn.Module):
    """x + a depthwise convolution of x (`RepCPE`)."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.pe = Conv(dim, dim, kernel_size, apart=True, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.pe(x)


class SqueezeExcite(nn.Module):
    """The gate of each channel, from what all of them hold on average (`SEBlock`)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce = Conv(dim, dim // SE_REDUCTION, bias=True)
        self.expand = Conv(dim // SE_REDUCTION, dim, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.expand(nn.relu(self.reduce(ops.mean_over_positions(x))))


class Expand(MobileOne):
    """The last widening, with squeeze-and-excitation (`conv_exp`)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, STEM_KERNEL, apart=True, scale=True)
        self.se = SqueezeExcite(out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.excite(super().__call__(x))

    def excite(self, x: mx.array) -> mx.array:
        """Weight each channel by its gate, then GELU."""
        return ops.gated_gelu(x, self.se(x), training=self.training)


class TrainingFastViTHD(nn.Module):
    """The encoder in training form, in the place of `vision.FastViTHD`.

    A new one has random weights: of convolutions as PyTorch draws them, and layer scales of 0.1.
    With `train()` its BatchNorms normalise by the batch, and remember what they saw; with `eval()`
    it gives what the folded encoder gives.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = Stem(config.embed_dims[0])
        self.network = build_network(config)
        self.conv_exp = Expand(config.embed_dims[-1], config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Encode images; as for `vision.FastViTHD`."""
        check_pixel_values(pixel_values, self.config.patch_size)
        x = self.patch_embed(as_float(pixel_values, self.conv_exp.se.expand.weight))
        for stage in self.network:
            for layer in stage if isinstance(stage, list) else [stage]:
                x = layer(x)
        return self.conv_exp(x).flatten(1, 2)


def build_network(config: VisionConfig) -> list[Layer | list[Layer]]:
    """The stages, each a list of blocks, between position encodings and downsampling, as the
    original numbers them."""
    network: list[Layer | list[Layer]] = []
    for i, (depth, dim, ratio) in enumerate(
        zip(config.layers, config.embed_dims, config.mlp_ratios, strict=True)
    ):
        if (shape := config.pos_embs_shapes[i]) is not None:
            network.append(Position(dim, shape[0]))
        if config.token_mixers[i] == "attention":
            network.append([AttentionBlock(dim, ratio, config.head_dim) for _ in range(depth)])
        else:
            kernel = config.repmixer_kernel_size
            network.append([RepMixerBlock(dim, ratio, kernel) for _ in range(depth)])
        if i + 1 < len(config.layers) and config.has_downsample(i):
            kernel, stride = config.down_patch_size, config.down_stride
            network.append(Downsample(dim, config.embed_dims[i + 1], kernel, stride))
    return network


def _layer_scale(dim: int) -> mx.array:
    return mx.full((1, 1, dim), LAYER_SCALE)
