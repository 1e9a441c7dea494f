"""The layers of the encoder in training form, as `layer_gradients` has layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from ..ops import BatchNorm, cpu_training
from .layer_gradients import (
    Gradients,
    Layer,
    Pullback,
    added,
    by_autodiff,
    depthwise_several,
    first_conv,
    gelu,
    heads,
    in_turn,
    linear,
    together,
)
from .vision_training import (
    Attention,
    AttentionBlock,
    Conv,
    ConvFFN,
    ConvNorm,
    Downsample,
    Expand,
    MobileOne,
    Position,
    RepMixer,
    RepMixerBlock,
    Stem,
    TrainingFastViTHD,
)


class Kernel(NamedTuple):
    """A depthwise convolution, as `layer_gradients.depthwise` takes it."""

    weight: mx.array
    bias: mx.array
    stride: int


# --- Single layers ---


def conv(module: Conv) -> Layer:
    """Any convolution."""
    kernel = module.weight.shape[1]
    if not module.apart:
        return linear(module) if kernel == 1 else first_conv(module)
    return _scale_apart(module) if kernel == 1 else _depthwise(module)


def _depthwise(module: Conv) -> Layer:
    """Depthwise, with one output per channel or several, which are neighbours."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        ways = len(module.weight) // x.shape[-1]
        bias = module.bias if "bias" in module else mx.zeros(len(module.weight))
        parts = [Kernel(module.weight[i::ways], bias[i::ways], module.stride) for i in range(ways)]
        y, pullback = depthwise_several(parts, -1)(x)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, own = pullback(cotangent)
            names = ("weight", "bias") if "bias" in module else ("weight",)
            joined = {
                name: mx.stack([own[f"{i}.{name}"] for i in range(ways)], axis=1).flatten(0, 1)
                for name in names
            }
            return to_x, joined

        return y, back

    return run


def _scale_apart(module: Conv) -> Layer:
    """A 1x1 convolution of each channel on its own, with one output or several."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        C = x.shape[-1]
        scales = module.weight.reshape(C, -1)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            parts = cotangent.reshape(*cotangent.shape[:-1], C, -1)
            ways = [parts[..., i] for i in range(scales.shape[1])]
            to_x = sum(
                (g * scales[:, i] for i, g in enumerate(ways[1:], 1)), ways[0] * scales[:, 0]
            )
            to_scales = mx.stack([cpu_training.row_sum(g * x) for g in ways], axis=-1)
            return to_x, {"weight": to_scales.reshape(module.weight.shape)}

        return module(x), back

    return run


def norm(module: BatchNorm) -> Layer:
    """A BatchNorm in training."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        mean, variance = cpu_training.channel_statistics(x)
        module.remember(mean, variance, x.size // x.shape[-1])
        weight, root = module.weight, mx.rsqrt(variance + module.eps)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, to_weight, to_bias = cpu_training.batch_norm_gradients(
                x, mean, root, weight, cotangent
            )
            return to_x, {"weight": to_weight, "bias": to_bias}

        scale = weight * root
        return cpu_training.scaled(x, scale, module.bias - mean * scale), back

    return run


def layer_scale(module: Any, name: str = "layer_scale") -> Layer:
    """A scale of each channel, a parameter of its module."""
    scale = module[name]

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_scale = cpu_training.row_sum(cotangent * x).reshape(scale.shape)
            return cotangent * scale, {name: to_scale}

        return x * scale, back

    return run


def _negative(x: mx.array) -> tuple[mx.array, Pullback]:
    return -x, lambda cotangent: (-cotangent, {})


# --- The encoder's modules ---


def _conv_norm(module: ConvNorm) -> Layer:
    return in_turn(conv=conv(module.conv), bn=norm(module.bn))


def _mobile_one(module: MobileOne) -> Layer:
    branches = {"rbr_conv.0": _conv_norm(module.rbr_conv[0])}
    if "rbr_scale" in module:
        branches["rbr_scale"] = _conv_norm(module.rbr_scale)
    if "rbr_skip" in module:
        branches["rbr_skip"] = norm(module.rbr_skip)
    return together(**branches)


def _rep_mixer(module: RepMixer) -> Layer:
    mixed = together(
        mixer=_mobile_one(module.mixer),
        norm=in_turn(rbr_skip=norm(module.norm.rbr_skip), _negative=_negative),
    )
    return added(in_turn(_mixed=mixed, _scale=layer_scale(module)))


def _conv_ffn(module: ConvFFN) -> Layer:
    return in_turn(
        conv=_conv_norm(module.conv), fc1=linear(module.fc1), _gelu=gelu, fc2=linear(module.fc2)
    )


def _rep_mixer_block(module: RepMixerBlock) -> Layer:
    ffn = in_turn(convffn=_conv_ffn(module.convffn), _scale=layer_scale(module))
    return in_turn(token_mixer=_rep_mixer(module.token_mixer), _ffn=added(ffn))


def _attention(module: Attention) -> Layer:
    attend = heads(module.num_heads, module.scale)
    return in_turn(qkv=linear(module.qkv), _heads=attend, proj=linear(module.proj))


def _attention_block(module: AttentionBlock) -> Layer:
    attend = in_turn(
        _norm=by_autodiff(module.norm, norm=module.norm),
        token_mixer=_attention(module.token_mixer),
        _scale=layer_scale(module, "layer_scale_1"),
    )
    ffn = in_turn(convffn=_conv_ffn(module.convffn), _scale=layer_scale(module, "layer_scale_2"))
    return in_turn(_attend=added(attend), _ffn=added(ffn))


def _downsample(module: Downsample) -> Layer:
    large, pointwise = module.proj
    both = together(
        lkb_origin=_conv_norm(large.lkb_origin), small_conv=_conv_norm(large.small_conv)
    )
    layers = {"proj.0": both, "_gelu": gelu, "proj.1": _mobile_one(pointwise), "_gelu_2": gelu}
    return in_turn(**layers)


def _position(module: Position) -> Layer:
    return added(in_turn(pe=conv(module.pe)))


def _stem(module: Stem) -> Layer:
    layers: dict[str, Layer] = {}
    for i, block in enumerate(module.blocks):
        layers |= {f"blocks.{i}": _mobile_one(block), f"_gelu_{i}": gelu}
    return in_turn(**layers)


def _expand(module: Expand) -> Layer:
    excite = by_autodiff(module.excite, se=module.se)
    return in_turn(_branches=_mobile_one(module), _excite=excite)


def training_encoder(module: TrainingFastViTHD) -> Layer:
    """The encoder in training form."""
    network = {
        f"{i}.{n}" if isinstance(stage, list) else f"{i}": LAYERS[type(layer)](layer)
        for i, stage in enumerate(module.network)
        for n, layer in enumerate(stage if isinstance(stage, list) else [stage])
    }
    return in_turn(
        patch_embed=_stem(module.patch_embed),
        network=in_turn(**network),
        conv_exp=_expand(module.conv_exp),
    )


LAYERS: dict[type, Callable[[Any], Layer]] = {
    Position: _position,
    RepMixerBlock: _rep_mixer_block,
    AttentionBlock: _attention_block,
    Downsample: _downsample,
}
