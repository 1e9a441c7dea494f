"""What earlier questions computed: visual tokens of images, and KV caches of prompts.

A question about an image that was asked about before needs neither the encoder nor a prefill of
the image, and a system prompt is read once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import mlx.core as mx

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache, common_prefix
from .inputs import encode_images

MAX_BYTES = 2**30


@dataclass(eq=False)
class Prefix:
    """The ids of a prompt (see `PromptCache.tag`) and its keys and values, one array per layer."""

    ids: list[int]
    stored: list[mx.array]


class PromptCache:
    """Remembers images and prompts of one model for `generate`; the longest unused goes first.

    Args:
        model: whose visual tokens and KV caches are kept.
        max_bytes: of all that is kept; of it at most a half are visual tokens.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
    """

    def __init__(self, model: FastVLM, max_bytes: int = MAX_BYTES):
        check_whole_number("max_bytes", max_bytes)
        self.model = model
        self.max_bytes = max_bytes
        self._features: OrderedDict[bytes, mx.array] = OrderedDict()
        self._prefixes: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = [array for prefix in self._prefixes for array in prefix.stored]
        return sum(array.nbytes for array in (*self._features.values(), *kept))

    def clear(self) -> None:
        """Forget everything."""
        self._features.clear()
        self._prefixes.clear()

    def encode(
        self,
        model: FastVLM,
        pixel_values: Sequence[mx.array],
        image_sizes: Sequence[tuple[int, int]],
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
        features, keys = [], []
        for pixels, size in zip(pixel_values, image_sizes, strict=True):
            key = image_key(pixels, size)
            if key not in self._features:
                (self._features[key],) = encode_images(model, [pixels], [size])
            self._features.move_to_end(key)
            features.append(self._features[key])
            keys.append(key)
        while sum(f.nbytes for f in self._features.values()) > self.max_bytes // 2:
            self._features.popitem(last=False)
        return features, keys

    def tag(
        self, input_ids: Sequence[int], features: Sequence[mx.array], keys: Sequence[bytes]
    ) -> list[int]:
        """`input_ids` with a number of each image's own in its places, so that images differ."""
        marks = iter(
            -int.from_bytes(key, "little")
            for visual, key in zip(features, keys, strict=True)
            for _ in range(len(visual))
        )
        return [next(marks) if i == self.model.config.image_token_index else i for i in input_ids]

    def fetch(self, ids: list[int], cache: Sequence[KVCache]) -> int:
        """Fill an empty cache with as much of a prompt as is known; how many tokens that is.

        Args:
            ids: of the prompt, as `tag` gives them; the last is never taken as known.
            cache: one a layer.
        """
        known = 0
        for prefix in list(self._prefixes):
            shared = common_prefix(prefix.ids, ids[:-1])
            if shared > known:
                known = shared
                self._use(prefix)
        if known:
            for layer, stored in zip(cache, self._prefixes[-1].stored, strict=True):
                layer.stored, layer.offset = stored[..., :known, :], known
        return known

    def store(self, ids: list[int], cache: Sequence[KVCache]) -> None:
        """Remember a prompt whose keys and values are the first of a cache."""
        if any(prefix.ids[: len(ids)] == ids for prefix in self._prefixes):
            return
        kept = [layer.stored[..., : len(ids), :] for layer in cache if layer.stored is not None]
        stored = [mx.contiguous(a) for a in kept]  # without the room that the cache grows into
        mx.async_eval(stored)
        self._prefixes = [p for p in self._prefixes if ids[: len(p.ids)] != p.ids]
        self._prefixes.append(Prefix(ids, stored))
        while self._prefixes and self.nbytes > self.max_bytes:
            self._prefixes.pop(0)

    def _use(self, prefix: Prefix) -> None:
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)


def image_key(pixel_values: mx.array, image_size: tuple[int, int]) -> bytes:
    """A digest that differs where the pixels or the original sizes of two images do."""
    import numpy as np

    digest = blake2b(digest_size=16)
    digest.update(repr((pixel_values.shape, str(pixel_values.dtype), image_size)).encode())
    digest.update(np.asarray(pixel_values).data)
    return digest.digest()
