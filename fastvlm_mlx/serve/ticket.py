"""A request, and the ticket on which its answer comes, piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..generation.response import Response
from ..text.messages import Messages

# What comes from a ticket: a piece of its answer, what went wrong, or None once it was cancelled
Item: TypeAlias = "Response | Exception | None"


class QueueFull(RuntimeError):
    """No room for another request.

    Attributes:
        retry_after: seconds after which there is probably room.
    """

    def __init__(self, retry_after: float):
        super().__init__("Too many requests are waiting; try again later.")
        self.retry_after = retry_after


class RequestError(ValueError):
    """A request that can't be answered, because of what is in it."""


class RequestTimeout(TimeoutError):
    """An answer that took longer than the request allows."""


class EngineDied(RuntimeError):
    """The engine has stopped and answers no more."""


@dataclass(frozen=True)
class Request:
    """What to answer, and how.

    Attributes:
        prompt: a text or messages, as `generate` takes them; their images are bytes, PIL images or
            arrays. Paths and URLs are refused: who may read what is not for the engine to decide.
        options: the keyword arguments of `generate`.
        logprobs: as the option of this name.
        constraint: what the answer must match: options too.
        timeout: seconds from `submit` to the end of the answer.
    """

    prompt: Messages
    options: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    constraint: Mapping[str, Any] | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Timings:
    """Where the time of an answer went, in seconds.

    Attributes:
        queue: waiting for other requests.
        read: reading and resizing the images.
        encode: encoder and projector, together with other requests' images.
        prefill: running the decoder over the prompt.
        first_token: from `submit` to the first token.
        tokens_per_second: after the first.
        cached_tokens: of the prompt, that did not have to be read again.
        cached_images: that did not have to be encoded again.
    """

    queue: float
    read: float
    encode: float
    prefill: float
    first_token: float
    tokens_per_second: float
    cached_tokens: int
    cached_images: int

    @classmethod
    def of(cls, response: Response, waited: float) -> Timings:
        """By the last response, and the seconds before the batch knew of the request."""
        return cls(
            queue=response.queue_time + waited,
            read=response.preprocess_time,
            encode=response.encode_time,
            prefill=response.prefill_time,
            first_token=response.ttft + waited,
            tokens_per_second=response.generation_tps,
            cached_tokens=response.cached_tokens,
            cached_images=response.cached_images,
        )


class Ticket:
    """An answer on its way: iterate over it in the event loop that submitted the request.

    Attributes:
        request: what was asked.
        timings: once the answer has ended.
    """

    def __init__(self, request: Request, give_up: Callable[[Ticket], None]):
        self.request = request
        self.timings: Timings | None = None
        self.submitted = time.perf_counter()
        self.inserted = self.submitted
        self.id: int | None = None  # in the batch
        self.loop = asyncio.get_running_loop()
        self._give_up = give_up
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Response:
        """The next piece. A wait for it may be given up and repeated: no piece is lost.

        Raises:
            RequestError: the request can't be answered.
            ContextTooLong: its prompt leaves no room for an answer.
            RequestTimeout: the answer took longer than the request allows.
            EngineDied: the engine answers no more.
        """
        if self._ended:
            raise StopAsyncIteration
        item = await self._items.get()
        self._ended = not isinstance(item, Response) or item.finish_reason is not None
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Give the request up: its place is free within one step. Nothing happens if it ended."""
        self._give_up(self)

    def put(self, item: Item) -> None:
        """Hand on a piece, in the event loop's thread."""
        self._items.put_nowait(item)

    @property
    def deadline(self) -> float:
        """When the request's time is up."""
        timeout = self.request.timeout
        return float("inf") if timeout is None else self.submitted + timeout
