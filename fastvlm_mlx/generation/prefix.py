"""The keys and values of what prompts begin with, to begin other prompts with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..model.kv_cache import KVCache


@dataclass(eq=False)
class Prefix:
    """Token ids, and their keys and values.

    Attributes:
        ids: the tokens.
        stored: of each layer, [2, 1, kv_heads, len(ids), D], as a `KVCache` stores them.
    """

    ids: list[int]
    stored: list[mx.array]

    @classmethod
    def of(cls, ids: Sequence[int], cache: Sequence[KVCache]) -> Prefix:
        """A copy of the first keys and values of a cache, which are those of `ids`."""
        kept = [layer.stored for layer in cache if layer.stored is not None]
        return cls(list(ids), copied(kept, 0, len(ids)))

    def shared(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are those of `ids`."""
        return common_prefix(self.ids, ids)

    def fill(self, cache: Sequence[KVCache], known: int, rows: int = 1) -> None:
        """Put the first `known` tokens into an empty cache of so many rows."""
        for layer, stored in zip(cache, self.stored, strict=True):
            held = stored[..., :known, :]
            layer.stored = mx.broadcast_to(held, (2, rows, *held.shape[2:])) if rows > 1 else held
            layer.offset = known


@dataclass(eq=False)
class Node(Prefix):
    """A piece of prompts in a `PrefixTree`, after those of the nodes above it."""

    parent: Node | None = None
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(array.nbytes for array in self.stored)

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixTree:
    """Prompts with their keys and values, in which what they begin with alike stands once."""

    def __init__(self) -> None:
        self.root = Node([], [])

    def find(self, ids: Sequence[int]) -> tuple[Prefix, Node]:
        """The longest beginning of `ids` that is known, and the last node it is from."""
        node, known, parts = self.root, 0, []
        while known < len(ids) and (child := node.children.get(ids[known])) is not None:
            n = child.shared(ids[known:])
            parts.append([array[..., :n, :] for array in child.stored])
            node, known = child, known + n
            if n < len(child.ids):
                break
        stored = [
            mx.concatenate(layer, axis=3) if len(layer) > 1 else layer[0]
            for layer in map(list, zip(*parts, strict=True))
        ]
        return Prefix(list(ids[:known]), stored), node

    def insert(self, ids: Sequence[int], stored: Sequence[mx.array]) -> tuple[Node, list[Node]]:
        """Add a prompt; the last of its nodes, and those that are new.

        Args:
            ids: of the prompt.
            stored: of each layer [2, 1, kv_heads, len(ids) or more, D]; what is new is copied.
        """
        node, known = self.root, 0
        new: list[Node] = []
        while known < len(ids):
            child = node.children.get(ids[known])
            if child is None:
                child = Node(list(ids[known:]), copied(stored, known, len(ids)), node)
                node.children[ids[known]] = child
                return child, [*new, child]
            n = child.shared(ids[known:])
            if n < len(child.ids) and known + n < len(ids):
                child = _split(child, n)
                new.append(child)
            node, known = child, known + n
        return node, new

    def remove(self, node: Node) -> None:
        """Forget a node that has none below it."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.ids[0]]


def _split(node: Node, n: int) -> Node:
    """Divide a node after its first n tokens; the new one, which is above it."""
    assert node.parent is not None
    head = Node(node.ids[:n], copied(node.stored, 0, n), node.parent)
    node.parent.children[node.ids[0]] = head
    node.stored = copied(node.stored, n, len(node.ids))
    node.ids, node.parent = node.ids[n:], head
    head.children[node.ids[0]] = node
    return head


def copied(stored: Sequence[mx.array], start: int, end: int) -> list[mx.array]:
    """A copy of the keys and values from one position to another, without what lies around."""
    copies = [mx.contiguous(array[..., start:end, :]) for array in stored]
    mx.async_eval(copies)
    return copies


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first items that two sequences share."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
