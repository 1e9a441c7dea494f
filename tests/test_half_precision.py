"""What a GPU computes by default: half precision, in the forms for Metal, against float64."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.names import fuse, unfuse
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.vision import AttentionBlock, Expand, FastViTHD, RepMixerBlock
from fastvlm_mlx.ops import DepthwiseConv, activations, conv

# Half the spacing of numbers, relative, and near 0; float32 inside ends at 2**-126.
ROUNDING = {mx.float16: (2**-11, 2**-25), mx.bfloat16: (2**-8, 2**-126)}
IN_FLOAT32 = 3e-7  # of the arguments, for a few steps in float32
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
erf = np.vectorize(math.erf, otypes=[np.float64])


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def every(dtype: mx.Dtype) -> mx.array:
    """Every third number of a dtype of 16 bits, up to a quarter of float16's largest in size."""
    end = mx.array(2**14, dtype).view(mx.uint16).item()
    positive = mx.arange(0, end, 3, dtype=mx.uint16).view(dtype)
    return mx.concatenate([-positive[::-1], positive])


def assert_rounded_once(found: mx.array, exact: np.ndarray, size: np.ndarray) -> None:
    """`found` is `exact` up to one rounding and a few in float32, of terms of that size."""
    relative, smallest = ROUNDING[found.dtype]
    bound = 1.001 * relative * np.abs(exact) + smallest + IN_FLOAT32 * np.abs(size)
    error = np.abs(float64(found) - exact)
    assert (error <= bound).all(), (error / bound).max()


@dtypes
def test_activations_round_once(assume: Callable[[str], None], dtype: mx.Dtype) -> None:
    assume("metal")
    x = every(dtype)
    y = x[::-1]
    bias = mx.array(np.resize([0.3, -7.1, 250.0], x.size)).astype(dtype)
    a, c = float64(x), float64(bias)
    assert_rounded_once(ops.gelu(x), exact_gelu(a), a)
    assert_rounded_once(ops.gelu(x, bias), exact_gelu(a + c), np.abs(a) + np.abs(c))
    near = mx.clip(y, -3, 3)
    assert_rounded_once(ops.swiglu(x, near), a * sigmoid(a) * float64(near), a)
    gated = float64(near) * sigmoid(a)
    assert_rounded_once(ops.gated_gelu(near, x), exact_gelu(gated), gated)


def test_gelu_of_large_numbers_does_not_overflow(assume: Callable[[str], None]) -> None:
    assume("metal")
    x = mx.array([-65504, 40000, 65504], mx.float16)
    assert ops.gelu(x).tolist() == [0, 40000, 65504]
    assert ops.swiglu(x, mx.array([1, 1, 0.5], mx.float16)).tolist() == [0, 40000, 32752]


@dtypes
@pytest.mark.parametrize("side", [1, 3, 16, 24])
def test_means_over_positions(assume: Callable[[str], None], dtype: mx.Dtype, side: int) -> None:
    """Of large channels, whose sums float16 does not hold, and of small ones beside them."""
    assume("metal")
    spread = mx.random.normal((2, side, side, 3), key=mx.random.key(side))
    x = (spread + mx.array([900.0, -300.0, 0.01])).astype(dtype)
    exact = float64(x).mean(axis=(1, 2), keepdims=True)
    size = np.abs(float64(x)).mean(axis=(1, 2), keepdims=True)
    assert_rounded_once(ops.mean_over_positions(x), exact, size)


def test_large_channels_leave_the_encoder(assume: Callable[[str], None]) -> None:
    layer = Expand(32, 64)
    for module in layer.convs:
        module.bias = mx.full(32, 400.0)
    layer.reduce.weight = mx.ones((4, 64)) / 64
    layer.expand.weight = mx.ones((64, 4)) / 2000
    wanted = layer(mx.zeros((1, 16, 16, 32)))
    assert 200 < wanted.min() < wanted.max() + 1e-3 < 390  # neither closed nor open
    layer.set_dtype(mx.float16)
    assume("metal")
    found = layer(mx.zeros((1, 16, 16, 32), mx.float16))
    assert np.abs(float64(found) - float64(wanted)).max() < 4  # of 400


