"""Gradients of the encoder layer by layer, outside `mx.grad`.

Under `mx.grad` the compiled forms of the CPU fall apart into single operations. Here each layer
runs in its form for inference and keeps what its gradient needs, and the gradients are compiled
forms too. On the CPU that is several times as fast as differentiating the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import ops
from ..ops import DepthwiseConv, cpu, cpu_training
from .fastvlm import FastVLM
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
)

Gradients = dict[str, mx.array]
"""By the names of the parameters."""
Pullback = Callable[[mx.array], tuple[mx.array, Gradients]]
"""The cotangent of an output → that of the input, and the gradients of the parameters."""
Layer = Callable[[mx.array], tuple[mx.array, Pullback]]
"""An input → the output and its pullback."""


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
    if not tree_flatten(encoder.trainable_parameters()) or type(encoder) is not FastViTHD:
        return False
    leaves = dict(tree_flatten(encoder.leaf_modules(), is_leaf=nn.Module.is_module))
    is_plain = {type(layer) for layer in encoder.network} <= LAYERS.keys()
    is_plain &= {type(leaf) for leaf in leaves.values()} <= PLAIN
    return is_plain and ops.differentiates_by_layer(encoder.stem.conv.weight.dtype)


def encode_with_pullback(
    encoder: FastViTHD, pixel_values: mx.array
) -> tuple[mx.array, Callable[[mx.array], dict[str, Any]]]:
    """Visual features, and the way from their cotangent to the gradients of the encoder.

    Args:
        encoder: with plain layers, in float32.
        pixel_values: as the encoder takes them.

    Returns:
        Features [B, (S/64)², C], and a function of a cotangent of that shape which gives the
        gradients of the encoder's trainable parameters, as `nn.value_and_grad` would.
    """
    features, pullback = _encoder(encoder)(as_float(pixel_values, encoder.stem.conv.weight))
    trainable = list(dict(tree_flatten(encoder.trainable_parameters())))

    def gradients(cotangent: mx.array) -> dict[str, Any]:
        _, found = pullback(cotangent.reshape(features.shape))
        return cast("dict[str, Any]", tree_unflatten([(name, found[name]) for name in trainable]))

    return features.flatten(1, 2), gradients


# --- How layers are put together ---


def _in_turn(**layers: Layer) -> Layer:
    """Layers one after the other, by the names under which they stand in their module; those with
    a name that starts with an underscore have no parameters."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        pullbacks: list[tuple[str, Pullback]] = []
        for name, layer in layers.items():
            x, pullback = layer(x)
            pullbacks.insert(0, (name, pullback))

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            gradients: Gradients = {}
            for name, pullback in pullbacks:
                cotangent, own = pullback(cotangent)
                prefix = "" if name.startswith("_") else f"{name}."
                gradients |= {prefix + key: value for key, value in own.items()}
            return cotangent, gradients

        return x, back

    return run


