"""Converters: `convert` writes a folder; one module a source layout holds its map of names.

`fold` is the arithmetic they share.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Turn a checkpoint in any known layout into a folder to load or push.

    The folder has the MLX community's layout, which mlx-vlm and mlx-swift read too. It appears
    only when it is whole.

    Args:
        source: folder or Hub id.
        target: the folder to write.
        revision: branch, tag or commit on the Hub.
        dtype: float32, float16 or bfloat16; by default the checkpoint's own.
        quantize: bits a weight (2, 3, 4, 5, 6, 8), or a mapping of bits and group_size, for
            projector and decoder.
        overwrite: replace a target that exists.
        progress: show a bar.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists and `overwrite` is not set.
        FileNotFoundError: there is no such source.
        CheckpointError: the source is not a whole FastVLM.
        ValueError: `dtype` or `quantize` is not one that exists.
    """
    from fastvlm_mlx import hub, weights
    from fastvlm_mlx.quantize import quantize_checkpoint

    folder = hub.resolve(source, revision=revision)
    target = Path(target).expanduser()
    weights.check_target(target, folder)
    config, tensors = weights.read_whole(folder)
    own = tensors["language_model.model.norm.weight"].dtype
    chosen = weights.resolve_dtype(dtype or own, tensors)
    tensors = {name: weights.cast(tensor, chosen) for name, tensor in tensors.items()}
    quantization: dict[str, Any] = dict(config.quantization)
    if quantize is not None:
        tensors, quantization, kept = quantize_checkpoint(tensors, config, quantize)
        if kept:
            print(f"In float, since no group size divides their width: {', '.join(kept)}")
    with weights.folder_written_whole(target, overwrite=overwrite) as temporary:
        written = config_json(config, str(chosen).removeprefix("mlx.core."), quantization)
        weights.write_json(temporary / "config.json", written)
        _write_processor(folder, temporary, config.vision.image_size)
        card = model_card(os.fspath(source), target.name, quantization, str(written["torch_dtype"]))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        with _bar(sum(t.nbytes for t in tensors.values()), shown=progress) as bar:
            weights.save_checkpoint(tensors, temporary, progress=bar.update)
    return target


def config_json(config: Any, dtype: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for this project, mlx-vlm and mlx-swift; fields of the source are kept.

    Args:
        config: a `FastVLMConfig`.
        dtype: name of the dtype of what is not quantized.
        quantization: settings, or an empty mapping.
    """
    vision, text = config.vision, config.text
    eos = list(config.eos_token_ids)
    written = dict(config.source) | {
        "model_type": "llava_qwen2",
        "torch_dtype": dtype,
        "tie_word_embeddings": text.tie_word_embeddings,
        "image_token_index": config.image_token_index,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_projector_type": config.mm_projector_type,
        "mm_hidden_size": config.mm_hidden_size,
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "tokenizer_model_max_length": config.max_length,
        "tokenizer_padding_side": config.source.get("tokenizer_padding_side", "right"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "vision_config": {
            "model_type": "llava_qwen2",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim,
            "num_classes": 1000,
            "layers": vision.layers,
            "embed_dims": vision.embed_dims,
            "mlp_ratios": vision.mlp_ratios,
            "token_mixers": vision.token_mixers,
            "pos_embs_shapes": vision.pos_embs_shapes,
            "downsamples": vision.downsamples,
            "repmixer_kernel_size": vision.repmixer_kernel_size,
            "down_patch_size": vision.down_patch_size,
            "down_stride": vision.down_stride,
            "cls_ratio": vision.cls_ratio,
            "layer_scale_init_value": 1e-5,
            "head_dim": vision.head_dim,
        },
    }
    for name in ("quantization", "quantization_config"):  # transformers' name is the second
        written.pop(name, None)
        if quantization:
            written[name] = dict(quantization)
    return written


def _write_processor(source: Path, target: Path, image_size: int) -> None:
    from fastvlm_mlx.config import read_json
    from fastvlm_mlx.weights import write_json

    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    own = source / "preprocessor_config.json"
    defaults = {
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    written = defaults | (read_json(own) if own.is_file() else {})
    written["crop_size"] = {"height": image_size, "width": image_size}
    written["size"] = {"shortest_edge": image_size}
    written["processor_class"] = "FastVLMProcessor"
    write_json(target / "preprocessor_config.json", written)


def model_card(source: str, name: str, quantization: Mapping[str, Any], dtype: str) -> str:
    """The README.md of a converted folder."""
    precision = f"{dtype}"
    if quantization:
        bits, group = quantization["bits"], quantization["group_size"]
        precision = f"projector and decoder at {bits} bits (groups of {group}), the rest {dtype}"
    is_hub_id = not Path(source).expanduser().exists()
    base_model = f"base_model: {source}\n" if is_hub_id else ""
    origin = (
        f"[{source}](https://huggingface.co/{source})"
        if is_hub_id
        else f"`{Path(source).resolve().name}`"
    )
    return f"""---
library_name: mlx
pipeline_tag: image-text-to-text
{base_model}tags:
- mlx
- fastvlm
---

# {name}

FastVLM converted to MLX with [fastvlm-mlx](https://pypi.org/project/fastvlm-mlx/).

- Converted from: {origin}
- Precision: {precision}
- Licence: that of the weights it was converted from

```bash
pip install fastvlm-mlx
fastvlm generate --model <this folder or repo> --image photo.jpg --prompt "Describe the image."
```

```python
import fastvlm_mlx as fv

model, processor = fv.load("<this folder or repo>")
print(fv.generate(model, processor, "Describe the image.", image="photo.jpg"))
```
"""


def _bar(total: int, *, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, unit="B", unit_scale=True, desc="Converting", disable=None if shown else True
    )
