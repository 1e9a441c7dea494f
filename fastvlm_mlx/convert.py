"""A checkpoint in any layout → a folder in any layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from .checkpoint.card import license_of, model_card
from .checkpoint.files import Weights, check_finite, save_checkpoint, write_json
from .checkpoint.layouts import apple_export, llava, mlx_vlm, transformers
from .checkpoint.layouts.coreml.program import PACKAGE, import_coremltools
from .checkpoint.layouts.coreml.writer import write_vision_package
from .checkpoint.load import cast, processor_folder, resolve_dtype
from .checkpoint.names import quantized_linears
from .checkpoint.processor_files import (
    config_json,
    write_image_token,
    write_llava_processor,
    write_processor,
)
from .checkpoint.quantize import Quantize, parse_quantize, quantize_checkpoint
from .checkpoint.read import read_checkpoint
from .checkpoint.record import Record, read_record, write_record
from .checkpoint.target import atomic_folder, check_apart, check_target
from .checks import shown
from .config import FUSED_ADAPTERS, FastVLMConfig
from .hub.resolve import resolve
from .progress import progress_bar
from .train.calibrate import calibrate as tune

APPLE = "apple-export"
WRITTEN: dict[str, ModuleType] = {
    "mlx": mlx_vlm,
    "llava": llava,
    "transformers": transformers,
    APPLE: apple_export,
}
QUANTIZED = ("mlx", APPLE)  # the layouts that hold quantized weights


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: Quantize | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    layout: str = "mlx",
    precision: str = "float32",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Turn a checkpoint in any known layout into a folder, which appears only when it is whole.

    Args:
        source: folder or Hub id.
        target: the folder to write.
        revision: branch, tag or commit on the Hub.
        dtype: float32, float16 or bfloat16; by default the checkpoint's own.
        quantize: bits per weight, a mode or preset by name, or a mapping; see
            `quantize.parse_quantize`. The apple-export layout takes bits and group_size.
        calibrate: a folder of images on which the quantized decoder learns to answer as the source
            does; see `train.calibrate`.
        layout: "mlx", the MLX community's, which mlx-vlm and mlx-swift read too; "llava", the
            original PyTorch code's; "transformers", Hugging Face's; "apple-export", the original
            demo app's for iOS and macOS, always float16, with a Core ML encoder.
        precision: of that Core ML encoder, float32 or float16.
        overwrite: replace a target that holds a converted model; nothing else is replaced, and an
            empty folder is taken in any case.
        progress: show a bar.

    Returns:
        The target.

    Raises:
        FileExistsError: the target holds a model and `overwrite` is not set, or something else.
        OSError: the target can't be written, or the download failed.
        FileNotFoundError: there is no such source, or there are no images to calibrate on.
        CheckpointError: the source is not a whole FastVLM, holds NaN or infinity, or coremltools is
            needed and missing.
        ValueError: an option is unknown, options don't go together, or the layout can't hold the
            source.
    """
    check_options(layout, dtype, quantize, calibrate)
    target = Path(target).expanduser()
    check_apart(target, source)
    check_target(target, overwrite=overwrite)
    folder = resolve(source, revision=revision)
    check_apart(target, folder)
    _check_range(folder, "float16" if layout == APPLE else dtype, layout)
    check_exporter(layout)
    config, weights = read_checkpoint(folder)
    checkpoint = prepare(
        processor_folder(folder), config, weights, layout, dtype, quantize, shown=progress
    )
    with atomic_folder(target, overwrite=overwrite) as temporary:
        if quantize is not None and calibrate is not None:
            tuned = tune(folder, quantize, Path(calibrate), progress=progress)
            checkpoint.weights |= {n: cast(t, checkpoint.dtype) for n, t in tuned.items()}
        record = read_record(folder)
        card = _card(checkpoint, target.name, source, record, calibrated=calibrate is not None)
        write_record(record, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write(checkpoint, temporary, layout, precision, shown=progress)
    return target


@dataclass
class Checkpoint:
    """A source, read, cast and quantized as the target is to be.

    Attributes:
        folder: of the source.
        config: with the target's quantization.
        weights: in the mlx-vlm layout.
        encoder: what goes into a Core ML package instead; empty for other layouts.
        dtype: of what is not quantized.
    """

    folder: Path
    config: FastVLMConfig
    weights: Weights
    encoder: Weights
    dtype: mx.Dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("mlx.core.")


def check_options(layout: str, dtype: str | None, quantize: Any, calibrate: Any = None) -> None:
    """Raise a ValueError if options are unknown or don't go together."""
    if layout not in WRITTEN:
        raise ValueError(f"layout must be one of {', '.join(WRITTEN)}, found {shown(layout)}.")
    if calibrate is not None and quantize is None:
        raise ValueError("calibrate tunes a quantized model; give quantize too.")
    if calibrate is not None and layout != "mlx":
        raise ValueError(f"calibrate goes only with the mlx layout, found {layout}.")
    if quantize is not None and layout not in QUANTIZED:
        raise ValueError(f"The {layout} layout holds no quantized weights; leave out quantize.")
    if layout == APPLE and dtype not in (None, "float16"):
        raise ValueError(f"The {APPLE} layout is float16; leave out dtype, found {dtype}.")
    if layout == APPLE and quantize is not None and parse_quantize(quantize).get("vision"):
        raise ValueError(f"The {APPLE} layout holds no quantized encoder; leave out vision.")


def check_exporter(layout: str) -> None:
    """Raise a CheckpointError if the layout needs a library that is not there."""
    if layout == APPLE:
        import_coremltools(f"write {PACKAGE}")


def prepare(
    folder: Path,
    config: FastVLMConfig,
    weights: Weights,
    layout: str,
    dtype: str | None,
    quantize: Quantize | None,
    *,
    shown: bool,
) -> Checkpoint:
    """What `write` takes, of a model's configuration and tensors; errors as `convert`."""
    encoder: Weights = {}
    if layout == APPLE:
        _check_exportable(folder, config, weights)
        names = [name for name in weights if name.startswith(mlx_vlm.ENCODER)]
        encoder = {name: weights.pop(name) for name in names}
        dtype = "float16"
    chosen = resolve_dtype(dtype or mlx_vlm.dtype_of(weights))
    weights = {name: cast(tensor, chosen) for name, tensor in weights.items()}
    if quantize is not None:
        weights, quantization, kept = quantize_checkpoint(weights, config, quantize)
        config = replace(config, quantization=quantization)
        if kept and shown:
            print(f"In float, since the group size does not divide their width: {', '.join(kept)}")
    if config.quantization and layout not in QUANTIZED:
        raise ValueError(
            f"{folder} is quantized, and the {layout} layout holds no quantized weights, which are "
            "not expanded again; convert a full-precision source, or fuse with dequantize."
        )
    return Checkpoint(folder, config, weights, encoder, chosen)


def _check_range(folder: Path, dtype: str | None, layout: str) -> None:
    """Raise a CheckpointError if a tensor has numbers beyond the range of float16, if asked for.

    The tensors are read for it once more, so that memory holds one at a time. The encoder of the
    Apple export has its own precision and is checked before it is written.
    """
    if dtype != "float16":
        return
    _, weights = read_checkpoint(folder)
    if mlx_vlm.dtype_of(weights) == mx.float16:
        return
    while weights:
        name, tensor = weights.popitem()
        if layout != APPLE or not name.startswith(mlx_vlm.ENCODER):
            check_finite(name, cast(tensor, mx.float16))


def _check_exportable(folder: Path, config: FastVLMConfig, weights: Weights) -> None:
    """Raise a ValueError if the original's demo app can't run the model."""
    if config.quantization:
        raise ValueError(f"{folder} is quantized already; export a full-precision source.")
    if config.mm_projector_type != "mlp2x_gelu" or "image_newline" in weights:
        raise ValueError(
            f"{folder} can't be exported: the app knows only mlp2x_gelu, without tiles."
        )
    if config.text.model_type != "qwen2":
        raise ValueError(f"{folder} can't be exported: the app knows only Qwen2 decoders.")


def _card(
    checkpoint: Checkpoint,
    name: str,
    source: str | os.PathLike[str],
    record: Record | None,
    *,
    calibrated: bool,
) -> str:
    return model_card(
        name,
        source,
        checkpoint.dtype_name,
        layers=dict(quantized_linears(checkpoint.weights, checkpoint.config)),
        license=license_of(checkpoint.folder, source),
        calibrated=calibrated,
        is_trained=FUSED_ADAPTERS in checkpoint.config.source,
        record=record,
    )


def write(
    checkpoint: Checkpoint, target: Path, layout: str, precision: str, *, shown: bool
) -> None:
    """Write all files but the card; empties the checkpoint's weights."""
    write_processor(checkpoint.folder, target, checkpoint.config.vision.image_size)
    write_json(target / "config.json", _config(checkpoint, target, layout))
    if layout in ("transformers", APPLE):
        write_llava_processor(target, checkpoint.config.vision.patch_size)
    for name, tensor in checkpoint.encoder.items():
        check_finite(name, tensor.astype(mx.float16) if precision == "float16" else tensor)
    if checkpoint.encoder:
        vision = checkpoint.config.vision
        write_vision_package(checkpoint.encoder, vision, target / PACKAGE, precision=precision)
    # From here on nothing else holds the tensors, so that each is freed once it is written.
    checkpoint.weights = WRITTEN[layout].from_mlx(checkpoint.weights)
    total = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    with progress_bar(total, "Converting", unit="B", shown=shown) as bar:
        save_checkpoint(checkpoint.weights, target, progress=bar.update)


def _config(checkpoint: Checkpoint, target: Path, layout: str) -> dict[str, Any]:
    """config.json in a layout; writes the token `<image>` where the layout has one."""
    folder, config, dtype = checkpoint.folder, checkpoint.config, checkpoint.dtype_name
    if layout == "transformers":
        return transformers.config_json(config, dtype, write_image_token(folder, target))
    if layout != APPLE:
        return config_json(config, dtype, config.quantization)
    image_token_index = write_image_token(folder, target)
    if image_token_index >= config.text.vocab_size:
        raise ValueError(f"{folder} can't be exported: its vocabulary has no room for <image>.")
    # The app knows no modes.
    quantization = {key: value for key, value in config.quantization.items() if key != "mode"}
    written = config_json(config, dtype, quantization)
    return written | {"image_token_index": image_token_index}
