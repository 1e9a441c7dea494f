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

from fastvlm_mlx.checkpoint.files import save_checkpoint, write_json
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.load import DTYPES, cast
from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.checkpoint.target import atomic_folder
from fastvlm_mlx.config import FastVLMConfig, read_json
from fastvlm_mlx.model.fastvlm import FastVLM

SHARD_BYTES = 5 * 10**9

# Configurations by size: what they have in common, and what each has of its own. "small" is for
# tests: the released encoder at 256 pixels, and a decoder of next to nothing. "nano" is the bundled
# model's geometry: so little arithmetic that overhead is what counts.
SIZES: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("sizes.json"))
COMMON = SIZES.pop("common")
OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"choices": SIZES, "help": "small is for tests"},
    "target": {"type": Path, "help": "the folder to write"},
    "--dtype": {"default": "float32"},
    "--seed": {"type": int, "default": 0, "help": "of the weights"},
    "--overwrite": {"action": "store_true", "help": "replace a target that exists"},
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
