import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from reference import RandomTensors, convolution

from fastvlm_mlx.checkpoint import fold
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import CheckpointError, VisionConfig

NAME = "network.0.0"


class Branches(RandomTensors):
    """The tensors of parallel branches, and what the branches give."""

    def conv_norm(
        self, name: str, x: np.ndarray, out: int, kernel: int, stride: int, groups: int
    ) -> np.ndarray:
        weight = self.tensor(f"{name}.conv.weight", out, kernel, kernel, x.shape[-1] // groups)
        return self.batch_norm(f"{name}.bn", convolution(x, weight, stride, groups))

    def mobile_one(
        self,
        name: str,
        x: np.ndarray,
        out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        convs: int = 1,
        has_scale: bool = True,
        has_skip: bool = True,
    ) -> np.ndarray:
        y = sum(
            self.conv_norm(f"{name}.rbr_conv.{i}", x, out, kernel, stride, groups)
            for i in range(convs)
        )
        if has_scale:
            y = y + self.conv_norm(f"{name}.rbr_scale", x, out, 1, stride, groups)
        return y + self.batch_norm(f"{name}.rbr_skip", x) if has_skip else y

    def reparameterize(self) -> dict[str, mx.array]:
        return fold.reparameterize({name: mx.array(value) for name, value in self.tensors.items()})


def apply_folded(folded: dict, name: str, x: np.ndarray, stride: int = 1, groups: int = 1):
    """The one convolution that is left, of which there must be weight and bias and nothing else."""
    assert folded.keys() == {f"{name}.weight", f"{name}.bias"}
    return convolution(x, np.array(folded[f"{name}.weight"]), stride, groups) + np.array(
        folded[f"{name}.bias"]
    )


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(found, expected, rtol=0, atol=1e-5 * expected.std())


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 9, 6, 8))


@pytest.mark.parametrize("convs", [1, 3])
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("has_skip", [True, False])
@pytest.mark.parametrize("kernel, groups", [(3, 1), (3, 8), (7, 8), (3, 4), (1, 1)])
def test_mobile_one(x, kernel, groups, convs, has_scale, has_skip):
    branches = Branches()
    y = branches.mobile_one(
        NAME, x, 8, kernel, groups=groups, convs=convs, has_scale=has_scale, has_skip=has_skip
    )
    assert close(
        apply_folded(branches.reparameterize(), f"{NAME}.reparam_conv", x, groups=groups), y
    )


