"""Linear layers: plain, quantized, and several of one input side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from . import cpu
from .device import on_cpu


def linear(layer: nn.Module, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """layer(x) + residual, in as few kernels as the layer allows."""
    if not isinstance(layer, nn.Linear):
        return layer(x) if residual is None else residual + layer(x)
    if on_cpu() and cpu.is_row(x, layer.weight):
        y = cpu.row_matmul(x, layer.weight)
        y = y + layer.bias if "bias" in layer else y
        return y if residual is None else residual + y
    if residual is not None and "bias" not in layer:
        return mx.addmm(residual, x, layer.weight.T)
    return layer(x) if residual is None else residual + layer(x)


def as_linear(table: nn.Module, x: mx.array) -> mx.array:
    """[..., dims] → [..., num_embeddings]: the logits of tied embeddings."""
    if on_cpu() and isinstance(table, nn.Embedding) and cpu.is_row(x, table.weight):
        return cpu.row_matmul(x, table.weight)
    return table.as_linear(x)


def split_linear(layer: nn.Module, x: mx.array, parts: int) -> list[mx.array]:
    """The outputs of a fused layer, split into that many equal parts."""
    if isinstance(layer, UnfusedLinear):
        return [linear(each, x) for each in layer.layers]
    return list(mx.split(linear(layer, x), parts, axis=-1))


def adds_early(layer: nn.Module) -> bool:
    """Whether a layer's bias is better added to its residual, before the product.

    A product of floats takes one addend along at no cost. On the CPU it saves nothing.
    """
    return isinstance(layer, nn.Linear) and not on_cpu()


@partial(mx.compile, shapeless=True)
def add_both(x: mx.array, bias: mx.array, term: mx.array) -> tuple[mx.array, mx.array]:
    """(x + bias, x + bias + term), both from one kernel; bias and term are [C]."""
    y = x + bias
    return y, y + term


def gains_from_fusing(is_large: bool, is_quantized: bool) -> bool:
    """Whether several linear layers of one input are faster as one product.

    On the CPU, large ones in float are not, and fusing them takes time when a model is loaded.
    """
    return is_quantized or not is_large or not on_cpu()


class UnfusedLinear(nn.Module):
    """Linear layers of one input that stay apart; their outputs are concatenated."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] → [..., outputs of all layers]."""
        return mx.concatenate([layer(x) for layer in self.layers], axis=-1)


class AdaptedLinear(nn.Module):
    """A layer that stays as it is, with a low-rank product beside it (LoRA), and with DoRA a factor
    for each output.

    Args:
        layer: linear, plain or quantized; with `ratio`, it loses its bias to this one.
        down: [inputs, rank].
        up: [rank, outputs].
        ratio: [outputs], which multiplies all but the bias.
    """

    def __init__(
        self, layer: nn.Module, down: mx.array, up: mx.array, ratio: mx.array | None = None
    ):
        super().__init__()
        self.layer, self.down, self.up = layer, down, up
        if ratio is not None:
            self.ratio = ratio
            if "bias" in layer:
                self.bias = layer.pop("bias")
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] → [..., outputs]."""
        y = self.layer(x) + (x @ self.down) @ self.up
        if "ratio" in self:
            y = y * self.ratio
        return y + self.bias if "bias" in self else y


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's, with another product for many rows on the CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] → [..., outputs]."""
        if not (on_cpu() and cpu.has_many_rows(x)):
            return super().__call__(x)
        y = cpu.dequantized_matmul(x, self)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """MLX's, with another product for many rows on the CPU."""

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., dims] → [..., num_embeddings]."""
        is_slow = on_cpu() and cpu.has_many_rows(x)
        return cpu.dequantized_matmul(x, self) if is_slow else super().as_linear(x)


def quantize(model: nn.Module, settings_of: Callable[[str], dict[str, Any] | None]) -> None:
    """Quantize layers of a model in place.

    Args:
        model: changed in place.
        settings_of: path of a layer → its group_size, bits and mode, or None if it is to stay.
    """

    def replace(path: str, layer: nn.Module) -> nn.Module:
        settings = settings_of(path)
        if settings is None:
            return layer
        if isinstance(layer, nn.Embedding):
            return QuantizedEmbedding.from_embedding(layer, **settings)
        return QuantizedLinear.from_linear(layer, **settings)

    layers = tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(layers)
