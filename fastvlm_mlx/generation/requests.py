"""A request on its way through a batch: read, encoded, and a row in the decoder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any, TypeAlias

import mlx.core as mx

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages
from .constrain import Constraint, make_constraint
from .decode import hidden_states_at
from .inputs import answer_limit, preprocess_images, tokenize
from .options import CACHE_KINDS, DRAFTS, LogitsProcessor, Options, refuse
from .prefix import Prefix, common_prefix
from .prompt_cache import PromptCache, image_key
from .response import Response, stream_responses
from .sampling import (
    LazyLogprobs,
    Logprobs,
    filter_logits,
    find_logprobs,
    is_greedy,
    make_logits_processor,
)

# Pixel values of an image, uint8 [n, S, S, 3], and its original (width, height)
Picture: TypeAlias = tuple[mx.array, tuple[int, int]]


class RequestError(ValueError):
    """A request that can't be answered.

    Attributes:
        id: which one.
        error: what is wrong with it.
    """

    def __init__(self, id: int, error: Exception):
        super().__init__(f"Request {id}: {error}")
        self.id = id
        self.error = error


def batch_options(options: Mapping[str, Any]) -> Options:
    """The options of a request in a batch; ValueError if one is out of range or not for batches."""
    chosen = Options.of(options)
    refuse(chosen, "a batch", *CACHE_KINDS, *DRAFTS, "num_beams")
    return chosen


@dataclass(eq=False)
class PendingRequest:
    """A request on its way to the decoder.

    Attributes:
        start, reading, preprocessed, encoding, encoded: when it came, its images began to be read
            and were, and they, all together, began to be encoded and were.
        pictures: its images, read, until all are encoded.
        keys: of the images, if there is a cache.
        visual_tokens: of each image, None before it is encoded.
        cached_images: that needed no encoder.
        tagged: `input_ids` with the identity of images in their places, if there is a cache.
        prefix: what the cache knows of them.
        process: its logits processor.
    """

    id: int
    prompt: Messages
    images: list[ImageSource]
    options: Options
    start: float
    reading: float = 0.0
    preprocessed: float = 0.0
    encoding: float = 0.0
    encoded: float = 0.0
    pictures: list[Picture] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    visual_tokens: list[mx.array | None] = field(default_factory=list)
    cached_images: int = 0
    tagged: list[int] = field(default_factory=list)
    prefix: Prefix = field(default_factory=lambda: Prefix([], []))
    input_ids: list[int] = field(default_factory=list)
    process: LogitsProcessor | None = None
    constraint: Constraint | None = None

    def read(self, model: FastVLM, processor: Processor, with_keys: bool) -> PendingRequest:
        """Do, on a thread of its own, what nobody should wait for: read images, compile a grammar.

        Args:
            model, processor: see `batch_generate`.
            with_keys: whether the images' keys are needed.
        """
        self.reading = time.perf_counter()
        options = self.options
        self.prepare(model, processor)
        found = preprocess_images(processor, self.images, options.image_size, fast=options.fast)
        self.pictures = list(zip(*found, strict=True))
        self.images = []  # they may be large
        self.visual_tokens = [None] * len(self.pictures)
        self.keys = [image_key(*picture) for picture in self.pictures] if with_keys else []
        self.preprocessed = time.perf_counter()
        return self

    def prepare(self, model: FastVLM, processor: Processor) -> None:
        """Make what chooses among tokens, from the options."""
        vocab_size = model.config.text.vocab_size
        self.constraint = make_constraint(processor, vocab_size, self.options)
        self.process = make_logits_processor(self.options)

    def tokenize(self, model: FastVLM, processor: Processor) -> None:
        """Find `input_ids`, now that the images are read; errors as `inputs.tokenize`."""
        counts = [model.num_visual_tokens(*picture) for picture in self.pictures]
        self.input_ids = tokenize(model, processor, self.prompt, counts, self.options)

    def take(self, model: FastVLM, processor: Processor, visual_tokens: Sequence[mx.array]) -> None:
        """Do all of that for images that are encoded; errors as `read` and `tokenize`."""
        self.read(model, processor, with_keys=False)
        counts = [len(tokens) for tokens in visual_tokens]
        self.input_ids = tokenize(model, processor, self.prompt, counts, self.options)
        self.visual_tokens = list(visual_tokens)
        self.encoding = self.encoded = self.preprocessed

    @property
    def missing(self) -> list[int]:
        """The numbers of the images that are not encoded yet."""
        return [n for n, tokens in enumerate(self.visual_tokens) if tokens is None]

    def know(self, find: Callable[[bytes], mx.array | None]) -> None:
        """Take visual tokens that need no encoder, by the images' keys."""
        for n in self.missing if self.keys else ():
            self.visual_tokens[n] = find(self.keys[n])
            self.cached_images += self.visual_tokens[n] is not None