@pytest.mark.parametrize("out, groups", [(16, 1), (8, 8), (16, 8), (24, 8)])
def test_mobile_one_that_changes_the_shape(x, out, groups):
    branches = Branches()
    y = branches.mobile_one(NAME, x, out, 3, stride=2, groups=groups, has_skip=False)
    folded = branches.reparameterize()
    assert close(apply_folded(folded, f"{NAME}.reparam_conv", x, stride=2, groups=groups), y)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("has_layer_scale", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_rep_mixer(x, kernel, has_layer_scale, has_scale):
    branches, name = Branches(), f"{NAME}.token_mixer"
    mixed = branches.mobile_one(f"{name}.mixer", x, 8, kernel, groups=8, has_scale=has_scale)
    scale = branches.tensor(f"{name}.layer_scale", 1, 1, 8) if has_layer_scale else 1
    y = x + scale * (mixed - branches.batch_norm(f"{name}.norm.rbr_skip", x))
    assert close(apply_folded(branches.reparameterize(), f"{name}.reparam_conv", x, groups=8), y)


@pytest.mark.parametrize("out", [8, 16])
@pytest.mark.parametrize("small", [None, 3, 5])
def test_large_kernel(x, out, small):
    branches, name = Branches(), "network.1.proj.0"
    y = branches.conv_norm(f"{name}.lkb_origin", x, out, 7, 2, 8)
    if small is not None:
        y = y + branches.conv_norm(f"{name}.small_conv", x, out, small, 2, 8)
    assert close(
        apply_folded(branches.reparameterize(), f"{name}.lkb_reparam", x, stride=2, groups=8), y
    )


def test_position_encoding(x):
    branches, name = Branches(), "network.4"
    weight = branches.tensor(f"{name}.pe.weight", 8, 7, 7, 1)
    y = x + convolution(x, weight, groups=8) + branches.tensor(f"{name}.pe.bias", 8)
    assert close(apply_folded(branches.reparameterize(), f"{name}.reparam_conv", x, groups=8), y)


def test_what_has_no_branches_passes():
    tensors = {"network.0.0.layer_scale": mx.ones((1, 1, 8)), "head.proj": mx.ones((8, 4))}
    assert not fold.is_training_form(tensors)
    assert fold.reparameterize(tensors) == tensors


def test_half_precision_is_folded_in_single():
    branches = Branches()
    branches.mobile_one(NAME, np.ones((1, 4, 4, 8)), 8, 3, groups=8)
    half = {name: mx.array(value).astype(mx.float16) for name, value in branches.tensors.items()}
    single = {name: value.astype(mx.float32) for name, value in half.items()}
    expected = fold.reparameterize(single)
    for name, value in fold.reparameterize(half).items():
        assert value.dtype == mx.float32 and mx.array_equal(value, expected[name])


def test_the_training_form_is_told_from_the_inference_form(small_folder, training_folder):
    inference = llava.to_mlx(mx.load(str(small_folder / "model.safetensors")))
    training = llava.to_mlx(mx.load(str(training_folder / "model.safetensors")))
    assert fold.is_training_form(training) and not fold.is_training_form(inference)
    folded = fold.reparameterize(training)
    assert {k: v.shape for k, v in folded.items()} == {k: v.shape for k, v in inference.items()}
    assert all(mx.allclose(folded[k], inference[k], rtol=1e-4, atol=1e-5) for k in folded)


def checkpoint_with(tensors: dict[str, mx.array], source, target) -> None:
    shutil.copyfile(source / "config.json", target / "config.json")
    mx.save_safetensors(str(target / "model.safetensors"), tensors)


def branch_tensors(data) -> list[str]:
    branches = mx.load(str(data / "random-small" / "branches.safetensors"))
    return [name for name in sorted(branches) if "num_batches_tracked" not in name]


def test_a_missing_tensor_of_a_branch_is_named(data, training_folder, tmp_path):
    tensors = mx.load(str(training_folder / "model.safetensors"))
    names = [n for n in branch_tensors(data) if not n.endswith(".layer_scale")]
    assert len(names) > 150
    for name in names[::7]:
        checkpoint_with({k: v for k, v in tensors.items() if k != name}, training_folder, tmp_path)
        with pytest.raises(CheckpointError, match=r"branch|missing") as error:
            load_model(tmp_path)
        assert name in str(error.value)  # as the file would call it


@pytest.mark.parametrize("rows", [5, 1])  # one row would be broadcast
def test_a_misshapen_tensor_of_a_branch_is_named(data, training_folder, tmp_path, rows):
    tensors = mx.load(str(training_folder / "model.safetensors"))
    for name in branch_tensors(data)[::11]:
        wrong = {name: mx.zeros((rows, *tensors[name].shape[1:]))}
        checkpoint_with(tensors | wrong, training_folder, tmp_path)
        with pytest.raises(CheckpointError) as error:
            load_model(tmp_path)
        # It may be the one tensor into which the branches merge that is named.
        module = re.split(r"\.(?:rbr_|mixer|norm|layer_scale|lkb_|small_conv|pe)", name)[0]
        assert module in str(error.value)


def test_a_tensor_of_a_branch_too_many_is_named(training_folder, tmp_path):
    tensors = mx.load(str(training_folder / "model.safetensors"))
    surplus = "model.vision_tower.vision_tower.model.patch_embed.0.rbr_conv.0.extra"
    checkpoint_with(tensors | {surplus: mx.zeros(1)}, training_folder, tmp_path)
    with pytest.raises(CheckpointError, match="surplus") as error:
        load_model(tmp_path)
    assert surplus in str(error.value)


def test_layers_are_named_as_in_the_original(data):
    # mci.py counts position encodings, stages and downsampling layers in one list.
    config = json.loads((data / "random-small" / "llava" / "config.json").read_text())
    layers = fold.network_layers(VisionConfig.from_dict(config))
    assert [(layer.kind, layer.name, layer.ways) for layer in layers] == [
        ("repmixer", "network.0.0", 1),
        ("downsample", "network.1", 2),
        ("repmixer", "network.2.0", 1),
        ("downsample", "network.3", 2),
        ("repmixer", "network.4.0", 1),
        ("repmixer", "network.4.1", 1),
        ("downsample", "network.5", 1),
        ("position", "network.6", 1),
        ("attention", "network.7.0", 1),
        ("downsample", "network.8", 2),
        ("position", "network.9", 1),
        ("attention", "network.10.0", 1),
    ]
