"""What training would leave in a model, drawn at random; and rows to train on."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Adam
from mlx.utils import tree_map, tree_unflatten
from models import PANDA, PENGUINS

from fastvlm_mlx.checkpoint.layouts.adapters import LowRank
from fastvlm_mlx.checkpoint.load import load_for_training
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.train.adapters import adapted_layer

PARTS = {"vision": "vision_tower", "projector": "mm_projector", "decoder": "language_model"}
RANKS = (2, 3, 4)


def trained(folder: Path, seed: int = 0, **modes: str) -> FastVLM:
    """A model as after training, each part "lora", "dora", "full" or, if it isn't given, frozen."""
    mx.random.seed(seed)
    model = load_for_training(folder, dtype="float32")
    model.freeze()
    for part, mode in modes.items():
        if mode == "full":
            model[PARTS[part]].unfreeze()
            model[PARTS[part]].update(tree_map(moved, model[PARTS[part]].parameters()))
        else:
            _adapt(model, PARTS[part], mode)
    mx.eval(model.parameters())
    return model


def moved(parameter: mx.array) -> mx.array:
    """A parameter a little off."""
    if not mx.issubdtype(parameter.dtype, mx.floating):
        return parameter
    return parameter * (1 + 0.1 * mx.random.normal(parameter.shape))


def _adapt(model: FastVLM, part: str, mode: str) -> None:
    layers = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.QuantizedLinear)) and path.startswith(part)
    ]
    for number, (path, layer) in enumerate(layers):
        low_rank = random_low_rank(layer, RANKS[number % len(RANKS)], with_magnitude=mode == "dora")
        adapted = adapted_layer(layer, low_rank)
        model.update_modules(tree_unflatten([(path, adapted)]))


def random_low_rank(layer: nn.Module, rank: int, *, with_magnitude: bool = False) -> LowRank:
    """Matrices that change a layer noticeably, with a scale of their own for each rank."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits
    down = mx.random.normal((rank, inputs)) * inputs**-0.5
    up = mx.random.normal((outputs, rank)) * 0.1
    magnitude = 0.5 + mx.random.uniform(shape=(outputs,)) if with_magnitude else None
    return LowRank(down, up, 1.5 * rank**0.5, magnitude)


def learn(model: FastVLM, steps: int = 3) -> FastVLM:
    """A few steps of Adam towards random tokens; the loss falls."""
    ids = mx.random.randint(0, 250, (2, 16), key=mx.random.key(0))

    def loss(model: FastVLM) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    step, optimizer, losses = nn.value_and_grad(model, loss), Adam(1e-2), []
    for _ in range(steps):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < losses[0]
    return model


def write_rows(file: Path, count: int, lengths: int) -> None:
    """Write rows in LLaVA's layout, one in three without an image, with answers of some lengths."""
    rows = [
        {
            "id": f"row {n}",
            "image": str((PANDA, PENGUINS)[n % 2]) if n % 3 else None,
            "conversations": [
                {"from": "human", "value": ("<image>\n" if n % 3 else "") + f"What is {n}?"},
                {"from": "gpt", "value": "An animal" + "!" * (n % lengths)},
            ],
        }
        for n in range(count)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
