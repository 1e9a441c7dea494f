"""What earlier questions computed: visual tokens of images, and KV caches of prompts.

A question about an image that was asked about before needs neither the encoder nor a prefill of
the image, and a system prompt is read once. `Chat` needs no such copies: it goes on in the KV cache
of its last answer, whatever kind that is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import RLock

import mlx.core as mx

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache
from .inputs import Sizes, compute_visual_tokens
from .prefix import Prefix

MAX_BYTES = 2**30


class PromptCache:
    """Keeps images and prompts of one model for `generate`; the least recently used are evicted.

    Threads may share it.

    Args:
        model: whose visual tokens and KV caches are kept.
        max_bytes: of everything that is kept; at most half of it for visual tokens.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
    """

    def __init__(self, model: FastVLM, max_bytes: int = MAX_BYTES):
        check_whole_number("max_bytes", max_bytes)
        self.model = model
        self.max_bytes = max_bytes
        self._lock = RLock()
        self._visual_tokens: OrderedDict[bytes, mx.array] = OrderedDict()
        self._prefixes: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            kept = [array for prefix in self._prefixes for array in prefix.stored]
            return sum(array.nbytes for array in (*self._visual_tokens.values(), *kept))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._visual_tokens.clear()
            self._prefixes.clear()

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
        if model is not self.model:
            raise ValueError(
                "prompt_cache was made for another model; make a PromptCache for each."
            )
        visual_tokens, keys = [], []
        for pixels, size in zip(pixel_values, image_sizes, strict=True):
            key = image_key(pixels, size)
            tokens = self._visual_tokens.get(key)
            if tokens is None:
                (tokens,) = compute_visual_tokens(model, [pixels], [size])
            self._keep(key, tokens)
            visual_tokens.append(tokens)
            keys.append(key)
        return visual_tokens, keys

    def _keep(self, key: bytes, tokens: mx.array) -> None:
        """Make an image the most recently used, and evict others where there is no room."""
        with self._lock:
            self._visual_tokens[key] = tokens
            self._visual_tokens.move_to_end(key)
            while sum(t.nbytes for t in self._visual_tokens.values()) > self.max_bytes // 2:
                self._visual_tokens.popitem(last=False)

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

    def fetch(self, ids: list[int], cache: Sequence[KVCache]) -> int:
        """Fill an empty cache with as much of a prompt as is known; how many tokens that is.

        Args:
            ids: of the prompt, as `tag` gives them; the last is never taken as known.
            cache: one a layer.
        """
        with self._lock:
            found = max(self._prefixes, key=lambda prefix: prefix.shared(ids[:-1]), default=None)
            known = 0 if found is None else found.shared(ids[:-1])
            if found is None or not known:
                return 0
            self._prefixes.remove(found)
            self._prefixes.append(found)
        found.fill(cache, known)
        return known

    def store(self, ids: list[int], cache: Sequence[KVCache]) -> None:
        """Remember a prompt whose keys and values are the first of a cache."""
        with self._lock:
            if any(prefix.ids[: len(ids)] == ids for prefix in self._prefixes):
                return
            prefix = Prefix.of(ids, cache)
            self._prefixes = [p for p in self._prefixes if ids[: len(p.ids)] != p.ids]
            self._prefixes.append(prefix)
            while self._prefixes and self.nbytes > self.max_bytes:
                self._prefixes.pop(0)


def image_key(pixel_values: mx.array, image_size: tuple[int, int]) -> bytes:
    """A digest that differs where the pixels or the original sizes of two images do."""
    from hashlib import blake2b

    import numpy as np

    digest = blake2b(digest_size=16)
    digest.update(repr((pixel_values.shape, str(pixel_values.dtype), image_size)).encode())
    digest.update(np.asarray(pixel_values).data)
    return digest.digest()
