"""How much memory a run will need, from the graph of one step; no weight is read for it.

The step is traced with arrays that have shapes and no values. Its primitives are then walked in
the order in which MLX computes them: each makes its output, or takes over an input that nobody
needs any more, and what was needed for the last time is given back.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import ops
from ..bench.graph import VIEWS
from ..image.grid import anyres_grid
from ..model.fastvlm import FastVLM
from .batches import Batches
from .examples import Example, ExampleImage
from .loss import AT_ONCE, Arrays, bucket, loss
from .optimizer import HALF
from .order import bucket as length_bucket
from .settings import TrainOptions

# Views that copy what a transposition has brought into another order.
COPIES_IF_TRANSPOSED = {"Reshape", "Flatten", "Unflatten", "View", "Copy"}
# Primitives that never write their output over an input.
NEVER_IN_PLACE = {"Matmul", "Convolution", "Gather", "GatherAxis", "Concatenate", "Reduce"}
NEVER_IN_PLACE |= {"QuantizedMatmul", "Pad", "ArgReduce", "Full", "Arange", "RandomBits"}
IN_FLIGHT = 45  # primitives whose inputs are still held, since MLX computes behind: measured


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs.

    Attributes:
        weights: of the model, frozen or not.
        optimizer: of its state and float32 copies.
        gradients: of the trained parameters, while they are added up.
        activations: at most, of one batch; with it.
        encoding: of images whose features are kept, meanwhile.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    encoding: int = 0

    @property
    def peak(self) -> int:
        """All that is held together at most."""
        return self.weights + self.optimizer + max(self.gradients + self.activations, self.encoding)

    def lines(self) -> list[str]:
        """For a person."""
        named = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "activations of the largest batch": self.activations,
        }
        if self.encoding:
            named["encoding images, before them"] = self.encoding
        parts = ", ".join(f"{name} {size_of(size)}" for name, size in named.items())
        return [f"Memory: about {size_of(self.peak)} at most ({parts})."]


def size_of(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def estimate(model: FastVLM, arrays: Arrays, options: TrainOptions, side: int) -> Memory:
    """The memory that training takes.

    Args:
        model: prepared by `parts.prepare`; its parameters need not be computed.
        arrays: of the largest batch, as `largest_arrays` makes them.
        options: of the run.
        side: of the images, in pixels.
    """
    trained: Arrays = dict(tree_flatten(model.trainable_parameters()))
    everything: Arrays = dict(tree_flatten(model.parameters()))
    gradients = sum(p.nbytes for p in trained.values())
    again = options.gradient_checkpointing
    peak = (layer_by_layer_bytes if again else step_bytes)(model, arrays)
    return Memory(
        weights=sum(p.nbytes for p in everything.values()),
        optimizer=sum(_state_bytes(p, options.optimizer) for p in trained.values()),
        gradients=gradients * min(2, options.accumulation),
        activations=max(0, peak - gradients) + sum(a.nbytes for a in _leaves(arrays)),
        encoding=_encoding(model, arrays, side),
    )


def layer_by_layer_bytes(model: FastVLM, arrays: Arrays) -> int:
    """As `step_bytes`, where decoder layers compute their activations again: those of one layer,
    and what goes into each."""
    decoder = model.language_model
    layers, trained = decoder.layers, _trained_bytes(model)
    decoder.layers = layers[:1]
    try:
        found = step_bytes(model, arrays)
        trained -= _trained_bytes(model)
    finally:
        decoder.layers = layers
    inputs = arrays["input_ids"].size * decoder.config.hidden_size * _dtype(model).size
    return found + trained + (len(layers) - 1) * int(inputs)


def _trained_bytes(model: FastVLM) -> int:
    trained: Arrays = dict(tree_flatten(model.trainable_parameters()))
    return sum(p.nbytes for p in trained.values())


def _encoding(model: FastVLM, arrays: Arrays, side: int) -> int:
    """What encoding the images of a batch takes, if its features are given."""
    features = arrays.get("features", ())
    each = [features] if isinstance(features, mx.array) else features
    return encoder_bytes(model, side, sum(map(len, each))) if each else 0


def encoder_bytes(model: FastVLM, side: int, images: int) -> int:
    """The most that the encoder takes for so many images, as many together as it is given."""
    parameters: Arrays = dict(tree_flatten(model.vision_tower.parameters()))
    shape = min(images, ops.images_at_once()), side, side, 3
    names, pixels = list(parameters), mx.zeros(shape, mx.uint8)

    def run(pixels: mx.array, *values: mx.array) -> list[mx.array]:
        model.vision_tower.update(tree_unflatten(list(zip(names, values, strict=True))))
        return [model.vision_tower(pixels)]

    try:
        return traced(run, pixels, *parameters.values()).peak() + pixels.nbytes
    finally:
        model.vision_tower.update(tree_unflatten(list(parameters.items())))


def _state_bytes(parameter: mx.array, optimizer: str) -> int:
    moments = 1 if optimizer == "muon" and parameter.ndim == 2 else 2
    copies = 1 if parameter.dtype in HALF else 0
    return int(parameter.size * 4 * (moments + copies))


def step_bytes(model: FastVLM, arrays: Arrays) -> int:
    """The most that the gradients of a batch take, without parameters and batch."""
    parameters: Arrays = dict(tree_flatten(model.parameters()))
    names = list(parameters)
    flat, sizes = _named_leaves(arrays), arrays.get("image_sizes")
    gradients_of = nn.value_and_grad(model, loss)

    def run(*values: mx.array) -> list[mx.array]:
        given = dict(zip(names, values, strict=False))
        model.update(tree_unflatten(list(given.items())))
        batch: Arrays = dict(tree_unflatten(list(zip(flat, values[len(names) :], strict=True))))
        (total, count), gradients = gradients_of(model, batch | {"image_sizes": sizes})
        return [total, count, *_leaves(gradients)]

    try:
        return traced(run, *parameters.values(), *flat.values()).peak()
    finally:
        model.update(tree_unflatten(list(parameters.items())))


def traced(function: Callable[..., Sequence[mx.array]], *inputs: mx.array) -> Tape:
    """The tape of a function; as for a GPU where MLX can't trace the forms for the CPU."""
    try:
        return Tape(function, *inputs)
    except ValueError:  # for instance, of gradients that are written by hand
        with ops.assume("metal"):
            return Tape(function, *inputs)


