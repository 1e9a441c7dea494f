"""A model's tokenizer with the settings of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .image.preprocess import preprocess, preprocess_each
from .text.tokenizer import Tokenizer


@dataclass
class Processor:
    """What a model needs to read images and prompts.

    Attributes:
        tokenizer: the model's.
        image_size: side of the square, in pixels, that an image becomes.
        mode: how an image becomes a square: "pad", "square" or "anyres", as in `preprocess`. It is
            `image_aspect_ratio` of the model's config.json.
        grid_pinpoints: the (width, height) in pixels that "anyres" may choose from.
        patch_size: side, in pixels, of the patch that one visual token stands for.
        max_length: how many tokens the decoder has positions for.
    """

    tokenizer: Tokenizer
    image_size: int
    mode: str = "pad"
    grid_pinpoints: Sequence[tuple[int, int]] | None = None
    patch_size: int = 64
    max_length: int = 8192

    def preprocess(
        self,
        image: Any,
        image_size: int | None = None,
        *,
        fast: bool = False,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """Pixel values [N, S, S, 3] of an image, by default at the model's own image size.

        Other arguments, dtype and errors as in `fastvlm_mlx.preprocess`.
        """
        size = self.image_size if image_size is None else image_size
        return preprocess(image, size, self.mode, self.grid_pinpoints, fast=fast, dtype=dtype)

    def preprocess_each(
        self,
        images: Sequence[Any],
        image_size: int | None = None,
        *,
        fast: bool = False,
        dtype: mx.Dtype = mx.float32,
    ) -> Iterator[tuple[mx.array, tuple[int, int]]]:
        """Pixel values and upright (width, height) of each image, decoded ahead in threads.

        As `image.preprocess.preprocess_each`, by default at the model's own image size.
        """
        size = self.image_size if image_size is None else image_size
        return preprocess_each(images, size, self.mode, self.grid_pinpoints, fast=fast, dtype=dtype)

    def num_visual_tokens(self, image_size: int | None = None) -> int:
        """How many visual tokens a square of S = `image_size` pixels has: (S / patch_size)².

        Raises:
            ValueError: the size is not a multiple of `patch_size`.
        """
        size = self.image_size if image_size is None else image_size
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, found {size}.")
        return (size // self.patch_size) ** 2