def _added(layer: Layer) -> Layer:
    """x + layer(x)."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        y, pullback = layer(x)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, gradients = pullback(cotangent)
            return cotangent + to_x, gradients

        return x + y, back

    return run


def _by_autodiff(function: Callable[[mx.array], mx.array], **modules: nn.Module) -> Layer:
    """A function of few operations, and of modules, whose names are those of the parameters."""
    names, values = [], []
    for module_name, module in modules.items():
        for name, value in dict(tree_flatten(module.parameters())).items():
            names.append(f"{module_name}.{name}")
            values.append(value)

    def of_parameters(x: mx.array, *given: mx.array) -> mx.array:
        _update(modules, names, given)
        return function(x)

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            _, found = mx.vjp(of_parameters, [x, *values], [cotangent])
            _update(modules, names, values)
            return found[0], dict(zip(names, found[1:], strict=True))

        return function(x), back

    return run


def _update(modules: dict[str, nn.Module], names: list[str], values: Any) -> None:
    tree = tree_unflatten(list(zip(names, values, strict=True)))
    for name, parameters in (tree or {}).items():
        modules[name].update(parameters)


# --- Single layers ---


def _linear(layer: nn.Linear) -> Layer:
    weight = layer.weight

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            rows, inputs = cotangent.flatten(0, -2), x.flatten(0, -2)
            gradients = {"weight": rows.T @ inputs}
            if "bias" in layer:
                gradients["bias"] = cpu_training.row_sum(rows)
            return cotangent @ weight, gradients

        return layer(x), back

    return run


def _depthwise(layer: DepthwiseConv) -> Layer:
    weight, stride = layer.weight, layer.stride

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, to_weight = cpu_training.conv_gradients(x, weight, cotangent, stride)
            return to_x, {"weight": to_weight, "bias": cpu_training.row_sum(cotangent)}

        return cpu.depthwise_conv(x, weight, layer.bias, stride, None), back

    return run


def _depthwise_several(convs: list[DepthwiseConv], axis: int) -> Layer:
    """Convolutions of one input, side by side: one after the other (-2) or interleaved (-1)."""
    layers = [_depthwise(conv) for conv in convs]

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        outputs, pullbacks = zip(*(layer(x) for layer in layers), strict=True)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            shape = (len(layers), -1) if axis == -2 else (-1, len(layers))
            parts = cotangent.reshape(*cotangent.shape[:-1], *shape)
            each = [mx.take(parts, i, axis=axis) for i in range(len(layers))]
            found = [pullback(part) for pullback, part in zip(pullbacks, each, strict=True)]
            gradients = {
                f"{i}.{name}": g for i, (_, own) in enumerate(found) for name, g in own.items()
            }
            return sum((to_x for to_x, _ in found[1:]), found[0][0]), gradients

        return mx.stack(list(outputs), axis=axis).flatten(-2), back

    return run


def _gelu(x: mx.array) -> tuple[mx.array, Pullback]:
    def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
        return cpu_training.gelu_gradient(x, cotangent), {}

    return ops.gelu(x), back


def _pixels(conv: nn.Conv2d) -> Layer:
    """The first convolution; nothing asks for the cotangent of the pixels, and what is given for
    it has no meaning."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_weight = cpu_training.first_conv_gradient(x, cotangent, conv.weight.shape, 2)
            return cotangent, {"weight": to_weight, "bias": cpu_training.row_sum(cotangent)}

        return cast(mx.array, conv(x)), back

    return run


# --- The encoder's modules ---


def _conv_ffn(module: ConvFFN) -> Layer:
    return _added(
        _in_turn(
            conv=_depthwise(module.conv),
            fc1=_linear(module.fc1),
            _gelu=_gelu,
            fc2=_linear(module.fc2),
        )
    )


def _rep_mixer_block(module: RepMixerBlock) -> Layer:
    return _in_turn(token_mixer=_depthwise(module.token_mixer), convffn=_conv_ffn(module.convffn))


def _attention(module: Attention) -> Layer:
    def heads(qkv: mx.array) -> mx.array:
        B, H, W, C = qkv.shape
        qkv = qkv.reshape(B, H * W, 3 * module.num_heads, -1)
        return ops.attention(qkv, module.scale, training=True).reshape(B, H, W, C // 3)

    return _in_turn(qkv=_linear(module.qkv), _heads=_by_autodiff(heads), proj=_linear(module.proj))


def _attention_block(module: AttentionBlock) -> Layer:
    attend = _in_turn(
        _norm=_by_autodiff(module.norm, norm=module.norm),
        token_mixer=_attention(module.token_mixer),
    )
    return _in_turn(_attend=_added(attend), convffn=_conv_ffn(module.convffn))


def _stem(module: Stem) -> Layer:
    return _in_turn(
        conv=_pixels(module.conv),
        _gelu=_gelu,
        depthwise=_depthwise(module.depthwise),
        _gelu_2=_gelu,
        pointwise=_linear(module.pointwise),
        _gelu_3=_gelu,
    )


def _downsample(module: Downsample) -> Layer:
    return _in_turn(
        convs=_depthwise_several(module.convs, -2),
        _gelu=_gelu,
        pointwise=_linear(module.pointwise),
        _gelu_2=_gelu,
    )


def _expand(module: Expand) -> Layer:
    squeeze = _by_autodiff(module.excite, reduce=module.reduce, expand=module.expand)
    return _in_turn(convs=_depthwise_several(module.convs, -1), _squeeze=squeeze)


def _encoder(module: FastViTHD) -> Layer:
    network = {str(i): LAYERS[type(layer)](layer) for i, layer in enumerate(module.network)}
    return _in_turn(
        stem=_stem(module.stem),
        network=_in_turn(**network),
        conv_exp=_expand(module.conv_exp),
    )


LAYERS: dict[type, Callable[[Any], Layer]] = {
    DepthwiseConv: _depthwise,
    RepMixerBlock: _rep_mixer_block,
    AttentionBlock: _attention_block,
    Downsample: _downsample,
}
PLAIN = {DepthwiseConv, nn.Linear, nn.LayerNorm, nn.Conv2d}
