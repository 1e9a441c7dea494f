"""The vision encoder as a Core ML program, read and written with coremltools on any platform.

Core ML has merged what it could, and the names of its constants mean nothing. So `encode` says
once what FastViTHD does to an image, in the order of the data, and two classes follow it: a
`Reader` goes along the operations of a program and collects their constants, a `Writer` emits the
operations.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from fastvlm_mlx.config import CheckpointError, VisionConfig
from fastvlm_mlx.convert import fold
from fastvlm_mlx.convert.fold import Weights

VISION = "vision_tower.vision_model."
PACKAGE = "fastvithd.mlpackage"
NORM_EPS = 1e-5
INPUT, OUTPUT = "images", "image_features"
CASTS = ("cast", "identity")


def read_encoder(folder: Path, config: VisionConfig) -> Weights:
    """The encoder in a folder's Core ML package, in the mlx-vlm layout and inference form.

    Constants have the dtype that they have there; compressed ones are expanded. BatchNorms and
    layer scales that Core ML has merged are neutral.

    Args:
        folder: holds one `.mlpackage`.
        config: the geometry.

    Raises:
        CheckpointError: coremltools is missing, or there is no package, a broken one, or one whose
            program is not this encoder.
    """
    packages = sorted(folder.glob("*.mlpackage"))
    if len(packages) != 1:
        found = ", ".join(package.name for package in packages) or "none"
        raise CheckpointError(
            f"{folder} must hold one Core ML package with the vision encoder, {PACKAGE}; "
            f"found {found}."
        )
    reader = Reader(packages[0], load_program(packages[0]))
    reader.end(encode(reader, reader.image, config))
    return {VISION + name: value for name, value in reader.weights.items()}


def load_program(package: Path) -> Any:
    """The main function of a Core ML package, with its constants.

    Returns:
        A `coremltools` MIL `Function`.

    Raises:
        CheckpointError: coremltools is missing, or the package is broken or no ML Program.
    """
    import_coremltools(f"read {package}")
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.proto.Model_pb2 import Model

    file = next(package.glob("Data/*/*.mlmodel"), None)
    if file is None:
        raise CheckpointError(f"{package} is not a whole Core ML package; download it again.")
    try:
        spec = Model.FromString(file.read_bytes())
        program = load(spec, spec.specificationVersion, str(file.parent / "weights"))
        return program.functions["main"]
    except Exception as error:  # coremltools and protobuf raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{package} is not a readable ML Program ({reason}).") from None


def import_coremltools(purpose: str) -> None:
    """Import coremltools, without its warnings off a Mac; CheckpointError if it is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it imports transformers
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"To {purpose}, coremltools is needed: pip install 'fastvlm-mlx[coreml]'."
        ) from None


class Form(Protocol):
    """What `encode` asks of a `Reader` or a `Writer`; values are [1, C, H, W]."""

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        """A convolution with a bias, padded by half its kernel; `grouped`: one group an input."""

    def conv_norm(self, x: Any, name: str) -> Any:
        """A depthwise convolution and its BatchNorm."""

    def channel_norm(self, x: Any, name: str) -> Any:
        """LayerNorm over the channels of each position."""

    def attention(self, x: Any, name: str, head_dim: int) -> Any:
        """Self-attention over all positions."""

    def activation(self, x: Any, kind: str) -> Any:
        """gelu (exact), relu or sigmoid."""

    def mean(self, x: Any) -> Any:
        """Over all positions: [1, C, 1, 1]."""

    def gate(self, x: Any, y: Any) -> Any:
        """x y."""

    def residual(self, x: Any, y: Any, name: str) -> Any:
        """x + y, y times a layer scale."""

    def tokens(self, x: Any) -> Any:
        """[1, C, H, W] → [1, H W, C]."""


