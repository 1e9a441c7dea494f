import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sources import with_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import fold
from fastvlm_mlx.checkpoint.files import Weights, read_tensors, save_checkpoint
from fastvlm_mlx.checkpoint.layouts import apple_export
from fastvlm_mlx.checkpoint.layouts.coreml import program, writer
from fastvlm_mlx.checkpoint.layouts.coreml.encoder import encode
from fastvlm_mlx.checkpoint.layouts.coreml.program import constant
from fastvlm_mlx.checkpoint.layouts.coreml.reader import Reader
from fastvlm_mlx.checkpoint.layouts.coreml.writer import Writer
from fastvlm_mlx.checkpoint.layouts.mlx_vlm import ENCODER, HEAD
from fastvlm_mlx.checkpoint.load import cast
from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.checkpoint.quantize import quantize_checkpoint
from fastvlm_mlx.checkpoint.read import read_checkpoint, read_layout
from fastvlm_mlx.config import CheckpointError, FastVLMConfig, VisionConfig, load_config
from fastvlm_mlx.convert import APPLE, convert

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.needs("coremltools")

TINY = VisionConfig(
    image_size=64,
    layers=(1, 1, 1, 1, 1),
    embed_dims=(4, 8, 8, 16, 16),
    mlp_ratios=(2, 2, 2, 2, 2),
    head_dim=8,
    projection_dim=8,
)


# --- what a Core ML program computes, without Core ML ---


def interpret(function: Any, image: np.ndarray) -> np.ndarray:
    """Run a program on one image [1, 3, S, S]; every result is rounded to its declared dtype."""
    from coremltools.converters.mil.mil import types

    values = {next(iter(function.inputs.values())): image}

    def value(variable: Any) -> Any:
        known = values.get(variable)
        known = constant(variable) if known is None else known
        return np.asarray(known, np.float32) if np.issubdtype(known.dtype, np.floating) else known

    for op in function.operations:
        if op.op_type == "const" or op.op_type.startswith("constexpr_"):
            continue
        results = OPERATIONS[op.op_type](op, value)
        results = results if isinstance(results, list) else [results]
        for variable, result in zip(op.outputs, results, strict=True):
            assert result.shape == tuple(variable.shape)
            values[variable] = result.astype(types.nptype_from_builtin(variable.dtype))
    return np.asarray(values[function.outputs[0]])


def _conv(op: Any, value: Any) -> np.ndarray:
    kernel = value(op.weight)
    assert op.pad_type.val in ("valid", "custom")
    pad = op.pad.val if op.pad_type.val == "custom" else [0] * 4
    assert len(set(pad)) == 1
    y = mx.conv2d(
        mx.array(value(op.x)).transpose(0, 2, 3, 1),
        mx.array(kernel).transpose(0, 2, 3, 1),
        stride=tuple(op.strides.val.tolist()),
        padding=int(pad[0]),
        groups=int(op.groups.val),
    )
    return np.array(y.transpose(0, 3, 1, 2)) + value(op.bias)[:, None, None]


def _gelu(op: Any, value: Any) -> np.ndarray:
    assert op.mode.val == "EXACT"
    return 0.5 * value(op.x) * (1 + np.array(mx.erf(mx.array(value(op.x)) * math.sqrt(0.5))))


def _softmax(op: Any, value: Any) -> np.ndarray:
    power = np.exp(value(op.x) - value(op.x).max(axis=op.axis.val, keepdims=True))
    return power / power.sum(axis=op.axis.val, keepdims=True)


def _batch_norm(op: Any, value: Any) -> np.ndarray:
    terms = (op.mean, op.variance, op.gamma, op.beta)
    mean, variance, gamma, beta = (value(term)[:, None, None] for term in terms)
    return (value(op.x) - mean) / np.sqrt(variance + op.epsilon.val) * gamma + beta


def _matmul(op: Any, value: Any) -> np.ndarray:
    x, y = value(op.x), value(op.y)
    x = x.swapaxes(-1, -2) if op.transpose_x.val else x
    return x @ (y.swapaxes(-1, -2) if op.transpose_y.val else y)


def _avg_pool(op: Any, value: Any) -> np.ndarray:
    assert tuple(op.kernel_sizes.val) == value(op.x).shape[2:]
    return value(op.x).mean(axis=(2, 3), keepdims=True)


