"""How long the prompt of a request is, known before any of it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..generation.options import Options
from ..image.decode import Picture
from ..image.grid import anyres_grid
from ..image.resize import choose_resize
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.prompt import build_prompt
from .errors import too_long
from .media import image_parts

LARGEST_SIZE = 2048  # pixels, of the square that the encoder sees, unless the model's own is larger
MOST_CHARACTERS_PER_TOKEN = 64  # on average; a longer prompt is not even tokenized


def count_tokens(
    model: FastVLM,
    processor: Processor,
    messages: Sequence[Mapping[str, Any]],
    options: Options,
    limit: int,
) -> int:
    """The tokens of a prompt, with those of its images.

    Args:
        model, processor: of the engine.
        messages: with PIL images in their parts.
        options: of the request.
        limit: the most tokens that a prompt may have.

    Raises:
        ValueError: the messages don't make a prompt, or an image can't be resized.
        ApiError: it has more tokens than `limit`.
    """
    texts = (part["text"] for m in messages for part in m["content"] if part["type"] == "text")
    if sum(map(len, texts)) > limit * MOST_CHARACTERS_PER_TOKEN:
        raise too_long(f"more than {limit}", limit, processor.max_length)
    size = processor.image_size if options.image_size is None else options.image_size
    processor.num_visual_tokens(size)  # is it a size at all?
    if size > max(LARGEST_SIZE, processor.image_size):
        raise ValueError(f"image_size may be at most {LARGEST_SIZE} here, found {size}.")
    images = [part["image"] for part in image_parts(messages)]
    ids = build_prompt(
        processor.tokenizer,
        messages,
        num_visual_tokens=[_count_visual_tokens(model, processor, image, size) for image in images],
        system=options.system,
        image_token_index=model.config.image_token_index,
    )
    if len(ids) > limit:
        raise too_long(len(ids), limit, processor.max_length)
    return len(ids)


def _count_visual_tokens(model: FastVLM, processor: Processor, image: Any, size: int) -> int:
    """The visual tokens of an image, from its size."""
    import numpy as np

    _, purpose = choose_resize(size, processor.mode, processor.grid_pinpoints)
    purpose.check(Picture(image, 1, image.size))
    squares = 1
    if processor.mode == "anyres":
        across, down = anyres_grid(image.size, processor.grid_pinpoints or (), size)
        squares += across * down
    pixels: Any = np.broadcast_to(np.uint8(0), (squares, size, size, 3))  # which takes no memory
    return model.num_visual_tokens(pixels, image.size)
