"""The engine under load: nothing is lost, nothing mixed up, and nothing grows."""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import threading
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from engines import alone, request, text_of, with_engine
from models import PANDA, PENGUINS, Nano

from fastvlm_mlx.serve.cache import RequestCache
from fastvlm_mlx.serve.engine import Engine, QueueFull, Request, RequestError, RequestTimeout

CLIENTS, ROUNDS = 32, 12
MOST_GROWTH = 30e6  # bytes of the process, over the second half


def mixed() -> list[Request]:
    """Requests of every kind, whose answers are repeatable."""
    panda, penguins = PANDA.read_bytes(), PENGUINS.read_bytes()
    questions = "Describe the image.", "How many penguins are there?", "What is this?"
    found = [request(q, image) for q in questions for image in (panda, penguins)]
    found += [request(q) for q in ("Hello!", "Who are you?", "Write a poem.")]
    found += [request("Compare.", panda, penguins), request("Compare.", penguins, panda)]
    found += [request(questions[0], panda, temperature=4.0, seed=seed) for seed in range(4)]
    found += [request(questions[0], panda, image_size=128, max_tokens=30)]
    found += [request(questions[2], penguins, conv_mode=None, system="Be brief.", max_tokens=20)]
    found += [request(questions[0], penguins, stop=["ing", "e"], max_tokens=20)]
    found += [request("Hello!", repetition_penalty=1.6, max_tokens=20)]
    found += [request("Hello!", temperature=2.0, top_k=40, min_p=0.01, seed=3, max_tokens=40)]
    return found


def memory_of_process() -> int:
    """Bytes of this process now; on a Mac the most so far."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def client(
    number: int, engine: Engine, asked: list[Request], expected: list[str], counts: Counter[str]
) -> None:
    """Asks one thing after the other, leaves some answers, and sends some nonsense."""
    draw = random.Random(number)
    for _ in range(ROUNDS):
        index = draw.randrange(len(asked))
        kind = draw.choices(("ask", "leave", "nonsense", "hurry"), (8, 1, 1, 1))[0]
        try:
            if kind == "nonsense":
                await text_of(engine.submit(request("Hi", b"no image")))
            elif kind == "hurry":
                await text_of(engine.submit(Request("Hi", asked[index].options, timeout=1e-4)))
            elif kind == "leave":
                ticket = engine.submit(asked[index])
                await asyncio.wait([asyncio.ensure_future(anext(ticket))], timeout=draw.random())
                ticket.cancel()
            else:
                found = await text_of(engine.submit(asked[index]))
                assert found == expected[index], asked[index]
        except (RequestError, RequestTimeout) as error:
            assert kind == ("nonsense" if isinstance(error, RequestError) else "hurry")
        except QueueFull:
            await asyncio.sleep(0.05)
            kind = "full"
        counts[kind] += 1


@pytest.mark.slow
@pytest.mark.parametrize("with_cache", [True, False])
def test_many_clients_get_the_answers_alone_and_memory_stays_flat(
    nano: Nano, with_cache: bool
) -> None:
    asked = mixed()
    expected = [alone(nano, each) for each in asked]
    counts: Counter[str] = Counter()
    held: list[tuple[int, int, int]] = []

    async def use(engine: Engine) -> None:
        for turn in range(4):
            clients = [
                client(CLIENTS * turn + n, engine, asked, expected, counts) for n in range(CLIENTS)
            ]
            await asyncio.gather(*clients)
            while engine.queued or engine.running:
                await asyncio.sleep(0.01)
            mx.clear_cache()
            held.append((memory_of_process(), mx.get_active_memory(), threading.active_count()))
        assert engine.alive and engine.stats.answered >= counts["ask"]

    settings: dict[str, Any] = {"max_queue": 12}
    if with_cache:
        settings["cache"] = RequestCache(nano[0], max_bytes=400_000)
    with_engine(nano, use, limit=1200, **settings)
    assert sum(counts.values()) == 4 * CLIENTS * ROUNDS
    assert min(counts[kind] for kind in ("ask", "leave", "nonsense", "hurry", "full")) > 0
    _, second, _, last = held
    assert last[0] - second[0] < MOST_GROWTH
    assert last[1] - second[1] < 1e6
    assert last[2] == second[2]
