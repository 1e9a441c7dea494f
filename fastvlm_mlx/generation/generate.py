"""A prompt about images, answered: the whole text or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .decode import generate_tokens, make_kv_cache
from .inputs import read_inputs
from .options import Options
from .prompt_cache import PromptCache
from .response import Response, stream_responses
from .speculate import make_drafter, speculate_tokens


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[dict[str, str]],
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> str:
    """Answer a prompt about any number of images; the whole text.

    Args:
        model, processor: from `load`.
        prompt: a question, in which `<image>` may mark the images' places, or a chat as a list of
            {"role", "content"}.
        image: one image or several: path, URL, bytes, PIL image or array.
        prompt_cache: what earlier calls computed, so that an image asked about again is neither
            encoded nor read by the decoder again.
        **options: the fields of `Options`.

    Raises:
        ValueError: an option is out of range, an image can't be read, marks and images differ in
            number, or the prompt is longer than the model's limit.
        FileNotFoundError: no such image.
    """
    responses = stream_generate(
        model, processor, prompt, image=image, prompt_cache=prompt_cache, **options
    )
    return "".join(response.text for response in responses)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[dict[str, str]],
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> Iterator[Response]:
    """As `generate`, piece by piece; bad arguments raise on the call, not on the first piece."""
    chosen = Options(**options)
    encode = None if prompt_cache is None else prompt_cache.encode
    inputs = read_inputs(model, processor, prompt, image, chosen, encode)
    input_ids, limit = inputs.input_ids, inputs.limit(chosen, processor)
    embeddings, cache = inputs.embeddings, make_kv_cache(model, chosen)
    keeps_prompt = (
        prompt_cache is not None and chosen.max_kv_size is None and chosen.kv_bits is None
    )
    if prompt_cache is not None and keeps_prompt:
        ids = prompt_cache.tag(input_ids, inputs.features, inputs.image_keys)
        embeddings = embeddings[:, prompt_cache.fetch(ids, cache) :]
    drafter = make_drafter(processor, prompt, inputs, chosen)
    times = inputs.times
    del inputs
    if drafter is None:
        tokens = generate_tokens(model, input_ids, embeddings, cache, chosen, limit)
    else:
        tokens = speculate_tokens(model, input_ids, embeddings, cache, chosen, limit, drafter)
    if prompt_cache is not None and keeps_prompt:
        tokens = keep_prompt(prompt_cache, ids, cache, tokens)
    del embeddings
    return stream_responses(tokens, processor, len(input_ids), chosen.stop, limit, times)


def keep_prompt(
    prompt_cache: PromptCache, ids: list[int], cache: list[Any], tokens: Iterator[int]
) -> Iterator[int]:
    """The tokens, and once the first shows that the prompt was read, it is remembered."""
    for n, token in enumerate(tokens):
        if n == 0:
            prompt_cache.store(ids, cache)
        yield token
