import math
from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RandomTensors, convolution

from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint.fold import fold_encoder, unfold_encoder
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.ops import DepthwiseConv, gelu

SMALL = VisionConfig(
    image_size=128,
    layers=(1, 1, 2, 1, 1),
    embed_dims=(16, 32, 64, 64, 128),
    projection_dim=32,
)
# Where the model computes: sums of shifted slices, as on the CPU, or convolutions, as on a GPU.
FORMS = pytest.mark.parametrize("on_cpu", [True, False], ids=["slices", "convolutions"])
TOLERANCE = 2e-5  # of the standard deviation, float32 against float64

quick = settings(max_examples=25, deadline=None)
erf = np.vectorize(math.erf, otypes=[np.float64])


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


class Reference(RandomTensors):
    """FastViTHD in inference form, step by step in float64, as its papers describe it.

    The names and shapes of tensors are those that this description asks for.
    """

    def __init__(self, config: VisionConfig, seed: int = 0):
        super().__init__(seed)
        self.config = config
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []
        self.layer = 0

    def conv(
        self, name: str, x: np.ndarray, out: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> np.ndarray:
        width = x.shape[-1] // groups
        std = (kernel * kernel * width) ** -0.5
        weight = self.tensor(f"{name}.weight", out, kernel, kernel, width, std=std)
        return convolution(x, weight, stride, groups) + self.tensor(f"{name}.bias", out)

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        dim = x.shape[-1]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.tensor(f"{name}.weight", dim, mean=1) + self.tensor(f"{name}.bias", dim)

    def stem(self, x: np.ndarray) -> np.ndarray:
        dim, name = self.config.embed_dims[0], "patch_embed.blocks.{}.reparam_conv"
        x = exact_gelu(self.conv(name.format(0), x, dim, kernel=3, stride=2))
        x = exact_gelu(self.conv(name.format(1), x, dim, kernel=3, stride=2, groups=dim))
        return exact_gelu(self.conv(name.format(2), x, dim))

    def conv_ffn(self, name: str, x: np.ndarray, ratio: float) -> np.ndarray:
        dim = x.shape[-1]
        weight = self.tensor(f"{name}.conv.conv.weight", dim, 7, 7, 1, std=1 / 7)
        x = self.batch_norm(f"{name}.conv.bn", convolution(x, weight, groups=dim))
        x = exact_gelu(self.conv(f"{name}.fc1", x, int(dim * ratio)))
        return self.conv(f"{name}.fc2", x, dim)

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        batch, height, width, dim = x.shape
        head_dim = self.config.head_dim
        weight = self.tensor(f"{name}.qkv.weight", 3 * dim, dim, std=dim**-0.5)
        qkv = (x.reshape(batch, -1, dim) @ weight.T).reshape(
            batch, -1, 3, dim // head_dim, head_dim
        )
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(2, 3) / math.sqrt(head_dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v
        y = y.swapaxes(1, 2).reshape(batch, height, width, dim)
        projected = self.tensor(f"{name}.proj.weight", dim, dim, std=dim**-0.5)
        return y @ projected.T + self.tensor(f"{name}.proj.bias", dim)

    def block(self, name: str, x: np.ndarray, mixer: str, ratio: float) -> np.ndarray:
        dim = x.shape[-1]
        if mixer == "repmixer":
            kernel = self.config.repmixer_kernel_size
            x = self.conv(f"{name}.token_mixer.reparam_conv", x, dim, kernel, groups=dim)
            scale = self.tensor(f"{name}.layer_scale", 1, 1, dim)
            return x + scale * self.conv_ffn(f"{name}.convffn", x, ratio)
        scales = [self.tensor(f"{name}.layer_scale_{i}", 1, 1, dim) for i in (1, 2)]
        x = x + scales[0] * self.attention(
            f"{name}.token_mixer", self.layer_norm(f"{name}.norm", x)
        )
        return x + scales[1] * self.conv_ffn(f"{name}.convffn", x, ratio)

    def downsample(self, name: str, x: np.ndarray, out: int) -> np.ndarray:
        kernel, stride = self.config.down_patch_size, self.config.down_stride
        x = self.conv(f"{name}.proj.0.lkb_reparam", x, out, kernel, stride, groups=x.shape[-1])
        return exact_gelu(self.conv(f"{name}.proj.1.reparam_conv", exact_gelu(x), out))

    def expand(self, x: np.ndarray) -> np.ndarray:
        out = self.config.hidden_size
        x = self.conv("conv_exp.reparam_conv", x, out, kernel=3, groups=x.shape[-1])
        gate = self.conv("conv_exp.se.reduce", x.mean((1, 2), keepdims=True), out // 16)
        gate = self.conv("conv_exp.se.expand", np.maximum(gate, 0), out)
        return exact_gelu(x / (1 + np.exp(-gate)))

    def step(self, piece: Callable[..., np.ndarray], *arguments: object) -> None:
        """Run a piece on what came out of the last one."""
        x = self.steps[-1][1]
        self.steps.append((x, piece(*arguments, x=x)))

    def network_step(self, piece: Callable[..., np.ndarray], suffix: str = "", **more: object):
        name = f"network.{self.layer}{suffix}"
        self.step(lambda x: piece(name, x, **more))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[B, H, W, 3] → [B, H W / patch², C]; `steps` keeps what goes in and out of each layer."""
        config, dims = self.config, self.config.embed_dims
        self.steps, self.layer = [(pixels, self.stem(pixels))], 0
        for i, dim in enumerate(dims):
            if config.pos_embs_shapes[i] is not None:
                kernel = config.pos_embs_shapes[i][0]
                conv = self.conv
                self.network_step(conv, ".reparam_conv", out=dim, kernel=kernel, groups=dim)
                self.layer += 1
            for block in range(config.layers[i]):
                mixer, ratio = config.token_mixers[i], config.mlp_ratios[i]
                self.network_step(self.block, f".{block}", mixer=mixer, ratio=ratio)
            self.layer += 1
            if i + 1 < len(dims) and (config.downsamples[i] or dims[i + 1] != dim):
                self.network_step(self.downsample, out=dims[i + 1])
                self.layer += 1
        self.step(self.expand)
        y = self.steps[-1][1]
        return y.reshape(len(y), -1, y.shape[-1])

    def load(self) -> FastViTHD:
        """The encoder with the tensors that the last call used, all of them and no other."""
        left = {name: mx.array(value) for name, value in self.tensors.items()}
        model = FastViTHD(self.config)
        model.load_weights(list(fold_encoder(left.pop, self.config).items()))
        assert not left
        return model


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def difference(found: mx.array, expected: np.ndarray) -> float:
    """The largest difference, in standard deviations of what is expected."""
    assert found.shape == expected.shape
    return float(np.abs(np.array(found, np.float64) - expected).max() / expected.std())


@pytest.fixture
def computed_as(assume):
    return lambda on_cpu: assume("cpu" if on_cpu else "cuda")


@pytest.fixture(scope="module")
def reference() -> tuple[Reference, np.ndarray, np.ndarray]:
    """A small encoder, two images and their features."""
    reference, pixels = Reference(SMALL), random_pixels(2, 128, 128, 3)
    return reference, pixels, reference(pixels.astype(np.float64))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out, groups", [(8, 1), (8, 4), (4, 4), (12, 4)])
def test_the_reference_convolves_as_mlx(stride, out, groups):
    x, weight = random_pixels(2, 9, 6, 4), random_pixels(out, 7, 7, 4 // groups)
    expected = mx.conv2d(mx.array(x), mx.array(weight), stride, 3, groups=groups)
    assert difference(expected, convolution(x, weight, stride, groups)) < 1e-5


@FORMS
def test_every_layer_equals_its_unfolded_form(computed_as, reference, on_cpu):
    computed_as(on_cpu)
    encoder, _, _ = reference
    model = encoder.load()
    layers = [model.stem, *model.network, model.conv_exp]
    for layer, (x, y) in zip(layers, encoder.steps, strict=True):
        assert difference(layer(mx.array(x, mx.float32)), y) < TOLERANCE


@FORMS
def test_features_equal_the_unfolded_form(computed_as, reference, on_cpu):
    computed_as(on_cpu)
    encoder, pixels, expected = reference
    assert difference(encoder.load()(mx.array(pixels)), expected) < TOLERANCE


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("height", [1, 2, 9, 16])
@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_bands_join_to_the_whole(monkeypatch, computed_as, stride, kernel, height, rows):
    computed_as(True)
    monkeypatch.setattr(ops.cpu, "BAND", rows * 2 * 6 * 4 // stride)
    layer = DepthwiseConv(4, kernel, stride)
    layer.weight = mx.array(random_pixels(4, kernel, kernel, 1))
    layer.bias = mx.array(random_pixels(4))
    x = random_pixels(2, height, 6, 4)
    expected = convolution(x, np.array(layer.weight), stride, 4) + np.array(layer.bias)
    assert difference(layer(mx.array(x)), expected) < TOLERANCE


def test_features_in_bands_of_a_row(monkeypatch, computed_as, reference):
    computed_as(True)
    monkeypatch.setattr(ops.cpu, "BAND", 1)
    monkeypatch.setattr(ops.cpu, "MAX_HIDDEN", 1)
    encoder, pixels, expected = reference
    assert difference(encoder.load()(mx.array(pixels)), expected) < TOLERANCE


@pytest.mark.parametrize("size", [(64, 64), (192, 192), (320, 320), (64, 192)])
def test_any_multiple_of_the_patch_size(size):
    encoder, pixels = Reference(SMALL), random_pixels(1, *size, 3)
    expected = encoder(pixels.astype(np.float64))
    assert expected.shape == (1, size[0] * size[1] // 64**2, 256)
    assert difference(encoder.load()(mx.array(pixels)), expected) < TOLERANCE


def test_images_of_a_batch_do_not_meet(reference):
    encoder, pixels, _ = reference
    model = encoder.load()
    together = model(mx.array(pixels))
    alone = mx.concatenate([model(mx.array(image[None])) for image in pixels])
    assert mx.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_features_have_the_dtype_of_the_weights(dtype):
    model = FastViTHD(SMALL)
    model.set_dtype(dtype)
    assert model(mx.zeros((1, 128, 128, 3))).dtype == dtype
    assert gelu(mx.zeros(3, dtype)).dtype == dtype


@pytest.mark.parametrize(
    "shape",
    [
        (128, 128, 3),
        (1, 1, 128, 128, 3),
        (1, 128, 128, 1),
        (1, 128, 128, 4),
        (1, 3, 128, 128),
        (1, 100, 128, 3),
        (1, 128, 100, 3),
        (1, 32, 32, 3),
        (1, 0, 64, 3),
        (1, 64, 0, 3),
    ],
)
def test_pixels_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"channels last|multiple of 64") as error:
        FastViTHD(SMALL)(mx.zeros(shape))
    assert str(shape if len(shape) != 4 or shape[3] != 3 else shape[1:3]) in str(error.value)


@st.composite
def geometries(draw: st.DrawFn) -> VisionConfig:
    """Small encoders of one to three stages."""
    stages = draw(st.integers(1, 3))
    ways = [draw(st.sampled_from([1, 2, 3])) for _ in range(stages - 1)]
    dims = [draw(st.sampled_from([16, 24]))]
    for n in ways:
        dims.append(dims[-1] * n)
    kernels = st.sampled_from([3, 5, 7])

    def per_stage(strategy: st.SearchStrategy) -> tuple:
        return tuple(draw(strategy) for _ in range(stages))

    return VisionConfig(
        layers=per_stage(st.integers(1, 2)),
        embed_dims=tuple(dims),
        mlp_ratios=per_stage(st.sampled_from([1, 1.5, 2])),
        token_mixers=per_stage(st.sampled_from(["repmixer", "attention"])),
        pos_embs_shapes=per_stage(st.none() | kernels.map(lambda k: (k, k))),
        downsamples=per_stage(st.booleans()),
        repmixer_kernel_size=draw(kernels),
        down_patch_size=draw(kernels),
        cls_ratio=draw(st.sampled_from([1.0, 2.0, 3.0])),
        head_dim=8,
    )


@quick
@given(
    config=geometries(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_any_geometry_equals_its_unfolded_form(config, size, seed):
    config._validate(None)
    encoder = Reference(config, seed)
    pixels = random_pixels(2, *(n * config.patch_size for n in size), 3, seed=seed)
    expected = encoder(pixels.astype(np.float64))
    model = encoder.load()
    for on_cpu in (True, False):
        with ops.assume("cpu" if on_cpu else "cuda"):
            assert difference(model(mx.array(pixels)), expected) < TOLERANCE


@quick
@given(config=geometries(), seed=st.integers(0, 99))
def test_unfolding_is_the_inverse_of_folding(config, seed):
    encoder = Reference(config, seed)
    encoder(random_pixels(1, config.patch_size, config.patch_size, 3))
    tensors = {name: mx.array(value) for name, value in encoder.tensors.items()}
    folded = fold_encoder(tensors.__getitem__, config)
    unfolded = unfold_encoder(folded.__getitem__, config)
    assert {k: v.shape for k, v in unfolded.items()} == {k: v.shape for k, v in tensors.items()}
    again = fold_encoder(unfolded.__getitem__, config)
    assert again.keys() == folded.keys()
    assert all(mx.allclose(again[name], folded[name], rtol=1e-6, atol=0) for name in folded)


def metal_kernel(
    x: mx.array, weight: mx.array, stride: int, padding: int, dilation: int, groups: int
) -> str:
    """The kernel that MLX's Metal backend takes (`dispatch_conv_2D_gpu` in its conv.cpp)."""
    channels, (out, height, width, group_width) = x.shape[-1], weight.shape
    strides, dilations = np.broadcast_to(stride, 2), np.broadcast_to(dilation, 2)
    if groups == 1:
        thin = channels <= 4 or channels % 16 == 0
        return "implicit gemm" if thin and (out <= 16 or out % 16 == 0) else "another"
    is_depthwise = group_width == 1 and groups == channels == out and channels % 16 == 0
    fits = max(height, width) <= 7 and max(strides) <= 2 and max(dilations) == 1
    return "depthwise" if is_depthwise and fits else "another"


@pytest.fixture
def convolutions(monkeypatch) -> list[tuple]:
    """What `mx.conv2d` is called with."""
    calls: list[tuple] = []
    convolve = mx.conv2d

    def record(x, weight, stride=1, padding=0, dilation=1, groups=1, **more):
        calls.append((x, weight, stride, padding, dilation, groups))
        return convolve(x, weight, stride, padding, dilation, groups, **more)

    monkeypatch.setattr(mx, "conv2d", record)
    return calls


@pytest.mark.parametrize("size", range(256, 1537, 256))
def test_on_a_gpu_every_convolution_has_a_fast_kernel(computed_as, convolutions, size):
    computed_as(on_cpu=False)
    model = FastViTHD(VisionConfig())
    features = model(mx.zeros((1, size, size, 3)))  # never computed
    assert features.shape == (1, (size // 64) ** 2, 3072)
    kernels = [metal_kernel(*call) for call in convolutions]
    depthwise = [m for m in model.modules() if isinstance(m, DepthwiseConv)]
    assert kernels == ["implicit gemm"] + ["depthwise"] * len(depthwise)


def test_the_bundled_encoder_has_fast_kernels_too(computed_as, convolutions, nano):
    computed_as(on_cpu=False)
    tower = nano[0].vision_tower
    mx.eval(tower(mx.zeros((1, 256, 256, 3))))
    assert {metal_kernel(*call) for call in convolutions[1:]} == {"depthwise"}
    assert metal_kernel(*convolutions[0]) == "implicit gemm"


@pytest.mark.parametrize("image_size", [128, 192])
def test_the_forms_for_a_gpu_give_the_same(assume, small, image_size):
    """Biases and residuals in one kernel, heads padded for Metal: against the CPU's forms."""
    pixels = mx.random.uniform(shape=(2, image_size, image_size, 3), key=mx.random.key(4))
    wanted = small.vision_tower(pixels)
    for on_metal in (False, True):
        assume("metal" if on_metal else "cuda")
        found = small.vision_tower(pixels)
        assert mx.abs(found - wanted).max() < 3e-4 * mx.std(wanted), on_metal


@pytest.mark.parametrize("heads, D", [(1, 32), (3, 32), (2, 64)])
def test_padded_heads_change_nothing(assume, heads, D):
    qkv = mx.random.normal((2, 20, 3 * heads, D), key=mx.random.key(5))
    wanted = ops.attention(qkv, D**-0.5)
    for on_metal in (False, True):
        assume("metal" if on_metal else "cuda")
        found = ops.attention(qkv, D**-0.5)
        assert found.shape == (2, 20, heads, D)
        assert mx.allclose(found, wanted, atol=2e-6), on_metal


@pytest.mark.parametrize("released", [True, False])
def test_every_layer_that_convolves_meets_the_conditions(released):
    model = FastViTHD(VisionConfig() if released else SMALL)
    for name, module in model.named_modules():
        if isinstance(module, DepthwiseConv):
            channels, height, width, group_width = module.weight.shape
            assert channels % 16 == 0 and group_width == 1, name
            assert height == width <= 7 and module.stride <= 2, name
        elif isinstance(module, nn.Conv2d):
            out, _, _, channels = module.weight.shape
            assert (name, channels) == ("stem.conv", 3) and out % 16 == 0


def test_depthwise_weights_are_contiguous_once_loaded(small):
    # The checkpoint has them channels first, and the downsampling ones interleaved.
    for name, module in small.vision_tower.named_modules():
        if isinstance(module, DepthwiseConv):
            view = memoryview(module.weight)
            kernel = module.weight.shape[1]
            steps = [stride // view.itemsize for stride in view.strides]
            assert steps[:3] == [kernel * kernel, kernel, 1], name


def test_on_the_cpu_only_the_dense_convolution_is_one(computed_as, convolutions):
    computed_as(on_cpu=True)
    FastViTHD(SMALL)(mx.zeros((1, 128, 128, 3)))
    assert [call[5] for call in convolutions] == [1]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 8, 8, 16), (3, 7, 9, 8), (2, 6, 5, 3), (2, 1, 2, 4)])
def test_shifted_slices_are_a_convolution(computed_as, kernel, stride, shape):
    computed_as(on_cpu=True)
    channels = shape[-1]
    conv = DepthwiseConv(channels, kernel, stride)
    conv.weight = mx.random.normal(conv.weight.shape, key=mx.random.key(1))
    conv.bias = mx.random.normal(conv.bias.shape, key=mx.random.key(2))
    x = mx.random.normal(shape, key=mx.random.key(3))
    expected = mx.conv2d(x, conv.weight, stride, kernel // 2, groups=channels) + conv.bias
    assert conv(x).shape == expected.shape
    assert mx.allclose(conv(x), expected, rtol=1e-6, atol=1e-5)


def test_gelu_on_the_cpu_is_exact_to_rounding(computed_as):
    computed_as(on_cpu=True)
    x = np.concatenate([np.linspace(-12, 12, 20001), [0, 1e-20, -1e-20, 1e4, -1e4, 3e38]])
    x = x.astype(np.float32)
    found = np.array(gelu(mx.array(x)), np.float64)
    wanted = exact_gelu(x.astype(np.float64))
    assert (np.abs(found - wanted) <= 4e-7 * np.maximum(1, np.abs(x))).all()
    assert found[x == 0] == 0


def test_gelu_keeps_what_is_not_finite(computed_as):
    for on_cpu in (True, False):
        computed_as(on_cpu)
        assert math.isnan(gelu(mx.array(math.nan)).item())
        assert not math.isfinite(gelu(mx.array(math.inf)).item())


def test_the_released_geometry_in_numbers():
    model = FastViTHD(VisionConfig())
    widths = [model.stem.pointwise.weight.shape[0]]
    widths += [m.pointwise.weight.shape[0] for m in model.network if hasattr(m, "pointwise")]
    assert widths == [96, 192, 384, 768, 1536]
    assert all(b == 2 * a for a, b in pairwise(widths))
    blocks = [type(m).__name__ for m in model.network]
    assert blocks.count("RepMixerBlock") == 38 and blocks.count("AttentionBlock") == 6
    assert blocks.count("Downsample") == 4 and blocks.count("DepthwiseConv") == 2
