"""A Core ML package → the encoder's tensors."""

from __future__ import annotations

import math
from numbers import Integral
from pathlib import Path
from typing import Any

import mlx.core as mx

from ....checks import is_litter
from ....config import CheckpointError, VisionConfig
from ... import fold
from ...files import Weights
from ..mlx_vlm import ENCODER
from .encoder import encode
from .program import (
    NORM_EPS,
    PACKAGE,
    constant,
    constant_operand,
    consumers,
    load_program,
    uncast,
)


def read_encoder(folder: Path, config: VisionConfig) -> Weights:
    """The encoder in a folder's Core ML package, in the mlx-vlm layout and inference form.

    Constants keep their dtype; compressed ones are expanded. BatchNorms and layer scales that
    Core ML has folded are neutral.

    Args:
        folder: holds one `.mlpackage`.
        config: the geometry.

    Raises:
        CheckpointError: coremltools is missing, or there is no package, a broken one, or one whose
            program is not this encoder.
    """
    packages = sorted(p for p in folder.glob("*.mlpackage") if not is_litter(p.name))
    if len(packages) != 1:
        found = ", ".join(package.name for package in packages) or "none"
        raise CheckpointError(
            f"{folder} must hold one Core ML package with the vision encoder, {PACKAGE}; "
            f"found {found}."
        )
    reader = Reader(packages[0], load_program(packages[0]))
    reader.end(encode(reader, reader.image, config))
    return {ENCODER + name: value for name, value in reader.weights.items()}


class Reader:
    """Follows a program from operation to operation; `weights` collects the constants it passes."""

    def __init__(self, package: Path, function: Any):
        self.package = package
        self.outputs = function.outputs
        self.place = "the image"
        self.weights: Weights = {}
        inputs = list(function.inputs.values())
        self._check(len(inputs) == 1, f"it has {len(inputs)} inputs, not only an image")
        self.image = inputs[0]
        fixed = [size for size in self.image.shape if isinstance(size, Integral)]
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
        """Check that the program ends with the visual features reached."""
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
        self._check(eps is not None and math.prod(_shape(eps)) == 1, f"{name} adds no epsilon")
        root, y = self._next(y, "sqrt", "rsqrt")
        return self._combine(centered, y, "real_div" if root.op_type == "sqrt" else "mul"), eps

    def _channel_mean(self, x: Any, name: str | None = None) -> Any:
        op, y = self._next(x, "reduce_mean", name=name)
        self._expect("axes", [int(i) % 4 for i in op.axes.val], [1])
        return y

    def _scale_and_shift(self, x: Any) -> tuple[Any, mx.array, mx.array]:
        """Pass all that scales and shifts channels by constants: (what follows, scale, shift)."""
        channels = x.shape[1]
        scale, shift = mx.ones(channels), mx.zeros(channels)
        while len(takers := consumers(x)) == 1:
            op, value = takers[0], constant_operand(takers[0])
            if op.op_type == "batch_norm":
                factor, term = self._batch_norm(op)
            elif value is not None and _shape(value)[-3:] == (channels, 1, 1):
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
        """Pass a multiplication by a constant number: (what follows, the number or 1)."""
        takers = consumers(x)
        value = constant_operand(takers[0]) if len(takers) == 1 else None
        if value is None or takers[0].op_type != "mul" or math.prod(_shape(value)) != 1:
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
        """(operation, its first output) of the one operation of these kinds that takes x."""
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


def _shape(constant: Any) -> tuple[int, ...]:
    """The shape of an array; a number has an empty one."""
    return tuple(getattr(constant, "shape", ()))
