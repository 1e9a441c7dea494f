"""Measure what packing gains: useful tokens per second of LoRA training on short, uneven rows.

Each row is an image, whose features are known, and text of any length up to a few dozen tokens. One
epoch is trained in batches of rows of like length, padded to one; in larger ones, with as many
tokens as packed batches have; and packed. Tokens are useful that are no padding.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_for_training
from fastvlm_mlx.hub.resolve import resolve
from fastvlm_mlx.train.batches import Batch, Batches
from fastvlm_mlx.train.examples import Example, ExampleImage, Span
from fastvlm_mlx.train.images import ImageReader, Images, ReadImage
from fastvlm_mlx.train.loss import arrays_of
from fastvlm_mlx.train.optimizer import Optimizer
from fastvlm_mlx.train.order import Order
from fastvlm_mlx.train.parts import prepare
from fastvlm_mlx.train.settings import PACKED_LENGTH, TrainOptions
from fastvlm_mlx.train.step import Step

from .tables import Result
from .turns import in_turns, seconds_of

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--dtype": {},
    "--rounds": {"default": 3},
    "--image-size": {"default": 256},
    "--rows": {"type": int, "default": 96, "help": "of an epoch"},
    "--batch-size": {"type": int, "default": 4, "help": "rows computed together"},
    "--text-tokens": {"type": int, "default": 80, "help": "of a row, at most"},
}
GOAL = 1.3
LEAST_TEXT = 16  # tokens; the second half of a row's text is learned
UNPACKED, LARGER, PACKED = "unpacked", "unpacked, as many tokens in a batch", "packed"


class KnownFeatures(ImageReader):
    """An `ImageReader` all of whose images have the same features, which are known.

    Args:
        shape: of an image's features.
    """

    def __init__(self, *shape: int):
        self.features = None
        self._each = mx.random.normal((1, *shape))

    def read(self, source: Any, *names: object) -> ReadImage:
        """Nothing needs to be read."""
        return ReadImage((1, 1), None)

    def collect(self, images: Sequence[ReadImage]) -> tuple[Images, Images]:
        """The features of so many images."""
        return None, mx.repeat(self._each, len(images), axis=0)


def measure(args: argparse.Namespace) -> Result:
    """Useful tokens per second of each way, the medians of all rounds."""
    model = load_for_training(resolve(args.model), dtype=args.dtype)
    options = TrainOptions()
    mx.random.seed(0)
    prepare(model, options)
    places = (args.image_size // model.config.vision.patch_size) ** 2
    examples = list(make_examples(args.rows, places, args.text_tokens, model))
    reader = KnownFeatures(places, model.config.mm_hidden_size)
    packed = cut(examples, reader, Order(args.batch_size, pack=PACKED_LENGTH))
    plain = cut(examples, reader, Order(args.batch_size))
    larger = min(args.rows, args.batch_size * len(plain) // len(packed))
    found = {UNPACKED: plain, LARGER: cut(examples, reader, Order(larger)), PACKED: packed}
    ways = {name: way(model, options, batches) for name, batches in found.items()}
    seconds = in_turns(ways, args.rounds, "packing")
    return table(found, seconds)


def make_examples(count: int, places: int, most: int, model: fv.FastVLM) -> list[Example]:
    """Rows of random tokens, each with an image and from `LEAST_TEXT` to `most` tokens of text."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        text = random.integers(
            1, model.config.text.vocab_size - 1, random.integers(LEAST_TEXT, most + 1)
        )
        ids = array("i", [model.config.image_token_index] * places + text.tolist())
        answer = Span(len(ids) - len(text) // 2, len(ids))
        image = ExampleImage(None, 0, places)  # type: ignore[arg-type]
        found.append(Example(str(number), "", ids, (answer,), (image,)))
    return found


def cut(examples: Sequence[Example], reader: ImageReader, order: Order) -> list[Batch]:
    """All batches of an epoch."""
    return list(Batches(examples, reader, order).batches(0))


def way(model: fv.FastVLM, options: TrainOptions, batches: Sequence[Batch]) -> Callable[[], float]:
    """What trains an epoch and gives its seconds."""
    optimizer = Optimizer(dict(tree_flatten(model.trainable_parameters())), options)
    step = Step(model, optimizer, options.clip)

    def epoch() -> None:
        for batch in batches:
            sums = step.compute(arrays_of(batch))
            mx.eval(sums)
            norm = step.apply(sums, 1.0)
            mx.eval(norm, model.state, optimizer.state)

    return partial(seconds_of, epoch)


def table(found: dict[str, list[Batch]], seconds: dict[str, list[float]]) -> Result:
    """The result, of the seconds of each round of each way."""
    gains = {
        name: median(a / b for a, b in zip(seconds[name], seconds[PACKED], strict=True))
        for name in (UNPACKED, LARGER)
    }
    useful = sum(batch.tokens for batch in found[PACKED])
    return {
        "kind": "table",
        "title": f"Packing: {gains[UNPACKED]:.2f} times the useful tokens per second of batches of "
        f"as many rows (goal: {GOAL}), {gains[LARGER]:.2f} times those with as many tokens",
        "results": [
            {
                "way": name,
                "batches": len(batches),
                "useful": f"{useful / sum(b.input_ids.size for b in batches):.0%}",
                "useful tokens per second": useful / median(seconds[name]),
                "least": useful / max(seconds[name]),
                "most": useful / min(seconds[name]),
            }
            for name, batches in found.items()
        ],
    }