class Tape:
    """The primitives of a function in their order, and the arrays that they make."""

    def __init__(self, function: Callable[..., Sequence[mx.array]], *inputs: mx.array):
        self._bytes: dict[str, int] = {}
        self._source: dict[str, str] = {}
        self._transposed: set[str] = set()
        self._nodes: list[tuple[str, list[str], list[str]]] = []
        self._results: set[str] = set()
        with ops.exported():
            mx.export_function(self._read, function, *inputs)

    def _read(self, part: dict[str, Any]) -> None:
        if part["type"] == "outputs":
            self._results = {self._origin(name) for name, *_ in part["outputs"]}
        if part["type"] != "primitive":
            return
        inputs, outputs = ([name for name, *_ in part[key]] for key in ("inputs", "outputs"))
        for name, shape, dtype in part["outputs"]:
            self._bytes[name] = math.prod(shape) * dtype.size
        turned = bool(inputs) and inputs[0] in self._transposed
        if part["name"] in VIEWS and not (turned and part["name"] in COPIES_IF_TRANSPOSED):
            self._source |= dict.fromkeys(outputs, inputs[0])
            if turned or part["name"] == "Transpose":
                self._transposed |= set(outputs)
        else:
            self._nodes.append((part["name"], [self._origin(x) for x in inputs], outputs))

    def _origin(self, name: str) -> str:
        """The array that holds a view's values."""
        while name in self._source:
            name = self._source[name]
        return name

    def peak(self) -> int:
        """The most bytes at any time, without the function's inputs."""
        uses = Counter(x for _, inputs, _ in self._nodes for x in set(inputs))
        made: set[str] = set()
        waiting: deque[int] = deque([0] * IN_FLIGHT)
        live = peak = 0
        for name, inputs, outputs in self._nodes:
            taken = self._taken_over(name, inputs, outputs, uses, made)
            live += sum(self._bytes[x] for x in outputs) - taken
            peak = max(peak, live)
            made |= set(outputs)
            freed = -taken
            for x in set(inputs):
                uses[x] -= 1
                if not uses[x] and x in made and x not in self._results:
                    freed += self._bytes[x]
            freed += sum(self._bytes[x] for x in outputs if not uses[x] and x not in self._results)
            waiting.append(freed)
            live -= waiting.popleft()
        return peak

    def _taken_over(
        self, name: str, inputs: list[str], outputs: list[str], uses: Counter[str], made: set[str]
    ) -> int:
        """The bytes of an input that becomes the output."""
        size = self._bytes[outputs[0]]
        if name in NEVER_IN_PLACE:
            return 0
        free = (x for x in inputs if x in made and uses[x] == 1 and x not in self._results)
        return size if any(self._bytes[x] == size for x in free) else 0


