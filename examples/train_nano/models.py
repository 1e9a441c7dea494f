"""The models: one from nothing with the geometry of the bundled one, and one grown from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx import FastVLM
from fastvlm_mlx.checkpoint.files import read_tensors, save_checkpoint, write_json
from fastvlm_mlx.checkpoint.fold import is_training_form
from fastvlm_mlx.checkpoint.layouts.mlx_vlm import ENCODER, HEAD
from fastvlm_mlx.checkpoint.load import inference_weights, load_for_training
from fastvlm_mlx.checkpoint.training_form import fresh_model, load_training_form
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.vision_training import TrainingFastViTHD
from fastvlm_mlx.text import Tokenizer

from . import tokenizer

SMALL = 0.02  # deviation of new weights
# Blocks of the encoder's stages and layers of the decoder: of the model from nothing, and of the
# grown one, which has two attention blocks and two layers more.
FRESH: dict[str, Any] = {"vision_config": {"layers": [1, 2, 4, 1, 1]}, "num_hidden_layers": 4}
GROWN: dict[str, Any] = {"vision_config": {"layers": [1, 2, 4, 2, 2]}, "num_hidden_layers": 6}
ENDS = ("fc2.weight", "mixer.proj.weight")  # of a block of the encoder


def settings(rows: int, geometry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """config.json as the bundled model's, with another geometry and so many embedding rows."""
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    config |= geometry | {"vision_config": config["vision_config"] | geometry["vision_config"]}
    config["max_window_layers"] = config["num_hidden_layers"]
    return config | {"vocab_size": rows, "torch_dtype": "float32"} | changes


def parameters_of(module: nn.Module) -> dict[str, mx.array]:
    """By name."""
    return dict(tree_flatten(module.parameters()))


def write_model(folder: Path, model: FastVLM, config: dict[str, Any]) -> None:
    """Write weights and config.json beside the tokenizer that is there; an encoder in training form
    keeps its branches, which are folded where the model is loaded to answer."""
    weights = inference_weights(model)
    if isinstance(model.vision_tower, TrainingFastViTHD):
        branches = parameters_of(model.vision_tower)
        weights = {
            n: w for n, w in weights.items() if n.startswith(HEAD) or not n.startswith(ENCODER)
        }
        weights |= {ENCODER + name: value for name, value in branches.items()}
    save_checkpoint(weights, folder)
    write_json(folder / "config.json", config)
    text = (NANO / "preprocessor_config.json").read_text(encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def fresh(folder: Path, seed: int = 0) -> None:
    """Write a model with random weights, in training form."""
    rows = tokenizer.write(folder, None)
    ids = special_ids(folder)
    config = settings(rows, FRESH, bos_token_id=ids[0], eos_token_id=ids[2])
    write_model(folder, fresh_model(FastVLMConfig.from_dict(config), seed), config)


def load_trainable(folder: Path) -> FastVLM:
    """A model to go on training: its encoder in training form if it is stored so."""
    if is_training_form(read_tensors(folder)):
        return load_training_form(folder, dtype="float32")
    return load_for_training(folder, dtype="float32")


def grow(base: Path, folder: Path) -> None:
    """Write a larger model that answers as `base` does, with more words as single tokens.

    New layers add nothing to their input until they are trained: the projections that end them are
    zero. New words begin as the mean of the pieces that they were before.
    """
    rows = tokenizer.write(folder, base)
    source = load_for_training(base, dtype="float32")
    ids = special_ids(folder)
    config = settings(rows, GROWN, bos_token_id=ids[0], eos_token_id=ids[2])
    model = FastVLM(FastVLMConfig.from_dict(config))
    model.unfuse()
    mx.random.seed(0)
    grown = {name: _new(name, value) for name, value in parameters_of(model).items()}
    places = encoder_places(source.config.vision.layers, GROWN["vision_config"]["layers"])
    for name, value in parameters_of(source).items():
        grown[_moved(name, places)] = value
    table = "language_model.embed_tokens.weight"
    grown[table] = more_rows(parameters_of(source)[table], rows, base, folder)
    model.update(tree_unflatten(list(grown.items())))
    write_model(folder, model, config)


def special_ids(folder: Path) -> list[int]:
    """Of the special tokens, in the order of `tokenizer.SPECIAL`."""
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in written["added_tokens"]}
    return [ids[name] for name in tokenizer.SPECIAL]


def _new(name: str, value: mx.array) -> mx.array:
    """A parameter of a layer that begins by adding nothing."""
    if name.endswith(("o_proj.weight", "down_proj.weight", *ENDS)):
        return mx.zeros_like(value)
    if "norm" in name and name.endswith("weight"):
        return mx.ones_like(value)
    if name.endswith("bias"):
        return mx.zeros_like(value)
    return SMALL * mx.random.normal(value.shape)


def encoder_places(old: tuple[int, ...], new: list[int]) -> dict[int, int]:
    """Where each entry of the encoder's `network` goes when stages get further blocks.

    Between two stages stands the downsampling and, before those with attention, a convolution;
    new blocks stand at the end of their stage.
    """
    config = FastVLMConfig.from_dict(settings(tokenizer.ROUND, FRESH)).vision
    places, before, after = {}, 0, 0
    for stage, (few, more) in enumerate(zip(old, new, strict=True)):
        around = int(config.pos_embs_shapes[stage] is not None)
        for i in range(around + few):
            places[before + i] = after + i
        before, after = before + around + few, after + around + more
        if stage + 1 < len(old):
            places[before] = after
            before, after = before + 1, after + 1
    return places


def _moved(name: str, places: dict[int, int]) -> str:
    start = "vision_tower.network."
    if not name.startswith(start):
        return name
    number, rest = name.removeprefix(start).split(".", 1)
    return f"{start}{places[int(number)]}.{rest}"


def more_rows(table: mx.array, rows: int, base: Path, folder: Path) -> mx.array:
    """An embedding table with rows for new tokens: means of the old tokens they consist of."""
    old, new = Tokenizer.from_folder(base), Tokenizer.from_folder(folder)
    known = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    used = max([*known["model"]["vocab"].values(), *(t["id"] for t in known["added_tokens"])])
    added = []
    for token in range(used + 1, rows):
        pieces = old.encode(new.decode([token])) or [used]  # rows without a token stay unread
        added.append(table[mx.array(pieces)].mean(axis=0))
    return mx.concatenate([table[: used + 1], mx.stack(added)])
