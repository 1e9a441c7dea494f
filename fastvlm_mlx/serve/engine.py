"""One thread that owns all MLX work, and answers together what an event loop asks.

engine = Engine(model, processor, name="nano")
engine.start()
ticket = engine.submit(Request("What is this?", {"max_tokens": 64}))
async for piece in ticket:
    print(piece.text, end="")
await engine.close(grace=5)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from threading import Event, RLock, Thread
from typing import Any

import mlx.core as mx

from ..checks import check_whole_number
from ..generation import requests
from ..generation.inputs import ContextTooLong
from ..generation.prompt_cache import PromptCache
from ..generation.response import Response
from ..generation.scheduler import MAX_BATCH, Batch
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import read_messages
from .ticket import (
    EngineDied,
    Item,
    QueueFull,
    Request,
    RequestError,
    RequestTimeout,
    Ticket,
    Timings,
)

MAX_QUEUE = 64  # requests that wait, if nothing else is asked for
POLL = 0.02  # seconds between two looks at what still runs, while an engine closes


@dataclass(frozen=True)
class Stats:
    """What an engine has done since its start.

    Attributes:
        answered, failed, cancelled, timed_out, refused: requests by how they ended.
        prompt_tokens, generated_tokens: of the requests that were answered.
        cached_tokens, cached_images: of those, what was not computed again.
        steps: of the decoder.
        mean_batch: sequences in a step, on average.
        cache_bytes: that the cache holds.
        memory_bytes: that MLX's arrays take.
    """

    answered: int
    failed: int
    cancelled: int
    timed_out: int
    refused: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    cached_images: int
    steps: int
    mean_batch: float
    cache_bytes: int
    memory_bytes: int


class Engine:
    """Answers requests together, in one thread that owns all MLX work.

    Args:
        model, processor: from `load`.
        name: of the model, for those who ask.
        max_batch: requests that are answered at a time.
        max_queue: requests that may wait beyond those.
        cache: what is kept of images and prompts for later requests.

    Raises:
        ValueError: one of the numbers is out of range.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        *,
        name: str,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        cache: PromptCache | None = None,
    ):
        check_whole_number("max_batch", max_batch)
        check_whole_number("max_queue", max_queue, least=0)
        self.model = model
        self.processor = processor
        self.name = name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.cache = cache
        self.error: BaseException | None = None
        self.ready = False
        self._wake = Event()
        self._lock = RLock()  # of the tickets
        self._tickets: set[Ticket] = set()  # all that have not ended
        self._coming: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._by_id: dict[int, Ticket] = {}
        self._counts: Counter[str] = Counter()
        self._seconds = 1.0  # that an answer takes, lately
        self._closing = self._stopping = self._ended = False
        self._step_began: float | None = None
        self._batch = Batch(
            model, processor, max_batch=max_batch, when_read=self._wake.set, cache=cache
        )
        self._thread = Thread(target=self._run, name="fastvlm-engine", daemon=True)

    # In any thread

    def start(self) -> None:
        """Start the thread; it warms up, which takes about as long as an answer, and is `ready`."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine works, on requests or waiting for them."""
        return self._thread.is_alive() and not self._ended

    @property
    def step_seconds(self) -> float:
        """How long the step takes that the engine is in; 0 between two."""
        began = self._step_began
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def queued(self) -> int:
        """Requests that wait for their first token."""
        return max(0, len(self._tickets) - self.running)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._batch.running

    @property
    def stats(self) -> Stats:
        """What was done so far."""
        measured: dict[str, Any] = {
            "mean_batch": self._counts["rows"] / max(1, self._counts["steps"]),
            "cache_bytes": 0 if self.cache is None else self.cache.nbytes,
            "memory_bytes": mx.get_active_memory(),
        }
        counted = [each.name for each in fields(Stats) if each.name not in measured]
        return Stats(**measured, **{name: self._counts[name] for name in counted})

    def submit(self, request: Request) -> Ticket:
        """Ask for an answer; to be called in an event loop.

        Raises:
            QueueFull: as many requests wait as may. What is wrong with the request, or the engine,
                comes from the ticket.
        """
        with self._lock:
            ticket = Ticket(request, self.cancel)
            if self._ended or self._closing:
                ticket.put(self._death())
                return ticket
            if len(self._tickets) >= self.max_batch + self.max_queue:
                self._counts["refused"] += 1
                raise QueueFull(max(1.0, self._seconds / self.max_batch))
            self._tickets.add(ticket)
            self._coming.append(ticket)
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request."""
        self._cancelled.append(ticket)
        self._wake.set()

    async def close(self, grace: float) -> None:
        """Take no more requests, let those that are there end within `grace` seconds, and stop."""
        with self._lock:
            self._closing = True
        self.ready = False
        end = time.perf_counter() + grace
        while self._tickets and self.alive and time.perf_counter() < end:
            await asyncio.sleep(POLL)
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._tell_everyone()  # it may never have been started

    def _death(self) -> EngineDied:
        if self.error is None:
            return EngineDied("The server is shutting down.")
        return EngineDied("The engine has stopped after a fault; the server must be restarted.")

    # In the engine's own thread

    def _run(self) -> None:
        try:
            self._warm_up()
            self.ready = not self._closing
            while not self._stopping:
                self._wake.clear()
                self._take()
                self._drop()
                if self._batch and not self._batch.is_blocked:
                    self._step_began = time.perf_counter()
                    self._step()
                    self._step_began = None
                else:
                    self._wake.wait(self._time_left())
        except BaseException as error:
            self.error = error
        finally:
            self._tell_everyone()
            mx.clear_streams()  # see docs/threads.md

    def _tell_everyone(self) -> None:
        """End all tickets: nobody will answer."""
        self.ready = False
        with self._lock:
            self._ended = True
            waiting = list(self._tickets)
            self._tickets.clear()
        self._deliver((ticket, self._death()) for ticket in waiting)

    def _warm_up(self) -> None:
        """Answer a first question, so that kernels are compiled and libraries imported."""
        from PIL import Image

        batch = Batch(self.model, self.processor, max_batch=1)
        batch.insert(
            "Hi", Image.new("RGB", (64, 64)), max_tokens=2, top_k=2, temperature=1.0, seed=0
        )
        try:
            while batch:
                batch.step()
        except requests.RequestError as error:
            raise error.error from None

    def _take(self) -> None:
        """Hand new requests to the batch."""
        while self._coming:
            ticket = self._coming.popleft()
            if ticket not in self._tickets:
                continue
            ticket.inserted = time.perf_counter()
            try:
                ticket.id = self._insert(ticket.request)
            except Exception as error:
                self._fail(ticket, error)
            else:
                self._by_id[ticket.id] = ticket

    def _insert(self, request: Request) -> int:
        _, slots = read_messages(request.prompt)
        if any(isinstance(slot.image, (str, os.PathLike)) for slot in slots):
            raise ValueError("An image is a path or URL, which the engine does not read.")
        options = {**request.options, **(request.constraint or {})}
        if request.logprobs is not None:
            options["logprobs"] = request.logprobs
        return self._batch.insert(request.prompt, **options)

    def _drop(self) -> None:
        """Let go of requests that were given up or whose time is up."""
        while self._cancelled:
            self._finish(self._cancelled.popleft(), None, "cancelled")
        now = time.perf_counter()
        for ticket in [ticket for ticket in self._tickets.copy() if ticket.deadline <= now]:
            timeout = ticket.request.timeout
            error = RequestTimeout(f"The answer took longer than {timeout:g} s.")
            self._finish(ticket, error, "timed_out")

    def _time_left(self) -> float | None:
        """Seconds until a request's time is up; None if there is no such request."""
        deadline = min((ticket.deadline for ticket in self._tickets.copy()), default=float("inf"))
        return None if deadline == float("inf") else max(0.0, deadline - time.perf_counter())

    def _step(self) -> None:
        try:
            responses = self._batch.step()
        except requests.RequestError as error:
            if error.id in self._by_id:
                self._fail(self._by_id[error.id], error.error)
            return
        found = [(self._by_id[id], response) for id, response in responses if id in self._by_id]
        self._counts["steps"] += bool(found)
        self._counts["rows"] += len(found)
        for ticket, response in found:
            if response.finish_reason is not None:
                self._count(ticket, response)
        self._deliver(found)

    def _count(self, ticket: Ticket, last: Response) -> None:
        """Note that a request was answered."""
        ticket.timings = Timings.of(last, ticket.inserted - ticket.submitted)
        seconds = time.perf_counter() - ticket.submitted - ticket.timings.queue
        self._seconds += 0.2 * (seconds - self._seconds)
        self._counts.update(
            answered=1,
            prompt_tokens=last.prompt_tokens,
            generated_tokens=last.generation_tokens,
            cached_tokens=last.cached_tokens,
            cached_images=last.cached_images,
        )
        self._forget(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        known = isinstance(error, ContextTooLong)
        self._finish(ticket, error if known else RequestError(str(error)), "failed")

    def _finish(self, ticket: Ticket, item: Item, outcome: str) -> None:
        """End a ticket that was not answered."""
        if ticket not in self._tickets:
            return
        if ticket.id is not None:
            self._batch.remove(ticket.id)
        self._counts[outcome] += 1
        self._forget(ticket)
        self._deliver([(ticket, item)])

    def _forget(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.discard(ticket)
        if ticket.id is not None:
            self._by_id.pop(ticket.id, None)

    def _deliver(self, items: Iterable[tuple[Ticket, Item]]) -> None:
        """Hand pieces to their tickets, with one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Item]]] = {}
        for ticket, item in items:
            by_loop.setdefault(ticket.loop, []).append((ticket, item))
        for loop, found in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_each, found)
            except RuntimeError:  # the loop is closed, and so nobody waits
                for ticket, _ in found:
                    self.cancel(ticket)


def _put_each(items: Iterable[tuple[Ticket, Item]]) -> None:
    for ticket, item in items:
        ticket.put(item)
