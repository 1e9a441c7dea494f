"""TODO scheduler"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

from ..checks import check_whole_number
from ..image.load import ImageSource
from ..model.batch_kv_cache import BatchKVCache
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache, common_prefix
from ..ops import on_cpu
from ..processor import Processor
from ..text.prompt import check_marks
from ..text.template import Messages
from .inputs import list_images, tokenize
from .options import Options
from .response import Response, stream_responses
from .sampling import MIN_TEMPERATURE, make_logits_processor, scale_logits

if TYPE_CHECKING:
    from concurrent.futures import Future

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
# Of an image: uint8 [n, S, S, 3], one square or with tiles more; and its original (width, height)
Pixels: TypeAlias = "tuple[mx.array, tuple[int, int]]"
MAX_THREADS = 8  # that read images
READ_AHEAD = 2  # encoder batches whose images are read in advance
PIXELS_AT_ONCE, IMAGES_AT_ONCE = 2**22, 8  # that are encoded, if nothing else is asked for


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


def check_options(options: Mapping[str, Any]) -> Options:
    """The options of a request in a batch.

    Raises:
        ValueError: one is out of range, or of those that change the KV cache.
    """
    chosen = Options(**options)
    for name in ("max_kv_size", "kv_bits"):
        if getattr(chosen, name) is not None:
            raise ValueError(f"{name} is not for batches, whose KV cache is kept in full: omit it.")
    if chosen.prompt_lookup is not None or chosen.draft_model is not None:
        raise ValueError("Batches are not speculated on: omit prompt_lookup and draft_model.")
    return chosen


@dataclass(eq=False)
class _Request:
    """A request on its way to the decoder."""

    id: int
    prompt: Messages
    images: list[ImageSource]
    options: Options
    start: float
    preprocessed: float = 0.0
    encoded: float = 0.0
    features: list[mx.array] = field(default_factory=list)
    input_ids: list[int] = field(default_factory=list)


class _Row:
    """A sequence in the decoder."""

    def __init__(self, request: _Request, processor: Processor):
        self.id = request.id
        self.options = options = request.options
        self.limit = min(options.max_tokens, processor.max_length - len(request.input_ids))
        self.process = make_logits_processor(options)
        self.seen = mx.array([i for i in request.input_ids if i >= 0])
        self.key = None if options.seed is None else mx.random.key(options.seed)
        self.generated = 0
        self.done = False
        self._tokens: deque[int] = deque()
        self._parts = stream_responses(
            iter(self._tokens.popleft, None),
            processor,
            len(request.input_ids),
            options.stop,
            self.limit,
            (request.start, request.preprocessed, request.encoded),
        )

    def read(self, token: int) -> Response:
        """What one more token brings."""
        self._tokens.append(token)
        response = next(self._parts)
        self.generated = response.generation_tokens
        self.done = response.finish_reason is not None
        return response


class Batch:
    """Requests that are answered together; they come and go at any time.

        batch = Batch(model, processor)
        id = batch.insert("What is this?", "cat.jpg", max_tokens=64)
        while batch:
            for id, response in batch.step():
                print(id, response.text, response.finish_reason)

    Which sequences run together depends on the requests and their order, never on time, so that a
    run can be repeated. All methods are to be called from one thread.

    Args:
        model, processor: from `load`.
        max_batch: sequences that are decoded at a time.
        encode_batch: images that are encoded, and requests that enter the decoder, at a time; by
            default 8, or fewer if they have more than 4 million pixels.

    Raises:
        ValueError: one of the numbers is below 1.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        *,
        max_batch: int = 16,
        encode_batch: int | None = None,
    ):
        from concurrent.futures import ThreadPoolExecutor

        if encode_batch is None:
            pixels = processor.image_size**2
            encode_batch = max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // pixels))
        check_whole_number("max_batch", max_batch)
        check_whole_number("encode_batch", encode_batch)
        self.model = model
        self.processor = processor
        self.max_batch = max_batch
        self.encode_batch = encode_batch
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        self._count = 0
        self._waiting: deque[_Request] = deque()
        self._reading: deque[tuple[_Request, Future[list[Pixels]]]] = deque()
        self._encoded: deque[_Request] = deque()
        self._failed: deque[RequestError] = deque()
        self._rows: list[_Row] = []
        self._tokens = mx.array([], dtype=mx.uint32)  # one a row, computed but not yet read
        self._cache = BatchKVCache(len(model.layers))
        self._prefix: list[int] = []
        self._prefix_caches: list[Any] = []

    def __len__(self) -> int:
        """Requests that have not ended."""
        entering = len(self._waiting) + len(self._reading) + len(self._encoded)
        return entering + len(self._failed) + sum(not row.done for row in self._rows)

    @property
    def wants_more(self) -> bool:
        """Whether a request more would be worked on at once, rather than wait."""
        return len(self._waiting) + len(self._reading) < READ_AHEAD * self.encode_batch

    def insert(
        self,
        prompt: Messages,
        image: Images = None,
        **options: Any,
    ) -> int:
        """Add a request; the arguments are those of `generate`, the result is its id for `step`.

        Raises:
            ValueError: an option is out of range, or marks and images differ in number. What is
                wrong with an image, or a prompt that is too long, is for `step` to find.
        """
        chosen = check_options(options)
        images = list_images(image)
        check_marks(prompt, len(images))
        self.processor.num_visual_tokens(chosen.image_size)
        mx.eval([image for image in images if isinstance(image, mx.array)])  # for another thread
        id, self._count = self._count, self._count + 1
        start = time.perf_counter()
        self._waiting.append(_Request(id, prompt, images, chosen, start))
        self._read_ahead()
        return id

    def remove(self, id: int) -> None:
        """Give up a request; nothing happens if it has ended."""
        for row in self._rows:
            row.done = row.done or row.id == id
        self._waiting = deque(request for request in self._waiting if request.id != id)
        self._reading = deque(pair for pair in self._reading if pair[0].id != id)
        self._encoded = deque(request for request in self._encoded if request.id != id)
        self._read_ahead()

    def step(self) -> list[tuple[int, Response]]:
        """Let requests in where there is room; then (id, response) of each that runs.

        Raises:
            RequestError: a request that was to be let in can't be answered and is out. No other is
                harmed: they go on with the next call.
        """
        self._keep([not row.done for row in self._rows])
        if len(self._rows) < self.max_batch:
            self._let_in()
        if self._failed:
            raise self._failed.popleft()
        rows, tokens = self._rows, self._tokens
        self._keep([row.generated + 1 < row.limit for row in rows])
        if self._rows:
            self._decode()
        if on_cpu():
            # A step that still runs reads the KV cache, which then could not be written in place.
            mx.eval(tokens)
        mx.async_eval(self._tokens)
        values: Any = tokens.tolist()
        return [(row.id, row.read(token)) for row, token in zip(rows, values, strict=True)]

    def _read_ahead(self) -> None:
        while self._waiting and len(self._reading) < READ_AHEAD * self.encode_batch:
            request = self._waiting.popleft()
            future = self._threads.submit(_read_images, self.processor, request)
            self._reading.append((request, future))

    def _let_in(self) -> None:
        """Prefill what is encoded, as far as there is room; if nothing is, first encode."""
        if not self._encoded:
            self._encode()
        room = self.max_batch - len(self._rows)
        entering = [self._encoded.popleft() for _ in range(min(room, len(self._encoded)))]
        if entering:
            self._prefill(entering)

    def _encode(self) -> None:
        """Encode the images of the next few requests and tokenize their prompts."""
        found: list[tuple[_Request, list[Pixels]]] = []
        for _ in range(min(self.encode_batch, len(self._reading))):
            request, future = self._reading.popleft()
            try:
                found.append((request, future.result()))
            except (ValueError, OSError) as error:
                self._failed.append(RequestError(request.id, error))
            request.preprocessed = time.perf_counter()
        self._read_ahead()
        images = [image for _, images in found for image in images]
        features = iter(encode_together(self.model, images, self.encode_batch))
        for request, images in found:
            request.features = list(islice(features, len(images)))
            request.encoded = time.perf_counter()
            try:
                request.input_ids = tokenize(
                    self.model, self.processor, request.prompt, request.features, request.options
                )
                self._encoded.append(request)
            except ValueError as error:
                self._failed.append(RequestError(request.id, error))

    def _prefill(self, requests: list[_Request]) -> None:
        """Start a sequence for each request, up to its first token."""
        sequences = [request.input_ids for request in requests]
        lengths = [len(ids) for ids in sequences]
        padded = [ids + [0] * (max(lengths) - len(ids)) for ids in sequences]
        rows = [_Row(request, self.processor) for request in requests]
        step = min(row.options.prefill_step_size for row in rows)
        caches = self._start_caches(sequences, step)
        known = caches[0].offset
        embeddings = self.model.embed_inputs(
            mx.array(padded), visual_tokens=[f for r in requests for f in r.features]
        )
        last = [length - known - 1 for length in lengths]
        hidden_states = self._hidden_states_at(last, embeddings[:, known:], caches, step)
        tokens = self._next_tokens(rows, hidden_states)
        mx.async_eval(tokens)
        self._tokens = mx.concatenate([self._tokens, tokens])
        self._rows = self._rows + rows
        self._cache.add(caches, lengths)

    def _start_caches(self, sequences: list[list[int]], step: int) -> list[KVCache]:
        """KV caches that hold what the sequences begin with alike, often the system prompt.

        That is computed for one of them, and kept for those that come later.
        """
        text = list(takewhile(lambda i: i >= 0, sequences[0][:-1]))
        alike = min(common_prefix(text, ids[:-1]) for ids in sequences)
        known = common_prefix(text[:alike], self._prefix)
        if alike < (alike - known) * (len(sequences) - 1):
            known, self._prefix = alike, text[:alike]
            self._prefix_caches = self.model.make_kv_cache()
            embeddings = self.model.embed_inputs(mx.array([self._prefix]))
            self._hidden_states_at([alike - 1], embeddings, self._prefix_caches, step)
        caches = self.model.make_kv_cache()
        if known:
            for cache, prefix in zip(caches, self._prefix_caches, strict=True):
                held = (prefix.keys[:, :, :known], prefix.values[:, :, :known])
                shape = (len(sequences), *held[0].shape[1:])
                cache.update_and_fetch(*(mx.broadcast_to(each, shape) for each in held))
        return caches

    def _hidden_states_at(
        self, places: list[int], embeddings: mx.array, caches: list[KVCache], step: int
    ) -> mx.array:
        """Prefill; [B, hidden_size] at one place of each sequence.

        Args:
            places: of what is given here of each sequence.
            embeddings: [B, T, hidden_size] of what the caches don't hold, padded at the end.
            caches: updated in place.
            step: tokens to process at a time.
        """
        B, T, _ = embeddings.shape
        index = mx.array(places)[:, None, None]
        found = mx.zeros((B, 1, embeddings.shape[2]), embeddings.dtype)
        columns = max(1, step // B)
        for start in range(0, T, columns):
            chunk = embeddings[:, start : start + columns]
            hidden_states = self.model.language_model.hidden_states(None, caches, chunk)
            at = mx.clip(index - start, 0, chunk.shape[1] - 1)
            reached = mx.take_along_axis(hidden_states, at, axis=1)
            found = mx.where(index >= start, reached, found)
            if start + columns < T:
                mx.eval(found, [cache.state for cache in caches])
        return found[:, 0]

    def _decode(self) -> None:
        """One more token for each row."""
        hidden_states = self.model.language_model.hidden_states(
            self._tokens[:, None], self._cache.layers
        )
        self._cache.advance()
        self._tokens = self._next_tokens(self._rows, hidden_states[:, -1])

    def _next_tokens(self, rows: list[_Row], hidden_states: mx.array) -> mx.array:
        """[B, hidden_size] → tokens [B]."""
        logits = self.model.language_model.logits(hidden_states)
        if any(row.process for row in rows):
            each = [
                logits[i : i + 1]
                if row.process is None
                else row.process(row.seen, logits[i : i + 1])
                for i, row in enumerate(rows)
            ]
            logits = mx.concatenate(each)
        tokens = sample_rows(rows, logits)
        for i, row in enumerate(rows):
            if row.process is not None:
                row.seen = mx.concatenate([row.seen, tokens[i : i + 1]])
        return tokens

    def _keep(self, kept: list[bool]) -> None:
        """Drop the other rows."""
        if all(kept):
            return
        order = self._cache.keep(kept)
        self._rows = [self._rows[i] for i in order]
        self._tokens = self._tokens[mx.array(order, dtype=mx.int32)]


def _read_images(processor: Processor, request: _Request) -> list[Pixels]:
    # As bytes nothing is left to compute: MLX would keep a stream for each thread that does.
    each = processor.preprocess_each(
        request.images, request.options.image_size, fast=request.options.fast, dtype=mx.uint8
    )
    return list(each)


def encode_together(model: FastVLM, images: Sequence[Pixels], encode_batch: int) -> list[mx.array]:
    """As `generate.encode_images`, but squares of one size are encoded several at a time.

    Args:
        model: see `batch_generate`.
        images: from `Processor.preprocess_each`, as bytes.
        encode_batch: squares at a time.

    Returns:
        the visual tokens [n, hidden_size] of each image, computed.
    """
    features: list[mx.array] = [mx.array([])] * len(images)
    for side in {pixels.shape[1] for pixels, _ in images}:
        alike = [i for i, (pixels, _) in enumerate(images) if pixels.shape[1] == side]
        squares = mx.concatenate([images[i][0] for i in alike])
        encoded = []
        for start in range(0, len(squares), encode_batch):
            encoded.append(model.encode_image(squares[start : start + encode_batch]))
            mx.eval(encoded)
        ends = list(accumulate(len(images[i][0]) for i in alike))
        for i, tiles in zip(alike, mx.split(mx.concatenate(encoded), ends[:-1]), strict=True):
            features[i] = model.merge_tiles(tiles, images[i][1])
    mx.eval(features)
    return features


def sample_rows(rows: Sequence[_Row], logits: mx.array) -> mx.array:
    """[B, vocab_size] → tokens [B], those of like options together."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        o = row.options
        greedy = o.temperature < MIN_TEMPERATURE
        kind = None if greedy else (o.temperature, o.top_p, o.top_k, o.min_p)
        groups.setdefault(kind, []).append(i)
    if len(groups) == 1:
        return _sample_alike(rows, logits).astype(mx.uint32)
    tokens = mx.zeros(len(rows), dtype=mx.uint32)
    for members in groups.values():
        index = mx.array(members)
        tokens[index] = _sample_alike([rows[i] for i in members], logits[index])
    return tokens


def _sample_alike(rows: Sequence[_Row], logits: mx.array) -> mx.array:
    options = rows[0].options
    if options.temperature < MIN_TEMPERATURE:
        return mx.argmax(logits, axis=-1)
    logits = scale_logits(logits, options)
    if all(row.key is None for row in rows):
        return mx.random.categorical(logits)
    tokens = []
    for i, row in enumerate(rows):
        key = None
        if row.key is not None:
            row.key, key = mx.random.split(row.key)
        tokens.append(mx.random.categorical(logits[i : i + 1], key=key))
    return mx.concatenate(tokens)
