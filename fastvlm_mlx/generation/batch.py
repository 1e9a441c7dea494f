"""Many requests, answered together: all texts in order, or responses as they appear."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

from ..checks import shown
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages
from .constrain import IncompleteAnswer, is_constrained
from .inputs import ImageSources
from .requests import RequestError, batch_options
from .response import Response
from .scheduler import MAX_BATCH, Batch

Request: TypeAlias = tuple[Messages, ImageSources]


class BatchError(ValueError):
    """Requests that could not be answered, raised when all the others have been.

    Attributes:
        errors: what is wrong with which request, by its index.
        texts: from `batch_generate`: the answers in order, None for those without.
    """

    def __init__(self, errors: Mapping[int, Exception], texts: Sequence[str | None] = ()):
        shown = " ".join(f"Request {i}: {error}" for i, error in islice(errors.items(), 3))
        more = f" Another {len(errors) - 3} failed." if len(errors) > 3 else ""
        super().__init__(f"{shown}{more} All others were answered.")
        self.errors = dict(errors)
        self.texts = list(texts)


def batch_generate(
    model: FastVLM,
    processor: Processor,
    requests: Iterable[Request],
    *,
    max_batch: int = MAX_BATCH,
    encode_batch: int | None = None,
    **options: Any,
) -> list[str]:
    """Answer many requests, each as `generate` does; the texts in order.

    In float32 the answers are those of `generate`. In lower precision, products of many rows may
    round differently from those of one, and so pick the other of two nearly equal tokens.

    Args:
        model, processor: from `load`.
        requests: (prompt, image) pairs, each as `generate` takes them: a prompt and one image,
            several or None. They are taken as needed, so there may be any number of them, and
            memory holds only a few images and the sequences in the decoder.
        max_batch: sequences decoded at a time.
        encode_batch: images encoded, and requests that enter the decoder, at a time; by default 8,
            or fewer if they have more than 4 million pixels.
        **options: the fields of `Options`, for each request by itself: with a `seed`, each answer
            is the one that `generate` gives with it.

    Raises:
        ValueError: an option is out of range, or is one that batches can't take: drafts, beams,
            `kv_bits` and `max_kv_size`.
        BatchError: some requests could not be answered, since an image can't be read, marks and
            images differ in number, the prompt is too long, or `max_tokens` cut off what a
            `schema` asks for. The other answers are in `texts`.
    """
    responses = stream_batch(
        model,
        processor,
        requests,
        max_batch=max_batch,
        encode_batch=encode_batch,
        **options,
    )
    constrained = is_constrained(batch_options(options))
    texts: dict[int, str] = {}
    errors: dict[int, Exception] = {}
    try:
        for i, response in responses:
            texts[i] = texts.get(i, "") + response.text
            if constrained and response.finish_reason == "length":
                errors[i] = IncompleteAnswer(texts.pop(i), response.generation_tokens)
    except BatchError as error:
        errors = dict(sorted((errors | error.errors).items()))
    answers = [texts.get(i) for i in range(len(texts) + len(errors))]
    if errors:
        raise BatchError(errors, answers)
    return [text for text in answers if text is not None]


def stream_batch(
    model: FastVLM,
    processor: Processor,
    requests: Iterable[Request],
    *,
    max_batch: int = MAX_BATCH,
    encode_batch: int | None = None,
    **options: Any,
) -> Iterator[tuple[int, Response]]:
    """As `batch_generate`, but (index of the request, response) as responses appear.

    An answer's last response has a `finish_reason`.
    """
    batch = Batch(model, processor, max_batch=max_batch, encode_batch=encode_batch)
    batch_options(options)
    return _run(batch, enumerate(requests), options)


def _run(
    batch: Batch, coming: Iterator[tuple[int, Request]], common: dict[str, Any]
) -> Iterator[tuple[int, Response]]:
    """Keep a batch supplied until all requests are answered."""
    index_of: dict[int, int] = {}
    errors: dict[int, Exception] = {}
    while True:
        while batch.wants_more and (following := next(coming, None)) is not None:
            index, request = following
            try:
                index_of[batch.insert(*_checked_pair(request), **common)] = index
            except ValueError as error:
                errors[index] = error
        if not batch:
            break
        try:
            responses = batch.step()
        except RequestError as error:
            errors[index_of[error.id]] = error.error
        else:
            yield from ((index_of[id], response) for id, response in responses)
    if errors:
        raise BatchError(dict(sorted(errors.items())))


def _checked_pair(request: Any) -> Request:
    if not isinstance(request, (tuple, list)) or len(request) != 2:
        raise ValueError(f"A request must be a pair (prompt, image), found {shown(request)}.")
    return request[0], request[1]
