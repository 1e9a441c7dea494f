"""A GPU computes what the CPU computes in float32; skipped where there is no GPU.

Each bound is a few roundings of the dtype (`ROUNDOFF` of the doctor, which counts TF32 in).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import PENGUINS

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.bench.doctor import ROUNDOFF, compare, compute_outputs, product_kind
from fastvlm_mlx.hub.resolve import NANO

pytestmark = pytest.mark.gpu

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
ROUNDINGS = 8
"""How many roundings of its greatest value an operation may be off."""


@pytest.fixture
def gpu() -> Iterator[None]:
    with mx.stream(mx.gpu):
        yield


def depthwise(kernel: int, stride: int) -> ops.DepthwiseConv:
    conv = ops.DepthwiseConv(32, kernel, stride)
    conv.weight = normal(32, kernel, kernel, 1) / kernel
    conv.bias = normal(32)
    return conv


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(len(shape)))


def rope(x: mx.array) -> mx.array:
    return ops.RoPE(x, x.shape[-2], x.shape[-1], 1e6, 100)(x)


def self_attention(x: mx.array) -> mx.array:
    return ops.attention(x, x.shape[-1] ** -0.5)


def causal(x: mx.array) -> mx.array:
    return ops.causal_attention(x, x[:, :2], x[:, 2:4], None, x.shape[-1] ** -0.5, "causal")


OPERATIONS: dict[str, tuple[Callable[[mx.array], mx.array], tuple[int, ...]]] = {
    "gelu": (ops.gelu, (3, 1000)),
    "swiglu": (lambda x: ops.swiglu(x, x + 1), (3, 1000)),
    "rope": (rope, (2, 4, 33, 64)),
    "attention of narrow heads": (self_attention, (2, 65, 3 * 4, 32)),
    "attention of wide heads": (self_attention, (2, 65, 3 * 2, 64)),
    "causal attention": (causal, (2, 8, 33, 64)),
    "causal attention of one query": (lambda x: causal(x[:, :, -1:]), (2, 8, 33, 64)),
}
for kernel, stride in ((3, 1), (3, 2), (7, 1), (7, 2)):
    OPERATIONS[f"depthwise {kernel}, {stride}"] = (depthwise(kernel, stride), (2, 20, 20, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str, dtype: str, gpu: None) -> None:
    operation, shape = OPERATIONS[name]
    x = normal(*shape).astype(DTYPES[dtype])
    found = computed(operation, x, DTYPES[dtype])
    with mx.stream(mx.cpu), ops.assume("cpu"):
        wanted = computed(operation, x, mx.float32)
    off = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert off <= ROUNDINGS * ROUNDOFF[product_kind(dtype)]


def computed(operation: Callable[[mx.array], mx.array], x: mx.array, dtype: mx.Dtype) -> np.ndarray:
    if isinstance(operation, nn.Module):
        operation.set_dtype(mx.float32)
        operation.set_dtype(dtype)
    return np.array(operation(x.astype(dtype)).astype(mx.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folder", ["nano", "small"])
def test_a_model(folder: str, dtype: str, small_folder: Path, gpu: None) -> None:
    path = NANO if folder == "nano" else small_folder
    with mx.stream(mx.cpu), ops.assume("cpu"):
        exact = compute_outputs(path, "float32", None)
    found = compute_outputs(path, dtype, None, exact.tokens)
    checks = compare(found, exact, ROUNDOFF[product_kind(dtype)])
    assert all(check.holds for check in checks), checks


def test_every_way_of_answering(gpu: None) -> None:
    model, processor = fv.load()
    question, answer = "How many penguins are there?", "There are 6 penguins."
    for options in (
        {},
        {"prompt_lookup": 4},
        {"num_beams": 2},
        {"max_kv_size": 64},
        *([{"kv_bits": 8}] if ops.takes_quantized_caches() else []),
    ):
        assert fv.generate(model, processor, question, image=PENGUINS, **options) == answer, options
    assert fv.batch_generate(model, processor, [(question, PENGUINS)] * 3) == [answer] * 3
    chat = fv.Chat(model, processor)
    assert [chat.ask(question, image=PENGUINS), chat.ask(question)][0] == answer
