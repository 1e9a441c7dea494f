"""FastViTHD, the vision encoder, folded as it runs.

BatchNorm, layer scales and parallel branches are folded into their neighbours (`checkpoint.fold`
does the arithmetic), and 1x1 convolutions are matrix products on channels-last data. What remains
are depthwise convolutions, matrix products, GELU and attention. Docstrings name the modules of the
original `mci.py`. Shapes: B images, H x W positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..config import STEM_STRIDE, VisionConfig
from ..ops import DepthwiseConv, gelu

CONV_FFN_KERNEL = 7
STEM_KERNEL = 3
SE_REDUCTION = 16


class ConvFFN(nn.Module):
    """Depthwise 7x7, expand, GELU and project, added to the input (`ConvFFN`).

    BatchNorm is folded into the convolution, the layer scale into the projection.
    """

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.conv = DepthwiseConv(dim, CONV_FFN_KERNEL)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x, then=lambda y, x: x + self.fc2(self.expand(y)))

    def of_sum(self, x: mx.array, bias: mx.array) -> mx.array:
        """self(x + bias), with its own last bias in the same kernel where that saves another."""
        if not ops.adds_early(self.fc2):
            return self(x + bias)
        x, residual = ops.add_both(x, bias, self.fc2.bias)
        return mx.addmm(residual, self.expand(self.conv(x)), self.fc2.weight.T)

    def fold_bias(self) -> None:
        """Leave the convolution's bias to `fc1`, whose product adds one at no cost.

        fc1(x + b) is fc1(x) + W b. Not on the CPU, where a convolution adds one at no cost either.
        """
        if "bias" in self.conv and ops.adds_early(self.fc1):
            weight, bias = (a.astype(mx.float32) for a in (self.fc1.weight, self.conv.drop_bias()))
            self.fc1.bias = (self.fc1.bias + weight @ bias).astype(self.fc1.bias.dtype)

    def expand(self, x: mx.array) -> mx.array:
        return gelu(self.fc1(x), training=self.training)


class RepMixerBlock(nn.Module):
    """Token mixing by one depthwise convolution, then a ConvFFN (`RepMixerBlock`; FastViT paper,
    section 3.1)."""

    def __init__(self, dim: int, mlp_ratio: float, kernel_size: int):
        super().__init__()
        self.token_mixer = DepthwiseConv(dim, kernel_size)
        self.convffn = ConvFFN(dim, mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        if not ops.adds_early(self.convffn.fc2):
            return self.convffn(self.token_mixer(x))
        return self.convffn.of_sum(self.token_mixer.without_bias(x), self.token_mixer.bias)


class Attention(nn.Module):
    """Multi-head self-attention over all positions (`MHSA`), its layer scale folded into `proj`."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(self.attend(x))

    def attend(self, x: mx.array) -> mx.array:
        """What `proj` is given."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3 * self.num_heads, -1)
        x = ops.attention(qkv, self.scale, training=self.training)
        return x.reshape(B, H, W, C)


class AttentionBlock(nn.Module):
    """Attention on normalised channels, then a ConvFFN (`AttentionBlock`)."""

    def __init__(self, dim: int, mlp_ratio: float, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = Attention(dim, head_dim)
        self.convffn = ConvFFN(dim, mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        mixer, proj = self.token_mixer, self.token_mixer.proj
        if not ops.adds_early(proj):
            return self.convffn(x + mixer(self.norm(x)))
        y = mx.addmm(x, mixer.attend(self.norm(x)), proj.weight.T)
        return self.convffn.of_sum(y, proj.bias)


class Stem(nn.Module):
    """Pixels to stage 0, a quarter as high and wide (`convolutional_stem`)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, STEM_KERNEL, stride=2, padding=1)
        self.depthwise = DepthwiseConv(dim, STEM_KERNEL, stride=2)
        self.pointwise = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            return self._run(x)
        # In bands, since these would otherwise be the largest arrays of all.
        return ops.in_row_bands(self._run, x, STEM_STRIDE, len(self.conv.weight))

    def _run(self, x: mx.array) -> mx.array:
        x = self.depthwise.gelu(self._conv_gelu(x))
        return gelu(self.pointwise(x), training=self.training)

    def _conv_gelu(self, x: mx.array) -> mx.array:
        y = mx.conv2d(x, self.conv.weight, self.conv.stride, self.conv.padding)
        return gelu(y, self.conv.bias, training=self.training)