# An image to encode: its request, its number there, and what was read
Chosen: TypeAlias = tuple[PendingRequest, int, Picture]


def present(arrays: Sequence[mx.array | None]) -> list[mx.array]:
    """The arrays of a list that lacks none."""
    return [array for array in arrays if array is not None]


def next_images(requests: Iterable[PendingRequest], most: int) -> list[Chosen]:
    """The next images to encode, each once: at most so many squares, but one image at least."""
    chosen: list[Chosen] = []
    squares, keys = 0, set()
    for request in requests:
        for n in request.missing:
            if request.keys and request.keys[n] in keys:
                continue
            squares += len(request.pictures[n][0])
            if chosen and squares > most:
                return chosen
            chosen.append((request, n, request.pictures[n]))
            keys.update(request.keys[n : n + 1])
    return chosen


def take_group(
    requests: list[PendingRequest], cache: PromptCache | None
) -> tuple[list[PendingRequest], list[PendingRequest]]:
    """Some requests that can be prefilled together, and the others.

    With a cache, they are those of which the same beginning is known. Of those that go on with the
    same image only one is taken: once it was read, the others begin with it.
    """
    if cache is None:
        return requests, []
    for request in requests:
        visual_tokens = present(request.visual_tokens)
        request.tagged = cache.tag(request.input_ids, visual_tokens, request.keys)
        request.prefix = cache.find(request.tagged)
    known = requests[0].prefix.ids
    group: dict[int, PendingRequest] = {}
    for request in requests:
        if request.prefix.ids == known:
            unknown = request.tagged[len(known) :]
            first_image = next((mark for mark in unknown if mark < 0), -request.id)
            group.setdefault(first_image, request)
    taken = list(group.values())
    return taken, [request for request in requests if request not in taken]


def read_alike(
    model: FastVLM, sequences: list[list[int]], held: Prefix, step: int
) -> tuple[Prefix, int]:
    """What all sequences begin with, often the system prompt, and how much of it is theirs.

    It is computed once if that is less work, and otherwise what is `held` from earlier ones.
    """
    text = list(takewhile(lambda i: i >= 0, sequences[0][:-1]))
    alike = min(common_prefix(text, ids[:-1]) for ids in sequences)
    known = held.shared(text[:alike])
    if alike >= (alike - known) * (len(sequences) - 1):
        return held, known
    cache = model.make_kv_cache()
    embeddings = model.embed_inputs(mx.array([text[:alike]]))
    hidden_states_at(model, [alike - 1], embeddings, cache, step)
    return Prefix.of(text[:alike], cache), alike


