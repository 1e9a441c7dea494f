"""Linear layers, in the forms that are fast where they run.

On a GPU those are MLX's own. On the CPU a product of one row and a large matrix, and one of many
rows and a quantized matrix, have faster forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from .vision import on_cpu, one_by_one

# On the CPU, a product of one row is taken this many outputs at a time, of weights of this size.
BLOCK = 128
LARGE = 2**18
# There, a quantized product takes time by the row, and from this many on it costs less to write
# the weights out in float32, so many values at a time that memory does not notice.
MANY_ROWS = 8
WRITTEN_OUT = 2**24


def project(layer: nn.Module, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """layer(x), and `residual` added, in as few steps as a layer in float allows."""
    if not isinstance(layer, nn.Linear):
        return layer(x) if residual is None else residual + layer(x)
    if is_row(x, layer):
        y = times_row(x, layer.weight)
        y = y + layer.bias if "bias" in layer else y
        return y if residual is None else residual + y
    if residual is not None and "bias" not in layer:
        return mx.addmm(residual, x, layer.weight.T)
    return layer(x) if residual is None else residual + layer(x)


def is_row(x: mx.array, layer: nn.Module) -> bool:
    """Whether `times_row` is for x and a layer: one row, times a large weight in float."""
    is_float = isinstance(layer, (nn.Linear, nn.Embedding))
    return on_cpu() and x.size == x.shape[-1] and is_float and layer.weight.size >= LARGE


def times_row(x: mx.array, weight: mx.array) -> mx.array:
    """One row x, [..., inputs], times weight [outputs, inputs] transposed.

    Where it can, a block of outputs at a time: BLAS libraries repack a large matrix before they
    multiply, which costs more than the product itself, but not a small one.
    """
    outputs, inputs = weight.shape
    if outputs % BLOCK:
        return x @ weight.T
    blocks = weight.reshape(-1, BLOCK, inputs).swapaxes(-1, -2)
    return (x.reshape(1, 1, inputs) @ blocks).reshape(*x.shape[:-1], outputs)


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's, with another product for many rows on the CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] → [..., outputs]."""
        if not has_many_rows(x):
            return super().__call__(x)
        y = times_quantized(x, self)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """MLX's, with another product for many rows on the CPU."""

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., dims] → [..., num_embeddings]."""
        return times_quantized(x, self) if has_many_rows(x) else super().as_linear(x)


def has_many_rows(x: mx.array) -> bool:
    """Whether `times_quantized` is for x: in float32 on the CPU, and of enough rows."""
    return on_cpu() and x.dtype == mx.float32 and x.size >= MANY_ROWS * x.shape[-1]


def times_quantized(x: mx.array, layer: QuantizedLinear | QuantizedEmbedding) -> mx.array:
    """x, [..., inputs], times the layer's weight [outputs, inputs] transposed, in float32."""
    quantized = [a for a in (layer.weight, layer.scales, layer.get("biases")) if a is not None]
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, WRITTEN_OUT // x.shape[-1])
    pieces = [[a[i : i + step] for a in quantized] for i in range(0, len(layer.weight), step)]

    def product(weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        written_out = mx.dequantize(weight, scales, biases, dtype=mx.float32, **settings)
        # A plain BLAS takes half as long again for a transposed view as for the copy of one, so
        # that the smaller matrix is copied.
        if len(rows) < len(written_out):
            return (written_out @ mx.contiguous(rows.T)).T
        return rows @ mx.contiguous(written_out.T)

    y = mx.concatenate(one_by_one(product, pieces), axis=-1)
    return mx.contiguous(y).reshape(*x.shape[:-1], -1)


def quantize_layers(model: nn.Module, settings_of: Callable[[str], dict[str, Any] | None]) -> None:
    """Make layers of a model quantized.

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


class SideBySide(nn.Module):
    """Linear layers of one input that stay apart, their outputs joined."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([layer(x) for layer in self.layers], axis=-1)
