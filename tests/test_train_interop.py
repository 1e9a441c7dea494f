"""Training against PyTorch and transformers' fast_vlm: loss, gradients and steps of AdamW.

FASTVLM_TRANSFORMERS_PYTHON=~/torch/bin/python pytest -m interop tests/test_train_interop.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from sources import full_nano, with_tokenizer

from fastvlm_mlx.checkpoint.layouts import transformers
from fastvlm_mlx.checkpoint.load import inference_weights, load_for_training
from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.convert import convert
from fastvlm_mlx.train.loss import arrays_of, loss
from fastvlm_mlx.train.optimizer import Optimizer
from fastvlm_mlx.train.parts import prepare
from fastvlm_mlx.train.settings import TrainOptions
from fastvlm_mlx.train.step import Step

WORKER = Path(__file__).with_name("train_worker.py")
TRANSFORMERS = os.environ.get("FASTVLM_TRANSFORMERS_PYTHON", "")
SETTINGS = {"rate": 1e-4, "decay": 0.1, "norm": 1.0, "steps": 10}
IMAGE, SUPERVISED = "image", "supervised"
# Rows of several turns: an answer before, between and after images, and a row without images.
ROWS = [
    [5, (SUPERVISED, 4), 3, IMAGE, 6, (SUPERVISED, 5), IMAGE, 2, (SUPERVISED, 3)],
    [4, IMAGE, 3, (SUPERVISED, 6), 5, (SUPERVISED, 2), 1],
    [6, (SUPERVISED, 5), 4, (SUPERVISED, 1)],
]
# BatchNorms and layer scales, which are folded here, and what follows from them.
FOLDED = (".bn.", ".norm.running", "gamma", "layer_scale", ".se.", "running_")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(not TRANSFORMERS, reason="set FASTVLM_TRANSFORMERS_PYTHON"),
]


def make_rows(places: int, vocabulary: int) -> tuple[list[list[int]], list[list[bool]], int]:
    """(ids with -1 at visual tokens, which of them are supervised, number of images)."""
    random = np.random.default_rng(3)
    rows, masks, images = [], [], 0
    for pieces in ROWS:
        ids: list[int] = []
        mask: list[bool] = []
        for piece in pieces:
            is_image, supervised = piece == IMAGE, isinstance(piece, tuple)
            count = places if is_image else piece[1] if supervised else piece
            drawn = random.integers(0, vocabulary, count).tolist()
            ids += [-1] * places if is_image else drawn
            mask += [supervised] * count
            images += is_image
        rows.append(ids)
        masks.append(mask)
    return rows, masks, images


def as_batch(rows: list[list[int]], masks: list[list[bool]], pixels: np.ndarray) -> Any:
    width = max(map(len, rows)) + 3
    ids, targets = np.zeros((2, len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    places = []
    for b, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        places += [b * width + t for t, token in enumerate(row) if token < 0]
        ids[b, : len(row)] = np.maximum(row, 0)
        targets[b, : len(row) - 1] = ids[b, 1 : len(row)]
        weights[b, : len(row) - 1] = mask[1:]
    return SimpleNamespace(
        ids=["a", "b", "c"],
        input_ids=mx.array(ids),
        targets=mx.array(targets),
        weights=mx.array(weights),
        places=mx.array(places),
        pixel_values=mx.array(pixels),
    )


def run_transformers(
    folder: Path, rows: list[list[int]], masks: list[list[bool]], pixels: np.ndarray, scratch: Path
) -> dict[str, Any]:
    image = json.loads((folder / "config.json").read_text())["image_token_index"]
    width = max(map(len, rows))
    ids, attention = np.zeros((2, len(rows), width), np.int64)
    labels = np.full((len(rows), width), -100)
    for b, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids[b, : len(row)] = [image if token < 0 else token for token in row]
        attention[b, : len(row)] = 1
        # Its first token follows nothing.
        labels[b, : len(row)] = [i if m else -100 for i, m in zip(row, mask, strict=True)]
    given, found = scratch / "inputs.npz", scratch / "outputs.npz"
    arrays = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    np.savez(given, pixel_values=pixels, **arrays, **SETTINGS)
    command = [TRANSFORMERS, str(WORKER), str(folder), str(given), str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(found) as outputs:
        return dict(outputs)


def named_gradients(model: Any, gradients: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """Gradients in transformers' names and axes: a checkpoint's are linear in the parameters."""
    model.update(tree_unflatten(list(gradients.items())))
    weights = transformers.from_mlx(unfuse(model))
    return {name: np.array(value) for name, value in weights.items()}


@pytest.fixture(params=["small", "nano"])
def folder(request: pytest.FixtureRequest, small_folder: Path, tmp_path: Path) -> Path:
    if request.param == "nano":
        source = full_nano(tmp_path / "source")
    else:
        source = with_tokenizer(small_folder, tmp_path / "source")
    # Folded, BatchNorms and layer scales are neutral: kernels are then what training sees.
    folded = convert(source, tmp_path / "folded", dtype="float32", progress=False)
    weights = inference_weights(load_for_training(folded))
    mx.eval(weights)
    mx.save_safetensors(str(folded / "model.safetensors"), weights)
    target = tmp_path / "folder"
    return convert(folded, target, layout="transformers", dtype="float32", progress=False)


def test_loss_gradients_and_steps_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    places = config["image_seq_length"]
    rows, masks, images = make_rows(places, 250)
    side = 64 * int(places**0.5)
    pixels = np.random.default_rng(0).random((images, side, side, 3), dtype=np.float32)
    theirs = run_transformers(folder, rows, masks, pixels, tmp_path)
    arrays = arrays_of(as_batch(rows, masks, pixels))

    model = load_for_training(folder, dtype="float32")
    prepare(model, TrainOptions(vision="full", decoder="full"))
    total, count = loss(model, arrays)
    assert total.item() / count.item() == pytest.approx(float(theirs["loss"]), abs=1e-5)
    optimizer = Optimizer(dict(tree_flatten(model.trainable_parameters())), TrainOptions())
    sums = Step(model, optimizer, 0.0, compiled=False).compute(arrays)
    means = {name: g / sums.tokens for name, g in sums.gradients.items()}
    compare(named_gradients(model, means), theirs)

    model = load_for_training(folder, dtype="float32")
    losses = train(model, arrays)
    assert losses[-1] < 0.95 * losses[0]
    np.testing.assert_allclose(losses, theirs["losses"], atol=1e-4)


def compare(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    """Every part's gradients, each relative to the largest of its tensor."""
    compared = set()
    for name, wanted in theirs.items():
        name = name.removeprefix("gradient.")
        if f"gradient.{name}" not in theirs or any(part in name for part in FOLDED):
            continue
        found = ours[name]
        assert found.shape == wanted.shape, name
        scale = max(np.abs(wanted).max(), 1e-7)
        assert np.abs(found - wanted).max() <= 1e-4 * scale, name
        compared.add(name.split(".")[1])
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= compared


def train(model: Any, arrays: dict[str, Any]) -> list[float]:
    options = TrainOptions(
        decoder="full", learning_rate=SETTINGS["rate"], weight_decay=SETTINGS["decay"]
    )
    prepare(model, options)
    optimizer = Optimizer(dict(tree_flatten(model.trainable_parameters())), options)
    step = Step(model, optimizer, SETTINGS["norm"], compiled=False)
    losses = []
    for _ in range(int(SETTINGS["steps"])):
        sums = step.compute(arrays)
        step.apply(sums, 1.0)
        losses.append((sums.loss / sums.tokens).item())
    return losses
