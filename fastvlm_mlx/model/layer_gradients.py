"""Layers with gradients of their own, outside `mx.grad`.

Under `mx.grad` the compiled forms of the CPU fall apart into single operations. Here each layer
runs in its form for inference and keeps what its gradient needs, and the gradients are compiled
forms too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import ops
from ..ops import cpu, cpu_training

Gradients = dict[str, mx.array]
"""By the names of the parameters."""
Pullback = Callable[[mx.array], tuple[mx.array, Gradients]]
"""The cotangent of an output → that of the input, and the gradients of the parameters."""
Layer = Callable[[mx.array], tuple[mx.array, Pullback]]
"""An input → the output and its pullback."""


# --- How layers are put together ---


def in_turn(**layers: Layer) -> Layer:
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


def added(layer: Layer) -> Layer:
    """x + layer(x)."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        y, pullback = layer(x)

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, gradients = pullback(cotangent)
            return cotangent + to_x, gradients

        return x + y, back

    return run


def together(**layers: Layer) -> Layer:
    """The sum of layers of one input, by the names under which they stand in their module."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        found = {name: layer(x) for name, layer in layers.items()}

        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            parts: list[mx.array] = []
            gradients: Gradients = {}
            for name, (_, pullback) in found.items():
                to_x, own = pullback(cotangent)
                parts.append(to_x)
                gradients |= {f"{name}.{key}": value for key, value in own.items()}
            return sum(parts[1:], parts[0]), gradients

        outputs = [y for y, _ in found.values()]
        return sum(outputs[1:], outputs[0]), back

    return run


def by_autodiff(function: Callable[[mx.array], mx.array], **modules: nn.Module) -> Layer:
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


def linear(layer: Any) -> Layer:
    """A linear layer, or a 1x1 convolution of all channels."""
    weight = layer.weight.flatten(1)

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            rows, inputs = cotangent.flatten(0, -2), x.flatten(0, -2)
            gradients = {"weight": (rows.T @ inputs).reshape(layer.weight.shape)}
            if "bias" in layer:
                gradients["bias"] = cpu_training.row_sum(rows)
            return cotangent @ weight, gradients

        return layer(x), back

    return run


def depthwise(layer: Any) -> Layer:
    """A convolution of each channel with a kernel of its own, and a bias."""
    weight, stride = layer.weight, layer.stride

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_x, to_weight = cpu_training.conv_gradients(x, weight, cotangent, stride)
            return to_x, {"weight": to_weight, "bias": cpu_training.row_sum(cotangent)}

        return cpu.depthwise_conv(x, weight, layer.bias, stride, None), back

    return run


def depthwise_several(convs: Sequence[Any], axis: int) -> Layer:
    """Convolutions of one input, side by side: one after the other (-2) or interleaved (-1)."""
    layers = [depthwise(conv) for conv in convs]

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


def gelu(x: mx.array) -> tuple[mx.array, Pullback]:
    def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
        return cpu_training.gelu_gradient(x, cotangent), {}

    return ops.gelu(x), back


def first_conv(conv: Any) -> Layer:
    """The first convolution; nothing asks for the cotangent of the pixels, and what is given for
    it has no meaning."""

    def run(x: mx.array) -> tuple[mx.array, Pullback]:
        def back(cotangent: mx.array) -> tuple[mx.array, Gradients]:
            to_weight = cpu_training.first_conv_gradient(x, cotangent, conv.weight.shape, 2)
            gradients = {"weight": to_weight}
            if "bias" in conv:
                gradients["bias"] = cpu_training.row_sum(cotangent)
            return cotangent, gradients

        return cast(mx.array, conv(x)), back

    return run


def heads(number: int, scale: float) -> Layer:
    """Attention of all positions to all: queries, keys and values [B, H, W, 3 C] → [B, H, W, C]."""

    def attend(qkv: mx.array) -> mx.array:
        B, H, W, C = qkv.shape
        qkv = qkv.reshape(B, H * W, 3 * number, -1)
        return ops.attention(qkv, scale, training=True).reshape(B, H, W, C // 3)

    return by_autodiff(attend)
