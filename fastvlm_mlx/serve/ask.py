"""A request of any interface → answers of the engine, whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from ..generation.constrain import make_constraint
from ..generation.inputs import ContextTooLong
from ..generation.options import Options
from ..generation.response import Response
from ..hub import registry
from .engine import Engine
from .errors import ApiError, bad, failed, too_long
from .facts import facts_of
from .fields import FIRST_SEED
from .logs import log_failure
from .media import Media, image_parts
from .metrics import Metrics
from .prompt import count_tokens
from .settings import Settings
from .ticket import EngineDied, QueueFull, Request, RequestError, Ticket

MODEL_ALIASES = ("default", "fastvlm")
COUNTABLE = 2**20  # tokens of a prompt that is only counted


@dataclass(frozen=True)
class Question:
    """What a request asks, whichever interface it came by.

    Attributes:
        messages: a role and a list of parts each; an image part has the text that names its image.
        options: keyword arguments of `generate` that the request sets.
        n: how many answers.
        logprobs: how many alternatives of each token to report; None for no log probabilities.
        constraint: what the answer must follow: `schema`, `regex` or `choices` of `generate`.
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    n: int = 1
    logprobs: int | None = None
    constraint: Mapping[str, Any] | None = None


@dataclass
class Answer:
    """What has come of one answer.

    Attributes:
        ticket: by which it comes.
        pieces: those that came, in order.
    """

    ticket: Ticket
    pieces: list[Response] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> Response:
        return self.pieces[-1]

    @property
    def timings(self) -> dict[str, Any]:
        """Where its time went, once it has ended; in seconds."""
        found = {} if self.ticket.timings is None else asdict(self.ticket.timings)
        return {name: round(value, 6) for name, value in found.items()}


