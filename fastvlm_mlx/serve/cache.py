"""What is kept across requests, and across restarts of the server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.cache_folder import digest_of
from ..generation.prefix import Prefix
from ..generation.prompt_cache import MAX_BYTES, PromptCache
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache
from ..version import __version__
from .disk import MAX_DISK_BYTES, Disk


class RequestCache(PromptCache):
    """Images and beginnings of prompts that earlier requests brought, within one byte budget.

    With a folder, visual tokens, and the keys and values of prompts up to their last image, are
    there again after a restart. They are kept by the model's weights, so that those of another
    model, or of another precision, are never taken for its own.

    Args:
        model: whose visual tokens and KV caches are kept.
        max_bytes: of all that is kept in memory.
        cache_dir: the folder; without one, nothing outlives the process.
        max_disk_bytes: of the files there.

    Raises:
        ValueError: a number of bytes is not a whole number from 1.
        OSError: the folder can't be made, read or written.
    """

    def __init__(
        self,
        model: FastVLM,
        max_bytes: int = MAX_BYTES,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        max_disk_bytes: int = MAX_DISK_BYTES,
    ):
        super().__init__(model, max_bytes)
        self.disk = None if cache_dir is None else Disk(cache_dir, max_disk_bytes)
        self._identity = "" if self.disk is None else identity_of(model)

    def find_image(self, key: bytes) -> mx.array | None:
        """As `PromptCache.find_image`; also from the folder."""
        tokens = super().find_image(key)
        if tokens is not None or self.disk is None:
            return tokens
        name = self._name("image", key)
        tokens = self.disk.read(name)
        if tokens is not None and not self._fits_image(tokens):
            self.disk.delete(name)
            return None
        if tokens is not None:
            super().store_image(key, tokens)
        return tokens

    def store_image(self, key: bytes, tokens: mx.array) -> None:
        """As `PromptCache.store_image`; also in the folder."""
        super().store_image(key, tokens)
        if self.disk is not None:
            self.disk.write(self._name("image", key), tokens)

    def find(self, ids: list[int]) -> Prefix:
        """As `PromptCache.find`; also from the folder, up to the end of an image."""
        prefix = super().find(ids)
        if self.disk is None:
            return prefix
        for end in reversed(ends_of_images(ids[:-1])):
            if end <= len(prefix.ids):
                break
            if self._load_prefix(ids[:end]):
                return super().find(ids)
        return prefix

    def store(self, ids: list[int], cache: Sequence[KVCache], row: int = 0) -> None:
        """As `PromptCache.store`; up to the last image also in the folder."""
        super().store(ids, cache, row)
        ends = ends_of_images(ids) if self.disk is not None else []
        if self.disk is None or not ends:
            return
        name = self._name("prefix", repr(ids[: ends[-1]]).encode())
        if name not in self.disk:
            kept = [
                a.stored[:, row : row + 1, :, : ends[-1]] for a in cache if a.stored is not None
            ]
            self.disk.write(name, mx.stack(kept))

    def flush(self) -> None:
        """Wait until what the folder is to keep is written."""
        if self.disk is not None:
            self.disk.flush()

    def _load_prefix(self, ids: list[int]) -> bool:
        """Take the keys and values of a prompt's beginning from the folder, if they are there."""
        assert self.disk is not None
        name = self._name("prefix", repr(ids).encode())
        stored = self.disk.read(name)
        if stored is None:
            return False
        text = self.model.config.text
        known = (2, 1, text.num_key_value_heads, len(ids), text.head_dim)
        if stored.shape != (len(self.model.layers), *known):
            self.disk.delete(name)
            return False
        self.store_prefix(Prefix(ids, list(stored)))
        return True

    def _fits_image(self, tokens: mx.array) -> bool:
        return tokens.ndim == 2 and tokens.shape[1] == self.model.config.text.hidden_size

    def _name(self, kind: str, key: bytes) -> str:
        """What is computed by this model from what has this key."""
        about = f"{self._identity} {kind} ".encode() + key
        return blake2b(about, digest_size=16).hexdigest()


def ends_of_images(ids: Sequence[int]) -> list[int]:
    """Where images end in a prompt's ids, as `PromptCache.tag` gives them."""
    pairs = zip(ids, [*ids[1:], 0], strict=False)
    return [n for n, (mark, after) in enumerate(pairs, 1) if mark < 0 and mark != after]


def identity_of(model: FastVLM) -> str:
    """A digest of a model's weights and configuration, and of this version of the library."""
    weights = sorted(dict(tree_flatten(model.parameters())).items())
    names = repr((__version__, model.config, [name for name, _ in weights]))
    return digest_of(mx.array(list(names.encode())), *(array for _, array in weights))