OPERATIONS = {
    "conv": _conv,
    "gelu": _gelu,
    "softmax": _softmax,
    "batch_norm": _batch_norm,
    "matmul": _matmul,
    "avg_pool": _avg_pool,
    "linear": lambda op, value: value(op.x) @ value(op.weight).T + value(op.bias),
    "relu": lambda op, value: np.maximum(value(op.x), 0),
    "sigmoid": lambda op, value: 1 / (1 + np.exp(-value(op.x))),
    "add": lambda op, value: value(op.x) + value(op.y),
    "sub": lambda op, value: value(op.x) - value(op.y),
    "mul": lambda op, value: value(op.x) * value(op.y),
    "real_div": lambda op, value: value(op.x) / value(op.y),
    "pow": lambda op, value: value(op.x) ** value(op.y),
    "square": lambda op, value: value(op.x) ** 2,
    "sqrt": lambda op, value: np.sqrt(value(op.x)),
    "cast": lambda op, value: value(op.x),
    "reduce_mean": lambda op, value: value(op.x).mean(
        axis=tuple(op.axes.val), keepdims=bool(op.keep_dims.val)
    ),
    "reshape": lambda op, value: value(op.x).reshape(op.shape.val),
    "transpose": lambda op, value: value(op.x).transpose(op.perm.val),
    "squeeze": lambda op, value: value(op.x).squeeze(tuple(op.axes.val)),
    "split": lambda op, value: np.split(value(op.x), len(op.outputs), axis=op.axis.val),
}


def error(found: Any, expected: Any) -> float:
    """The largest difference, in standard deviations of what is expected."""
    found, expected = np.array(found, np.float32), np.array(expected, np.float32)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


# --- fixtures ---


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    """The small model as an 8-bit decoder and a Core ML package."""
    return data / "apple-export-small"


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionConfig:
    return load_config(folder).vision


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, mx.array]:
    return mx.load(str(data / "random-small" / "expected.safetensors"))


@pytest.fixture(scope="module")
def encoder(small_folder: Path) -> Weights:
    """The small model's tensors in the mlx-vlm layout, float32."""
    return read_layout(small_folder)[0]