def encode(form: Form, x: Any, config: VisionConfig) -> Any:
    """FastViTHD in inference form (`mci.py`): image to features, layer by layer."""
    x = form.activation(form.conv(x, "patch_embed.blocks.0.reparam_conv", stride=2), "gelu")
    x = form.conv(x, "patch_embed.blocks.1.reparam_conv", stride=2, grouped=True)
    x = form.conv(form.activation(x, "gelu"), "patch_embed.blocks.2.reparam_conv")
    x = form.activation(x, "gelu")
    for layer in fold.network_layers(config):
        x = LAYERS[layer.kind](form, x, layer.name, config)
    x = form.conv(x, "conv_exp.reparam_conv", grouped=True)
    squeezed = form.activation(form.conv(form.mean(x), "conv_exp.se.reduce"), "relu")
    excited = form.activation(form.conv(squeezed, "conv_exp.se.expand"), "sigmoid")
    return form.tokens(form.activation(form.gate(x, excited), "gelu"))


def _position(form: Form, x: Any, name: str, _: VisionConfig) -> Any:
    return form.conv(x, f"{name}.reparam_conv", grouped=True)


def _conv_ffn(form: Form, x: Any, name: str, layer_scale: str) -> Any:
    y = form.conv_norm(x, f"{name}.convffn.conv")
    y = form.activation(form.conv(y, f"{name}.convffn.fc1"), "gelu")
    return form.residual(x, form.conv(y, f"{name}.convffn.fc2"), f"{name}.{layer_scale}")


def _rep_mixer(form: Form, x: Any, name: str, _: VisionConfig) -> Any:
    x = form.conv(x, f"{name}.token_mixer.reparam_conv", grouped=True)
    return _conv_ffn(form, x, name, "layer_scale")


def _attention(form: Form, x: Any, name: str, config: VisionConfig) -> Any:
    y = form.channel_norm(x, f"{name}.norm")
    y = form.attention(y, f"{name}.token_mixer", config.head_dim)
    x = form.residual(x, y, f"{name}.layer_scale_1")
    return _conv_ffn(form, x, name, "layer_scale_2")


def _downsample(form: Form, x: Any, name: str, config: VisionConfig) -> Any:
    x = form.conv(x, f"{name}.proj.0.lkb_reparam", stride=config.down_stride, grouped=True)
    x = form.conv(form.activation(x, "gelu"), f"{name}.proj.1.reparam_conv")
    return form.activation(x, "gelu")


LAYERS: dict[str, Callable[[Form, Any, str, VisionConfig], Any]] = {
    "position": _position,
    "repmixer": _rep_mixer,
    "attention": _attention,
    "downsample": _downsample,
}


