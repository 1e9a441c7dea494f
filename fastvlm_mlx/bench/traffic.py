"""Bytes that a computation moves on a GPU, read from its traced graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx

from .graph import STAND_INS, VIEWS, as_on_gpu

# What `mx.compile` fuses with its neighbours. Nearly all of this library's stand in compiled
# functions, so that each connected group is one kernel.
POINTWISE = {"Abs", "Add", "AsType", "Divide", "Equal", "Erf", "Exp", "Maximum", "Minimum"}
POINTWISE |= {"Multiply", "Negative", "Select", "Sigmoid", "Square", "Subtract"}


class Node(NamedTuple):
    """A primitive, and the arrays that it reads and writes, by name."""

    name: str
    inputs: list[str]
    outputs: list[str]


class Trace:
    """The primitives of a function, and the bytes of its arrays."""

    def __init__(self, function: Callable[..., mx.array], *inputs: mx.array):
        self.nodes: list[Node] = []
        self.results: set[str] = set()
        self.bytes: dict[str, int] = {}
        self.sources: dict[str, str] = {}
        """What a view is a view of."""
        mx.export_function(self._read, function, *inputs)

    def _read(self, part: dict[str, Any]) -> None:
        if part["type"] == "outputs":
            self.results = {name for name, *_ in part["outputs"]}
        if part["type"] != "primitive":
            return
        for name, shape, dtype in [*part["inputs"], *part["outputs"]]:
            self.bytes[name] = math.prod(shape) * dtype.size
        inputs, outputs = ([name for name, *_ in part[key]] for key in ("inputs", "outputs"))
        if part["name"] in VIEWS and part["name"] not in STAND_INS:
            self.sources |= dict.fromkeys(outputs, inputs[0])
        else:
            self.nodes.append(Node(part["name"], inputs, outputs))

    def source(self, name: str) -> tuple[str, int]:
        """The array that holds a view's values, and how many of its bytes the view reaches."""
        size = self.bytes[name]
        while name in self.sources:
            name = self.sources[name]
            size = min(size, self.bytes[name])
        return name, size


def bytes_moved(function: Callable[..., mx.array], *inputs: mx.array) -> int:
    """Bytes that the kernels of `function(*inputs)` read and write on Metal, without caches.

    Each kernel reads its inputs and writes its output once; the pointwise operations that follow
    each other are one kernel. Copies that depend on strides are not seen.
    """
    with as_on_gpu():
        trace = Trace(function, *inputs)
    return sum(_kernel_bytes(trace, kernel) for kernel in kernels(trace))


def kernels(trace: Trace) -> Iterable[list[Node]]:
    """The nodes of each kernel: pointwise ones with those that they feed."""
    made_by: dict[str, list[Node]] = {}
    found: dict[int, list[Node]] = {}
    for node in trace.nodes:
        kernel = [node]
        if node.name in POINTWISE:
            feeding = {id(k): k for x in node.inputs if (k := made_by.get(trace.source(x)[0]))}
            for other in feeding.values():
                if other[0].name in POINTWISE:
                    kernel = other + kernel
                    found.pop(id(other))
        found[id(kernel)] = kernel
        for member in kernel:
            made_by |= dict.fromkeys(member.outputs, kernel)
    return found.values()


def _kernel_bytes(trace: Trace, kernel: list[Node]) -> int:
    """What a kernel reads from outside it, and writes for others."""
    made = {name for node in kernel for name in node.outputs}
    members = {id(node) for node in kernel}
    read = dict(trace.source(x) for node in kernel for x in node.inputs)
    used = {
        trace.source(x)[0] for node in trace.nodes if id(node) not in members for x in node.inputs
    } | {trace.source(x)[0] for x in trace.results}
    reads = sum(size for name, size in read.items() if name not in made)
    return reads + sum(trace.bytes[name] for name in made & used)
