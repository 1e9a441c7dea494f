"""The images of examples, read in threads: as pixel values, or as features that are known."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..checkpoint.cache_folder import from_entry
from ..image.load import ImageSource, load_image
from ..image.preprocess import read_and_resize
from ..image.resize import choose_resize
from ..processor import Processor
from .augment import Augment, random_of
from .features import FeatureCache

if TYPE_CHECKING:
    import numpy as np

Images = mx.array | list[mx.array] | None
"""One array of all, or with "anyres" one per image."""


class ReadImage(NamedTuple):
    """An image that was read.

    Attributes:
        size: (width, height) of the original.
        pixels: uint8 [n, S, S, 3]; None where its features are known.
        key: of its features, where they are kept.
        features: the file that holds them.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None
    key: str = ""
    features: bytes | None = None


class ImageReader:
    """Reads images as `preprocess` does.

    Args:
        processor: the model's.
        image_size: side of the squares; by default the processor's.
        augment: how to change them first; None for not at all.
        features: where their visual features are kept.

    Raises:
        ValueError: a bad image size, or images are changed and kept.
    """

    def __init__(
        self,
        processor: Processor,
        image_size: int | None = None,
        *,
        augment: Augment | None = None,
        features: FeatureCache | None = None,
    ):
        if augment is not None and features is not None:
            raise ValueError(
                "Changed images look different in every epoch, so their features can't be kept: "
                "leave out either augment or the cache of features."
            )
        side = processor.image_size if image_size is None else image_size
        processor.num_visual_tokens(side)  # or it is no multiple of the patch size
        resize, purpose = choose_resize(side, processor.mode, processor.grid_pinpoints)
        purpose = purpose._replace(reduction=None)
        self._work = partial(read_and_resize, threads=1, resize=resize, purpose=purpose)
        self._is_tiled = processor.mode == "anyres"
        self._augment, self.features = augment, features
        self._known: dict[tuple[Any, ...], tuple[str, tuple[int, int]]] = {}

    def read(self, source: ImageSource, *names: object) -> ReadImage:
        """An image; `names` (seed, epoch, row, number) draw how it is changed.

        Raises:
            ValueError, OSError: as `load_image`.
        """
        if self.features is not None:
            return self._read_features(source, self.features)
        if self._augment is not None:
            picture = load_image(source)
            source = self._augment.apply(picture, random_of(*names))
        pixels, size = self._work(source)
        return ReadImage(size, pixels)

    def _read_features(self, source: ImageSource, cache: FeatureCache) -> ReadImage:
        file = _version(source)
        key, size = self._known.get(file, ("", (0, 0)))
        if key and (data := cache.read(key)) is not None:
            return ReadImage(size, None, key, data)
        pixels, size = self._work(source)
        key = cache.key(pixels)
        if file:
            self._known[file] = key, size
        if (data := cache.read(key)) is not None:
            return ReadImage(size, None, key, data)
        return ReadImage(size, pixels, key)

    def collect(self, images: Sequence[ReadImage]) -> tuple[Images, Images]:
        """The pixel values and the features of a batch: one of them, or neither without images.

        What is not known yet is encoded and kept.
        """
        if not images:
            return None, None
        if self.features is None:
            return self._join([mx.array(i.pixels) for i in images if i.pixels is not None]), None
        found = {i.key: from_entry(i.features) for i in images if i.features is not None}
        missing = {i.key: i.pixels for i in images if i.key not in found and i.pixels is not None}
        for key in list(missing):
            if (features := self.features.find(key)) is not None:
                found[key] = features
                del missing[key]
        if missing:
            computed = self.features.compute(list(missing.values()))
            for key, features in zip(missing, computed, strict=True):
                found[key] = features
                self.features.write(key, features)
        return None, self._join([found[image.key] for image in images])

    def _join(self, each: list[mx.array]) -> Images:
        return each if self._is_tiled else mx.concatenate(each)


def _version(source: Any) -> tuple[Any, ...]:
    """What tells an image from another without reading it, and a file from what it was before;
    nothing for images in memory that may change."""
    if isinstance(source, Path):
        stat = source.stat()
        return source, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return (source,) if isinstance(source, Hashable) else ()