def largest_arrays(
    batches: Batches, model: FastVLM, side: int, *, is_encoded: bool, packed: bool
) -> Arrays:
    """Arrays as the largest batch of the first epoch has them, without values.

    Args:
        batches: of the run.
        model: its encoder says how many features an image has.
        side: of the images, in pixels.
        is_encoded: whether features come from a cache.
        packed: whether rows hold several examples.
    """
    rows = max(batches.plan(0), key=lambda rows: _size(rows, batches.examples))
    examples = [[batches.examples[n] for n in row] for row in rows]
    length = length_bucket(max(sum(map(len, row)) for row in examples))
    every = [example for row in examples for example in row]
    places = sum(e.num_visual for e in every)
    # Logits of more are not held together.
    supervised = min(AT_ONCE, bucket(sum(e.num_supervised for e in every)))
    arrays = {
        "input_ids": mx.zeros((len(rows), length), mx.int32),
        "places": mx.zeros(places, mx.int32),
        "positions": mx.zeros(supervised, mx.int32),
        "targets": mx.zeros(supervised, mx.int32),
        "weights": mx.zeros(supervised),
    }
    if packed:
        shape = bucket(len(every)), length_bucket(max(map(len, every)))
        arrays["segment_tokens"] = mx.zeros(shape, mx.int32)
        arrays["segment_places"] = mx.zeros((len(rows), length), mx.int32)
    images = [image for example in every for image in example.images]
    arrays |= _image_arrays(images, model, side, is_encoded=is_encoded) if images else {}
    features = arrays.get("features")
    if packed and isinstance(features, mx.array):  # as `loss.arrays_of` pads them
        count, square, width = bucket(len(features)), *features.shape[1:]
        arrays["features"] = mx.zeros((count, square, width), features.dtype)
        arrays["places"] = mx.zeros(count * square, mx.int32)
    return arrays


def _image_arrays(
    images: Sequence[ExampleImage], model: FastVLM, side: int, *, is_encoded: bool
) -> Arrays:
    config = model.config
    square = (side // config.vision.patch_size) ** 2
    name, dtype = ("features", _dtype(model)) if is_encoded else ("pixel_values", mx.uint8)
    shape = (square, config.mm_hidden_size) if is_encoded else (side, side, 3)
    if config.image_aspect_ratio != "anyres":
        return {name: mx.zeros((len(images), *shape), dtype)}
    sizes = [image.size or (side, side) for image in images]
    grids = [anyres_grid(size, config.image_grid_pinpoints, side) for size in sizes]
    tiles = [mx.zeros((1 + across * down, *shape), dtype) for across, down in grids]
    return {name: tiles, "image_sizes": sizes}


def _size(rows: Sequence[Sequence[int]], examples: Sequence[Example]) -> int:
    longest = max((sum(len(examples[n]) for n in row) for row in rows), default=0)
    visual = sum(examples[n].num_visual for row in rows for n in row)
    return longest * len(rows) + visual


def _dtype(model: FastVLM) -> mx.Dtype:
    return model.language_model.norm.weight.dtype


def _leaves(arrays: Arrays) -> list[mx.array]:
    return list(_named_leaves(arrays).values())


def _named_leaves(arrays: Arrays) -> Arrays:
    found: Arrays = dict(tree_flatten(arrays))
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, mx.array)}
