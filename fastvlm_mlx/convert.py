"""A checkpoint in any layout → a folder in any layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint.card import license_of, model_card
from .checkpoint.files import atomic_folder, check_target, save_checkpoint, write_json
from .checkpoint.fold import Weights
from .checkpoint.layouts import apple_export, llava, transformers
from .checkpoint.layouts.coreml.program import PACKAGE, import_coremltools
from .checkpoint.layouts.coreml.writer import write_vision_package
from .checkpoint.load import cast, resolve_dtype
from .checkpoint.names import VISION, quantized_linears
from .checkpoint.processor_files import (
    config_json,
    write_image_token,
    write_llava_processor,
    write_processor,
)
from .checkpoint.quantize import Quantize, quantize_checkpoint
from .checkpoint.read import read_checkpoint
from .config import FastVLMConfig
from .hub.resolve import resolve
from .progress import progress_bar
from .train.calibrate import calibrate as tune

WRITTEN = ("mlx", "llava", "transformers", "apple-export")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: Quantize | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    layout: str = "mlx",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Turn a checkpoint in any known layout into a folder to load or push.

    The folder appears only when it is whole.

    Args:
        source: folder or Hub id.
        target: the folder to write.
        revision: branch, tag or commit on the Hub.
        dtype: float32, float16 or bfloat16; by default the checkpoint's own.
        quantize: bits a weight, a mode or preset by name, or a mapping; see `quantize.settings`.
        calibrate: a folder of images on which the quantized decoder learns to answer as the source
            does; see `calibrate.calibrate`.
        layout: "mlx", the MLX community's, which mlx-vlm and mlx-swift read too; "llava", the
            original PyTorch code's; "transformers", Hugging Face's; "apple-export", the original
            demo app's for iOS and macOS.
        overwrite: replace a target that exists.
        progress: show a bar.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists and `overwrite` is not set.
        FileNotFoundError: there is no such source, or no images to calibrate on.
        CheckpointError: the source is not a whole FastVLM.
        ValueError: `dtype`, `quantize` or `layout` is not one that exists, or they and
            `calibrate` don't go together.
    """
    if layout not in WRITTEN:
        raise ValueError(f"layout must be one of {', '.join(WRITTEN)}, found {layout!r}.")
    if calibrate is not None and quantize is None:
        raise ValueError("calibrate tunes a quantized model; give quantize too.")
    if calibrate is not None and layout != "mlx":
        raise ValueError(f"calibrate goes with the mlx layout alone, found {layout}.")
    folder = resolve(source, revision=revision)
    target = Path(target).expanduser()
    check_target(target, folder)
    if layout == "apple-export":
        if dtype not in (None, "float16"):
            raise ValueError(f"The apple-export layout is float16; leave out dtype, found {dtype}.")
        return export(source, target, revision=revision, quantize=quantize, overwrite=overwrite)
    config, tensors = read_checkpoint(folder)
    own = tensors["language_model.model.norm.weight"].dtype
    chosen = resolve_dtype(dtype or own, tensors)
    tensors = {name: cast(tensor, chosen) for name, tensor in tensors.items()}
    quantization: dict[str, Any] = dict(config.quantization)
    if quantize is not None:
        tensors, quantization, kept = quantize_checkpoint(tensors, config, quantize)
        if kept and progress:
            print(f"In float, since the group size does not divide their width: {', '.join(kept)}")
    if quantization and layout != "mlx":
        raise ValueError(f"The {layout} layout holds no quantized weights; leave out quantize.")
    with atomic_folder(target, overwrite=overwrite) as temporary:
        if quantize is not None and calibrate is not None:
            tuned = tune(folder, quantize, Path(calibrate), progress=progress)
            tensors |= {name: cast(tensor, chosen) for name, tensor in tuned.items()}
        name = str(chosen).removeprefix("mlx.core.")
        packed = quantized_linears(tensors, replace(config, quantization=quantization))
        card = model_card(
            target.name,
            source,
            name,
            layers=dict(packed),
            license=license_of(folder, source),
            calibrated=calibrate is not None,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        tensors = _write_files(folder, temporary, config, tensors, name, quantization, layout)
        total = sum(tensor.nbytes for tensor in tensors.values())
        with progress_bar(total, "Converting", unit="B", shown=progress) as bar:
            save_checkpoint(tensors, temporary, progress=bar.update)
    return target


def _write_files(
    source: Path,
    target: Path,
    config: FastVLMConfig,
    tensors: Weights,
    dtype: str,
    quantization: Mapping[str, Any],
    layout: str,
) -> Weights:
    """Write what stands beside the weights, and give these the layout's names and axes."""
    write_processor(source, target, config.vision.image_size)
    if layout == "transformers":
        image_token_index = write_image_token(source, target)
        write_llava_processor(target, config.vision.patch_size)
        written = transformers.config_json(config, dtype, image_token_index)
        write_json(target / "config.json", written)
        return transformers.from_mlx(tensors)
    write_json(target / "config.json", config_json(config, dtype, quantization))
    return llava.from_mlx(tensors) if layout == "llava" else tensors


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantize: Quantize | None = 8,
    precision: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Turn a checkpoint in any known layout into a folder for the original's demo app.

    The folder appears only when it is whole. Its tokenizer has the token `<image>`.

    Args:
        source: folder or Hub id.
        target: the folder to write; the app takes its files from `app/FastVLM/model`.
        revision: branch, tag or commit on the Hub.
        quantize: bits a weight of projector and decoder, or a mapping of bits and group_size;
            None keeps them float16. The released folders: 0.5B float16, 1.5B 8 bits, 7B 4 bits.
        precision: of the encoder, float32 or float16.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists and `overwrite` is not set.
        FileNotFoundError: there is no such source.
        CheckpointError: the source is not a whole FastVLM, or coremltools is missing.
        ValueError: the source is one that the app can't run, or an argument is not one that exists.
    """
    import_coremltools(f"write {PACKAGE}")
    folder = resolve(source, revision=revision)
    target = Path(target).expanduser()
    check_target(target, folder)
    config, tensors = read_checkpoint(folder)
    if config.quantization:
        raise ValueError(f"{folder} is quantized already; export a full-precision source.")
    if config.mm_projector_type != "mlp2x_gelu" or "image_newline" in tensors:
        raise ValueError(
            f"{folder} can't be exported: the app knows mlp2x_gelu without tiles alone."
        )
    decoder = {n: cast(t, mx.float16) for n, t in tensors.items() if VISION not in n}
    quantization: dict[str, Any] = {}
    if quantize is not None:
        decoder, quantization, _ = quantize_checkpoint(decoder, config, quantize)
        quantization.pop("mode")  # which the app does not know
    with atomic_folder(target, overwrite=overwrite) as temporary:
        write_processor(folder, temporary, config.vision.image_size)
        image_token_index = write_image_token(folder, temporary)
        if image_token_index >= config.text.vocab_size:
            raise ValueError(f"{folder} can't be exported: its vocabulary has no room for <image>.")
        written = config_json(config, "float16", quantization)
        written["image_token_index"] = image_token_index
        write_json(temporary / "config.json", written)
        write_llava_processor(temporary, config.vision.patch_size)
        layers = dict(quantized_linears(decoder, replace(config, quantization=quantization)))
        license = license_of(folder, source)
        card = model_card(target.name, source, "float16", layers=layers, license=license)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_vision_package(tensors, config.vision, temporary / PACKAGE, precision=precision)
        save_checkpoint(apple_export.from_mlx(decoder), temporary)
    return target
