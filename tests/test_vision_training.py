"""The encoder in training form, against the form that runs, and against PyTorch."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.files import save_checkpoint
from fastvlm_mlx.checkpoint.load import inference_weights, load_model
from fastvlm_mlx.checkpoint.training_form import folded, fresh_model, load_training_form
from fastvlm_mlx.config import CheckpointError, load_config
from fastvlm_mlx.model.vision_gradients import encode_with_pullback, trains_by_layer
from fastvlm_mlx.model.vision_training import TrainingFastViTHD
from fastvlm_mlx.ops import BatchNorm

TOLERANCE = 1e-5  # relative to the largest value


def relative(found: mx.array, expected: mx.array) -> float:
    found, expected = (np.array(a.astype(mx.float32)) for a in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def random_pixels(batch: int = 2, side: int = 128) -> mx.array:
    return mx.random.uniform(shape=(batch, side, side, 3), key=mx.random.key(side))


@pytest.fixture
def trained(training_folder: Path) -> fv.FastVLM:
    return load_training_form(training_folder, dtype="float32")


def assert_same_gradients(found: Any, expected: dict[str, mx.array]) -> None:
    """Within 1e-4, relative to the largest of a parameter, or to 1 % of the largest of all. That of
    a 1x1 branch is mostly rounding, since the BatchNorm behind it takes its scale out again."""
    largest = max(mx.abs(g).max().item() for g in expected.values())
    for name, gradient in tree_flatten(found):
        error = mx.abs(gradient - expected[name]).max().item()
        least = largest / 10 if name.endswith("rbr_scale.conv.weight") else largest / 100
        assert error < 1e-4 * max(least, mx.abs(expected[name]).max().item()), name


# --- The same as the folded form ---


def test_a_checkpoint_in_training_form_keeps_its_branches_and_gives_the_same(
    trained: fv.FastVLM, training_folder: Path
) -> None:
    assert trained.training and isinstance(trained.vision_tower, TrainingFastViTHD)
    trained.eval()
    expected = load_model(training_folder, dtype="float32").encode_image(random_pixels())
    assert relative(trained.encode_image(random_pixels()), expected) < TOLERANCE


def test_it_folds_to_what_it_gives_after_eval(trained: fv.FastVLM, tmp_path: Path) -> None:
    """After steps of training, through a file as well."""
    for _ in range(2):  # so that the BatchNorms remember something else
        mx.eval(trained.vision_tower(random_pixels(3)), trained.parameters())
    trained.eval()
    ids, pixels = mx.array([[5, 9, 11, 17]]), random_pixels()
    expected = trained.encode_image(pixels), trained(ids)
    found = folded(trained)
    assert relative(found.encode_image(pixels), expected[0]) < TOLERANCE
    assert relative(found(ids), expected[1]) < TOLERANCE
    save_checkpoint(inference_weights(trained), tmp_path)
    config = (Path(__file__).parent / "data" / "random-small" / "llava" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert relative(load_model(tmp_path).encode_image(pixels), expected[0]) < TOLERANCE


def test_parameters_are_named_as_in_the_layout(trained: fv.FastVLM, training_folder: Path) -> None:
    from fastvlm_mlx.checkpoint.read import read_branches

    stored = read_branches(training_folder)
    found = dict(tree_flatten(trained.vision_tower.parameters()))
    assert {name: a.shape for name, a in found.items()} == {n: a.shape for n, a in stored.items()}
    remembered = {n for n in found if ".running_" in n}
    assert dict(tree_flatten(trained.vision_tower.trainable_parameters())).keys() == (
        found.keys() - remembered
    )


def test_an_encoder_in_inference_form_is_refused(small_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in inference form.*train it as it is"):
        load_training_form(small_folder)


def test_branches_that_do_not_fit_are_named(trained: fv.FastVLM, training_folder, tmp_path) -> None:
    tensors = mx.load(str(training_folder / "model.safetensors"))
    name = next(n for n in tensors if n.endswith("network.0.0.token_mixer.layer_scale"))
    tensors[name.replace("layer_scale", "extra.rbr_skip.weight")] = mx.ones(16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text((training_folder / "config.json").read_text())
    with pytest.raises(CheckpointError):
        load_training_form(tmp_path)


# --- BatchNorm ---


def test_batch_norm_as_its_formula_says() -> None:
    norm, x = BatchNorm(5), 3 + 2 * mx.random.normal((4, 6, 7, 5), key=mx.random.key(0))
    norm.weight, norm.bias = mx.arange(1.0, 6), mx.arange(5.0)
    rows = np.array(x, np.float64).reshape(-1, 5)
    centred = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    expected = centred * np.arange(1.0, 6) + np.arange(5.0)
    assert np.abs(np.array(norm(x)).reshape(-1, 5) - expected).max() < 1e-5
    assert relative(norm.running_mean, mx.array(0.1 * rows.mean(0), mx.float32)) < TOLERANCE
    remembered = 0.9 + 0.1 * rows.var(0, ddof=1)
    assert relative(norm.running_var, mx.array(remembered, mx.float32)) < TOLERANCE
    norm.eval()
    scale = np.arange(1.0, 6) / np.sqrt(remembered + 1e-5)
    expected = (rows - 0.1 * rows.mean(0)) * scale + np.arange(5.0)
    assert np.abs(np.array(norm(x)).reshape(-1, 5) - expected).max() < 1e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_of_batch_norm(assume, device: str) -> None:
    assume(device)
    keys = mx.random.split(mx.random.key(1), 2)
    x, weights = (mx.random.normal((4, 6, 7, 5), key=key) for key in keys)

    def textbook(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        rows = x.reshape(-1, 5)
        mean = rows.sum(0) / len(rows)
        variance = ((rows - mean) ** 2).sum(0) / len(rows)
        return ((x - mean) / mx.sqrt(variance + 1e-5) * weight + bias) * weights

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        norm = BatchNorm(5)
        norm.weight, norm.bias = weight, bias
        return norm(1 * x) * weights

    arguments = [2 * x + 1, mx.arange(1.0, 6), mx.arange(5.0)]
    found, expected = (
        mx.grad(lambda *a, f=f: mx.square(f(*a)).sum(), argnums=(0, 1, 2))(*arguments)
        for f in (ours, textbook)
    )
    for own, other in zip(found, expected, strict=True):
        assert relative(own, other) < 1e-4


def test_batch_norm_in_half_precision_counts_in_float32() -> None:
    norm, x = BatchNorm(3), mx.full((1, 64, 64, 3), 40.0).astype(mx.float16)
    x = x + mx.random.normal(x.shape, key=mx.random.key(0)).astype(mx.float16)
    y = norm(x)  # whose sum is beyond float16's range
    assert y.dtype == mx.float16 and norm.running_mean.dtype == mx.float32
    assert abs(y.astype(mx.float32).mean().item()) < 0.01
    assert 3.9 < norm.running_mean[0].item() < 4.1


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="one value per channel: give it larger images"):
        BatchNorm(3)(mx.ones((1, 1, 1, 3)))


# --- New models ---


def test_a_new_model_is_the_same_for_one_seed(small_folder: Path) -> None:
    config = load_config(small_folder)
    models = [fresh_model(config, seed) for seed in (1, 1, 2)]
    first, again, other = (dict(tree_flatten(model.parameters())) for model in models)
    assert all((first[name] == again[name]).all() for name in first)
    assert not (
        first["language_model.embed_tokens.weight"] == other["language_model.embed_tokens.weight"]
    ).any()


def test_a_new_model_keeps_the_size_of_activations(small_folder: Path) -> None:
    """No channel is dead, nothing overflows: the loss is that of guessing, gradients are finite."""
    model = fresh_model(load_config(small_folder))
    assert model.training
    vocab = model.config.text.vocab_size
    ids = mx.random.randint(1, vocab, (2, 30), key=mx.random.key(0))

    def loss(model: fv.FastVLM) -> mx.array:
        visual = model.encode_image(random_pixels()).flatten(0, 1)
        embeddings = model.embed_at(ids, visual, mx.array([3, 4, 5, 6, 33, 34, 35, 36]))
        states = model.language_model.hidden_states(None, None, embeddings)
        logits = model.language_model.logits(states)
        return nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    assert abs(value.item() - np.log(vocab)) < 0.3
    sizes = {name: mx.abs(g).max().item() for name, g in tree_flatten(gradients)}
    assert all(0 < size < 100 for size in sizes.values()), sizes


def test_a_new_model_folds(small_folder: Path) -> None:
    model = fresh_model(load_config(small_folder))
    mx.eval(model.vision_tower(random_pixels()), model.parameters())
    model.eval()
    found, expected = (
        folded(model).encode_image(random_pixels()),
        model.encode_image(random_pixels()),
    )
    assert relative(found, expected) < TOLERANCE


# --- Devices, and PyTorch ---


def test_training_steps_are_the_same_in_the_forms_of_each_device(
    training_folder: Path, assume
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        assume(device)
        tower = load_training_form(training_folder, dtype="float32").vision_tower
        pixels = random_pixels()
        weights = mx.random.normal((2, 4, 256), key=mx.random.key(1))
        step = nn.value_and_grad(tower, lambda t, p=pixels, w=weights: (w * t(p)).sum())
        found.append((step(tower), tower.parameters()))
    ((value, gradients), remembered), ((wanted, expected), kept) = found
    assert abs(value.item() - wanted.item()) < 1e-4 * abs(wanted.item()) + 1e-3
    assert_same_gradients(gradients, dict(tree_flatten(expected)))
    kept = dict(tree_flatten(kept))
    assert all(relative(a, kept[name]) < 1e-4 for name, a in tree_flatten(remembered))


@pytest.mark.interop
def test_a_step_of_training_is_pytorchs(training_folder: Path) -> None:
    """Output, gradients and what BatchNorms remember, with the same modules in PyTorch, float64."""
    torch = pytest.importorskip("torch")
    tower: Any = load_training_form(training_folder, dtype="float32").vision_tower
    parameters = dict(tree_flatten(tower.parameters()))
    tensors = {
        name: torch.tensor(np.array(value, np.float64), requires_grad=".running_" not in name)
        for name, value in parameters.items()
    }
    pixels, weights = random_pixels(), mx.random.normal((2, 4, 256), key=mx.random.key(1))
    value, gradients = nn.value_and_grad(tower, lambda t: (weights * t(pixels)).sum())(tower)
    x = torch.tensor(np.array(pixels, np.float64)).permute(0, 3, 1, 2)
    reference = TorchEncoder(torch, tensors, tower.config)
    y = reference(x)
    (y * torch.tensor(np.array(weights, np.float64))).sum().backward()
    assert relative(mx.array(y.detach().numpy()), tower_features(training_folder, pixels)) < 1e-4
    expected = {n: mx.array(t.grad.numpy()) for n, t in tensors.items() if t.grad is not None}
    assert_same_gradients(gradients, expected)
    for name, remembered in tree_flatten(tower.parameters()):
        if ".running_" in name:
            assert relative(remembered, mx.array(tensors[name].numpy())) < 1e-4, name
    assert np.isfinite(value.item())


def tower_features(folder: Path, pixels: mx.array) -> mx.array:
    return load_training_form(folder, dtype="float32").vision_tower(pixels)


class TorchEncoder:
    """The training form in PyTorch's functions, channels first, by the names of the tensors."""

    def __init__(self, torch: Any, tensors: dict[str, Any], config: Any):
        self.torch, self.t, self.config = torch, tensors, config
        self.F = torch.nn.functional

    def has(self, prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.") for name in self.t)

    def norm(self, name: str, x: Any) -> Any:
        keys = ("running_mean", "running_var", "weight", "bias")
        return self.F.batch_norm(x, *(self.t[f"{name}.{key}"] for key in keys), training=True)

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        weight = self.t[f"{name}.weight"].permute(0, 3, 1, 2)
        groups = x.shape[1] // weight.shape[1]
        bias = self.t.get(f"{name}.bias")
        return self.F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, groups=groups)

    def conv_norm(self, name: str, x: Any, stride: int = 1) -> Any:
        return self.norm(f"{name}.bn", self.conv(f"{name}.conv", x, stride))

    def mobile_one(self, name: str, x: Any, stride: int = 1) -> Any:
        y = self.conv_norm(f"{name}.rbr_conv.0", x, stride)
        if self.has(f"{name}.rbr_scale"):
            y = y + self.conv_norm(f"{name}.rbr_scale", x, stride)
        return y + self.norm(f"{name}.rbr_skip", x) if self.has(f"{name}.rbr_skip") else y

    def scale(self, name: str) -> Any:
        return self.t[name].reshape(1, -1, 1, 1)

    def conv_ffn(self, name: str, x: Any) -> Any:
        y = self.conv_norm(f"{name}.conv", x)
        return self.conv(f"{name}.fc2", self.F.gelu(self.conv(f"{name}.fc1", y)))

    def rep_mixer_block(self, name: str, x: Any) -> Any:
        mixer = f"{name}.token_mixer"
        mixed = self.mobile_one(f"{mixer}.mixer", x) - self.norm(f"{mixer}.norm.rbr_skip", x)
        x = x + self.scale(f"{mixer}.layer_scale") * mixed
        return x + self.scale(f"{name}.layer_scale") * self.conv_ffn(f"{name}.convffn", x)

    def attention_block(self, name: str, x: Any) -> Any:
        B, C, H, W = x.shape
        rows = x.flatten(2).transpose(1, 2)
        y = self.F.layer_norm(
            rows, (C,), self.t[f"{name}.norm.weight"], self.t[f"{name}.norm.bias"]
        )
        qkv = y @ self.t[f"{name}.token_mixer.qkv.weight"].T
        q, k, v = qkv.reshape(B, H * W, 3, -1, self.config.head_dim).permute(2, 0, 3, 1, 4)
        y = self.F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        proj = f"{name}.token_mixer.proj"
        y = self.F.linear(y, self.t[f"{proj}.weight"], self.t[f"{proj}.bias"])
        x = x + self.scale(f"{name}.layer_scale_1") * y.transpose(1, 2).reshape(B, C, H, W)
        return x + self.scale(f"{name}.layer_scale_2") * self.conv_ffn(f"{name}.convffn", x)

    def downsample(self, name: str, x: Any) -> Any:
        large = f"{name}.proj.0"
        stride = self.config.down_stride
        x = self.conv_norm(f"{large}.lkb_origin", x, stride) + self.conv_norm(
            f"{large}.small_conv", x, stride
        )
        return self.F.gelu(self.mobile_one(f"{name}.proj.1", self.F.gelu(x)))

    def __call__(self, x: Any) -> Any:
        for i, stride in enumerate((2, 2, 1)):
            x = self.F.gelu(self.mobile_one(f"patch_embed.blocks.{i}", x, stride))
        count = 1 + max(int(name.split(".")[1]) for name in self.t if name.startswith("network."))
        for i in range(count):
            x = self.stage(f"network.{i}", x)
        x = self.mobile_one("conv_exp", x)
        pooled = x.mean((2, 3), keepdim=True)
        gate = self.conv("conv_exp.se.expand", self.F.relu(self.conv("conv_exp.se.reduce", pooled)))
        return self.F.gelu(x * gate.sigmoid()).flatten(2).transpose(1, 2)

    def stage(self, name: str, x: Any) -> Any:
        if self.has(f"{name}.pe"):
            return x + self.conv(f"{name}.pe", x)
        if self.has(f"{name}.proj"):
            return self.downsample(name, x)
        block = 0
        while self.has(f"{name}.{block}"):
            is_attention = f"{name}.{block}.layer_scale_1" in self.t
            run = self.attention_block if is_attention else self.rep_mixer_block
            x = run(f"{name}.{block}", x)
            block += 1
        return x