class Row:
    """A sequence in the decoder."""

    def __init__(self, request: PendingRequest, processor: Processor):
        self.id = request.id
        self.options = options = request.options
        self.limit = answer_limit(request.input_ids, options, processor)
        self.process = request.process
        self.constraint = request.constraint
        self.seen = mx.array([i for i in request.input_ids if i >= 0])
        self.key = None if options.seed is None else mx.random.key(options.seed)
        self.generated = 0
        self.done = False
        self.request = request
        self.entering = time.perf_counter()
        self._tokens: deque[int] = deque()
        self._lazy: deque[LazyLogprobs] = deque()
        self._logprobs: deque[Logprobs] | None = None if options.logprobs is None else deque()
        self._responses = stream_responses(
            iter(self._tokens.popleft, None),
            processor,
            len(request.input_ids),
            options.stop,
            self.limit,
            (request.start, request.preprocessed, request.encoded),
            self.constraint,
            self._logprobs,
        )

    def choose(self, logits: mx.array, token: mx.array) -> None:
        """Note a token [1] that is computed for later, chosen by logits [1, vocab_size]."""
        if self._logprobs is not None:
            self._lazy.append(find_logprobs(logits, token, self.options.logprobs or 0))
        if self.process is not None:
            self.seen = mx.concatenate([self.seen, token])

    def read(self, token: int) -> Response:
        """What one more token brings."""
        self._tokens.append(token)
        if self._logprobs is not None:
            self._logprobs.append(self._lazy.popleft().read())
        response = self._timed(next(self._responses))
        self.generated = response.generation_tokens
        self.done = self.done or response.finish_reason is not None
        return response

    def _timed(self, response: Response) -> Response:
        """A response whose times leave out what the request waited for others."""
        asked = self.request
        first = response.ttft + asked.start
        response.preprocess_time = asked.preprocessed - asked.reading
        response.encode_time = asked.encoded - asked.encoding
        response.prefill_time = first - self.entering
        worked = response.preprocess_time + response.encode_time + response.prefill_time
        response.queue_time = max(0.0, response.ttft - worked)
        response.cached_tokens = len(asked.prefix.ids)
        response.cached_images = asked.cached_images
        return response


def encode_together(model: FastVLM, images: Sequence[Picture], encode_batch: int) -> list[mx.array]:
    """As `inputs.compute_visual_tokens`, but squares of one size are encoded several at a time.

    Args:
        model: see `batch_generate`.
        images: pixel values uint8 [n, S, S, 3] and original (width, height) of each.
        encode_batch: squares at a time.

    Returns:
        The visual tokens [n, hidden_size] of each image, computed.
    """
    visual_tokens: list[mx.array] = [mx.array([])] * len(images)
    for side in {pixels.shape[1] for pixels, _ in images}:
        alike = [i for i, (pixels, _) in enumerate(images) if pixels.shape[1] == side]
        squares = mx.concatenate([images[i][0] for i in alike])
        encoded = []
        for start in range(0, len(squares), encode_batch):
            encoded.append(model.encode_image(squares[start : start + encode_batch]))
            mx.eval(encoded)
        ends = list(accumulate(len(images[i][0]) for i in alike))
        for i, tiles in zip(alike, mx.split(mx.concatenate(encoded), ends[:-1]), strict=True):
            visual_tokens[i] = model.merge_tiles(tiles, images[i][1])
    mx.eval(visual_tokens)
    return visual_tokens


def sample_rows(rows: Sequence[Row], logits: mx.array) -> mx.array:
    """[B, vocab_size] → tokens [B], those with equal options together."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        o = row.options
        kind = None if is_greedy(o) else (o.temperature, o.top_p, o.top_k, o.min_p)
        groups.setdefault(kind, []).append(i)
    if len(groups) == 1:
        return _sample_alike(rows, logits).astype(mx.uint32)
    tokens = mx.zeros(len(rows), dtype=mx.uint32)
    for members in groups.values():
        index = mx.array(members)
        tokens[index] = _sample_alike([rows[i] for i in members], logits[index])
    return tokens


def _sample_alike(rows: Sequence[Row], logits: mx.array) -> mx.array:
    options = rows[0].options
    if is_greedy(options):
        return mx.argmax(logits, axis=-1)
    logits = filter_logits(logits, options)
    if all(row.key is None for row in rows):
        return mx.random.categorical(logits)
    tokens = []
    for i, row in enumerate(rows):
        key = None
        if row.key is not None:
            row.key, key = mx.random.split(row.key)
        tokens.append(mx.random.categorical(logits[i : i + 1], key=key))
    return mx.concatenate(tokens)
