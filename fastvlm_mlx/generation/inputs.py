"""Prompt and images to what the decoder reads; every way of answering begins here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import mlx.core as mx

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.prompt import build_prompt, check_marks
from ..text.template import Messages
from .options import Options

# (model, pixel values, original sizes) → (visual tokens, key) of each image
Encode = Callable[
    [FastVLM, list[mx.array], list[tuple[int, int]]], tuple[list[mx.array], list[bytes]]
]


class Times(NamedTuple):
    """When an answer was asked for, its images were read, and they were encoded."""

    start: float
    preprocessed: float
    encoded: float


@dataclass
class Inputs:
    """A prompt, ready for the decoder.

    Attributes:
        input_ids: with `image_token_index` at the place of each visual token.
        embeddings: [1, T, hidden_size] of them.
        features: the visual tokens [n, hidden_size] of each image.
        pixel_values, image_sizes: of the images that were read.
        image_keys: of those images, where `encode` gave them.
        times: see `Times`.
    """

    input_ids: list[int]
    embeddings: mx.array
    features: list[mx.array]
    pixel_values: list[mx.array]
    image_sizes: list[tuple[int, int]]
    times: Times
    image_keys: list[bytes] = field(default_factory=list)

    def limit(self, options: Options, processor: Processor) -> int:
        """Tokens to generate at most."""
        return min(options.max_tokens, processor.max_length - len(self.input_ids))


def read_inputs(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSource | Sequence[ImageSource] | None,
    options: Options,
    encode: Encode | None = None,
) -> Inputs:
    """Read, encode and tokenize; errors as `generate`.

    Args:
        model, processor, prompt, image: as `generate` takes them.
        options: how to read them.
        encode: what gives visual tokens instead of `encode_images`, and a key of each image.
    """
    start = time.perf_counter()
    images = list_images(image)
    check_marks(prompt, len(images))
    pixel_values, sizes = preprocess_images(
        processor, images, options.image_size, fast=options.fast
    )
    preprocessed = time.perf_counter()
    keys: list[bytes] = []
    if encode is None:
        features = encode_images(model, pixel_values, sizes)
    else:
        features, keys = encode(model, pixel_values, sizes)
    times = Times(start, preprocessed, time.perf_counter())
    input_ids = tokenize(model, processor, prompt, features, options)
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=features)
    return Inputs(input_ids, embeddings, features, pixel_values, sizes, times, keys)


def list_images(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
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
    """Pixels, uint8 [n, S, S, 3], and original (width, height) of each image."""
    each = list(processor.preprocess_each(images, image_size, fast=fast, dtype=mx.uint8))
    return [pixels for pixels, _ in each], [size for _, size in each]


def encode_images(
    model: FastVLM, pixel_values: list[mx.array], image_sizes: list[tuple[int, int]]
) -> list[mx.array]:
    """The visual tokens [n, hidden_size] of each image, computed."""
    features = model.encode_images(pixel_values, image_sizes) if pixel_values else []
    mx.eval(features)
    mx.clear_cache()  # of the encoder's activations, which the decoder has no use for
    return features


def tokenize(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    features: Sequence[mx.array],
    options: Options,
) -> list[int]:
    """Token ids of a prompt, with a place for each of the visual tokens in `features`.

    Raises:
        ValueError: as `prompt.build_prompt`, or the prompt leaves no room for an answer.
    """
    input_ids = build_prompt(
        processor.tokenizer,
        prompt,
        num_visual_tokens=[len(f) for f in features],
        system=options.system,
        image_token_index=model.config.image_token_index,
        conv_mode=options.conv_mode,
    )
    check_length(input_ids, processor.max_length)
    return input_ids


def check_length(input_ids: Sequence[int], max_length: int) -> None:
    """ValueError if a prompt leaves no room for an answer."""
    if len(input_ids) >= max_length:
        raise ValueError(
            f"The prompt has {len(input_ids)} tokens, and the model's limit is {max_length} with "
            "the answer; shorten it, or use fewer or smaller images."
        )
