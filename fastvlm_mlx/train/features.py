"""Visual features on disk, so that a frozen encoder sees each image once.

An entry is found by what it was computed from: the pixels, how they were made, and the encoder's
weights. So nothing stale is ever read, whatever happens to files and options meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import ops
from ..checkpoint.cache_folder import CacheFolder, bytes_of, from_entry, to_entry
from ..checks import reason, shown

if TYPE_CHECKING:
    import numpy as np

LOG = logging.getLogger(__name__)
MAX_BYTES = 32 * 2**30
MOST_WAITING = 16  # entries that wait to be written

Encode = Callable[[mx.array], mx.array]


def encode_in_parts(encode: Encode, pixels: np.ndarray | mx.array) -> mx.array:
    """The features of images, computed of some at a time, so that they take less memory."""
    parts = []
    for at in range(0, len(pixels), ops.images_at_once()):
        parts.append(encode(mx.array(pixels[at : at + ops.images_at_once()])))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


class FeatureCache:
    """Visual features of images, kept in files of a folder.

    What other runs left and this one has not used is deleted where there is no room, the longest
    unused first. Beyond that, images are encoded again each time: to drop what this epoch has used
    for what it uses next would leave nothing for the following one.

    Args:
        folder: made if there is none; several processes may share it.
        encode: pixel values uint8 [B, S, S, 3] → visual features [B, n, C].
        weights: a digest of the encoder's weights, as `digest_weights` gives it.
        mode: how images become squares, as in `preprocess`.
        max_bytes: of all entries together.

    Attributes:
        encoded: how many squares were encoded.
        found: how many images were found.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
        OSError: the folder can't be made, read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        encode: Encode,
        weights: str,
        *,
        mode: str = "pad",
        max_bytes: int = MAX_BYTES,
    ):
        self.encoded = self.found = 0
        self._encode, self._weights, self._mode = encode, weights, mode
        try:
            self._files = CacheFolder(folder, max_bytes, own_stay=True)
        except OSError as error:
            where = shown(os.fspath(folder))
            raise type(error)(f"Features can't be kept in {where}: {reason(error)}.") from None
        self.folder, self.max_bytes = self._files.folder, max_bytes
        self._lock = Lock()
        self._is_full = False
        self._writer = ThreadPoolExecutor(1, "fastvlm-features")
        self._waiting: deque[Future[None]] = deque()
        self._unwritten: dict[str, mx.array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self._files.nbytes

    def key(self, pixels: np.ndarray) -> str:
        """The name of an image's entry, given its pixel values uint8 [n, S, S, 3]."""
        made = f"{self._weights} {self._mode} {pixels.shape} {pixels.dtype}".encode()
        return blake2b(pixels.tobytes(), digest_size=16, person=_short(made)).hexdigest()

    def read(self, key: str) -> bytes | None:
        """The file of an entry, if there is a whole one; for threads."""
        data = self._files.read(key)
        if data is not None:
            with self._lock:
                self.found += 1
        return data

    def find(self, key: str) -> mx.array | None:
        """The features of an entry that may have been made since `read` found none."""
        with self._lock:
            features = self._unwritten.get(key)
        if features is None and (data := self.read(key)) is not None:
            features = from_entry(data)
        return features

    def compute(self, pixels: Sequence[np.ndarray]) -> list[mx.array]:
        """The features [n, places, C] of images, given the pixel values [n, S, S, 3] of each."""
        import numpy as np

        squares = np.concatenate(pixels)
        features = encode_in_parts(self._encode, squares)
        self.encoded += len(squares)
        ends = np.cumsum([len(each) for each in pixels]).tolist()
        return [features[end - len(each) : end] for each, end in zip(pixels, ends, strict=True)]

    def write(self, key: str, features: mx.array) -> None:
        """Keep an entry; it is written in the background."""
        if self._is_full:
            return
        data = to_entry(features, key)
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        with self._lock:
            self._unwritten[key] = features
        self._waiting.append(self._writer.submit(self._write, key, data))

    def flush(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write(self, key: str, data: bytes) -> None:
        try:
            if not self._files.write(key, data):
                self._stop(f"{self.max_bytes:,} bytes are full")
        except OSError as error:
            self._stop(reason(error))
        finally:
            with self._lock:
                self._unwritten.pop(key, None)

    def _stop(self, why: str) -> None:
        """Keep no more; training goes on without."""
        if not self._is_full:
            LOG.warning(
                "No more visual features are kept in %s (%s): the others are computed each time.",
                shown(os.fspath(self.folder)),
                why,
            )
        self._is_full = True


def digest_weights(module: nn.Module) -> str:
    """A digest of the names, shapes, types and values of a module's parameters."""
    digest = blake2b(digest_size=16)
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    for name, value in sorted(parameters.items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def _short(text: bytes) -> bytes:
    return blake2b(text, digest_size=16).digest()
