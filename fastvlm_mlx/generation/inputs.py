"""Prompt and images → what the decoder reads; every way of answering begins here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

import mlx.core as mx

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..ops import check_process, clear_large_cache
from ..processor import Processor
from ..text.messages import Messages, collect_images
from ..text.prompt import build_prompt
from .options import Options

# What a person gives as images: one, several or none
ImageSources: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
# (width, height) in pixels of each original image
Sizes: TypeAlias = Sequence[tuple[int, int]]
# (model, pixel values, original sizes) → (visual tokens, key) of each image
Encode = Callable[[FastVLM, Sequence[mx.array], Sizes], tuple[list[mx.array], list[bytes]]]


class Times(NamedTuple):
    """When an answer was asked for, its images were read, and they were encoded, in seconds."""

    start: float
    preprocessed: float
    encoded: float


@dataclass
class Inputs:
    """A prompt, ready for the decoder.

    Attributes:
        input_ids: of the prompt, with `config.image_token_index` at the place of each visual token.
        embeddings: [1, T, hidden_size] of them.
        visual_tokens: [n, hidden_size] of each image, in the prompt's order.
        pixel_values: uint8 [n, S, S, 3] of each image that was read: one square, or with tiles
            its overview first.
        image_sizes: original (width, height) of each.
        times: see `Times`.
        image_keys: of the images, where `encode` gave them.
    """

    input_ids: list[int]
    embeddings: mx.array
    visual_tokens: list[mx.array]
    pixel_values: list[mx.array]
    image_sizes: list[tuple[int, int]]
    times: Times
    image_keys: list[bytes] = field(default_factory=list)


def read_inputs(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSources,
    options: Options,
    *,
    earlier: Sequence[mx.array] = (),
    encode: Encode | None = None,
) -> Inputs:
    """Read and encode images, tokenize the prompt and embed it; errors as `generate`.

    Args:
        model, processor, prompt, image: as `generate` takes them.
        options: how to read them.
        earlier: visual tokens of images that stand in the prompt before these, as a conversation
            keeps them.
        encode: what gives visual tokens, and a key of each image, instead of
            `compute_visual_tokens`.
    """
    check_process()
    start = time.perf_counter()
    images = collect_images(prompt, [*earlier, *list_images(image)])[len(earlier) :]
    pixel_values, sizes = preprocess_images(
        processor, images, options.image_size, fast=options.fast
    )
    preprocessed = time.perf_counter()
    counts = [len(tokens) for tokens in earlier]
    counts += map(model.num_visual_tokens, pixel_values, sizes)
    input_ids = tokenize(model, processor, prompt, counts, options)  # too long? before encoding
    keys: list[bytes] = []
    if encode is None:
        encoded = compute_visual_tokens(model, pixel_values, sizes)
    else:
        encoded, keys = encode(model, pixel_values, sizes)
    times = Times(start, preprocessed, time.perf_counter())
    visual_tokens = [*earlier, *encoded]
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=visual_tokens)
    mx.async_eval(embeddings)  # nothing is left for the thread that decodes them
    return Inputs(input_ids, embeddings, visual_tokens, pixel_values, sizes, times, keys)


class ContextTooLong(ValueError):
    """A prompt that leaves no room for an answer.

    Attributes:
        tokens: that the prompt has.
        limit: of the model, for prompt and answer together.
    """

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"The prompt has {tokens} tokens, and the model's limit is {limit} with the answer; "
            "shorten it, or use fewer or smaller images."
        )
        self.tokens = tokens
        self.limit = limit


def list_images(image: ImageSources) -> list[ImageSource]:
    """One image, several or none, as a list."""
    if image is None:
        return []
    if isinstance(image, (list, tuple)):
        return list(image)
    return [cast(ImageSource, image)]


def preprocess_images(
    processor: Processor,
    images: Sequence[ImageSource],
    image_size: int | None = None,
    *,
    fast: bool = False,
) -> tuple[list[mx.array], list[tuple[int, int]]]:
    """Pixel values, uint8 [n, S, S, 3], and original (width, height) of each image."""
    # As bytes, nothing is left to compute: MLX would keep a stream for each thread that does.
    each = list(processor.preprocess_each(images, image_size, fast=fast, dtype=mx.uint8))
    return [pixels for pixels, _ in each], [size for _, size in each]


def compute_visual_tokens(
    model: FastVLM, pixel_values: Sequence[mx.array], image_sizes: Sizes
) -> list[mx.array]:
    """The visual tokens [n, hidden_size] of each image, computed, one image at a time."""
    visual_tokens = model.encode_images(pixel_values, image_sizes) if pixel_values else []
    mx.eval(visual_tokens)
    clear_large_cache()  # of the encoder's activations, which the decoder has no use for
    return visual_tokens


def tokenize(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    counts: Sequence[int],
    options: Options,
) -> list[int]:
    """Token ids of a prompt, with a place for each visual token; `counts` has those of each image.

    Raises:
        ValueError: as `build_prompt`.
        ContextTooLong: the prompt leaves no room for an answer.
    """
    input_ids = build_prompt(
        processor.tokenizer,
        prompt,
        num_visual_tokens=counts,
        system=options.system,
        image_token_index=model.config.image_token_index,
        conv_mode=options.conv_mode,
    )
    check_length(input_ids, processor.max_length)
    return input_ids


def check_length(input_ids: Sequence[int], max_length: int) -> None:
    """ContextTooLong if a prompt leaves no room for an answer."""
    if len(input_ids) >= max_length:
        raise ContextTooLong(len(input_ids), max_length)


def answer_limit(input_ids: Sequence[int], options: Options, processor: Processor) -> int:
    """Tokens to generate at most: those asked for, or those that the model has positions for."""
    return min(options.max_tokens, processor.max_length - len(input_ids))
