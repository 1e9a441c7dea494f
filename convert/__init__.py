"""Converters: `convert` writes a folder; one module a layout holds its map of names.

`fold` is the arithmetic they share, `files` what stands beside the weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

WRITTEN = ("mlx", "llava", "transformers", "apple-export")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | str | Mapping[str, Any] | None = None,
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
    from fastvlm_mlx import hub, weights
    from fastvlm_mlx.calibrate import calibrate as tune
    from fastvlm_mlx.card import license_of, model_card
    from fastvlm_mlx.quantize import quantize_checkpoint

    if layout not in WRITTEN:
        raise ValueError(f"layout must be one of {', '.join(WRITTEN)}, found {layout!r}.")
    if calibrate is not None and quantize is None:
        raise ValueError("calibrate tunes a quantized model; give quantize too.")
    if calibrate is not None and layout != "mlx":
        raise ValueError(f"calibrate goes with the mlx layout alone, found {layout}.")
    folder = hub.resolve(source, revision=revision)
    target = Path(target).expanduser()
    weights.check_target(target, folder)
    if layout == "apple-export":
        from fastvlm_mlx.convert.apple_export import export

        if dtype not in (None, "float16"):
            raise ValueError(f"The apple-export layout is float16; leave out dtype, found {dtype}.")
        return export(source, target, revision=revision, quantize=quantize, overwrite=overwrite)
    config, tensors = weights.read_whole(folder)
    own = tensors["language_model.model.norm.weight"].dtype
    chosen = weights.resolve_dtype(dtype or own, tensors)
    tensors = {name: weights.cast(tensor, chosen) for name, tensor in tensors.items()}
    quantization: dict[str, Any] = dict(config.quantization)
    if quantize is not None:
        tensors, quantization, kept = quantize_checkpoint(tensors, config, quantize)
        if kept and progress:
            print(f"In float, since the group size does not divide their width: {', '.join(kept)}")
    if quantization and layout != "mlx":
        raise ValueError(f"The {layout} layout holds no quantized weights; leave out quantize.")
    with weights.folder_written_whole(target, overwrite=overwrite) as temporary:
        if quantize is not None and calibrate is not None:
            tuned = tune(folder, quantize, Path(calibrate), progress=progress)
            tensors |= {name: weights.cast(tensor, chosen) for name, tensor in tuned.items()}
        name = str(chosen).removeprefix("mlx.core.")
        packed = weights.quantized_linears(tensors, replace(config, quantization=quantization))
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
        with _bar(sum(t.nbytes for t in tensors.values()), shown=progress) as bar:
            weights.save_checkpoint(tensors, temporary, progress=bar.update)
    return target


def _write_files(
    source: Path,
    target: Path,
    config: Any,
    tensors: dict[str, Any],
    dtype: str,
    quantization: Mapping[str, Any],
    layout: str,
) -> dict[str, Any]:
    """Write what stands beside the weights, and give these the layout's names and axes."""
    from fastvlm_mlx.convert import files, llava, transformers
    from fastvlm_mlx.weights import write_json

    files.write_processor(source, target, config.vision.image_size)
    if layout == "transformers":
        image_token_index = files.write_image_token(source, target)
        files.write_llava_processor(target, config.vision.patch_size)
        written = transformers.config_json(config, dtype, image_token_index)
        write_json(target / "config.json", written)
        return transformers.from_mlx(tensors)
    write_json(target / "config.json", files.config_json(config, dtype, quantization))
    return llava.from_mlx(tensors) if layout == "llava" else tensors


def _bar(total: int, *, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, unit="B", unit_scale=True, desc="Converting", disable=None if shown else True
    )