@pytest.fixture(scope="module")
def written(
    encoder: Weights, vision: VisionConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder for each precision, with the package that we write."""
    folders = {}
    for precision in ("float32", "float16"):
        folders[precision] = tmp_path_factory.mktemp(precision)
        package = folders[precision] / program.PACKAGE
        writer.write_vision_package(encoder, vision, package, precision=precision)
    return folders


@pytest.fixture(scope="module")
def converted(folder: Path, vision: VisionConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference folder in the mlx-vlm layout."""
    target = tmp_path_factory.mktemp("converted")
    tensors = apple_export.to_mlx(read_tensors(folder))
    save_checkpoint(tensors | apple_export.read_encoder(folder, vision), target)
    shutil.copyfile(folder / "config.json", target / "config.json")
    return target


def folded(tensors: Weights, config: VisionConfig) -> Weights:
    return fold.fold_encoder(lambda name: tensors[ENCODER + name], config)


def largest_difference(a: Weights, b: Weights) -> float:
    """Of parameters, in units of the largest value in each tensor."""
    assert a.keys() == b.keys()
    return max((abs(a[k] - b[k]).max() / abs(b[k]).max()).item() for k in b)


# --- reading the reference ---


def test_names(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert apple_export.matches(set(tensors))
    renamed = apple_export.to_mlx(tensors)
    assert not apple_export.matches(set(renamed))
    assert {"mm_projector.0.weight", "mm_projector.2.bias"} < set(renamed)
    back = apple_export.from_mlx(renamed)
    assert back.keys() == tensors.keys()
    assert all(back[name] is tensors[name] for name in tensors)


def test_other_layouts_do_not_match(data: Path, small_folder: Path) -> None:
    assert not apple_export.matches(set(read_tensors(small_folder)))
    names = {"model.multi_modal_projector.linear_1.weight", "model.vision_tower.timm_model.x"}
    assert not apple_export.matches(names)


def test_encoder_has_the_tensors_of_the_original(
    folder: Path, vision: VisionConfig, encoder: Weights
) -> None:
    found = apple_export.read_encoder(folder, vision)
    wanted = {name: tensor for name, tensor in encoder.items() if name.startswith(ENCODER)}
    wanted.pop(HEAD)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    # Core ML divides by the square root of 1 + 1e-5 in what it makes of the channel norms.
    assert largest_difference(folded(found, vision), folded(wanted, vision)) < 1e-5


def test_layer_scales_that_are_there_are_kept(
    folder: Path, vision: VisionConfig, encoder: Weights
) -> None:
    found = apple_export.read_encoder(folder, vision)
    name = f"{ENCODER}network.7.0.layer_scale_"
    assert mx.allclose(found[f"{name}1"], encoder[f"{name}1"])
    assert (found[f"{name}2"] == 1).all()


def test_decoder_is_that_of_the_original_at_8_bits(folder: Path, encoder: Weights) -> None:
    found = apple_export.to_mlx(read_tensors(folder))
    half = {n: cast(t, mx.float16) for n, t in encoder.items() if ENCODER not in n}
    settings = {"bits": 8, "group_size": 32}
    wanted, _, _ = quantize_checkpoint(half, load_config(folder), settings)
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)


def test_features_and_logits(converted: Path, expected: dict[str, mx.array], data: Path) -> None:
    model = fv.load_model(converted)
    pixel_values = expected["pixel_values"].transpose(0, 2, 3, 1)
    assert error(model.vision_tower(pixel_values), expected["vision_features"]) < 1e-3
    cases = json.loads((data / "random-small" / "expected.json").read_text())["cases"]
    places = model.config.image_token_index
    for i, case in enumerate(cases):
        ids = [j for k in case["input_ids"] for j in ([places] * 4 if k == -200 else [k])]
        images = pixel_values[mx.array(case["images"])] if case["images"] else None
        logits, wanted = model(mx.array([ids]), pixel_values=images), expected[f"case{i}.logits"]
        assert mx.array_equal(logits.argmax(-1), wanted.argmax(-1))
        # The decoder's 8 bits cost a little more than a hundredth.
        assert abs(logits - wanted).max().item() < 2e-2 * abs(wanted).max().item()


# --- the interpreter, and what we write ---


def test_interpreter_on_the_reference(folder: Path, expected: dict[str, mx.array]) -> None:
    function = program.load_program(folder / program.PACKAGE)
    for image, features in zip(
        np.array(expected["pixel_values"]), expected["vision_features"], strict=True
    ):
        assert error(interpret(function, image[None])[0], features) < 1e-4


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("float16", 0.1)])
def test_written_program_computes_the_features(
    written: dict[str, Path], expected: dict[str, mx.array], precision: str, limit: float
) -> None:
    function = program.load_program(written[precision] / program.PACKAGE)
    image = np.array(expected["pixel_values"])[:1]
    assert error(interpret(function, image), expected["vision_features"][:1]) < limit


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-6), ("float16", 2**-11)])
def test_written_package_reads_back(
    written: dict[str, Path],
    vision: VisionConfig,
    encoder: Weights,
    precision: str,
    limit: float,
) -> None:
    found = apple_export.read_encoder(written[precision], vision)
    kernels = {found[n].dtype for n in found if n.endswith("conv.weight")}
    assert kernels == {getattr(mx, precision)}
    assert largest_difference(folded(found, vision), folded(encoder, vision)) <= limit


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_written_interface_is_that_of_the_reference(
    folder: Path, written: dict[str, Path], precision: str
) -> None:
    specs = []
    for package in (folder / program.PACKAGE, written[precision] / program.PACKAGE):
        model = ct.proto.Model_pb2.Model()
        model.ParseFromString((package / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
        features = (*model.description.input, *model.description.output)
        specs.append(
            (model.specificationVersion, [(f.name, f.type.SerializeToString()) for f in features])
        )
    assert specs[0] == specs[1]
    assert [name for name, _ in specs[0][1]] == ["images", "image_features"]


def test_unknown_precision(encoder: Weights, vision: VisionConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision must be float32 or float16, found 'int8'"):
        writer.write_vision_package(encoder, vision, tmp_path / "x", precision="int8")


# --- forms that a program may take, and those it may not ---


def random_encoder(config: VisionConfig) -> Weights:
    """Random tensors for a geometry, names without a prefix."""
    model = fv.FastVLM(
        FastVLMConfig.from_dict(
            {
                "model_type": "llava_qwen2",
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 8,
                "mm_projector_type": "mlp2x_gelu",
                "vision_config": {
                    "layers": list(config.layers),
                    "embed_dims": list(config.embed_dims),
                    "mlp_ratios": list(config.mlp_ratios),
                    "head_dim": config.head_dim,
                    "image_size": config.image_size,
                },
            }
        )
    )
    random = np.random.default_rng(0)
    return {
        name.removeprefix(ENCODER): mx.array(
            random.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
        )
        for name, tensor in unfuse(model).items()
        if name.startswith(ENCODER) and name != HEAD
    }


class Emitter(Writer):
    """A `Writer` to vary, with vectors that multiply or add to channels."""

    def channels(self, name: str) -> np.ndarray:
        return self._array(name).reshape(-1, 1, 1)


def tiny_program(emitter: type[Writer], merged: bool = True, config: VisionConfig = TINY) -> Any:
    """(main function, tensors) of a program that a Writer emits."""
    from coremltools.converters.mil import Builder as mb

    tensors = random_encoder(config)
    if merged:
        tensors = fold.unfold_encoder(
            fold.fold_encoder(tensors.__getitem__, config).__getitem__, config
        )
    shape = (1, 3, config.image_size, config.image_size)

    @mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS16)
    def program(images: Any) -> Any:
        return encode(emitter(mb, tensors.__getitem__), images, config)

    return program.functions["main"], tensors


def read(function: Any, config: VisionConfig = TINY) -> Weights:
    reader = Reader(Path("x.mlpackage"), function)
    reader.end(encode(reader, reader.image, config))
    return reader.weights


class Unmerged(Emitter):
    """BatchNorms and layer scales of their own."""

    def conv_norm(self, x: Any, name: str) -> Any:
        kernel = self._array(f"{name}.conv.weight").transpose(0, 3, 1, 2)
        y = self.builder.conv(
            x=x, weight=kernel, pad_type="same", groups=x.shape[1], strides=[1, 1]
        )
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gamma, beta = (self._array(f"{name}.bn.{key}") for key in keys)
        return self.builder.batch_norm(
            x=y, mean=mean, variance=variance - 1e-3, gamma=gamma, beta=beta, epsilon=1e-3 + 1e-5
        )

    def residual(self, x: Any, y: Any, name: str) -> Any:
        return self.builder.add(x=x, y=self.builder.mul(x=y, y=self.channels(name)))


class LayerNormOperation(Emitter):
    def channel_norm(self, x: Any, name: str) -> Any:
        gamma, beta = self._array(f"{name}.weight"), self._array(f"{name}.bias")
        return self.builder.layer_norm(x=x, axes=[1], gamma=gamma, beta=beta, epsilon=1e-5)


class OtherSpelling(Emitter):
    """Powers, reciprocal roots, products instead of BatchNorms, pooling, scaled scores, casts."""

    def channel_norm(self, x: Any, name: str) -> Any:
        mb = self.builder
        x = mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32")
        centered = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[-3], keep_dims=True))
        squared = mb.pow(x=centered, y=2.0)
        variance = mb.reduce_mean(x=squared, axes=[1], keep_dims=True)
        root = mb.rsqrt(x=mb.add(x=np.float32(1e-5), y=variance), epsilon=1e-12)
        y = mb.mul(x=self.channels(f"{name}.weight"), y=mb.mul(x=root, y=centered))
        return mb.add(x=y, y=self.channels(f"{name}.bias")[None])

    def conv_norm(self, x: Any, name: str) -> Any:
        variance = np.full(x.shape[1], 1 - 1e-5, np.float32)
        y = super().conv_norm(x, name)
        return self.builder.batch_norm(x=y, mean=0 * variance, variance=variance, epsilon=1e-5)

    def mean(self, x: Any) -> Any:
        sides = list(x.shape[2:])
        return self.builder.avg_pool(x=x, kernel_sizes=sides, strides=sides, pad_type="valid")


