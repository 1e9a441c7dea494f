"""Gradients of the encoder, on the CPU layer by layer: twice as fast as those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import ops
from ..ops import BatchNorm, DepthwiseConv
from . import branch_gradients
from .branch_gradients import training_encoder
from .fastvlm import FastVLM
from .layer_gradients import (
    Layer,
    added,
    by_autodiff,
    depthwise,
    depthwise_several,
    first_conv,
    gelu,
    heads,
    in_turn,
    linear,
)
from .vision import (
    Attention,
    AttentionBlock,
    ConvFFN,
    Downsample,
    Expand,
    FastViTHD,
    RepMixerBlock,
    Stem,
    as_float,
    check_pixel_values,
)
from .vision_training import Conv, TrainingFastViTHD


def value_and_grad(
    model: FastVLM, loss: Callable[[FastVLM, dict[str, Any]], Any]
) -> Callable[[FastVLM, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """As `nn.value_and_grad`, with the encoder's part layer by layer where that is faster.

    Args:
        model: all of whose trainable parameters get gradients.
        loss: of the model and a batch of named arrays; it must take visual features under
            "features" in the place of "pixel_values", an array or a list of them.

    Returns:
        A function of the model and a batch which gives (the loss, gradients). By layer it is not
        to be a part of a compiled function, which would take its compiled forms apart.
    """
    if not trains_by_layer(model):
        return cast("Callable[..., tuple[Any, dict[str, Any]]]", nn.value_and_grad(model, loss))

    def of_features(parameters: Any, features: Any, batch: dict[str, Any]) -> Any:
        model.update(parameters)
        return loss(model, batch | {"features": features})

    def run(model: FastVLM, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "pixel_values" not in batch:
            return cast("tuple[Any, dict[str, Any]]", nn.value_and_grad(model, loss)(model, batch))
        rest, others = dict(batch), model.trainable_parameters()
        others.pop("vision_tower")
        encode = partial(encode_with_pullback, model.vision_tower)
        pixels = rest.pop("pixel_values")
        if isinstance(pixels, mx.array):
            features, pullback = encode(pixels)
        else:
            features, pullback = _all_of([encode(each) for each in pixels])
        gradients_of = mx.value_and_grad(of_features, argnums=(0, 1))
        value, (found, to_features) = gradients_of(others, features, rest)
        model.update(others)  # which `of_features` has replaced by those it was called with
        return value, found | {"vision_tower": pullback(to_features)}

    return run


def _all_of(encoded: list[tuple[mx.array, Callable[..., Any]]]) -> tuple[Any, Callable[..., Any]]:
    """Features of several arrays of images, and the pullback of all of them."""
    features, pullbacks = zip(*encoded, strict=True)

    def back(cotangents: list[mx.array]) -> Any:
        each = [pullback(to) for pullback, to in zip(pullbacks, cotangents, strict=True)]
        return tree_map(lambda *parts: sum(parts[1:], parts[0]), *each)

    return list(features), back


def trains_by_layer(model: FastVLM) -> bool:
    """Whether `value_and_grad` differentiates the encoder layer by layer: on the CPU in float32,
    if it has trainable parameters and plain layers, without adapters."""
    encoder = model.vision_tower
    is_trained = bool(tree_flatten(encoder.trainable_parameters()))
    # Layer by layer BatchNorms normalise by the batch, as only in training.
    is_trained &= type(encoder) is FastViTHD or encoder.training
    if not is_trained or type(encoder) not in ENCODERS:
        return False
    stages = [s if isinstance(s, list) else [s] for s in encoder.network]
    leaves = dict(tree_flatten(encoder.leaf_modules(), is_leaf=nn.Module.is_module))
    is_plain = {type(layer) for stage in stages for layer in stage} <= KNOWN
    is_plain &= {type(leaf) for leaf in leaves.values()} <= PLAIN
    return is_plain and ops.differentiates_by_layer(_first_weight(encoder).dtype)


def encode_with_pullback(
    encoder: FastViTHD | TrainingFastViTHD, pixel_values: mx.array
) -> tuple[mx.array, Callable[[mx.array], dict[str, Any]]]:
    """Visual features, and the way from their cotangent to the gradients of the encoder.

    Args:
        encoder: with plain layers, in float32; in training form it must be in `train()`.
        pixel_values: as the encoder takes them.

    Returns:
        Features [B, (S/64)², C], and a function of a cotangent of that shape which gives the
        gradients of the encoder's trainable parameters, as `nn.value_and_grad` would.
    """
    check_pixel_values(pixel_values, encoder.config.patch_size)
    layer = ENCODERS[type(encoder)](encoder)
    features, pullback = layer(as_float(pixel_values, _first_weight(encoder)))
    trainable = list(dict(tree_flatten(encoder.trainable_parameters())))

    def gradients(cotangent: mx.array) -> dict[str, Any]:
        _, found = pullback(cotangent.reshape(features.shape))
        return cast("dict[str, Any]", tree_unflatten([(name, found[name]) for name in trainable]))

    return features.flatten(1, 2), gradients


def _first_weight(encoder: FastViTHD | TrainingFastViTHD) -> mx.array:
    """One that has the dtype of all."""
    return next(value for _, value in sorted(dict(tree_flatten(encoder.parameters())).items()))


# --- The encoder's modules ---


def _conv_ffn(module: ConvFFN) -> Layer:
    return added(
        in_turn(
            conv=depthwise(module.conv),
            fc1=linear(module.fc1),
            _gelu=gelu,
            fc2=linear(module.fc2),
        )
    )


def _rep_mixer_block(module: RepMixerBlock) -> Layer:
    return in_turn(token_mixer=depthwise(module.token_mixer), convffn=_conv_ffn(module.convffn))


def _attention(module: Attention) -> Layer:
    attend = heads(module.num_heads, module.scale)
    return in_turn(qkv=linear(module.qkv), _heads=attend, proj=linear(module.proj))


def _attention_block(module: AttentionBlock) -> Layer:
    attend = in_turn(
        _norm=by_autodiff(module.norm, norm=module.norm),
        token_mixer=_attention(module.token_mixer),
    )
    return in_turn(_attend=added(attend), convffn=_conv_ffn(module.convffn))


def _stem(module: Stem) -> Layer:
    return in_turn(
        conv=first_conv(module.conv),
        _gelu=gelu,
        depthwise=depthwise(module.depthwise),
        _gelu_2=gelu,
        pointwise=linear(module.pointwise),
        _gelu_3=gelu,
    )


def _downsample(module: Downsample) -> Layer:
    return in_turn(
        convs=depthwise_several(module.convs, -2),
        _gelu=gelu,
        pointwise=linear(module.pointwise),
        _gelu_2=gelu,
    )


def _expand(module: Expand) -> Layer:
    squeeze = by_autodiff(module.excite, reduce=module.reduce, expand=module.expand)
    return in_turn(convs=depthwise_several(module.convs, -1), _squeeze=squeeze)


def _folded_encoder(module: FastViTHD) -> Layer:
    network = {str(i): LAYERS[type(layer)](layer) for i, layer in enumerate(module.network)}
    return in_turn(
        stem=_stem(module.stem),
        network=in_turn(**network),
        conv_exp=_expand(module.conv_exp),
    )


LAYERS: dict[type, Callable[[Any], Layer]] = {
    DepthwiseConv: depthwise,
    RepMixerBlock: _rep_mixer_block,
    AttentionBlock: _attention_block,
    Downsample: _downsample,
}
ENCODERS: dict[type, Callable[[Any], Layer]] = {
    FastViTHD: _folded_encoder,
    TrainingFastViTHD: training_encoder,
}
KNOWN = LAYERS.keys() | branch_gradients.LAYERS.keys()
PLAIN = {DepthwiseConv, BatchNorm, Conv, nn.Linear, nn.LayerNorm, nn.Conv2d}