class Downsample(nn.Module):
    """Half as high and wide, with more channels (`PatchEmbed`).

    The original's grouped convolution gives several outputs per input channel. Here it is as many
    depthwise convolutions of one output each; the inputs of `pointwise` are permuted to match.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        self.convs = [DepthwiseConv(in_dim, kernel_size, stride) for _ in range(out_dim // in_dim)]
        self.pointwise = nn.Linear(out_dim, out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = ops.concatenated_gelu(self.convs, x)
        return gelu(self.pointwise(x), training=self.training)


class Expand(nn.Module):
    """The last widening, with squeeze-and-excitation (`conv_exp`).

    Split as in `Downsample`, and interleaved again, since its channels leave the encoder.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.convs = [DepthwiseConv(in_dim, STEM_KERNEL) for _ in range(out_dim // in_dim)]
        self.reduce = nn.Linear(out_dim, out_dim // SE_REDUCTION)
        self.expand = nn.Linear(out_dim // SE_REDUCTION, out_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.excite(ops.interleaved(self.convs, x))

    def excite(self, x: mx.array) -> mx.array:
        """Weight each channel by what all of them hold on average, then GELU."""
        squeezed = ops.mean_over_positions(x)
        gate = self.expand(nn.relu(self.reduce(squeezed)))
        return ops.gated_gelu(x, gate, training=self.training)


class FastViTHD(nn.Module):
    """The encoder: pixel values in, visual features out (FastVLM paper, section 3.2).

    It is made for inference; `train()` turns to the forms that gradients pass through.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.stem = Stem(config.embed_dims[0])
        self.network = build_network(config)
        self.conv_exp = Expand(config.embed_dims[-1], config.hidden_size)
        self.eval()

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Encode images.

        Args:
            pixel_values: [B, S, S, 3] in [0, 1] as float or 0 to 255 as uint8; S any multiple of
                the patch size (64).

        Returns:
            [B, (S/64)², C] visual features, row by row; C = `config.hidden_size`.

        Raises:
            ValueError: the shape is not that of channels-last images of such a size.
        """
        check_pixel_values(pixel_values, self.config.patch_size)
        x = self.stem(as_float(pixel_values, self.stem.conv.weight))
        for layer in self.network:
            x = layer(x)
        return self.conv_exp(x).flatten(1, 2)

    def fold_biases(self) -> None:
        """Leave each bias to the layer that adds it at the lowest cost; weights are loaded."""
        for layer in self.network:
            if isinstance(layer, (RepMixerBlock, AttentionBlock)):
                layer.convffn.fold_bias()


def check_pixel_values(pixel_values: mx.array, patch: int) -> None:
    """ValueError unless these are channels-last images whose sides are multiples of a patch's."""
    shape = pixel_values.shape
    if len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"pixel_values must be [B, S, S, 3] (channels last), found {shape}.")
    if shape[1] % patch or shape[2] % patch or not shape[1] or not shape[2]:
        raise ValueError(f"image size must be a multiple of {patch}, found {shape[1:3]}.")


def as_float(pixel_values: mx.array, weight: mx.array) -> mx.array:
    """Pixel values in the dtype of a weight; bytes become numbers in [0, 1]."""
    if pixel_values.dtype == mx.uint8:
        return _rescale(pixel_values, weight)
    return pixel_values.astype(weight.dtype)


@partial(mx.compile, shapeless=True)
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
