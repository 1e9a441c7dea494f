"""The models that several test files ask, and what they ask about."""

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

import fastvlm_mlx as fv
from fastvlm_mlx.config import load_config
from fastvlm_mlx.hub.resolve import NANO

Nano = tuple[fv.FastVLM, fv.Processor]
"""The bundled model and its processor, as the fixture `nano` gives them."""

CONFIG = load_config(NANO).text
DEPTH, VOCAB_SIZE = CONFIG.num_hidden_layers, CONFIG.vocab_size  # of the bundled model
PENGUINS = NANO / "images" / "penguins.png"
PANDA = NANO / "images" / "panda.png"
VISION = {"layers": [1] * 5, "embed_dims": [8, 8, 16, 16, 32], "head_dim": 8, "image_size": 64}
"""An encoder that takes no time."""


def random_model(seed: int, **fields: Any) -> fv.FastVLM:
    """A model with the fields of a config.json and weights that keep the size of activations."""
    config = {"model_type": "llava_qwen2", "mm_projector_type": "linear", "vision_config": VISION}
    mx.random.seed(seed)
    model = fv.FastVLM(fv.FastVLMConfig.from_dict(config | fields))

    def draw(array: mx.array) -> mx.array:
        return mx.random.normal(array.shape) * (array.shape[-1] ** -0.5 if array.ndim > 1 else 1)

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def interrupt(target: type, name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the call of this number of a method."""
    original, calls = getattr(target, name), iter(range(10**6))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(target, name, interrupted)
