"""Questions to the server's engine, as several test files ask them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import mlx.core as mx
from models import Nano

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.serve.engine import Engine, Request, Ticket

T = TypeVar("T")
ENDS = sorted(load_processor(NANO).tokenizer.eos_token_ids)
SMALL: dict[str, Any] = {"image_size": 64, "max_tokens": 6, "conv_mode": "plain"}
LONG: dict[str, Any] = {**SMALL, "max_tokens": 2000, "logits_processor": None}


def never_ends(tokens: mx.array, logits: mx.array) -> mx.array:
    """No end of text, so that an answer runs to `max_tokens`."""
    return mx.put_along_axis(logits, mx.array([ENDS]), mx.array(-mx.inf), axis=-1)


LONG["logits_processor"] = never_ends


def asked(question: str, *images: Any) -> list[dict[str, Any]]:
    """A message with images as the server has them."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def request(question: str, *images: Any, **options: Any) -> Request:
    return Request(asked(question, *images), {**SMALL, **options})


def alone(nano: Nano, request: Request) -> str:
    return fv.generate(*nano, request.prompt, **request.options)


async def text_of(ticket: Ticket) -> str:
    return "".join([piece.text async for piece in ticket])


@asynccontextmanager
async def running(nano: Nano, **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(*nano, name="nano", **settings)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close(0)
        assert not engine.alive


def with_engine(
    nano: Nano, use: Callable[[Engine], Awaitable[T]], limit: float = 60, **settings: Any
) -> T:
    """What comes of using an engine, in an event loop, within so many seconds."""

    async def run() -> T:
        async with running(nano, **settings) as engine:
            return await use(engine)

    return asyncio.run(asyncio.wait_for(run(), limit))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)
