"""What earlier questions computed: visual tokens of images, and KV caches of prompts.

A question about an image that was asked about before needs neither the encoder nor a prefill of
the image, and a system prompt is read once. `Chat` needs no such copies: it goes on in the KV cache
of its last answer, whatever kind that is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import RLock

import mlx.core as mx

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache
from .inputs import Sizes, compute_visual_tokens
from .prefix import Node, Prefix, PrefixTree

MAX_BYTES = 2**30
KEY_BYTES = 16  # of the digest that tells images apart


@dataclass(eq=False)
class KnownImage:
    """An image that was encoded: its key, and its visual tokens [n, hidden_size]."""

    key: bytes
    tokens: mx.array

    @property
    def nbytes(self) -> int:
        """Bytes of its visual tokens."""
        return self.tokens.nbytes


class PromptCache:
    """Keeps images and prompts of one model for `generate`; the least recently used are evicted.

    What several prompts begin with is kept once. Threads may share it.

    Args:
        model: whose visual tokens and KV caches are kept.
        max_bytes: of everything that is kept.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
    """

    def __init__(self, model: FastVLM, max_bytes: int = MAX_BYTES):
        check_whole_number("max_bytes", max_bytes)
        self.model = model
        self.max_bytes = max_bytes
        self._lock = RLock()
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return self._nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._images: dict[bytes, KnownImage] = {}
            self._tree = PrefixTree()
            # The least recently used first. A node is used after those below it, so that the first
            # has none below; an image after the prompts that it is in, since it costs more to
            # compute and takes less room.
            self._used: OrderedDict[KnownImage | Node, int] = OrderedDict()
            self._nbytes = 0

    def encode(
        self,
        model: FastVLM,
        pixel_values: Sequence[mx.array],
        image_sizes: Sizes,
    ) -> tuple[list[mx.array], list[bytes]]:
        """The visual tokens [n, hidden_size] of each image, computed or remembered, and its key.

        Args:
            model: must be the one that this was made for.
            pixel_values: [n, S, S, 3] of each image.
            image_sizes: (width, height) of each original image.

        Raises:
            ValueError: it is another model.
        """
        self.check_model(model)
        visual_tokens, keys = [], []
        for pixels, size in zip(pixel_values, image_sizes, strict=True):
            key = image_key(pixels, size)
            tokens = self.find_image(key)
            if tokens is None:
                (tokens,) = compute_visual_tokens(model, [pixels], [size])
                self.store_image(key, tokens)
            visual_tokens.append(tokens)
            keys.append(key)
        return visual_tokens, keys

    def check_model(self, model: FastVLM) -> None:
        """ValueError if this was made for another model."""
        if model is not self.model:
            raise ValueError(
                "prompt_cache was made for another model; make a PromptCache for each."
            )

    def find_image(self, key: bytes) -> mx.array | None:
        """The visual tokens of an image, if they are known."""
        with self._lock:
            image = self._images.get(key)
            if image is None:
                return None
            self._used.move_to_end(image)
            return image.tokens

    def store_image(self, key: bytes, tokens: mx.array) -> None:
        """Remember the visual tokens of an image."""
        tokens = tokens * 1  # a copy: what was encoded together lies in one buffer
        mx.eval(tokens)
        with self._lock:
            if key not in self._images and tokens.nbytes <= self.max_bytes:
                self._images[key] = image = KnownImage(key, tokens)
                self._count([image])
                self._evict()

    def tag(
        self, input_ids: Sequence[int], visual_tokens: Sequence[mx.array], keys: Sequence[bytes]
    ) -> list[int]:
        """`input_ids` with a number of each image's own in its places, so that images differ."""
        marks = iter(
            -int.from_bytes(key, "little")
            for tokens, key in zip(visual_tokens, keys, strict=True)
            for _ in range(len(tokens))
        )
        return [next(marks) if i == self.model.config.image_token_index else i for i in input_ids]

    def find(self, ids: list[int]) -> Prefix:
        """As much of the beginning of a prompt as is known.

        Args:
            ids: of the prompt, as `tag` gives them; the last is never taken as known.
        """
        with self._lock:
            prefix, node = self._tree.find(ids[:-1])
            self._use(node, ids)
            return prefix

    def fetch(self, ids: list[int], cache: Sequence[KVCache]) -> int:
        """Fill an empty cache, one a layer, with what `find` finds; how many tokens that is."""
        prefix = self.find(ids)
        known = len(prefix.ids)
        if known:
            prefix.fill(cache, known)
        return known

    def store(self, ids: list[int], cache: Sequence[KVCache], row: int = 0) -> None:
        """Remember a prompt whose keys and values are the first of a row of a cache."""
        stored = [layer.stored[:, row : row + 1] for layer in cache if layer.stored is not None]
        self.store_prefix(Prefix(ids, stored))

    def store_prefix(self, prefix: Prefix) -> None:
        """Remember a prompt, whose keys and values may go on after its end."""
        ids, stored = prefix.ids, prefix.stored
        size = sum(a.nbytes // a.shape[3] * len(ids) for a in stored)
        if not stored or size > self.max_bytes:
            return
        with self._lock:
            node, new = self._tree.insert(ids, stored)
            self._count(changed for each in new for changed in (each, *each.children.values()))
            self._use(node, ids)
            self._evict()

    def _use(self, node: Node, ids: Sequence[int]) -> None:
        """Make a prompt and its images the most recently used."""
        for each in node.path():
            self._used.move_to_end(each)
        for mark in {i for i in ids if i < 0}:
            image = self._images.get((-mark).to_bytes(KEY_BYTES, "little"))
            if image is not None:
                self._used.move_to_end(image)

    def _count(self, changed: Iterable[KnownImage | Node]) -> None:
        """Note the bytes of what is new or was divided."""
        for each in changed:
            self._nbytes += each.nbytes - self._used.get(each, 0)
            self._used[each] = each.nbytes

    def _evict(self) -> None:
        """Forget what was used least recently, where there is no room."""
        while self._nbytes > self.max_bytes:
            each, nbytes = self._used.popitem(last=False)
            self._nbytes -= nbytes
            if isinstance(each, Node):
                self._tree.remove(each)
            else:
                del self._images[each.key]


def image_key(pixel_values: mx.array, image_size: tuple[int, int]) -> bytes:
    """A digest that differs where the pixels or the original sizes of two images do."""
    from hashlib import blake2b

    import numpy as np

    digest = blake2b(digest_size=KEY_BYTES)
    digest.update(repr((pixel_values.shape, str(pixel_values.dtype), image_size)).encode())
    digest.update(np.asarray(pixel_values).data)
    return digest.digest()