class Service:
    """What every interface works with: the engine, and what the server allows."""

    def __init__(self, engine: Engine, settings: Settings, media: Media, metrics: Metrics):
        self.engine = engine
        self.settings = settings
        self.media = media
        self.metrics = metrics
        self.facts = facts_of(engine.model)

    @property
    def context(self) -> int:
        """Tokens that the model has positions for, prompt and answer together."""
        return self.engine.processor.max_length

    @property
    def prompt_limit(self) -> int:
        """The most tokens of a prompt; one more is for the answer."""
        limit = self.settings.max_prompt_tokens
        return self.context - 1 if limit is None else min(limit, self.context - 1)

    def check_model(self, name: str | None) -> None:
        """ApiError, 404, unless it is a name of the loaded model; None means that one."""
        if name is not None and name.removesuffix(":latest").lower() not in self.names():
            raise ApiError(
                404,
                "There is no model of this name here; the loaded one is "
                f"{self.engine.name}, as GET /v1/models says.",
                "model_not_found",
                "model",
            )

    def names(self) -> set[str]:
        """What the loaded model is called, in lower case."""
        name = self.engine.name.lower()
        sizes = [registry.find(name).size] if registry.knows(name) else []
        return {name, name.rpartition("/")[2], *sizes, *MODEL_ALIASES}

    def output_limit(self, asked: int | None, name: str = "max_tokens") -> int:
        """The most tokens of an answer; ApiError if more are asked for than the server allows."""
        limit = self.settings.max_output_tokens
        if asked is not None and asked > limit:
            raise bad(f"{name} may be at most {limit} here, found {asked}.", name)
        return limit if asked is None else asked

    async def _prepare(self, question: Question) -> tuple[Request, int]:
        """Read the images and check all that can be known before the engine begins."""
        messages = await self.media.read(question.messages)
        tokens = await self._count(messages, question, self.prompt_limit)
        request = Request(
            prompt=messages,
            options=question.options,
            logprobs=question.logprobs,
            constraint=question.constraint,
            timeout=self.settings.timeout,
        )
        return request, tokens

    async def count(self, question: Question) -> int:
        """The tokens of a prompt, however many; ApiError if it is none."""
        return await self._count(await self.media.read(question.messages), question, COUNTABLE)

    async def _count(self, messages: Any, question: Question, limit: int) -> int:
        """The tokens of a prompt whose images are read; also checks the options of the request."""
        model, processor = self.engine.model, self.engine.processor

        def work() -> int:
            options = Options.of({**question.options, **(question.constraint or {})})
            make_constraint(processor, model.config.text.vocab_size, options)  # it is kept there
            return count_tokens(model, processor, messages, options, limit)

        try:
            return await asyncio.to_thread(work)
        except (ValueError, ImportError) as error:
            raise bad(str(error)) from None

    async def submit(self, question: Question) -> tuple[list[Ticket], int]:
        """Start the answers of a question; ApiError if it can't be answered, or not now.

        Returns:
            The ticket of each, and the tokens of the prompt.
        """
        request, tokens = await self._prepare(question)
        self.metrics.images.inc(len(image_parts(question.messages)))
        tickets: list[Ticket] = []
        try:
            for n in range(question.n):
                tickets.append(self.engine.submit(_nth(request, n)))
        except Exception as error:
            for ticket in tickets:
                ticket.cancel()
            raise self.explained(error) from error
        return tickets, tokens

    def explained(self, error: BaseException) -> ApiError:
        """What stopped an answer, as clients are told; what is no fault of theirs is logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFull):
            wait = {"Retry-After": str(ceil(error.retry_after))}
            return ApiError(429, str(error), "rate_limit_exceeded", headers=wait)
        if isinstance(error, EngineDied):
            return ApiError(503, str(error), "engine_died")
        if isinstance(error, TimeoutError):
            seconds = f"{self.settings.timeout:g}"
            return ApiError(504, f"The answer was not ready within {seconds} seconds.", "timeout")
        if isinstance(error, ContextTooLong):
            return too_long(error.tokens, error.limit - 1, error.limit)
        if isinstance(error, (RequestError, ValueError)):
            return bad(str(error))
        log_failure(error)
        return failed()

    async def pieces(
        self, tickets: Sequence[Ticket]
    ) -> AsyncGenerator[tuple[int, Response] | None, None]:
        """What comes of several answers, with the number of each; None where nothing came for long.

        The answers are given up when this is closed before their end.

        Raises:
            ApiError: one of them can't be answered, which ends the others.
        """
        queue: asyncio.Queue[tuple[int, Response | BaseException | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(n, ticket, queue)) for n, ticket in enumerate(tickets)]
        running = len(tasks)
        try:
            while running:
                try:
                    number, piece = await asyncio.wait_for(queue.get(), self.settings.keep_alive)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if isinstance(piece, BaseException):
                    raise self.explained(piece)
                if piece is None:
                    running -= 1
                else:
                    self.metrics.observe(piece)
                    yield number, piece
        finally:
            for task, ticket in zip(tasks, tickets, strict=True):
                ticket.cancel()
                task.cancel()

    async def answers(self, tickets: Sequence[Ticket]) -> list[Answer]:
        """All answers, whole; ApiError as `pieces`."""
        answers = [Answer(ticket) for ticket in tickets]
        async with aclosing(self.pieces(tickets)) as pieces:
            async for came in pieces:
                if came is not None:
                    number, piece = came
                    answers[number].pieces.append(piece)
        return answers


async def _pump(number: int, ticket: Ticket, queue: asyncio.Queue[Any]) -> None:
    """Put the pieces of an answer into a queue; at its end None, or what stopped it."""
    try:
        async for piece in ticket:
            queue.put_nowait((number, piece))
        queue.put_nowait((number, None))
    except Exception as error:
        queue.put_nowait((number, error))


def _nth(request: Request, n: int) -> Request:
    """The request for one of several answers: each has the next seed."""
    if not n or "seed" not in request.options:
        return request
    seed = (request.options["seed"] + n) % FIRST_SEED
    return replace(request, options={**request.options, "seed": seed})


async def until_left(receive: Any, answers: Any) -> Any:
    """What a coroutine gives, unless the client leaves first, which cancels it; then None.

    Args:
        receive: of the request, whose body was read.
        answers: the coroutine.
    """
    work = asyncio.ensure_future(answers)
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        left.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await work


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
