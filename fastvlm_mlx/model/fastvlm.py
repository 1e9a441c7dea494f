"""FastVLM: encoder, projector and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..config import FastVLMConfig
from ..image.grid import anyres_grid
from ..ops import check_process, gelu
from .kv_cache import KVCache, LayerCache
from .qwen2 import Block, Qwen2
from .vision import FastViTHD

PixelValues = mx.array | Sequence[mx.array]  # one array, or one per image


class Projector(nn.Module):
    """Visual features → visual tokens: linear layers with GELU between them
    (`build_vision_projector`)."""

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        widths = [config.mm_hidden_size] + [config.text.hidden_size] * config.projector_depth
        self.layers = [nn.Linear(a, b) for a, b in pairwise(widths)]

    def __call__(self, x: mx.array) -> mx.array:
        """[..., mm_hidden_size] → [..., hidden_size]."""
        for i, layer in enumerate(self.layers):
            x = layer(gelu(x, training=self.training) if i else x)
        return x


class FastVLM(nn.Module):
    """A vision language model (FastVLM paper); `checkpoint.load.load_model` fills it.

    It is made for inference; `train()` turns to the forms that gradients pass through.
    """

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.vision)
        self.mm_projector = Projector(config)
        self.language_model = Qwen2(config.text)
        if config.mm_patch_merge_type == "spatial_unpad":
            self.image_newline = mx.zeros((config.text.hidden_size,))
        self.eval()

    @property
    def layers(self) -> list[Block]:
        """The decoder's layers, as mlx_lm counts them to make caches."""
        return self.language_model.layers

    def make_kv_cache(self) -> list[KVCache]:
        """An empty KV cache for one batch of sequences."""
        return [KVCache() for _ in self.layers]

    def __call__(
        self,
        input_ids: mx.array,
        cache: Sequence[LayerCache] | None = None,
        input_embeddings: mx.array | None = None,
        pixel_values: PixelValues | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> mx.array:
        """Logits of every position.

        Args:
            input_ids: [B, T] token ids, with `config.image_token_index` at each visual token.
            cache: one KV cache per layer, updated in place.
            input_embeddings: [B, T, hidden_size], used instead of `input_ids`.
            pixel_values: images as in `embed_inputs`.
            image_sizes: as in `embed_inputs`.

        Returns:
            [B, T, vocab_size] logits.
        """
        check_process()
        if input_embeddings is None and pixel_values is not None:
            input_embeddings = self.embed_inputs(input_ids, pixel_values, image_sizes)
        return self.language_model(input_ids, cache, input_embeddings)

    def encode_image(self, pixel_values: mx.array) -> mx.array:
        """[B, S, S, 3] pixel values in [0, 1] → [B, (S/64)², hidden_size] visual tokens."""
        check_process()
        return self.mm_projector(self.vision_tower(pixel_values))

    def encode_images(
        self, pixel_values: PixelValues, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[mx.array]:
        """The visual tokens of each image.

        Args:
            pixel_values: [B, S, S, 3], one row per image; or one array per image, of any size. With
                `anyres`, an array is one image: its overview, then its tiles.
            image_sizes: (width, height) in pixels of each original image; needed for tiles that
                are merged spatially.

        Returns:
            [n, hidden_size] per image, not computed yet.
        """
        if isinstance(pixel_values, mx.array) and self.config.image_aspect_ratio != "anyres":
            return list(self.encode_image(pixel_values))
        if isinstance(pixel_values, mx.array):
            pixel_values = [pixel_values]
        sizes: Sequence[tuple[int, int] | None] = image_sizes or [None] * len(pixel_values)
        return [
            self.merge_tiles(self.encode_image(tiles), size)
            for tiles, size in zip(pixel_values, sizes, strict=True)
        ]

    def num_visual_tokens(
        self, pixel_values: mx.array, image_size: tuple[int, int] | None = None
    ) -> int:
        """How many visual tokens `encode_images` gives for an image, without encoding it.

        Args:
            pixel_values: [n, S, S, 3] of one image.
            image_size: as `merge_tiles` takes.
        """
        tiles, side = pixel_values.shape[:2]
        return count_visual_tokens(self.config, tiles, side, image_size)

    def merge_tiles(self, tiles: mx.array, image_size: tuple[int, int] | None) -> mx.array:
        """Join the visual tokens of an image's overview and tiles (`llava_arch.py`).

        Args:
            tiles: [1 + tiles, n, hidden_size], the overview first; it stands alone where nothing
                was tiled.
            image_size: (width, height) in pixels of the original image.

        Returns:
            [visual tokens, hidden_size].

        Raises:
            ValueError: tiles are merged spatially and there is no `image_size`.
        """
        if self.config.image_aspect_ratio != "anyres":
            return tiles.flatten(0, 1)
        merge_type = self.config.mm_patch_merge_type
        newline = self.image_newline[None] if merge_type == "spatial_unpad" else None
        if len(tiles) == 1:
            rows = [tiles[0]] if newline is None else [tiles[0], newline]
            return mx.concatenate(rows)
        if merge_type == "flat":
            return tiles.flatten(0, 1)
        if image_size is None:
            raise ValueError("Tiles that are merged spatially need the image's original size.")
        grid = _merge_grid(tiles[1:], image_size, self.config)
        if newline is not None:
            grid = _unpad(grid, image_size)
            ends = mx.broadcast_to(newline, (grid.shape[0], 1, newline.shape[-1]))
            grid = mx.concatenate([grid, ends], axis=1)
        return mx.concatenate([tiles[0], grid.flatten(0, 1)])

    def embed_inputs(
        self,
        input_ids: mx.array,
        pixel_values: PixelValues | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        visual_tokens: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Embed tokens and put visual tokens in their places.

        Args:
            input_ids: [B, T] token ids, with `config.image_token_index` at each visual token.
            pixel_values: the images of the whole batch in reading order, as `encode_images` takes.
            image_sizes: as `encode_images` takes.
            visual_tokens: those of each image, as `encode_images` gives them, instead of
                `pixel_values`.

        Returns:
            [B, T, hidden_size].

        Raises:
            ValueError: the places and the visual tokens differ in number.
        """
        check_process()
        places = input_ids == self.config.image_token_index
        embeddings = self.language_model.embed(mx.where(places, 0, input_ids))
        if visual_tokens is None:
            visual_tokens = (
                [] if pixel_values is None else self.encode_images(pixel_values, image_sizes)
            )
        # Counted on the host, where ids are, so that nothing waits for a GPU.
        rows_of_ids = cast("list[list[int]]", input_ids.tolist())
        found = sum(row.count(self.config.image_token_index) for row in rows_of_ids)
        expected = sum(len(tokens) for tokens in visual_tokens)
        if expected != found:
            raise ValueError(
                f"The images give {expected} visual tokens, but input_ids has {found} places "
                f"for them ({self.config.image_token_index})."
            )
        if not visual_tokens:
            return embeddings
        rows = mx.concatenate(list(visual_tokens)).astype(embeddings.dtype)
        index = mx.cumsum(places.flatten().astype(mx.int32)).reshape(places.shape) - 1
        return mx.where(places[..., None], rows[mx.maximum(index, 0)], embeddings)

    def embed_at(
        self,
        input_ids: mx.array,
        visual_tokens: mx.array,
        places: mx.array,
        *,
        with_spare: bool = False,
    ) -> mx.array:
        """Embed tokens and put visual tokens in places known beforehand.

        Nothing is read on the host, so that it can be a part of a compiled training step.

        Args:
            input_ids: [B, T] token ids; at a visual token's place any id of the vocabulary.
            visual_tokens: [V, hidden_size], those of all images.
            places: int32 [V], the place b T + t of each of them, none twice.
            with_spare: whether some have the place B T behind the last, which is dropped.

        Returns:
            [B, T, hidden_size].
        """
        embeddings = self.language_model.embed(input_ids)
        flat = embeddings.flatten(0, 1)
        count = len(flat)
        if with_spare:
            flat = mx.pad(flat, [(0, 1), (0, 0)])
        flat[places] = visual_tokens.astype(flat.dtype)
        return flat[:count].reshape(embeddings.shape)

    def unfuse(self) -> None:
        """Have each projection of the decoder apart, under the names of the published code, as
        training needs them; `checkpoint.names.unfuse` names the weights of either form alike."""
        for block in self.layers:
            block.self_attn.unfuse()
            block.mlp.unfuse()


def count_visual_tokens(
    config: FastVLMConfig, tiles: int, side: int, image_size: tuple[int, int] | None = None
) -> int:
    """How many visual tokens an image of so many squares of `side` pixels has; `image_size` as
    `FastVLM.merge_tiles` takes it."""
    side //= config.vision.patch_size
    square, merge_type = side * side, config.mm_patch_merge_type
    has_newline = merge_type == "spatial_unpad"
    if config.image_aspect_ratio != "anyres" or (merge_type == "flat" and tiles > 1):
        return tiles * square
    if tiles == 1 or image_size is None:
        return square + has_newline
    across, down = anyres_grid(
        image_size, config.image_grid_pinpoints, side * config.vision.patch_size
    )
    rows, columns = down * side, across * side
    if has_newline:
        top, left = unpad_margins((rows, columns), image_size)
        return square + (rows - 2 * top) * (columns - 2 * left + 1)
    return square + rows * columns


def _merge_grid(tiles: mx.array, image_size: tuple[int, int], config: FastVLMConfig) -> mx.array:
    """Tiles [tiles, n, C] → one grid of tokens [rows, columns, C]."""
    side = int(tiles.shape[1] ** 0.5)
    across, down = anyres_grid(
        image_size, config.image_grid_pinpoints, side * config.vision.patch_size
    )
    grid = tiles.reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
    return grid.reshape(down * side, across * side, -1)


def _unpad(grid: mx.array, image_size: tuple[int, int]) -> mx.array:
    """Drop the rows or columns of tokens that saw only padding (`unpad_image`)."""
    top, left = unpad_margins(grid.shape[:2], image_size)
    rows, columns = grid.shape[:2]
    return grid[top : rows - top, left : columns - left]


def unpad_margins(grid: Sequence[int], image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) to drop at each end of a (rows, columns) grid for a (width, height) image."""
    rows, columns = grid
    width, height = image_size
    if width / height > columns / rows:
        return (rows - int(height * (columns / width))) // 2, 0
    return 0, (columns - int(width * (rows / height))) // 2
