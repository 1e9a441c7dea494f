"""A GPU computes what the CPU computes in float32; skipped where there is no GPU.

Each bound is a few roundings of the dtype (`ROUNDOFF` of the doctor, which counts TF32 in).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import PENGUINS

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.bench.doctor import ROUNDOFF, compare, compute_outputs, product_kind
from fastvlm_mlx.checkpoint.load import load_for_training
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


COSINE = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.99}
"""Of a step's gradients and the exact ones; TF32's products have the digits of float16's."""


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_training(dtype: str, compiled: bool, small_folder: Path, gpu: None) -> None:
    """Of rows with images, two of them packed in one."""
    with mx.stream(mx.cpu), ops.assume("cpu"):
        exact = gradients(small_folder, "float32", compiled=False)
    found = gradients(small_folder, dtype, compiled=compiled)
    assert found.keys() == exact.keys()
    own, wanted = (
        np.concatenate([each[name].flatten() for name in exact]) for each in (found, exact)
    )
    cosine = (own @ wanted) / (np.linalg.norm(own) * np.linalg.norm(wanted))
    assert cosine > COSINE[dtype] and 0.9 < np.linalg.norm(own) / np.linalg.norm(wanted) < 1.1


def gradients(folder: Path, dtype: str, *, compiled: bool) -> dict[str, np.ndarray]:
    model = load_for_training(folder, dtype=dtype)
    ids = mx.random.randint(1, 300, (2, 24), key=mx.random.key(0))
    segments = mx.array([[0] * 12 + [1] * 12, [0] * 20 + [1] * 4])
    places = mx.array([3, 4, 5, 6, 33, 34, 35, 36])
    pixels = mx.random.uniform(shape=(2, 128, 128, 3), key=mx.random.key(1))

    def loss(model: fv.FastVLM) -> mx.array:
        embeddings = model.embed_at(ids, model.encode_image(pixels).flatten(0, 1), places)
        states = model.language_model.hidden_states(None, None, embeddings, segments)
        logits = model.language_model.logits(states).astype(mx.float32)
        return nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="mean")

    def step() -> dict[str, Any]:
        return nn.value_and_grad(model, loss)(model)[1]

    found = mx.compile(step, inputs=model.state, outputs=model.state)() if compiled else step()
    return {name: np.array(g.astype(mx.float32)) for name, g in tree_flatten(found)}
