"""Counts of what a computation does on a GPU: MLX primitives and kernel launches.

Small models and single tokens are bound by the number of kernels, not by arithmetic, and that
number can be read from the graph without running it, and without a GPU:

    with as_on_gpu():
        outputs = model.encode_image(pixel_values)   # lazy
        print(count_primitives(outputs), kernel_launches(outputs))

The module needs only mlx, so that it can be loaded by path beside any MLX model.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

# Primitives that only give an array another shape, order or name, on every GPU backend.
VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Copy",
    "CustomTransforms",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Load",
    "NumberOfElements",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
# Kernels that a primitive always launches, where it is not one.
KERNELS = {
    "DynamicSlice": 2,  # computes the offset, copies
    "DynamicSliceUpdate": 2,  # the same, into an array that nobody else reads
    "MaskedScatter": 2,
    "Pad": 2,  # fills, copies
    "Scatter": 2,  # copies, scatters
    "ScatterAxis": 2,
}
# Primitives that models do not use, standing for the functions of `mx.fast`.
STAND_INS = {
    "CumProd": "RMSNorm",
    "Partition": "LayerNorm",
    "CumMax": "RoPE",
    "CumMin": "ScaledDotProductAttention",
    "Sort": "Dequantize",
}
# Head dimensions with a fused attention kernel on Metal, for one to eight queries and for more.
FEW_QUERIES = 8
FUSED_HEADS_FEW = (64, 96, 128, 256)
FUSED_HEADS_MANY = (64, 72, 80, 96, 128)
_NODE = re.compile(r'\[label ="([^"]*)", shape=rectangle\]')
_stand_ins: dict[str, str] = {}


def count_primitives(outputs: Any) -> Counter[str]:
    """How many primitives of each name it takes to compute arrays.

    Args:
        outputs: an array, or a tree of them, not evaluated. Whatever is evaluated counts as input.

    Returns:
        A count by name. What `mx.compile` fuses is one "Compiled".
    """
    return Counter(name for name, _ in _primitives(outputs))


def kernel_launches(outputs: Any) -> int:
    """How many GPU kernels it takes to compute arrays, at least.

    Views launch none, a concatenation one per array that it joins, most others one. The graph
    tells neither shapes nor strides, so two things are not counted: the copies that MLX makes of
    arrays whose values lie in another order than a kernel or a reshape needs, and the second
    passes of large reductions and of split matrix products. Updates are taken to be in place.

    Args:
        outputs: as `count_primitives` takes.
    """
    return sum(
        inputs if name == "Concatenate" else KERNELS.get(name.split()[0], int(name not in VIEWS))
        for name, inputs in _primitives(outputs)
    )


class Counts(NamedTuple):
    """Primitives by name, and the kernels they launch at least."""

    primitives: Counter[str]
    launches: int


def count(outputs: Any) -> Counts:
    """Both counts of arrays, which are as `count_primitives` takes."""
    return Counts(count_primitives(outputs), kernel_launches(outputs))


def count_encode(model: Any, image_size: int) -> Counts:
    """Counts of encoder and projector for one image, whose pixels are bytes.

    Args:
        model: a `FastVLM`.
        image_size: side in pixels, a multiple of 64.
    """
    pixel_values = mx.zeros((1, image_size, image_size, 3), mx.uint8)
    mx.eval(model.parameters(), pixel_values)
    with as_on_gpu():
        return count(model.encode_image(pixel_values))


def count_prefill(model: Any, tokens: int) -> Counts:
    """Counts of the decoder over a prompt's embeddings, up to the first token, greedy."""
    text = model.config.text
    embeddings = mx.zeros((1, tokens, text.hidden_size), _dtype(model))
    mx.eval(model.parameters(), embeddings)
    with as_on_gpu():
        return count(_next_token(model, None, model.make_kv_cache(), embeddings))


def count_decode(model: Any, offset: int) -> Counts:
    """Counts of one token, greedy, after `offset` others in the KV cache."""
    kv_cache = filled_cache(model, 1, offset)
    mx.eval([layer.state for layer in kv_cache])
    return count_step(model, kv_cache, 1)


def count_step(model: Any, kv_cache: list[Any], rows: int) -> Counts:
    """Counts of one token, greedy, of each row of a cache that holds others, computed."""
    token = mx.zeros((rows, 1), mx.int32)
    mx.eval(model.parameters(), token)
    with as_on_gpu():
        return count(_next_token(model, token, kv_cache, None))


