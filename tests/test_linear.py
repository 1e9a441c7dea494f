"""The forms of linear layers that are fast on the CPU, against MLX's own."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from fastvlm_mlx.ops import QuantizedEmbedding, QuantizedLinear, cpu
from fastvlm_mlx.ops import linear as project
from fastvlm_mlx.ops import quantize as quantize_layers
from fastvlm_mlx.ops.cpu import MANY_ROWS, row_matmul

MODES = pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 64, "bits": 8, "mode": "affine"},
        {"group_size": 32, "bits": 3, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=lambda settings: f"{settings['mode']}-{settings['bits']}",
)


@pytest.fixture
def products(monkeypatch, assume) -> list[str]:
    """The quantized products made in the test: "rows" by MLX, or "written out"."""
    made = []
    dequantized_matmul, quantized_matmul = cpu.dequantized_matmul, mx.quantized_matmul
    assume("cpu")
    monkeypatch.setattr(
        cpu, "dequantized_matmul", lambda *a: made.append("written out") or dequantized_matmul(*a)
    )
    monkeypatch.setattr(
        mx, "quantized_matmul", lambda *a, **k: made.append("rows") or quantized_matmul(*a, **k)
    )
    return made


def close(a: mx.array, b: mx.array) -> bool:
    return mx.allclose(a, b, rtol=1e-5, atol=1e-5).item()


@MODES
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_times_a_quantized_layer(products, monkeypatch, settings, bias):
    monkeypatch.setattr(cpu, "WRITTEN_OUT", 7 * 128)  # several pieces, the last one smaller
    mx.random.seed(0)
    floats = nn.Linear(128, 40, bias=bias)
    layer = QuantizedLinear.from_linear(floats, **settings)
    x = mx.random.normal((2, MANY_ROWS, 128))
    expected = nn.QuantizedLinear.from_linear(floats, **settings)(x)
    products.clear()
    assert close(layer(x), expected)
    assert products == ["written out"]
    assert close(layer(x[:1, :1]), expected[:1, :1])
    assert products == ["written out", "rows"]


@MODES
def test_many_rows_times_a_quantized_table(products, settings):
    mx.random.seed(0)
    floats = nn.Embedding(50, 128)
    table = QuantizedEmbedding.from_embedding(floats, **settings)
    x = mx.random.normal((MANY_ROWS, 128))
    expected = nn.QuantizedEmbedding.from_embedding(floats, **settings).as_linear(x)
    products.clear()
    assert close(table.as_linear(x), expected)
    assert close(table.as_linear(x[:1]), expected[:1])
    assert products == ["written out", "rows"]


def test_half_precision_is_left_to_mlx(products):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), bits=4)
    layer.set_dtype(mx.float16)
    assert layer(mx.zeros((MANY_ROWS, 64), mx.float16)).dtype == mx.float16
    assert products == ["rows"]


def test_a_gpu_has_mlx_s_product(products, assume):
    assume("cuda")
    QuantizedLinear.from_linear(nn.Linear(64, 64), bits=4)(mx.zeros((MANY_ROWS, 64)))
    assert products == ["rows"]


def test_gradients_pass_through_a_quantized_layer(products):
    mx.random.seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), bits=8)
    x = mx.random.normal((MANY_ROWS, 64))
    found = mx.grad(lambda x: layer(x).square().sum())(x)
    expected = mx.grad(lambda x: nn.QuantizedLinear.__call__(layer, x).square().sum())(x)
    assert close(found, expected)


def test_quantize_layers_takes_those_that_have_settings():
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    chosen = {"layers.0": {"bits": 4}, "layers.2": {"bits": 8, "group_size": 32}}
    quantize_layers(model, chosen.get)
    table, plain, last = model.layers
    assert isinstance(table, QuantizedEmbedding) and table.bits == 4
    assert type(plain) is nn.Linear
    assert isinstance(last, QuantizedLinear) and (last.bits, last.group_size) == (8, 32)


@pytest.mark.parametrize("outputs", [256, 200], ids=["blocks", "whole"])
def test_times_row(outputs):
    mx.random.seed(0)
    x, weight = mx.random.normal((1, 1, 96)), mx.random.normal((outputs, 96))
    assert row_matmul(x, weight).shape == (1, 1, outputs)
    assert close(row_matmul(x, weight), x @ weight.T)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_project_is_the_layer_and_the_residual(monkeypatch, rows, bias, with_residual, quantized):
    monkeypatch.setattr(cpu, "LARGE", 1)
    mx.random.seed(0)
    layer = nn.Linear(64, 128, bias=bias)
    layer = QuantizedLinear.from_linear(layer, bits=8) if quantized else layer
    x, residual = mx.random.normal((1, rows, 64)), mx.random.normal((1, rows, 128))
    expected = layer(x) + residual if with_residual else layer(x)
    assert close(project(layer, x, residual if with_residual else None), expected)
