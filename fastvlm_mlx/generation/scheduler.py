"""Many requests at once: images are encoded and answers decoded together.

Each request goes through reading (threads) → encoder (a few images at a time) → prefill → decoder,
where all running sequences take each step together: when one ends, the next one enters.

Sequences lie side by side in rows of the KV cache, each from position 0 on and padded at its end.
In prefill, causal attention never sees the padding; in decoding, a mask by length hides it. So
padding shifts no position and enters no sum, and each answer is the one that `generate` gives.

Shapes: B sequences, T tokens, D = head_dim.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice, takewhile
from threading import Lock
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checks import check_whole_number
from ..model.batch_kv_cache import BatchKVCache
from ..model.fastvlm import FastVLM
from ..model.kv_cache import KVCache
from ..ops import check_process, on_cpu, wired_memory
from ..processor import Processor
from ..text.messages import Messages, collect_images
from .constrain import constrain_logits, make_constraint
from .decode import check_finite
from .inputs import ImageSources, list_images, preprocess_images, tokenize
from .options import CACHE_KINDS, DRAFTS, Options, refuse
from .prefix import Prefix, common_prefix
from .requests import PendingRequest, Picture, Row, encode_together, sample_rows
from .response import Response

if TYPE_CHECKING:
    from concurrent.futures import Future

MAX_BATCH = 16  # sequences in the decoder, if nothing else is asked for
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


def batch_options(options: Mapping[str, Any]) -> Options:
    """The options of a request in a batch; ValueError if one is out of range or not for batches."""
    chosen = Options.of(options)
    refuse(chosen, "a batch", *CACHE_KINDS, *DRAFTS, "num_beams")
    return chosen


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
        max_batch: int = MAX_BATCH,
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
        self._stepping = Lock()
        self._count = 0
        self._waiting: deque[PendingRequest] = deque()
        self._reading: deque[tuple[PendingRequest, Future[list[Picture]]]] = deque()
        self._encoded: deque[PendingRequest] = deque()
        self._failed: deque[RequestError] = deque()
        self._rows: list[Row] = []
        self._tokens = mx.array([], dtype=mx.uint32)  # one a row, computed but not yet read
        self._cache = BatchKVCache(len(model.layers))
        self._prefix = Prefix([], [])
        self._wired = ExitStack()  # holds memory while there are requests
        weakref.finalize(self, self._wired.close)

    def __len__(self) -> int:
        """Requests that have not ended."""
        entering = len(self._waiting) + len(self._reading) + len(self._encoded)
        return entering + len(self._failed) + sum(not row.done for row in self._rows)

    @property
    def wants_more(self) -> bool:
        """Whether another request would be worked on at once, rather than wait."""
        return len(self._waiting) + len(self._reading) < READ_AHEAD * self.encode_batch

    def insert(
        self,
        prompt: Messages,
        image: ImageSources = None,
        **options: Any,
    ) -> int:
        """Add a request; takes the arguments of `generate`, returns the request's id for `step`.

        Raises:
            ValueError: an option is out of range, or marks and images differ in number. What is
                wrong with an image, or a prompt that is too long, is for `step` to find.
        """
        check_process()
        chosen = batch_options(options)
        images = collect_images(prompt, list_images(image))
        self.processor.num_visual_tokens(chosen.image_size)
        mx.eval([image for image in images if isinstance(image, mx.array)])  # for another thread
        if not self:
            self._wired.enter_context(wired_memory())
        id, self._count = self._count, self._count + 1
        start = time.perf_counter()
        self._waiting.append(PendingRequest(id, prompt, images, chosen, start))
        self._read_ahead()
        return id

    def insert_encoded(
        self, prompt: Messages, visual_tokens: list[mx.array], options: Options
    ) -> int:
        """Add a request about images that were encoded before; returns its id for `step`.

        Args:
            prompt: as `insert` takes it.
            visual_tokens: [n, hidden_size] of each image, computed, in the prompt's order.
            options: from `batch_options`.

        Raises:
            ValueError: marks and images differ in number, the prompt is too long, or nothing can
                follow the schema.
        """
        check_process()
        counts = [len(tokens) for tokens in visual_tokens]
        input_ids = tokenize(self.model, self.processor, prompt, counts, options)
        if not self:
            self._wired.enter_context(wired_memory())
        id, self._count = self._count, self._count + 1
        now = time.perf_counter()
        request = PendingRequest(id, prompt, [], options, now, preprocessed=now, encoded=now)
        request.visual_tokens, request.input_ids = visual_tokens, input_ids
        vocab_size = self.model.config.text.vocab_size
        request.constraint = make_constraint(self.processor, vocab_size, options)
        self._encoded.append(request)
        return id

    def remove(self, id: int) -> None:
        """Give up a request; nothing happens if it has ended."""
        for row in self._rows:
            row.done = row.done or row.id == id
        self._waiting = deque(request for request in self._waiting if request.id != id)
        self._reading = deque(pair for pair in self._reading if pair[0].id != id)
        self._encoded = deque(request for request in self._encoded if request.id != id)
        self._read_ahead()
        self._release()

    def step(self) -> list[tuple[int, Response]]:
        """Let requests in where there is room; then (id, response) of each that runs.

        Raises:
            RequestError: a request that was to be let in can't be answered and is dropped. The
                others are not affected and go on with the next call.
            RuntimeError: another thread is in this call.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("Another thread is in this batch's step(); call it from one thread.")
        try:
            return self._step()
        finally:
            self._release()
            self._stepping.release()

    def _release(self) -> None:
        """Wire memory no longer if there are no requests."""
        if not self:
            self._wired.close()

    def _step(self) -> list[tuple[int, Response]]:
        self._keep([not row.done for row in self._rows])
        if len(self._rows) < self.max_batch:
            self._let_in()
        if self._failed:
            raise self._failed.popleft()
        rows, tokens = self._rows, self._tokens
        self._keep([row.generated + 1 < row.limit for row in rows])
        logits = self._decode()
        if any(row.constraint for row in rows):
            self._accept(rows, tokens, logits)
        self._tokens = self._next_tokens(self._rows, logits)
        if on_cpu():
            # A step that still runs reads the KV cache, which then could not be written in place.
            mx.eval(tokens)
        mx.async_eval(self._tokens, self._cache.arrays)  # nothing is left for another thread
        values: Any = tokens.tolist()
        return [
            (row.id, row.read(token))
            for row, token in zip(rows, values, strict=True)
            if not row.done
        ]

    def _read_ahead(self) -> None:
        while self._waiting and len(self._reading) < READ_AHEAD * self.encode_batch:
            request = self._waiting.popleft()
            future = self._threads.submit(_read, self.model, self.processor, request)
            self._reading.append((request, future))

    def _let_in(self) -> None:
        """Prefill what is encoded, as far as there is room; encode first if nothing is."""
        if not self._encoded:
            self._encode()
        room = self.max_batch - len(self._rows)
        entering = [self._encoded.popleft() for _ in range(min(room, len(self._encoded)))]
        if entering:
            self._prefill(entering)

    def _encode(self) -> None:
        """Tokenize the prompts of the next few requests, and encode their images."""
        found: list[tuple[PendingRequest, list[Picture]]] = []
        for _ in range(min(self.encode_batch, len(self._reading))):
            request, future = self._reading.popleft()
            try:
                pictures = future.result()
                request.preprocessed = time.perf_counter()
                request.tokenize(self.model, self.processor, pictures)
                found.append((request, pictures))
            except (ValueError, OSError) as error:
                self._failed.append(RequestError(request.id, error))
        self._read_ahead()
        images = [image for _, images in found for image in images]
        visual_tokens = iter(encode_together(self.model, images, self.encode_batch))
        for request, images in found:
            request.visual_tokens = list(islice(visual_tokens, len(images)))
            request.encoded = time.perf_counter()
            self._encoded.append(request)

    def _prefill(self, requests: list[PendingRequest]) -> None:
        """Start a sequence for each request, up to its first token."""
        sequences = [request.input_ids for request in requests]
        lengths = [len(ids) for ids in sequences]
        padded = [ids + [0] * (max(lengths) - len(ids)) for ids in sequences]
        rows = [Row(request, self.processor) for request in requests]
        step = min(row.options.prefill_step_size for row in rows)
        caches = self._start_caches(sequences, step)
        known = caches[0].offset
        embeddings = self.model.embed_inputs(
            mx.array(padded), visual_tokens=[t for r in requests for t in r.visual_tokens]
        )
        last = [length - known - 1 for length in lengths]
        hidden_states = self._hidden_states_at(last, embeddings[:, known:], caches, step)
        logits = self.model.language_model.logits(hidden_states)
        check_finite(self.model, mx.isfinite(logits).all(), logits.dtype)
        tokens = self._next_tokens(rows, logits)
        mx.async_eval(tokens)
        self._tokens = mx.concatenate([self._tokens, tokens])
        self._rows = self._rows + rows
        self._cache.add(caches, lengths)

    def _start_caches(self, sequences: list[list[int]], step: int) -> list[KVCache]:
        """KV caches that hold the common beginning of all sequences, often the system prompt.

        It is computed once, and kept for later sequences.
        """
        text = list(takewhile(lambda i: i >= 0, sequences[0][:-1]))
        alike = min(common_prefix(text, ids[:-1]) for ids in sequences)
        known = self._prefix.shared(text[:alike])
        if alike < (alike - known) * (len(sequences) - 1):
            known, cache = alike, self.model.make_kv_cache()
            embeddings = self.model.embed_inputs(mx.array([text[:alike]]))
            self._hidden_states_at([alike - 1], embeddings, cache, step)
            self._prefix = Prefix.of(text[:alike], cache)
        caches = self.model.make_kv_cache()
        if known:
            self._prefix.fill(caches, known, len(sequences))
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

    def _decode(self) -> mx.array:
        """The next logits of each row, [B, vocab_size]."""
        if not self._rows:
            return mx.zeros((0, self.model.config.text.vocab_size))
        hidden_states = self.model.language_model.hidden_states(
            self._tokens[:, None], self._cache.layers
        )
        self._cache.advance()
        return self.model.language_model.logits(hidden_states[:, -1])

    def _accept(self, rows: list[Row], tokens: mx.array, logits: mx.array) -> None:
        """Tell the constraints of rows their tokens, while the logits after them are computed."""
        if on_cpu():
            mx.eval(tokens)
        mx.async_eval(logits, self._cache.arrays)
        values: Any = tokens.tolist()
        for row, token in zip(rows, values, strict=True):
            try:
                if row.constraint is not None:
                    row.constraint.accept(token)
            except ValueError as error:
                row.done, row.constraint = True, None
                self._failed.append(RequestError(row.id, error))

    def _next_tokens(self, rows: list[Row], logits: mx.array) -> mx.array:
        """[B, vocab_size] → tokens [B]."""
        if any(row.process for row in rows):
            each = [
                logits[i : i + 1]
                if row.process is None
                else row.process(row.seen, logits[i : i + 1])
                for i, row in enumerate(rows)
            ]
            logits = mx.concatenate(each)
        logits = constrain_logits(logits, [row.constraint for row in rows])
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


def _read(model: FastVLM, processor: Processor, request: PendingRequest) -> list[Picture]:
    """The images of a request, on a thread of their own, which also compiles its grammar."""
    options = request.options
    request.constraint = make_constraint(processor, model.config.text.vocab_size, options)
    found = preprocess_images(processor, request.images, options.image_size, fast=options.fast)
    return list(zip(*found, strict=True))
