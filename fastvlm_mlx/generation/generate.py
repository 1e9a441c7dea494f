"""A prompt about images, answered: the whole text or piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages
from ..video.decode import VideoSource
from .beam import search_tokens
from .constrain import Constraint, make_constraint
from .decode import generate_tokens, make_kv_cache
from .inputs import ImageSources, Inputs, answer_limit, read_inputs
from .options import Options
from .prompt_cache import PromptCache
from .response import Response, stream_responses, whole_text
from .sampling import Logprobs
from .speculate import make_drafter, speculate_tokens
from .video import FRAMES, with_frames


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSources = None,
    *,
    video: VideoSource | None = None,
    frames: int = FRAMES,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> str:
    """Answer a prompt about any number of images; the whole text.

    Args:
        model, processor: from `load`.
        prompt: a question, in which `<image>` may mark the images' places; or a chat as a list of
            {"role", "content"}, whose contents are texts or lists of parts as OpenAI, transformers
            and mlx-vlm write them: {"type": "text", "text": …}, {"type": "image", "image": …} (or
            "url", "path"), {"type": "image_url", "image_url": {"url": …}}. {"type": "image"} by
            itself is the next of `image`. A text that a ChatML template wrote is taken as it is.
        image: one image or several: path, URL, bytes, PIL image or array.
        video: instead of images, a video (path, http, https or data URL, bytes or file object), of
            which the prompt gets a few frames with their times; in messages also as parts
            {"type": "video", "video": …} or {"type": "video_url", …}. It needs PyAV, the extra
            `video`.
        frames: of each video, the most: by scene, and evenly within each. There are fewer, with a
            warning, where the model has no room for them.
        prompt_cache: what earlier calls computed, so that an image asked about again is neither
            encoded nor read by the decoder again.
        **options: the fields of `Options`.

    Raises:
        ValueError: an option is out of range, an image or video can't be read, marks and images
            differ in number, or the prompt is longer than the model's limit.
        IncompleteAnswer: x
        FileNotFoundError: no such image or video.
        ImportError: a video, and PyAV is not installed.
        TypeError: there is no such option.
    """
    chosen = Options.of(options)
    responses = stream_generate(
        model,
        processor,
        prompt,
        image=image,
        video=video,
        frames=frames,
        prompt_cache=prompt_cache,
        **vars(chosen),
    )
    return whole_text(responses, chosen)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSources = None,
    *,
    video: VideoSource | None = None,
    frames: int = FRAMES,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> Iterator[Response]:
    """As `generate`, piece by piece; bad arguments raise on the call, not on the first piece."""
    chosen = Options.of(options)
    prompt = with_frames(model, processor, prompt, image, video, frames, chosen)
    constraint = make_constraint(processor, model.config.text.vocab_size, chosen)
    encode = None if prompt_cache is None else prompt_cache.encode
    inputs = read_inputs(model, processor, prompt, image, chosen, encode=encode)
    input_ids, times = inputs.input_ids, inputs.times
    limit = answer_limit(input_ids, chosen, processor)
    cache = make_kv_cache(model, chosen)
    logprobs: deque[Logprobs] | None = None if chosen.logprobs is None else deque()
    asked = model, processor, prompt, inputs
    if prompt_cache is None or not _keeps_prompt(chosen):
        tokens = _answer(*asked, cache, chosen, limit, constraint, logprobs)
    else:
        tagged = prompt_cache.tag(input_ids, inputs.visual_tokens, inputs.image_keys)
        inputs.embeddings = inputs.embeddings[:, prompt_cache.fetch(tagged, cache) :]
        mx.eval(inputs.embeddings, [layer.stored for layer in cache if layer.stored is not None])
        tokens = _answer(*asked, cache, chosen, limit, constraint, logprobs)
        tokens = _store_prompt(prompt_cache, tagged, cache, tokens)
    del inputs, asked  # pixel values and visual tokens, which are needed no more
    length = len(input_ids)
    return stream_responses(
        tokens, processor, length, chosen.stop, limit, times, constraint, logprobs
    )


def _keeps_prompt(options: Options) -> bool:
    """Whether the KV cache will hold the prompt as `PromptCache` keeps it."""
    return options.max_kv_size is None and options.kv_bits is None and options.num_beams == 1


def _answer(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    inputs: Inputs,
    cache: list[Any],
    options: Options,
    limit: int,
    constraint: Constraint | None,
    logprobs: deque[Logprobs] | None,
) -> Iterator[int]:
    """The tokens of an answer, decoded in the way that the options ask for."""
    if options.num_beams > 1:
        ends = processor.tokenizer.eos_token_ids
        return search_tokens(model, inputs.embeddings, ends, options, limit)
    drafter = make_drafter(processor, prompt, inputs, options)
    asked = model, inputs.input_ids, inputs.embeddings, cache, options, limit
    if drafter is None:
        return generate_tokens(*asked, constraint=constraint, logprobs=logprobs)
    return speculate_tokens(*asked, drafter, constraint)


def _store_prompt(
    prompt_cache: PromptCache, tagged: list[int], cache: list[Any], tokens: Iterator[int]
) -> Iterator[int]:
    """The tokens; once the first shows that the prompt was read, it is stored."""
    for n, token in enumerate(tokens):
        if n == 0:
            prompt_cache.store(tagged, cache)
        yield token