@pytest.mark.parametrize("ways", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_convolutions_side_by_side(assume: Callable[[str], None], ways: int, device: str) -> None:
    convs = [DepthwiseConv(4, 3) for _ in range(ways)]
    for i, module in enumerate(convs):
        module.weight = mx.random.normal((4, 3, 3, 1), key=mx.random.key(i))
        module.bias = mx.random.normal((4,), key=mx.random.key(10 + i))
    x = mx.random.normal((2, 5, 6, 4), key=mx.random.key(20))
    outputs = [mx.conv2d(x, m.weight, 1, 1, groups=4) + m.bias for m in convs]
    assume(device)
    assert mx.allclose(
        ops.concatenated_gelu(convs, x), nn.gelu(mx.concatenate(outputs, -1)), atol=2e-6
    )
    assert mx.allclose(ops.interleaved(convs, x), mx.stack(outputs, -1).flatten(-2), atol=2e-6)
    assert mx.allclose(convs[0].gelu(x), nn.gelu(outputs[0]), atol=2e-6)


def test_shapes_are_not_compiled_again(
    assume: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 lengths of prompts must not leave 2,000 compiled functions behind."""
    traced: list[str] = []

    def counted(name: str, function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda *arrays: traced.append(name) or function(*arrays)

    for module in (activations, conv):
        monkeypatch.setattr(module, "gelu_in_float32", counted("gelu", activations.gelu_in_float32))
    monkeypatch.setattr(mx, "sigmoid", counted("sigmoid", mx.sigmoid))
    assume("metal")
    module = DepthwiseConv(4, 3)
    for n in range(1, 20):
        x, vector = mx.ones((1, n, 4), mx.float16), mx.ones(4, mx.float16)
        y = ops.swiglu(ops.gelu(ops.gelu(x), vector), ops.gated_gelu(x, x))
        z, more = ops.add_both(y, vector, vector)
        images = mx.ones((1, n, n, 4))
        joined = ops.concatenated_gelu([module, module], images)
        assert (y.shape, z.shape, more.shape) == (x.shape,) * 3
        assert joined.shape == (1, n, n, 8)
        mx.eval(y, z, more, joined, ops.interleaved([module, module], images))
    assert len(traced) <= 6  # one for each function, and two in one


# --- biases that other layers add ---


def with_biases(model: FastViTHD) -> FastViTHD:
    """The model with random parameters, which zeros would leave untested."""
    keys = iter(mx.random.split(mx.random.key(0), 1000))
    model.apply(lambda p: mx.random.normal(p.shape, key=next(keys)) * (p[0].size + 1) ** -0.5)
    return model


def test_folding_biases_changes_no_feature(assume: Callable[[str], None], small) -> None:
    pixels = mx.random.uniform(shape=(2, 128, 128, 3), key=mx.random.key(4))
    folded = FastViTHD(small.config.vision)
    folded.update(small.vision_tower.parameters())
    wanted = small.vision_tower(pixels)
    with ops.assume("metal"):
        folded.fold_biases()
        blocks = [m for m in folded.network if isinstance(m, (RepMixerBlock, AttentionBlock))]
        assert not any("bias" in block.convffn.conv for block in blocks)
        assert mx.abs(folded(pixels) - wanted).max() < 3e-4 * mx.std(wanted)
        folded.fold_biases()  # once is enough
    assert mx.abs(folded(pixels) - wanted).max() < 3e-4 * mx.std(wanted)  # on the CPU, too


def test_each_bias_goes_into_the_product() -> None:
    """fc1(x + b) = fc1(x) + W b, in float64."""
    model = with_biases(FastViTHD(VisionConfig(layers=(1, 1, 1, 1, 1), embed_dims=(16,) * 5)))
    ffn = model.network[0].convffn
    weight, bias, shift = (float64(a) for a in (ffn.fc1.weight, ffn.fc1.bias, ffn.conv.bias))
    with ops.assume("metal"):
        model.fold_biases()
    assert np.abs(float64(ffn.fc1.bias) - (bias + weight @ shift)).max() < 1e-5


def test_on_the_cpu_biases_stay() -> None:
    model = FastViTHD(VisionConfig(layers=(1, 1, 1, 1, 1), embed_dims=(16,) * 5))
    with ops.assume("cpu"):
        model.fold_biases()
    assert "bias" in model.network[0].convffn.conv


def test_a_folded_model_is_written_as_any_other(small_folder) -> None:
    with ops.assume("metal"):
        model = load_model(small_folder, dtype="float32")
    assert "bias" not in model.vision_tower.network[0].convffn.conv
    with ops.assume("cpu"):
        plain = load_model(small_folder, dtype="float32")
    for folded in (True, False):
        tensors, wanted = unfuse(model, folded=folded), unfuse(plain, folded=folded)
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in wanted.items()}
    again = fuse(unfuse(model), model.config)
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(4))
    wanted = plain.vision_tower(pixels)
    tower = [(n.removeprefix("vision_tower."), t) for n, t in again.items() if "vision_t" in n]
    plain.vision_tower.load_weights(tower)
    assert mx.abs(plain.vision_tower(pixels) - wanted).max() < 3e-4 * mx.std(wanted)


def test_quantized_layers_keep_their_biases(small_folder) -> None:
    with ops.assume("metal"):
        model = load_model(small_folder, quantize={"vision": {"bits": 8, "group_size": 32}})
    ffns = [m.convffn for m in model.vision_tower.network if hasattr(m, "convffn")]
    quantized = [isinstance(ffn.fc1, nn.QuantizedLinear) for ffn in ffns]
    assert any(quantized)
    assert ["bias" in ffn.conv for ffn in ffns] == quantized