class Quantized(Emitter):
    """Kernels as integers with a scale, matrices as indices into a table."""

    def _conv(self, x: Any, weight: str, bias: str, stride: int, grouped: bool) -> Any:
        kernel = self._array(weight).transpose(0, 3, 1, 2)
        scales = abs(kernel).max(axis=(1, 2, 3)) / 127
        integers = np.round(kernel / scales[:, None, None, None]).astype(np.int8)
        packed = self.builder.constexpr_affine_dequantize(
            quantized_data=integers, zero_point=np.int8(0), scale=scales, axis=0
        )
        return self.builder.conv(
            x=x,
            weight=packed,
            bias=self._array(bias),
            strides=[stride, stride],
            pad_type="custom",
            pad=[kernel.shape[2] // 2] * 4,
            groups=x.shape[1] if grouped else 1,
        )

    def _linear(self, x: Any, name: str, **bias: np.ndarray) -> Any:
        matrix = self._array(f"{name}.weight")
        table = np.linspace(matrix.min(), matrix.max(), 256, dtype=np.float32)
        indices = abs(matrix.reshape(-1, 1) - table).argmin(axis=1).astype(np.uint8)
        packed = self.builder.constexpr_lut_to_dense(
            indices=indices, lut=table, shape=np.array(matrix.shape, np.uint32)
        )
        return self.builder.linear(x=x, weight=packed, **bias)


def test_compressed_constants_are_expanded() -> None:
    function, tensors = tiny_program(Quantized)
    found = read(function)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in tensors.items()}
    differences = {
        k: (abs(found[k] - tensors[k]).max() / abs(tensors[k]).max()).item() for k in found
    }
    assert 0 < max(differences.values()) < 2**-7


