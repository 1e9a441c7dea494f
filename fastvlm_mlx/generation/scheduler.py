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
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checks import check_whole_number
from ..model.batch_kv_cache import BatchKVCache
from ..model.fastvlm import FastVLM
from ..ops import check_process, on_cpu, wired_memory
from ..processor import Processor
from ..text.messages import Messages, collect_images
from .constrain import constrain_logits
from .decode import check_finite, hidden_states_at
from .inputs import ImageSources, list_images
from .options import Options
from .prefix import Prefix
from .prompt_cache import PromptCache
from .requests import (
    Chosen,
    PendingRequest,
    RequestError,
    Row,
    batch_options,
    encode_together,
    next_images,
    present,
    read_alike,
    sample_rows,
    take_group,
)
from .response import Response

if TYPE_CHECKING:
    from concurrent.futures import Future

MAX_BATCH = 16  # sequences in the decoder, if nothing else is asked for
MAX_THREADS = 8  # that read images
READ_AHEAD = 2  # encoder batches whose images are read in advance
PIXELS_AT_ONCE, IMAGES_AT_ONCE = 2**22, 8  # that are encoded, if nothing else is asked for


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
        when_read: called, from any thread, when the images of a request were read. With it,
            `step` never waits for images: requests go on as they are read, not in their order.
        cache: what earlier requests computed; images and beginnings of prompts that it knows are
            neither encoded nor read by the decoder again.

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
        when_read: Callable[[], None] | None = None,
        cache: PromptCache | None = None,
    ):
        from concurrent.futures import ThreadPoolExecutor

        if encode_batch is None:
            pixels = processor.image_size**2
            encode_batch = max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // pixels))
        check_whole_number("max_batch", max_batch)
        check_whole_number("encode_batch", encode_batch)
        if cache is not None:
            cache.check_model(model)
        self.model = model
        self.processor = processor
        self.max_batch = max_batch
        self.encode_batch = encode_batch
        self.when_read = when_read
        self.cache = cache
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        self._stepping = Lock()
        self._count = 0
        self._waiting: deque[PendingRequest] = deque()
        self._reading: deque[tuple[PendingRequest, Future[PendingRequest]]] = deque()
        self._read: deque[PendingRequest] = deque()
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
        reading = len(self._waiting) + len(self._reading)
        return reading + len(self._read) + len(self._encoded) + len(self._failed) + self.running

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(not row.done for row in self._rows)

    @property
    def is_blocked(self) -> bool:
        """Whether nothing can be done before an image is read."""
        ready = self._rows or self._read or self._encoded or self._failed
        return not ready and not any(future.done() for _, future in self._reading)

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
            ValueError: marks and images differ in number, the prompt is too long, nothing can
                follow the schema, or the batch has a cache, whose keys are the images'.
        """
        check_process()
        if self.cache is not None:
            raise ValueError("A batch with a cache takes no images that were encoded before.")
        asked = PendingRequest(self._count, prompt, [], options, time.perf_counter())
        asked.take(self.model, self.processor, visual_tokens)
        if not self:
            self._wired.enter_context(wired_memory())
        self._count += 1
        self._encoded.append(asked)
        return asked.id

    def remove(self, id: int) -> None:
        """Give up a request; nothing happens if it has ended."""
        for row in self._rows:
            row.done = row.done or row.id == id
        self._waiting = deque(request for request in self._waiting if request.id != id)
        self._reading = deque(pair for pair in self._reading if pair[0].id != id)
        self._read = deque(request for request in self._read if request.id != id)
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
        tell = self.when_read
        while self._waiting and len(self._reading) < READ_AHEAD * self.encode_batch:
            request = self._waiting.popleft()
            asked = self.model, self.processor, self.cache is not None
            future = self._threads.submit(request.read, *asked)
            self._reading.append((request, future))
            if tell is not None:
                future.add_done_callback(lambda _: tell())

    def _let_in(self) -> None:
        """Prefill what is encoded, as far as there is room; encode first if nothing is."""
        if not self._encoded:
            if not self._read:
                self._tokenize()
            chosen = next_images(self._read, self.encode_batch)
            self._try(self._encode, chosen, [request for request, _, _ in chosen])
            self._pass_on()
        room = self.max_batch - len(self._rows)
        entering = [self._encoded.popleft() for _ in range(min(room, len(self._encoded)))]
        while entering:
            group, entering = take_group(entering, self.cache)
            self._try(self._prefill, group, group)

    def _tokenize(self) -> None:
        """Tokenize the prompts of the next few requests, now that their images are read."""
        ready = [pair for pair in self._reading if self.when_read is None or pair[1].done()]
        for pair in ready[: self.encode_batch]:
            request, future = pair
            self._reading.remove(pair)
            try:
                future.result().tokenize(self.model, self.processor)
                if self.cache is not None:
                    request.know(self.cache.find_image)
                self._read.append(request)
            except Exception as error:
                self._failed.append(RequestError(request.id, error))
        self._read_ahead()

    def _try(
        self, work: Callable[[list[Any]], None], items: list[Any], requests: list[PendingRequest]
    ) -> None:
        """Do some work on all items; one by one if that fails, so that a fault stays with its
        request."""
        try:
            work(items)
        except Exception as error:
            if len(items) == 1:
                self.remove(requests[0].id)
                self._failed.append(RequestError(requests[0].id, error))
                return
            for item, request in zip(items, requests, strict=True):
                self._try(work, [item], [request])

    def _encode(self, chosen: list[Chosen]) -> None:
        """Encode images together, each once."""
        start = time.perf_counter()
        encoded = encode_together(
            self.model, [picture for *_, picture in chosen], self.encode_batch
        )
        for (request, n, _), visual_tokens in zip(chosen, encoded, strict=True):
            request.encoding = request.encoding or start
            request.visual_tokens[n] = visual_tokens
        if self.cache is not None:
            keys = [request.keys[n] for request, n, _ in chosen]
            of_key = dict(zip(keys, encoded, strict=True))
            for key, visual_tokens in of_key.items():
                self.cache.store_image(key, visual_tokens)
            for request in self._read:
                request.know(of_key.get)

    def _pass_on(self) -> None:
        """The requests whose images are all encoded can enter."""
        for request in [request for request in self._read if not request.missing]:
            self._read.remove(request)
            request.pictures = []
            request.encoded = time.perf_counter()
            request.encoding = request.encoding or request.encoded
            self._encoded.append(request)

    def _prefill(self, requests: list[PendingRequest]) -> None:
        """Start a sequence for each request, up to its first token."""
        sequences = [request.input_ids for request in requests]
        lengths = [len(ids) for ids in sequences]
        padded = [ids + [0] * (max(lengths) - len(ids)) for ids in sequences]
        rows = [Row(request, self.processor) for request in requests]
        step = min(row.options.prefill_step_size for row in rows)
        caches = self.model.make_kv_cache()
        prefix, known = requests[0].prefix, len(requests[0].prefix.ids)
        if not known:
            prefix, known = read_alike(self.model, sequences, self._prefix, step)
            self._prefix = prefix
        if known:
            prefix.fill(caches, known, len(sequences))
        embeddings = self.model.embed_inputs(
            mx.array(padded),
            visual_tokens=[t for r in requests for t in present(r.visual_tokens)],
        )
        last = [length - known - 1 for length in lengths]
        hidden_states = hidden_states_at(self.model, last, embeddings[:, known:], caches, step)
        logits = self.model.language_model.logits(hidden_states)
        check_finite(self.model, mx.isfinite(logits).all(), logits.dtype)
        tokens = self._next_tokens(rows, logits)
        mx.async_eval(tokens)
        self._tokens = mx.concatenate([self._tokens, tokens])
        self._rows = self._rows + rows
        self._cache.add(caches, lengths)
        if self.cache is not None:
            for i, request in enumerate(requests):
                self.cache.store(request.tagged, caches, row=i)

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
        processed = logits
        if any(row.process for row in rows):
            each = [self._process(row, logits[i : i + 1]) for i, row in enumerate(rows)]
            processed = mx.concatenate(each)
        processed = constrain_logits(processed, [row.constraint for row in rows])
        tokens = sample_rows(rows, processed)
        for i, row in enumerate(rows):
            row.choose(logits[i : i + 1], tokens[i : i + 1])
        return tokens

    def _process(self, row: Row, logits: mx.array) -> mx.array:
        """What a row's own processor makes of its logits; if that fails, only the row does."""
        if row.process is None or row.done:
            return logits
        try:
            return row.process(row.seen, logits)
        except Exception as error:
            row.done = True
            self._failed.append(RequestError(row.id, error))
            return logits

    def _keep(self, kept: list[bool]) -> None:
        """Drop the other rows."""
        if all(kept):
            return
        order = self._cache.keep(kept)
        self._rows = [self._rows[i] for i in order]
        self._tokens = self._tokens[mx.array(order, dtype=mx.int32)]
