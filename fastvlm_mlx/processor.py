"""What reads the images and prompts of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .image.preprocess import preprocess, preprocess_each
from .text.tokenizer import Tokenizer


@dataclass
class Processor:
    """What a model must know to read images and prompts.

    Attributes:
        tokenizer: the model's.
        image_size: side of the square, in pixels, that an image becomes.
        mode: how it does: "pad", "square" or "anyres".
        grid_pinpoints: widths and heights, in pixels, that "anyres" may choose from.
        patch_size: side, in pixels, of a visual token's patch.
        max_length: most tokens that the decoder has positions for.
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
        """Pixels [N, S, S, 3] of an image, by default at the model's own size.

        `fast` and `dtype` are those of `fastvlm_mlx.preprocess`.
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
        """Pixels and upright (width, height) of each image; threads decode those that follow.

        As `fastvlm_mlx.image.preprocess_each`, by default at the model's own size.
        """
        size = self.image_size if image_size is None else image_size
        return preprocess_each(images, size, self.mode, self.grid_pinpoints, fast=fast, dtype=dtype)

    def num_visual_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one square of S = `image_size` pixels: (S / patch_size)².

        Raises:
            ValueError: the size is not a multiple of `patch_size`.
        """
        size = self.image_size if image_size is None else image_size
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, found {size}.")
        return (size // self.patch_size) ** 2