def test_gradients_layer_by_layer_are_those_of_autodiff(training_folder: Path, assume) -> None:
    """In training form, BatchNorms' memory included."""
    assume("cpu")
    model, other = (load_training_form(training_folder, dtype="float32") for _ in range(2))
    pixels = random_pixels(3)
    weights = mx.random.normal((3, 4, 256), key=mx.random.key(1))
    assert trains_by_layer(model)
    features, pullback = encode_with_pullback(model.vision_tower, pixels)
    step = nn.value_and_grad(other.vision_tower, lambda tower: (weights * tower(pixels)).sum())
    value, expected = step(other.vision_tower)
    assert abs((weights * features).sum().item() - value.item()) < 1e-4 * abs(value.item())
    assert_same_gradients(pullback(weights), dict(tree_flatten(expected)))
    remembered = dict(tree_flatten(other.vision_tower.parameters()))
    for name, found in tree_flatten(model.vision_tower.parameters()):
        assert relative(found, remembered[name]) < 1e-5, name
    model.vision_tower.eval()
    assert not trains_by_layer(model)  # with BatchNorms that stay as they are


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_step_in_half_precision_points_where_float32_does(
    training_folder: Path, assume, dtype: str
) -> None:
    """In the forms for a GPU; what BatchNorms remember stays float32."""
    assume("cuda")
    found = []
    for kind in (dtype, "float32"):
        tower = load_training_form(training_folder, dtype=kind).vision_tower
        pixels, weights = random_pixels(), mx.random.normal((2, 4, 256), key=mx.random.key(1))
        step = nn.value_and_grad(tower, lambda t, p=pixels, w=weights: (w * t(p)).sum())
        gradients = dict(tree_flatten(step(tower)[1]))
        assert all(mx.isfinite(g).all() for g in gradients.values())
        found.append(mx.concatenate([g.astype(mx.float32).flatten() for g in gradients.values()]))
        remembered = dict(tree_flatten(tower.parameters()))
        assert all(a.dtype == mx.float32 for n, a in remembered.items() if ".running_" in n)
        assert (
            remembered["conv_exp.se.reduce.weight"].dtype
            == gradients["conv_exp.se.reduce.weight"].dtype
        )
    own, exact = found
    cosine = (own * exact).sum() / (mx.linalg.norm(own) * mx.linalg.norm(exact))
    # Rounding of one number may turn a ReLU behind it off, in this small model of few channels.
    assert cosine.item() > (0.98 if dtype == "float16" else 0.95)