class Reader:
    """Follows a program from operation to operation; `weights` collects what it passes."""

    def __init__(self, package: Path, function: Any):
        self.package = package
        self.outputs = function.outputs
        self.place = "the image"
        self.weights: Weights = {}
        inputs = list(function.inputs.values())
        self._check(len(inputs) == 1, f"it has {len(inputs)} inputs, not an image alone")
        self.image = inputs[0]
        fixed = [size for size in self.image.shape if isinstance(size, (int, np.integer))]
        self._check(len(fixed) == 4, f"its image has the shape {list(self.image.shape)}")

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        x, weight, bias = self._conv(x, name, stride, grouped)
        self.weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return x

    def conv_norm(self, x: Any, name: str) -> Any:
        x, weight, bias = self._conv(x, f"{name}.conv", 1, True)
        x, scale, shift = self._scale_and_shift(x)
        self.weights |= {
            f"{name}.conv.weight": weight,
            f"{name}.bn.weight": scale,
            f"{name}.bn.bias": bias * scale + shift,
            f"{name}.bn.running_mean": mx.zeros_like(scale),
            f"{name}.bn.running_var": mx.full(scale.shape, 1 - fold.BATCH_NORM_EPS),
        }
        return x

    def channel_norm(self, x: Any, name: str) -> Any:
        if any(op.op_type == "layer_norm" for op in consumers(x)):
            op, x = self._next(x, "layer_norm", name=name)
            self._expect("axes", [int(i) % 4 for i in op.axes.val], [1])
            scale, shift, eps = (self._constant(op, key) for key in ("gamma", "beta", "epsilon"))
        else:
            x, eps = self._spelled_norm(x, name)
            x, scale, shift = self._scale_and_shift(x)
        self._expect("epsilon", round(float(eps), 7), NORM_EPS)  # 1.0014e-5 at half precision
        self.weights |= {f"{name}.weight": mx.array(scale), f"{name}.bias": mx.array(shift)}
        return x

    def attention(self, x: Any, name: str, head_dim: int) -> Any:
        B, C, H, W = x.shape
        y, weight, bias = self._linear(self.tokens(x), f"{name}.qkv")
        self._expect("largest bias", abs(bias).max().item(), 0)
        self.weights[f"{name}.qkv.weight"] = weight
        y = self._reshape(y, B, H * W, 3, C // head_dim, head_dim)
        split, _ = self._next(self._transpose(y, 2, 0, 3, 1, 4), "split")
        self._expect("parts", [part.shape[0] for part in split.outputs], [1, 1, 1])
        query, key, value = (self._next(part, "squeeze")[1] for part in split.outputs)
        query, before = self._pass_number(query)
        y, after = self._pass_number(self._matmul(query, key, transposed=True))
        self._expect("scale", round(before * after, 3), round(head_dim**-0.5, 3))
        softmax, y = self._next(y, "softmax")
        self._expect("axis", int(softmax.axis.val) % 4, 3)
        y = self._transpose(self._matmul(y, value, transposed=False), 0, 2, 1, 3)
        y, weight, bias = self._linear(self._reshape(y, B, H * W, C), f"{name}.proj")
        self.weights |= {f"{name}.proj.weight": weight, f"{name}.proj.bias": bias}
        return self._reshape(self._transpose(y, 0, 2, 1), B, C, H, W)

    def activation(self, x: Any, kind: str) -> Any:
        op, y = self._next(x, kind)
        if kind == "gelu":
            self._expect("gelu's mode", op.mode.val, "EXACT")
        return y

    def mean(self, x: Any) -> Any:
        _, y = self._next(x, "avg_pool", "reduce_mean")
        self._expect("shape", tuple(y.shape), (*x.shape[:2], 1, 1))
        return y

    def gate(self, x: Any, y: Any) -> Any:
        return self._combine(x, y, "mul")

    def residual(self, x: Any, y: Any, name: str) -> Any:
        y, scale, shift = self._scale_and_shift(y)
        self._expect("largest shift", abs(shift).max().item(), 0)
        self.weights[name] = scale.reshape(1, 1, -1)
        return self._combine(x, y, "add")

    def tokens(self, x: Any) -> Any:
        B, C, H, W = x.shape
        return self._transpose(self._reshape(x, B, C, H * W), 0, 2, 1)

    def end(self, x: Any) -> None:
        """Check that the features reached are what the program gives."""
        given = [uncast(output) for output in self.outputs]
        self._check(given == [uncast(x)], f"after {self.place} the features should be the output")

    def _conv(
        self, x: Any, name: str, stride: int, grouped: bool
    ) -> tuple[Any, mx.array, mx.array]:
        op, y = self._next(x, "conv", name=name)
        weight = mx.array(self._constant(op, "weight")).transpose(0, 2, 3, 1)
        pad = [weight.shape[1] // 2] * 4
        kind = op.pad_type.val
        implied = (kind == "same" and stride == 1) or (kind == "valid" and not any(pad))
        self._expect("padding", pad if implied else op.pad.val.tolist(), pad)
        self._expect("strides", op.strides.val.tolist(), [stride, stride])
        self._expect("dilations", op.dilations.val.tolist(), [1, 1])
        self._expect("groups", int(op.groups.val), x.shape[1] if grouped else 1)
        return y, weight, self._bias(op, weight)

    def _linear(self, x: Any, name: str) -> tuple[Any, mx.array, mx.array]:
        op, y = self._next(x, "linear", name=name)
        weight = mx.array(self._constant(op, "weight"))
        return y, weight, self._bias(op, weight)

    def _bias(self, op: Any, weight: mx.array) -> mx.array:
        if op.bias is None:
            return mx.zeros(len(weight), weight.dtype)
        return mx.array(self._constant(op, "bias"))

    def _spelled_norm(self, x: Any, name: str) -> tuple[Any, float]:
        """(x - mean) / sqrt(variance + epsilon) over the channels, and that epsilon."""
        mean = self._channel_mean(x, name)
        centered = self._combine(x, mean, "sub")
        power, squared = self._next(centered, "square", "pow")
        if power.op_type == "pow":
            self._expect("exponent", float(power.y.val), 2.0)
        op, y = self._next(self._channel_mean(squared), "add")
        eps = constant_operand(op)
        self._check(eps is not None and np.size(eps) == 1, f"{name} adds no epsilon")
        root, y = self._next(y, "sqrt", "rsqrt")
        return self._combine(centered, y, "real_div" if root.op_type == "sqrt" else "mul"), eps

    def _channel_mean(self, x: Any, name: str | None = None) -> Any:
        op, y = self._next(x, "reduce_mean", name=name)
        self._expect("axes", [int(i) % 4 for i in op.axes.val], [1])
        return y

    def _scale_and_shift(self, x: Any) -> tuple[Any, mx.array, mx.array]:
        """Pass what multiplies or adds constants to channels: (what comes after, scale, shift)."""
        channels = x.shape[1]
        scale, shift = mx.ones(channels), mx.zeros(channels)
        while len(takers := consumers(x)) == 1:
            op, value = takers[0], constant_operand(takers[0])
            if op.op_type == "batch_norm":
                factor, term = self._batch_norm(op)
            elif value is not None and np.shape(value)[-3:] == (channels, 1, 1):
                vector = mx.array(value).flatten().astype(mx.float32)
                is_scale = op.op_type == "mul"
                factor, term = (vector, 0 * vector) if is_scale else (0 * vector + 1, vector)
            else:
                break
            x, scale, shift = op.outputs[0], scale * factor, shift * factor + term
        return x, scale, shift

    def _batch_norm(self, op: Any) -> tuple[mx.array, mx.array]:
        mean, variance = mx.array(constant(op.mean)), mx.array(constant(op.variance))
        terms = {
            "bn.running_mean": mean,
            "bn.running_var": variance + (float(op.epsilon.val) - fold.BATCH_NORM_EPS),
            "bn.weight": mx.ones_like(mean) if op.gamma is None else mx.array(constant(op.gamma)),
            "bn.bias": mx.zeros_like(mean) if op.beta is None else mx.array(constant(op.beta)),
        }
        return fold.batch_norm_terms(terms.__getitem__, "bn", terms["bn.weight"].size)

    def _pass_number(self, x: Any) -> tuple[Any, float]:
        """Pass a multiplication by a constant number: (what comes after, the number or 1)."""
        takers = consumers(x)
        value = constant_operand(takers[0]) if len(takers) == 1 else None
        if value is None or takers[0].op_type != "mul" or np.size(value) != 1:
            return x, 1.0
        return takers[0].outputs[0], float(value)

    def _matmul(self, x: Any, y: Any, *, transposed: bool) -> Any:
        op = self._next(x, "matmul")[0]
        flags = [bool(op.transpose_x.val), bool(op.transpose_y.val)]
        self._expect("transposition", flags, [False, transposed])
        return self._combine(x, y, "matmul")

    def _combine(self, x: Any, y: Any, kind: str) -> Any:
        op, z = self._next(y, kind)
        wanted, operands = [uncast(x), uncast(y)], [uncast(op.x), uncast(op.y)]
        swapped = kind in ("add", "mul") and operands[::-1] == wanted
        self._check(
            operands == wanted or swapped, f"after {self.place} {kind} takes other operands"
        )
        return z

    def _reshape(self, x: Any, *shape: int) -> Any:
        _, y = self._next(x, "reshape")
        self._expect("shape", tuple(y.shape), shape)
        return y

    def _transpose(self, x: Any, *order: int) -> Any:
        op, y = self._next(x, "transpose")
        self._expect("order of axes", tuple(int(i) % len(order) for i in op.perm.val), order)
        return y

    def _next(self, x: Any, *kinds: str, name: str | None = None) -> tuple[Any, Any]:
        """(operation, first result) of the one operation of these kinds that takes x."""
        takers = consumers(x)
        found = [op for op in takers if op.op_type in kinds]
        wanted = " or ".join(kinds) + (f" ({name})" if name else "")
        others = ", ".join(op.op_type for op in takers) or "the end"
        self._check(len(found) == 1, f"after {self.place} expected {wanted}, found {others}")
        self.place = name or self.place
        return found[0], found[0].outputs[0]

    def _constant(self, op: Any, key: str) -> Any:
        value = constant(getattr(op, key))
        self._check(value is not None, f"the {key} of {self.place} is not a constant")
        return value

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        text = f"at {self.place} the {what} should be {expected}, found {found}"
        self._check(found == expected, text)

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            raise CheckpointError(
                f"{self.package} is not the vision encoder that config.json describes: {problem}."
            )


def consumers(value: Any) -> list[Any]:
    """The operations that take a value, casts passed over."""
    takers: list[Any] = []
    for op in value.child_ops:
        is_cast = op.op_type in CASTS
        takers += consumers(op.outputs[0]) if is_cast else [op]
    return list(dict.fromkeys(takers))


def uncast(value: Any) -> Any:
    """A value before its casts."""
    while value.op is not None and value.op.op_type in CASTS:
        value = value.op.x
    return value


def constant(value: Any) -> Any:
    """A value as a number or numpy array, expanded if it is compressed; None if it is computed."""
    if value is None:
        return None
    op = uncast(value).op
    if op is not None and op.op_type.startswith("constexpr_"):
        return op.materialized_val_inference()
    return value.val


def constant_operand(op: Any) -> Any:
    """The constant that an operation adds or multiplies by, or None."""
    if op.op_type not in ("add", "mul"):
        return None
    return constant(op.y) if constant(op.x) is None else constant(op.x)


class Writer:
    """Emits operations; the weights are neutral where Core ML needs none."""

    def __init__(self, builder: Any, get: fold.Get):
        self.builder = builder
        self.get = get

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        return self._conv(x, f"{name}.weight", f"{name}.bias", stride, grouped)

    def conv_norm(self, x: Any, name: str) -> Any:
        return self._conv(x, f"{name}.conv.weight", f"{name}.bn.bias", 1, True)

    def channel_norm(self, x: Any, name: str) -> Any:
        mb, prefix = self.builder, _identifier(name)
        mean = mb.reduce_mean(x=x, axes=[1], keep_dims=True, name=f"{prefix}_mean")
        centered = mb.sub(x=x, y=mean, name=f"{prefix}_centered")
        squared = mb.square(x=centered, name=f"{prefix}_squared")
        variance = mb.reduce_mean(x=squared, axes=[1], keep_dims=True, name=f"{prefix}_variance")
        positive = mb.add(x=variance, y=np.float32(NORM_EPS), name=f"{prefix}_positive")
        deviation = mb.sqrt(x=positive, name=f"{prefix}_deviation")
        weight, bias = self._array(f"{name}.weight"), self._array(f"{name}.bias")
        return mb.batch_norm(
            x=mb.real_div(x=centered, y=deviation, name=f"{prefix}_normal"),
            mean=np.zeros_like(bias),
            variance=np.full_like(bias, 1 - fold.BATCH_NORM_EPS),
            gamma=weight,
            beta=bias,
            epsilon=np.float32(fold.BATCH_NORM_EPS),
            name=prefix,
        )

    def attention(self, x: Any, name: str, head_dim: int) -> Any:
        mb = self.builder
        B, C, H, W = x.shape
        y = self._linear(self._flatten(x), f"{name}.qkv")
        y = mb.reshape(x=y, shape=[B, H * W, 3, C // head_dim, head_dim])
        y = mb.transpose(x=y, perm=[2, 0, 3, 1, 4])
        parts = mb.split(x=y, split_sizes=[1, 1, 1], axis=0)
        query, key, value = (mb.squeeze(x=part, axes=[0]) for part in parts)
        query = mb.mul(x=query, y=np.float32(head_dim**-0.5))
        scores = mb.softmax(x=mb.matmul(x=query, y=key, transpose_y=True), axis=-1)
        y = mb.transpose(x=mb.matmul(x=scores, y=value), perm=[0, 2, 1, 3])
        y = mb.reshape(x=y, shape=[B, H * W, C])
        y = self._linear(y, f"{name}.proj", bias=self._array(f"{name}.proj.bias"))
        return mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1]), shape=[B, C, H, W])

    def activation(self, x: Any, kind: str) -> Any:
        options = {"mode": "EXACT"} if kind == "gelu" else {}
        return getattr(self.builder, kind)(x=x, **options)

    def mean(self, x: Any) -> Any:
        return self.builder.reduce_mean(x=x, axes=[2, 3], keep_dims=True)

    def gate(self, x: Any, y: Any) -> Any:
        return self.builder.mul(x=x, y=y)

    def residual(self, x: Any, y: Any, name: str) -> Any:
        return self.builder.add(x=x, y=y)

    def tokens(self, x: Any) -> Any:
        return self._flatten(x, name=OUTPUT)

    def _flatten(self, x: Any, **named: str) -> Any:
        B, C, H, W = x.shape
        flat = self.builder.reshape(x=x, shape=[B, C, H * W])
        return self.builder.transpose(x=flat, perm=[0, 2, 1], **named)

    def _conv(self, x: Any, weight: str, bias: str, stride: int, grouped: bool) -> Any:
        kernel = np.ascontiguousarray(self._array(weight).transpose(0, 3, 1, 2))
        return self.builder.conv(
            x=x,
            weight=kernel,
            bias=self._array(bias),
            strides=[stride, stride],
            pad_type="custom",
            pad=[kernel.shape[2] // 2] * 4,
            groups=x.shape[1] if grouped else 1,
            name=_identifier(weight.removesuffix(".weight")),
        )

    def _linear(self, x: Any, name: str, **bias: np.ndarray) -> Any:
        weight = self._array(f"{name}.weight")
        return self.builder.linear(x=x, weight=weight, name=_identifier(name), **bias)

    def _array(self, name: str) -> np.ndarray:
        return np.array(self.get(name).astype(mx.float32))


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def write_vision_package(
    weights: Weights, config: VisionConfig, path: Path, *, precision: str = "float32"
) -> None:
    """Write the encoder as a Core ML package, for iOS 16 or macOS 13 and later.

    Its input `images` is float32 [1, 3, S, S] in [0, 1], its output `image_features` float32
    [1, (S/64)², C], as the original's `export_vision_encoder.py` makes them. BatchNorms and layer
    scales are merged.

    Args:
        weights: holds the encoder in the mlx-vlm layout, in inference form.
        config: the geometry.
        path: a name that ends in `.mlpackage`; replaced if it exists.
        precision: of constants and arithmetic: float32 as in the original, or float16 (then the
            channel norms, whose squares can overflow, stay float32).

    Raises:
        CheckpointError: coremltools is missing.
        ValueError: there is no such precision.
        OSError: the package can't be written.
    """
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be float32 or float16, found {precision!r}.")
    import_coremltools(f"write {path}")
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    folded = fold.fold_encoder(lambda name: weights[VISION + name].astype(mx.float32), config)
    merged = fold.unfold_encoder(folded.__getitem__, config)
    shape = (1, 3, config.image_size, config.image_size)

    @mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS16)
    def program(images: Any) -> Any:
        return encode(Writer(mb, merged.__getitem__), images, config)

    # The names of `Writer.channel_norm`'s operations.
    half = ct.transform.FP16ComputePrecision(op_selector=lambda op: "_norm" not in op.name)
    try:
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=half if precision == "float16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.short_description = "FastViTHD, the vision encoder of FastVLM"
        model.input_description[INPUT] = "RGB image in [0, 1], channels first"
        model.output_description[OUTPUT] = "Visual tokens, row by row"
        model.save(str(path))
    except (RuntimeError, shutil.Error) as error:  # so coremltools says that the disk is full
        raise OSError(f"{path} can't be written ({_reason(error)}).") from None


def _reason(error: Exception) -> str:
    """Why a package could not be written, in a few words."""
    if isinstance(error, shutil.Error):  # a list of (source, target, reason)
        return str(error.args[0][0][2]).partition(": '")[0]
    return str(error).splitlines()[0].rstrip(".")
