"""The encoder's tensors → a Core ML package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ....checks import reason, shown
from ....config import VisionConfig
from ... import fold
from ...files import Weights
from ..mlx_vlm import ENCODER
from .encoder import encode
from .program import NORM_EPS, import_coremltools

if TYPE_CHECKING:
    import numpy as np

INPUT, OUTPUT = "images", "image_features"


def write_vision_package(
    weights: Weights, config: VisionConfig, path: Path, *, precision: str = "float32"
) -> None:
    """Write the encoder as a Core ML package, for iOS 16 or macOS 13 and later.

    Its input `images` is float32 [1, 3, S, S] in [0, 1], its output `image_features` float32
    [1, (S/64)², C], as in the original's `export_vision_encoder.py`. BatchNorms and layer scales
    are folded.

    Args:
        weights: holds the encoder in the mlx-vlm layout, in inference form.
        config: the geometry.
        path: a name that ends in `.mlpackage`; replaced if it exists.
        precision: of constants and arithmetic: float32 as in the original, or float16 (then the
            channel norms, whose squares can overflow, stay float32).

    Raises:
        CheckpointError: coremltools is missing.
        ValueError: `precision` is neither.
        OSError: the package can't be written.
    """
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be float32 or float16, found {shown(precision)}.")
    import_coremltools(f"write {path}")
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    folded = fold.fold_encoder(lambda name: weights[ENCODER + name].astype(mx.float32), config)
    neutral = fold.unfold_encoder(folded.__getitem__, config)
    shape = (1, 3, config.image_size, config.image_size)

    @mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS16)
    def program(images: Any) -> Any:
        return encode(Writer(mb, neutral.__getitem__), images, config)

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
    except (RuntimeError, shutil.Error) as error:  # as coremltools reports a full disk
        raise OSError(f"{path} can't be written ({_reason(error)}).") from None


class Writer:
    """Emits operations. `get` gives neutral BatchNorms and layer scales, which are not written."""

    def __init__(self, builder: Any, get: fold.Get):
        self.builder = builder
        self.get = get

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        return self._conv(x, f"{name}.weight", f"{name}.bias", stride, grouped)

    def conv_norm(self, x: Any, name: str) -> Any:
        return self._conv(x, f"{name}.conv.weight", f"{name}.bn.bias", 1, True)

    def channel_norm(self, x: Any, name: str) -> Any:
        import numpy as np

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
        import numpy as np

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
        import numpy as np

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
        import numpy as np

        return np.array(self.get(name).astype(mx.float32))


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _reason(error: Exception) -> str:
    """Why a package could not be written, in a few words."""
    if isinstance(error, shutil.Error):  # a list of (source, target, reason)
        return str(error.args[0][0][2]).partition(": '")[0]
    return reason(error)