@pytest.mark.parametrize(
    "emitter", [Writer, LayerNormOperation, OtherSpelling], ids=lambda e: e.__name__
)
def test_forms(emitter: type[Writer]) -> None:
    function, tensors = tiny_program(emitter)
    found = read(function)
    assert found.keys() == tensors.keys()
    assert all(mx.allclose(found[name], tensors[name], rtol=1e-5) for name in tensors)


def test_unmerged_form_is_the_same_encoder() -> None:
    function, tensors = tiny_program(Unmerged, merged=False)
    found, wanted = (fold.fold_encoder(w.__getitem__, TINY) for w in (read(function), tensors))
    assert largest_difference(found, wanted) < 1e-5


def test_released_depth() -> None:
    config = VisionConfig(
        image_size=64, embed_dims=(2, 4, 8, 16, 32), mlp_ratios=(1,) * 5, head_dim=8
    )
    function, tensors = tiny_program(Writer, config=config)
    found = read(function, config)
    assert all(mx.array_equal(found[name], tensors[name]) for name in tensors)


class TanhGelu(Emitter):
    def activation(self, x: Any, kind: str) -> Any:
        if kind != "gelu":
            return super().activation(x, kind)
        return self.builder.gelu(x=x, mode="TANH_APPROXIMATION")


class NoGelu(Emitter):
    def activation(self, x: Any, kind: str) -> Any:
        return self.builder.relu(x=x)


class Ungrouped(Emitter):
    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        if name != "network.1.proj.0.lkb_reparam":
            return super().conv(x, name, stride=stride, grouped=grouped)
        return super().conv(x, name, stride=1, grouped=grouped)


