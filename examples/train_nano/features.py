"""Visual features of a store's pictures, computed once for a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM

    from .store import Store

AT_ONCE = 32  # pictures


class Features:
    """Features in one memory-mapped file; each is computed when it is first asked for.

    Args:
        file: beside it stands which features it holds; both belong to one encoder and one store.
        model: whose encoder is frozen.
        store: the pictures.
        visual_tokens: of a picture.
    """

    def __init__(self, file: Path, model: FastVLM, store: Store, visual_tokens: int):
        self._model, self._store = model, store
        shape = (store.settings.pictures, visual_tokens, model.config.mm_hidden_size)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._values = _mapped(file, np.float32, shape)
        self._held = _mapped(file.with_suffix(".held"), np.uint8, shape[:1])

    def read(self, pictures: Sequence[int]) -> mx.array:
        """[pictures, n, C], computed now where they never were."""
        missing = [number for number in pictures if not self._held[number]]
        for start in range(0, len(missing), AT_ONCE):
            numbers = missing[start : start + AT_ONCE]
            pixels = mx.array(self._store.pixels[numbers])
            self._model.vision_tower.eval()
            found = np.array(self._model.vision_tower(pixels))
            if not np.isfinite(found).all():
                raise ValueError("The encoder gives features that are no finite numbers.")
            self._values[numbers] = found
            self._held[numbers] = 1
        return mx.array(self._values[list(pictures)])


def _mapped(file: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file, of zeros if there is none yet."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not file.exists():
        with file.open("wb") as new:
            new.truncate(size)
    return np.memmap(file, dtype, mode="r+", shape=shape)
