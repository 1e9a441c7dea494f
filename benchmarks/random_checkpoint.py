"""Write a FastVLM checkpoint of a released size with random weights.

The folder has the original PyTorch (LLaVA) layout, tensor for tensor, so that whatever costs time
or memory in the real model costs the same in this one, and nothing has to be downloaded. Weights
are scaled so that features and logits are finite, of ordinary size and far from constant. There is
no tokenizer.

In float32 the 0.5b folder takes 2.5 GB on disk, 1.5b 6.7 GB and 7b 31 GB; in bfloat16, the
precision of the published checkpoints, half of that.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.checkpoint.files import atomic_folder, save_checkpoint, write_json
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.load import DTYPES, cast
from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.model.fastvlm import FastVLM

SHARD_BYTES = 5 * 10**9

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size
SHAPES = {
    "small": (64, 2, 4, 2, 160),
    "nano": (256, 4, 4, 2, 640),
    "0.5b": (896, 24, 14, 2, 4864),
    "1.5b": (1536, 28, 12, 2, 8960),
    "7b": (3584, 28, 28, 4, 18944),
}
OTHERS: dict[str, dict[str, Any]] = {
    # For tests: the released encoder, at 256 pixels, and a decoder of next to nothing.
    "small": {
        "vocab_size": 512,
        "bos_token_id": 510,
        "eos_token_id": 511,
        "mm_vision_tower": "mobileclip_l_256",
    },
    # The bundled model's geometry: so little arithmetic that overhead is what counts.
    "nano": {
        "vocab_size": 768,
        "bos_token_id": 740,
        "eos_token_id": 742,
        "mm_hidden_size": 512,
        "mm_vision_tower": "mobileclip_nano_256",
        "vision_config": {
            "image_size": 256,
            "layers": [1, 2, 4, 1, 1],
            "embed_dims": [16, 32, 64, 128, 256],
            "projection_dim": 64,
        },
    },
    "0.5b": {"max_window_layers": 24},
    "1.5b": {"max_window_layers": 28},
    "7b": {"vocab_size": 152064, "tie_word_embeddings": False, "max_window_layers": 28},
}
SIZES: dict[str, dict[str, Any]] = {
    size: {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        **OTHERS[size],
    }
    for size, (width, layers, heads, kv_heads, inner) in SHAPES.items()
}
OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"choices": SIZES, "help": "small is for tests"},
    "target": {"type": Path, "help": "the folder to write"},
    "--dtype": {"default": "float32"},
    "--seed": {"type": int, "default": 0, "help": "of the weights"},
    "--overwrite": {"action": "store_true", "help": "replace a target that exists"},
}
COMMON: dict[str, Any] = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "transformers_version": "4.39.3",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# (pattern, centre, spread): the first that matches a tensor's name says how it is filled; the
# weights of linear layers and convolutions match none.
SCALES: tuple[tuple[str, float, float], ...] = (
    (r"running_var$", 1.0, 0.1),
    (r"layer_scale", 0.5, 0.15),
    (r"norm\.weight$|\.bn\.weight$", 1.0, 0.1),
    (r"bias$|running_mean$", 0.0, 0.05),
)
# Depthwise convolutions that the original merged with the identity: token mixers, positions.
NEAR_IDENTITY = re.compile(r".*(token_mixer|network\.\d+)\.reparam_conv\.weight$")
# The decoder's attention is made sharp, or its answers would be one token over and over.
SHARP = re.compile(r".*\.[qk]_proj\.weight$")


def make_config(size: str, dtype: str) -> dict[str, Any]:
    """config.json of a size, with the fields of the published checkpoints."""
    return dict(sorted((COMMON | SIZES[size] | {"torch_dtype": dtype}).items()))


def write_checkpoint(
    size: str, target: str | Path, *, dtype: str, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write the folder; at most one file's tensors are in memory at a time.

    Args:
        size: one of `SIZES`.
        target: the folder to write; it appears once it is complete.
        dtype: float32, float16 or bfloat16.
        seed: the same seed gives the same weights.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists and `overwrite` is not set.
    """
    config = make_config(size, dtype)
    target = Path(target).expanduser()
    with atomic_folder(target, overwrite=overwrite) as folder:
        write_json(folder / "config.json", config)
        # Nothing is computed before it is saved: a model's parameters are lazy, and so are these.
        shapes = llava.from_mlx(unfuse(FastVLM(FastVLMConfig.from_dict(config))))
        keys = mx.random.split(mx.random.key(seed), len(shapes))
        tensors = {
            name: cast(fill(name, like, key), DTYPES[dtype])
            for (name, like), key in zip(sorted(shapes.items()), keys, strict=True)
        }
        save_checkpoint(tensors, folder, shard_bytes=SHARD_BYTES)
    return target


def fill(name: str, like: mx.array, key: mx.array) -> mx.array:
    """A random tensor of the shape of `like`, scaled for what its name says it is."""
    if not mx.issubdtype(like.dtype, mx.floating):
        return like
    noise = mx.random.normal(like.shape, key=key)
    for pattern, centre, spread in SCALES:
        if re.search(pattern, name):
            return centre + spread * noise
    if NEAR_IDENTITY.match(name):
        middle = mx.arange(like.shape[-1]) == like.shape[-1] // 2
        return middle[:, None] * middle + 0.3 * noise * _linear_spread(like)
    return noise * _linear_spread(like) * (2 if SHARP.match(name) else 1)


def _linear_spread(weight: mx.array) -> float:
    """What keeps the variance of the inputs: one over the root of their number."""
    return float((weight.size / weight.shape[0]) ** -0.5)


def write(args: argparse.Namespace) -> None:
    """As the command line asks."""
    write_checkpoint(
        args.size, args.target, dtype=args.dtype, seed=args.seed, overwrite=args.overwrite
    )