def filled_cache(model: Any, rows: int, offset: int) -> list[Any]:
    """A KV cache of so many rows with `offset` tokens each, zeros."""
    text = model.config.text
    past = mx.zeros((rows, text.num_key_value_heads, offset, text.head_dim), _dtype(model))
    kv_cache: list[Any] = model.make_kv_cache()
    for layer in kv_cache:
        layer.update_and_fetch(past, past)
    return kv_cache


def _next_token(
    model: Any, token: mx.array | None, kv_cache: list[Any], embeddings: mx.array | None
) -> mx.array:
    decoder = model.language_model
    hidden_states = decoder.hidden_states(token, kv_cache, embeddings)
    return mx.argmax(decoder.logits(hidden_states[:, -1]), axis=-1)


def _dtype(model: Any) -> mx.Dtype:
    return model.language_model.norm.weight.dtype


def _primitives(outputs: Any) -> list[tuple[str, int]]:
    """(name, number of inputs) of each primitive in the graph."""
    arrays = [a for a in dict(tree_flatten([outputs])).values() if isinstance(a, mx.array)]
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    found: list[tuple[str, int]] = []
    # The inputs of a primitive follow it. Its number is no help: compiled functions share theirs.
    for line in text.getvalue().splitlines():
        if node := _NODE.search(line):
            name = "Compiled" if node[1].startswith("Compiled") else node[1]
            found.append((_stand_ins.get(name, name), 0))
        elif line.startswith('"'):
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return [row for row in found if not (_stand_ins and row[0] == "Depends")]


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Build graphs as Metal would have them, to be counted and never evaluated.

    On the CPU, MLX takes the functions of `mx.fast` apart, and this library chooses other forms of
    its operations. Inside this block those functions become one primitive each, and this library
    assumes Metal. Load the model inside as well, since loading fuses layers according to the
    device. On a GPU the block changes nothing.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        yield
        return
    # By name, because beside another library this package is not there to be imported.
    device = sys.modules.get("fastvlm_mlx.ops.device")
    # Compiled functions are kept by stream: those of the CPU are not found on this one, and those
    # compiled on it are not found outside.
    with (
        _names_of_stand_ins(),
        _replaced(mx.fast, FAST),
        _replaced(mx, {"dequantize": _dequantize}),
        device.assume("metal") if device else nullcontext(),
        mx.stream(_stream()),
    ):
        yield


@contextmanager
def _names_of_stand_ins() -> Iterator[None]:
    """Count each stand-in under the name of what it stands for."""
    global _stand_ins
    before, _stand_ins = _stand_ins, STAND_INS
    try:
        yield
    finally:
        _stand_ins = before


@contextmanager
def _replaced(module: Any, functions: dict[str, Any]) -> Iterator[None]:
    """Set functions of a module by name, and set the former ones back."""
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@cache
def _stream() -> mx.Stream:
    return mx.new_stream(mx.default_device())


def _after(y: mx.array, *inputs: Any) -> mx.array:
    arrays = [a for a in inputs if isinstance(a, mx.array)]
    return mx.depends(y, arrays) if arrays else y


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return _after(mx.cumprod(x, -1), weight)


def _layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any
) -> mx.array:
    return _after(mx.partition(x, 0, -1), weight, bias)


def _rope(
    a: mx.array, dims: int, *, offset: int | mx.array = 0, freqs: mx.array | None = None, **_: Any
) -> mx.array:
    return _after(mx.cummax(a, -1), offset, freqs)


_unfused_attention = mx.fast.scaled_dot_product_attention


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    **others: Any,
) -> mx.array:
    if has_fused_attention(q.shape, k.shape, v.shape):
        return _after(mx.cummin(q, -1), k, v, mask, *others.values())
    return _unfused_attention(q, k, v, scale=scale, mask=mask, **others)


def has_fused_attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> bool:
    """Whether Metal has one kernel for attention of these shapes: [B, heads, T, D] each.

    After `has_fused_kernel` and `use_fallback` in MLX's Metal backend.
    """
    queries, keys, D = q[2], k[2], q[3]
    if queries > FEW_QUERIES:
        return v[3] == D and D in FUSED_HEADS_MANY
    groups = q[1] // k[1]
    return v[3] == D and D in FUSED_HEADS_FEW and queries <= keys and queries * groups <= 32


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    dtype: mx.Dtype | None = None,
    **_: Any,
) -> mx.array:
    bits = bits or {"mxfp8": 8}.get(mode, 4)
    dtype = dtype or (mx.bfloat16 if biases is None else scales.dtype)
    values = mx.zeros((*w.shape[:-1], w.shape[-1] * 32 // bits), dtype)
    mx.eval(values)  # a primitive of another shape than its input's, by way of a constant
    return _after(mx.sort(values, -1), w, scales, biases)


FAST = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "scaled_dot_product_attention": _attention,
}
