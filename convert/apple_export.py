"""The layout of the ready-made Apple silicon checkpoints, which the original's demo app loads.

Decoder and projector are safetensors; the encoder is a Core ML program (`model_export/` in the
original), which `coreml` reads and writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.convert.files import (
    config_json,
    write_image_token,
    write_llava_processor,
    write_processor,
)
from fastvlm_mlx.convert.fold import Weights

VISION = "vision_tower.vision_model."
PROJECTOR = ("mm_projector.", "multi_modal_projector.linear_")


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith(PROJECTOR[1]) for name in names)


def to_mlx(weights: Weights) -> Weights:
    """Names of the mlx-vlm layout; the encoder is in the Core ML package, see `read_encoder`."""
    return {name.replace(PROJECTOR[1], PROJECTOR[0]): tensor for name, tensor in weights.items()}


def from_mlx(weights: Weights) -> Weights:
    """The inverse of `to_mlx`; tensors of the encoder keep their names."""
    return {name.replace(*PROJECTOR): tensor for name, tensor in weights.items()}


def read_encoder(folder: Path, config: VisionConfig) -> Weights:
    """The encoder in the folder's Core ML package; see `coreml.read_encoder`."""
    from fastvlm_mlx.convert import coreml

    return coreml.read_encoder(folder, config)


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    quantize: int | Mapping[str, Any] | None = 8,
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
    from fastvlm_mlx import hub, weights
    from fastvlm_mlx.card import license_of, model_card
    from fastvlm_mlx.convert.coreml import PACKAGE, import_coremltools, write_vision_package
    from fastvlm_mlx.quantize import quantize_checkpoint

    import_coremltools(f"write {PACKAGE}")
    folder = hub.resolve(source, revision=revision)
    target = Path(target).expanduser()
    weights.check_target(target, folder)
    config, tensors = weights.read_whole(folder)
    if config.quantization:
        raise ValueError(f"{folder} is quantized already; export a full-precision source.")
    if config.mm_projector_type != "mlp2x_gelu" or "image_newline" in tensors:
        raise ValueError(
            f"{folder} can't be exported: the app knows mlp2x_gelu without tiles alone."
        )
    decoder = {n: weights.cast(t, mx.float16) for n, t in tensors.items() if VISION not in n}
    quantization: dict[str, Any] = {}
    if quantize is not None:
        decoder, quantization, _ = quantize_checkpoint(decoder, config, quantize)
        quantization.pop("mode")  # which the app does not know
    with weights.folder_written_whole(target, overwrite=overwrite) as temporary:
        write_processor(folder, temporary, config.vision.image_size)
        image_token_index = write_image_token(folder, temporary)
        if image_token_index >= config.text.vocab_size:
            raise ValueError(f"{folder} can't be exported: its vocabulary has no room for <image>.")
        written = config_json(config, "float16", quantization)
        written["image_token_index"] = image_token_index
        weights.write_json(temporary / "config.json", written)
        write_llava_processor(temporary, config.vision.patch_size)
        layers = dict(
            weights.quantized_linears(decoder, replace(config, quantization=quantization))
        )
        license = license_of(folder, source)
        card = model_card(target.name, source, "float16", layers=layers, license=license)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_vision_package(tensors, config.vision, temporary / PACKAGE, precision=precision)
        weights.save_checkpoint(from_mlx(decoder), temporary)
    return target
