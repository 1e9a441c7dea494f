"""The files beside the weights in a folder: configuration, tokenizer and image settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import IMAGE_TOKEN_INDEX, FastVLMConfig, load_config, read_json
from ..text.messages import IMAGE_MARK
from ..text.tokenizer import Tokenizer
from .files import write_json

# Without these, the original's code would add tokens to the vocabulary, and would not load the
# weights of an encoder that is not to be trained.
ORIGINAL = {
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "unfreeze_mm_vision_tower": True,
}
ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
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
)


def config_json(
    config: FastVLMConfig, dtype: str, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json for this project, mlx-vlm, mlx-swift and the original; the source's fields stay.

    Those readers know only one `eos_token_id`, so it is the first; `write_processor` keeps the
    others.

    Args:
        config: the model's.
        dtype: name of the dtype of what is not quantized.
        quantization: the `quantization` entry, or an empty mapping.
    """
    vision = config.vision
    tower = {"mm_vision_tower": f"mobileclip_l_{vision.image_size}"}
    written = tower | ORIGINAL | dict(config.source)
    written.pop("dtype", None)  # transformers' name of torch_dtype
    written.pop("auto_map", None)  # names code that is not copied
    written |= {
        **asdict(config.text),
        "model_type": f"llava_{config.text.model_type}",
        "torch_dtype": dtype,
        "image_token_index": IMAGE_TOKEN_INDEX,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_projector_type": config.mm_projector_type,
        "mm_hidden_size": config.mm_hidden_size,
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "tokenizer_model_max_length": config.max_length,
        "tokenizer_padding_side": config.source.get("tokenizer_padding_side", "right"),
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
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
    for name in ("quantization", "quantization_config"):  # the second is transformers' name
        written.pop(name, None)
        if quantization:
            written[name] = dict(quantization)
    return written


def write_processor(source: Path, target: Path, image_size: int) -> None:
    """Copy the tokenizer, and write preprocessor_config.json as mlx-vlm and mlx-swift read it."""
    licences = [file.name for file in source.glob("LICENSE*")]
    for name in (*COPIED, *licences):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write_ends(source, target / "generation_config.json")
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
    written.pop("auto_map", None)
    write_json(target / "preprocessor_config.json", written)


def _write_ends(source: Path, file: Path) -> None:
    """If several ids end an answer, list them all in generation_config.json."""
    ends = load_config(source).eos_token_ids if (source / "config.json").is_file() else ()
    if len(ends) < 2:
        return
    written = read_json(file) if file.is_file() else {}
    own = written.get("eos_token_id")
    more = own if isinstance(own, list) else [i for i in [own] if i is not None]
    write_json(file, written | {"eos_token_id": list(dict.fromkeys([*ends, *more]))})


def write_image_token(source: Path, target: Path) -> int:
    """Write tokenizer.json with a token `<image>`, and return its id."""
    from tokenizers import AddedToken

    file = target / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    bpe = Tokenizer.from_folder(source).bpe
    bpe.add_special_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)])
    bpe.save(str(target / "tokenizer.json"))
    index = bpe.get_vocab()[IMAGE_MARK]
    # Readers take this list as complete, whatever tokenizer.json has.
    added = {
        str(i): {name: getattr(token, name) for name in ADDED_TOKEN}
        for i, token in bpe.get_added_tokens_decoder().items()
    }
    settings["added_tokens_decoder"] = added | (settings.get("added_tokens_decoder") or {})
    write_json(file, settings)
    return index


def write_llava_processor(folder: Path, patch_size: int) -> None:
    """Name transformers' LlavaProcessor as the folder's processor."""
    file = folder / "preprocessor_config.json"
    write_json(file, read_json(file) | {"processor_class": "LlavaProcessor"})
    settings = {"image_token": IMAGE_MARK, "num_additional_image_tokens": 0}
    settings |= {"processor_class": "LlavaProcessor", "patch_size": patch_size}
    write_json(folder / "processor_config.json", settings)
