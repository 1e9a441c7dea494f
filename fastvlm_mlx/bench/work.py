"""The least work that each stage needs, counted from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import FastVLMConfig, TextConfig, VisionConfig
from ..model.fastvlm import FastVLM
from ..model.vision import CONV_FFN_KERNEL, SE_REDUCTION, STEM_KERNEL


@dataclass(frozen=True)
class Work:
    """The least work that a computation needs.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a
            multiplication and an addition count as two.
        weights: numbers read of the model, each once.
        activations: numbers that these operations read and write, each once. What happens between
            them (biases, GELU, norms, residuals) is taken to be part of their kernels.
    """

    flops: int = 0
    weights: int = 0
    activations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weights + other.weights,
            self.activations + other.activations,
        )

    def __mul__(self, times: int) -> Work:
        """The same on `times` inputs, with the same weights."""
        return Work(times * self.flops, self.weights, times * self.activations)


def linear_work(positions: int, inputs: int, outputs: int, *, bias: bool = True) -> Work:
    """A matrix product with the weights of a linear layer."""
    return Work(
        2 * positions * inputs * outputs,
        inputs * outputs + outputs * bias,
        positions * (inputs + outputs),
    )


def conv_work(
    side: int, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> Work:
    """A convolution with bias on side x side positions, zero-padded by half the kernel."""
    positions = (-(-side // stride)) ** 2
    taps = kernel * kernel * (inputs // groups) * outputs
    return Work(2 * positions * taps, taps + outputs, side * side * inputs + positions * outputs)


def attention_work(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, *, causal: bool = False
) -> Work:
    """Scores and weighted values, the scores never written; causal queries are the last keys."""
    pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return Work(
        4 * pairs * heads * head_dim,
        0,
        2 * queries * heads * head_dim + 2 * keys * kv_heads * head_dim,
    )


def encoder_work(config: VisionConfig, image_size: int) -> Work:
    """FastViTHD on one image of `image_size` x `image_size` pixels."""
    first, last = config.embed_dims[0], config.embed_dims[-1]
    work = conv_work(image_size, 3, first, STEM_KERNEL, 2)
    work += conv_work(image_size // 2, first, first, STEM_KERNEL, 2, first)
    side = image_size // 4
    work += linear_work(side**2, first, first)
    for i, (depth, dim) in enumerate(zip(config.layers, config.embed_dims, strict=True)):
        if (shape := config.pos_embs_shapes[i]) is not None:
            work += conv_work(side, dim, dim, shape[0], groups=dim)
        for _ in range(depth):
            work += block_work(config, i, side)
        if i + 1 < len(config.layers) and config.has_downsample(i):
            wider, stride = config.embed_dims[i + 1], config.down_stride
            work += conv_work(side, dim, wider, config.down_patch_size, stride, dim)
            side = -(-side // stride)
            work += linear_work(side**2, wider, wider)
    work += conv_work(side, last, config.hidden_size, STEM_KERNEL, groups=last)
    squeezed = config.hidden_size // SE_REDUCTION
    work += linear_work(1, config.hidden_size, squeezed)
    return work + linear_work(1, squeezed, config.hidden_size)


def block_work(config: VisionConfig, stage: int, side: int) -> Work:
    """One block of a stage, on side x side positions."""
    dim, positions = config.embed_dims[stage], side**2
    hidden = int(dim * config.mlp_ratios[stage])
    if config.token_mixers[stage] == "attention":
        heads = dim // config.head_dim
        mixer = Work(weights=2 * dim)  # the norm's
        mixer += linear_work(positions, dim, 3 * dim, bias=False)
        mixer += attention_work(positions, positions, heads, heads, config.head_dim)
        mixer += linear_work(positions, dim, dim)
    else:
        mixer = conv_work(side, dim, dim, config.repmixer_kernel_size, groups=dim)
    conv = conv_work(side, dim, dim, CONV_FFN_KERNEL, groups=dim)
    return mixer + conv + linear_work(positions, dim, hidden) + linear_work(positions, hidden, dim)


def projector_work(config: FastVLMConfig, tokens: int) -> Work:
    """The projector on `tokens` visual tokens."""
    width = config.text.hidden_size
    work = linear_work(tokens, config.mm_hidden_size, width)
    for _ in range(config.projector_depth - 1):
        work += linear_work(tokens, width, width)
    return work


def decoder_work(config: TextConfig, tokens: int, offset: int = 0) -> Work:
    """The decoder on `tokens` that follow `offset` others in the KV cache, with the last's logits.

    The embeddings are given; where they share their weights with the output layer, these are
    counted there.
    """
    width, D = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = Work(weights=2 * width + 2 * D * config.qk_norm)  # the norms'
    layer += linear_work(tokens, width, (heads + 2 * kv_heads) * D, bias=config.attention_bias)
    layer += attention_work(tokens, offset + tokens, heads, kv_heads, D, causal=True)
    layer += linear_work(tokens, heads * D, width, bias=False)
    layer += linear_work(tokens, width, 2 * config.intermediate_size, bias=False)
    layer += linear_work(tokens, config.intermediate_size, width, bias=False)
    n = config.num_hidden_layers
    layers = Work(n * layer.flops, n * layer.weights, n * layer.activations)
    return layers + Work(weights=width) + linear_work(1, width, config.vocab_size, bias=False)


class Need(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flops: int
    bytes: int


def stage_needs(
    model: FastVLM,
    images: tuple[int, int],
    original: tuple[int, int],
    prompt_tokens: int,
    tokens: int,
) -> dict[str, Need]:
    """The least that each stage needs.

    Args:
        model: loaded.
        images: the number of squares that are encoded (several with `anyres`), and their side.
        original: width and height of the picture.
        prompt_tokens: of text and image.
        tokens: to generate.
    """
    config, decoder = model.config, model.language_model
    itemsize = decoder.norm.weight.itemsize
    n, side = images
    encoder = encoder_work(config.vision, side) * n
    projector = projector_work(config, (side // config.vision.patch_size) ** 2) * n
    output = decoder.embed_tokens if config.text.tie_word_embeddings else decoder.lm_head
    decoding = [*decoder.layers, decoder.norm, output]
    prefill = decoder_work(config.text, prompt_tokens)
    decode = decoder_work(config.text, 1, prompt_tokens + tokens // 2)
    kv_width = 2 * config.text.num_key_value_heads * config.text.head_dim
    kv_cache = config.text.num_hidden_layers * kv_width * (prompt_tokens + tokens) * itemsize
    decoded = 2 * 3 * original[0] * original[1]  # written, and read to be resized
    return {
        "load": Need(0, 2 * size_of(model)),
        "preprocess": Need(0, decoded + 3 * 4 * n * side**2),
        "encode": need(encoder + projector, [model.vision_tower, model.mm_projector], itemsize),
        "prefill": need(prefill, decoding, itemsize),
        "decode": need(decode, decoding, itemsize),
        "memory": Need(0, size_of(model) + kv_cache),
    }


def need(work: Work, modules: Sequence[nn.Module], itemsize: int) -> Need:
    """The work of some modules, whose weights are as they are in memory, quantized or not."""
    stored = sum(size_of(module) for module in modules)
    return Need(work.flops, stored + work.activations * itemsize)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(value.nbytes for value in dict(tree_flatten(module.parameters())).values())