class WrongHeads(Emitter):
    def attention(self, x: Any, name: str, head_dim: int) -> Any:
        return super().attention(x, name, head_dim // 2)


class SwappedProduct(Emitter):
    def residual(self, x: Any, y: Any, name: str) -> Any:
        return self.builder.add(x=y, y=y)


class ExtraShift(Emitter):
    def residual(self, x: Any, y: Any, name: str) -> Any:
        return super().residual(x, self.builder.add(x=y, y=np.ones((y.shape[1], 1, 1))), name)


class BiasedQuery(Emitter):
    def _linear(self, x: Any, name: str, **bias: np.ndarray) -> Any:
        return super()._linear(x, name, bias=np.ones(len(self._array(f"{name}.weight")), "f"))


class OtherEpsilon(Emitter):
    def channel_norm(self, x: Any, name: str) -> Any:
        gamma, beta = self._array(f"{name}.weight"), self._array(f"{name}.bias")
        return self.builder.layer_norm(x=x, axes=[1], gamma=gamma, beta=beta, epsilon=1e-6)


class MoreAfterwards(Emitter):
    def tokens(self, x: Any) -> Any:
        return self.builder.relu(x=super().tokens(x))


@pytest.mark.parametrize(
    ("emitter", "message"),
    [
        (TanhGelu, r"at patch_embed.blocks.0.reparam_conv the gelu's mode should be EXACT, found "),
        (NoGelu, r"after patch_embed.blocks.0.reparam_conv expected gelu, found relu"),
        (Ungrouped, r"at network.1.proj.0.lkb_reparam the strides should be \[2, 2\], found \[1,"),
        (WrongHeads, r"at network.7.0.token_mixer.qkv the shape should be \(1, 4, 3, 2, 8\), foun"),
        (SwappedProduct, r"after network.0.0.convffn.fc2 add takes other operands"),
        (ExtraShift, r"at network.0.0.convffn.fc2 the largest shift should be 0, found 1"),
        (BiasedQuery, r"at network.7.0.token_mixer.qkv the largest bias should be 0, found 1"),
        (OtherEpsilon, r"at network.7.0.norm the epsilon should be 1e-05, found 1e-06"),
        (MoreAfterwards, r"after conv_exp.se.expand the features should be the output"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_programs_that_are_not_the_encoder(emitter: type[Writer], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x.mlpackage is not the vision.*: {message}"):
        read(tiny_program(emitter)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layers": (2, 1, 1, 1, 1)},
            r"at network.0.1.token_mixer.reparam_conv the strides should be \[1, 1\]",
        ),
        ({"down_stride": 1}, "at network.1.proj.0.lkb_reparam the strides should be"),
        ({"token_mixers": ("repmixer",) * 5}, "groups|expected conv .*found"),
        ({"head_dim": 4}, "shape should be"),
    ],
)
def test_programs_of_another_geometry(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tiny_program(Writer)[0], replace(TINY, **fields))


def test_programs_without_one_image() -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import get_new_symbol

    sides = mb.TensorSpec(shape=(1, 3, get_new_symbol(), 64))
    flat = mb.TensorSpec(shape=(1, 64))
    for specs, message in (
        ([sides], r"its image has the shape \[1, 3, \w+, 64\]"),
        ([flat], r"its image has the shape \[1, 64\]"),
        ([flat, flat], "it has 2 inputs, not only an image"),
    ):
        program = mb.program(input_specs=specs)(
            (lambda x: mb.relu(x=x)) if len(specs) == 1 else (lambda x, y: mb.add(x=x, y=y))
        )
        with pytest.raises(CheckpointError, match=message):
            Reader(Path("x.mlpackage"), program.functions["main"])


# --- packages that can't be read ---


def test_needs_one_package(tmp_path: Path, vision: VisionConfig) -> None:
    with pytest.raises(CheckpointError, match=r"must hold one Core ML package .* found none\.$"):
        apple_export.read_encoder(tmp_path, vision)
    (tmp_path / "._a.mlpackage").touch()  # as macOS adds on exFAT
    for name in ("a.mlpackage", "b.mlpackage"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"found a\.mlpackage, b\.mlpackage\.$"):
        apple_export.read_encoder(tmp_path, vision)


@pytest.fixture()
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the reference folder, to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


MODEL = "fastvithd.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.mark.parametrize(
    ("file", "kept", "message"),
    [
        (MODEL, None, "is not a whole Core ML package; download it again"),
        (MODEL, 1000, "is not a readable ML Program"),
        (MODEL, 0, "is not a readable ML Program"),
        (WEIGHTS, None, "is not a readable ML Program"),
        (WEIGHTS, 0, "is not a readable ML Program"),
        (WEIGHTS, 1000, "is not a readable ML Program"),
        (WEIGHTS, 800_000, "is not a readable ML Program"),
    ],
)
def test_broken_packages(
    copied: Path, vision: VisionConfig, file: str, kept: int | None, message: str
) -> None:
    content = (copied / file).read_bytes()
    (copied / file).unlink()
    if kept is not None:
        (copied / file).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"fastvithd.mlpackage {message}"):
        apple_export.read_encoder(copied, vision)


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_a_pipe_in_a_package(copied: Path, vision: VisionConfig, file: str) -> None:
    (copied / file).unlink()
    os.mkfifo(copied / file)
    with pytest.raises(CheckpointError, match="is not a whole Core ML package"):
        apple_export.read_encoder(copied, vision)


def test_what_macos_adds_to_a_package_is_not_read(copied: Path, vision: VisionConfig) -> None:
    for file in (MODEL, WEIGHTS):
        path = copied / file
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert apple_export.read_encoder(copied, vision)


def export(source: Path, target: Path, quantize: Any = 8, **options: Any) -> Path:
    return convert(source, target, layout=APPLE, quantize=quantize, progress=False, **options)


def test_without_coremltools(
    folder: Path, vision: VisionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(CheckpointError, match=r"pip install 'fastvlm-mlx\[coreml\]'\.$"):
        apple_export.read_encoder(folder, vision)
    with pytest.raises(CheckpointError, match=r"pip install 'fastvlm-mlx\[coreml\]'\.$"):
        export(folder, tmp_path / "target")


# --- a folder for the app ---


@pytest.fixture(scope="module")
def source(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tokenizer of bytes and three control tokens."""
    return with_tokenizer(small_folder, tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "app"
    assert export(source, target, quantize={"bits": 8, "group_size": 32}) == target
    return target


def test_exported_folder_is_that_of_the_reference(
    folder: Path, exported: Path, vision: VisionConfig, encoder: Weights
) -> None:
    assert {f.name for f in folder.iterdir()} <= {f.name for f in exported.iterdir()}
    found, wanted = read_tensors(exported), read_tensors(folder)
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    package = apple_export.read_encoder(exported, vision)
    assert largest_difference(folded(package, vision), folded(encoder, vision)) < 1e-6
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((folder / name).read_text())


def test_exported_config(folder: Path, exported: Path) -> None:
    found, wanted = (json.loads((f / "config.json").read_text()) for f in (exported, folder))
    assert found["quantization"] == wanted["quantization"]
    assert found["image_token_index"] == 259
    different = ("vision_config", "image_token_index", "torch_dtype")
    same = wanted.keys() - {*different}
    assert {k: found.get(k) for k in same} == {k: wanted[k] for k in same}
    assert load_config(exported).vision == load_config(folder).vision


def test_exported_tokenizer_knows_the_image_token(exported: Path) -> None:
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert bpe.encode("a<image>").ids[1:] == [259]
    assert bpe.token_to_id("<|im_end|>") == 258
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["259"]["content"] == "<image>"


def test_export_at_half_precision(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions = []
    monkeypatch.setattr(
        sys.modules["fastvlm_mlx.convert"],
        "write_vision_package",
        lambda *_, precision: precisions.append(precision),
    )
    target = export(source, tmp_path / "app", quantize=None, precision="float16")
    assert precisions == ["float16"]
    tensors = read_tensors(target)
    assert {tensor.dtype for tensor in tensors.values()} == {mx.float16}
    assert "quantization" not in json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("precision, value", [("float32", math.nan), ("float16", 1e6)])
def test_an_encoder_that_is_not_finite_is_not_exported(
    source: Path, tmp_path: Path, precision: str, value: float
) -> None:
    spoiled = Path(shutil.copytree(source, tmp_path / "source"))
    _, tensors = read_checkpoint(spoiled)
    name = "vision_tower.vision_model.network.0.0.convffn.fc1.bias"
    tensors[name] = mx.full(tensors[name].shape, value)  # float16 holds no 1e6
    mx.eval(tensors)
    mx.save_safetensors(str(spoiled / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN .* in {precision}"):
        export(spoiled, tmp_path / "app", precision=precision)
    assert not (tmp_path / "app").exists()


def test_export_refuses(
    source: Path, folder: Path, exported: Path, small_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="quantized already; export a full-precision source"):
        export(folder, tmp_path / "app")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(source, exported, quantize=None)
    with pytest.raises(ValueError, match="both the source and the target"):
        export(source, source)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        export(small_folder, tmp_path / "app")
    with pytest.raises(ValueError, match="bits must be one of"):
        export(source, tmp_path / "app", quantize=7)
    with pytest.raises(ValueError, match="holds no quantized encoder; leave out vision"):
        export(source, tmp_path / "app", quantize={"bits": 8, "vision": 8})
    assert not (tmp_path / "app").exists()


def test_export_needs_a_projector_that_the_app_knows(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "linear"))
    tensors = read_tensors(source)
    linear = {
        "model.mm_projector.weight": mx.zeros((64, 256)),
        "model.mm_projector.bias": mx.zeros(64),
    }
    kept = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), kept | linear)
    config = json.loads((source / "config.json").read_text()) | {"mm_projector_type": "linear"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="linear can't be exported: the app"):
        export(folder, tmp_path / "app")


def test_export_needs_room_for_the_image_token(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = Path(shutil.copytree(source, tmp_path / "full"))
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_special_tokens([f"<|{i}|>" for i in range(320 - bpe.get_vocab_size())])
    bpe.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="its vocabulary has no room for <image>"):
        export(folder, tmp_path / "app")
