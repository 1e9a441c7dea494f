"""The engine behind the server: many askers, one thread, and nobody harms another."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from io import BytesIO
from math import isfinite
from typing import Any

import mlx.core as mx
import pytest
from engines import LONG, SMALL, alone, asked, request, text_of, until, with_engine
from models import PANDA, PENGUINS, Nano
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.generation import scheduler
from fastvlm_mlx.generation.response import Response
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.serve.engine import (
    ContextTooLong,
    Engine,
    EngineDied,
    QueueFull,
    Request,
    RequestError,
    RequestTimeout,
    Ticket,
)


async def pieces_of(ticket: Ticket) -> list[Response]:
    return [piece async for piece in ticket]


def picture(path: Any = PANDA) -> bytes:
    return bytes(path.read_bytes())


# Answers


def requests() -> list[Request]:
    panda, penguins = Image.open(PANDA), picture(PENGUINS)
    return [
        request("Describe the image.", panda),
        request("How many penguins are there?", penguins),
        request("Hello!"),
        request("What are these?", panda, penguins),
        request("Describe the image.", panda, temperature=3.0, seed=0),
        request("Describe the image.", panda, temperature=3.0, seed=7),
        request("Describe the image.", panda, stop=["i"]),
        request("Describe the image.", panda, repetition_penalty=1.9),
    ]


def test_answers_are_those_alone_whatever_runs_beside(nano: Nano) -> None:
    expected = [alone(nano, each) for each in requests()]

    async def use(engine: Engine) -> None:
        for _ in range(2):
            tickets = [engine.submit(each) for each in requests()]
            assert [await text_of(ticket) for ticket in tickets] == expected
        found = [await text_of(engine.submit(each)) for each in requests()]
        assert found == expected

    assert len(set(expected)) == len(expected)
    with_engine(nano, use, max_batch=3)


def test_unseeded_twins_differ(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        twins = [request("Hi", temperature=5.0, max_tokens=20) for _ in range(2)]
        first, second = [await text_of(ticket) for ticket in map(engine.submit, twins)]
        assert first != second

    with_engine(nano, use)


def test_pieces_have_counts_and_the_ticket_its_timings(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        ticket = engine.submit(request("What is this?", picture()))
        assert ticket.timings is None
        pieces = [piece async for piece in ticket]
        assert [piece async for piece in ticket] == []
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason in ("stop", "length")
        assert pieces[-1].generation_tokens == len(pieces)
        times = ticket.timings
        assert times is not None
        parts = times.queue + times.read + times.encode + times.prefill
        assert min(times.read, times.encode, times.prefill, times.tokens_per_second) > 0
        assert times.queue >= 0 and parts == pytest.approx(times.first_token, rel=1e-6)
        stats = engine.stats
        assert stats.answered == 1 and stats.generated_tokens == len(pieces)
        assert stats.prompt_tokens == pieces[-1].prompt_tokens
        assert stats.steps == len(pieces) and stats.mean_batch == 1

    with_engine(nano, use)


def test_waiting_counts_as_queue_time(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        first = engine.submit(request("Hi", **{**LONG, "max_tokens": 100}))
        second = engine.submit(request("Hi"))
        await asyncio.gather(text_of(first), text_of(second))
        assert first.timings is not None and second.timings is not None
        assert second.timings.queue > 0.5 * second.timings.first_token
        assert second.timings.queue > 10 * first.timings.prefill / 100

    with_engine(nano, use, max_batch=1)


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_the_models_own(nano: Nano, top: int) -> None:
    options = {**SMALL, "temperature": 2.0, "seed": 3, "repetition_penalty": 1.5}
    expected = list(fv.stream_generate(*nano, asked("Hello!"), logprobs=top, **options))

    async def use(engine: Engine) -> None:
        plain = engine.submit(request("Hello, you!"))
        ticket = engine.submit(Request(asked("Hello!"), options, logprobs=top))
        pieces = [piece async for piece in ticket]
        assert [piece.token for piece in pieces] == [piece.token for piece in expected]
        for piece, single in zip(pieces, expected, strict=True):
            assert piece.logprobs is not None and single.logprobs is not None
            assert piece.logprobs.logprob == pytest.approx(single.logprobs.logprob, abs=1e-3)
            assert len(piece.logprobs.top) == top
            assert [t for t, _ in piece.logprobs.top] == [t for t, _ in single.logprobs.top]
        assert all([piece.logprobs is None async for piece in plain])

    with_engine(nano, use)


def test_the_stop_text_that_ended_an_answer_is_named(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        for stop, named in ((["zzz", "i"], "i"), (["zzz"], None)):
            *_, last = [p async for p in engine.submit(request("Describe.", picture(), stop=stop))]
            assert last.stop_text == named

    with_engine(nano, use)


@pytest.mark.needs("llguidance")
def test_answers_that_must_match_run_beside_others(nano: Nano) -> None:
    free = request("What is this?", picture(), max_tokens=12)
    expected = alone(nano, free)

    async def use(engine: Engine) -> None:
        asked_for = {"choices": ["yes", "no"]}, {"regex": "[0-9]{3}"}, {"regex": "("}
        bound = [
            Request(asked("Is it day?", picture()), SMALL, logprobs=2, constraint=constraint)
            for constraint in asked_for
        ]
        tickets = [engine.submit(each) for each in (free, *bound, free)]
        found = await asyncio.gather(*map(pieces_of, tickets), return_exceptions=True)
        texts = ["".join(p.text for p in each) for each in found if isinstance(each, list)]
        assert [texts[0], texts[-1]] == [expected] * 2
        assert texts[1] in ("yes", "no") and len(texts[2]) == 3 and texts[2].isdecimal()
        assert isinstance(found[3], RequestError) and "regex" in str(found[3])
        for piece in (*found[1], *found[2]):  # type: ignore[misc]
            assert isfinite(piece.logprobs.logprob)
            assert all(isfinite(logprob) for _, logprob in piece.logprobs.top)

    with_engine(nano, use)


# What can't be answered


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("Hi", b"no image"), "Cannot read image bytes"),
        (request("Hi", "/etc/passwd"), "path or URL"),
        (request("Hi", "https://example.org/cat.png"), "path or URL"),
        (request("Hi", PANDA), "path or URL"),
        (request("Hi", temperature=-1), "temperature must be"),
        (request("Hi", temprature=1), "did you mean temperature"),
        (request("Hi", num_beams=2), "does not go with a batch"),
        (Request("Hi", {"logprobs": 21}), "logprobs must be a whole number from 0 to 20"),
        (Request([], {}), "There are no messages"),
        (Request(5, {}), "A prompt must be"),  # type: ignore[arg-type]
        (Request("<image>", {}), "mark"),
        (request("Hi", logits_processor=lambda tokens, logits: 1 / 0), "division by zero"),
        (request("Hi", logits_processor=lambda tokens, logits: 5), "must return logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_harms_no_other(nano: Nano, bad: Request, message: str) -> None:
    good = request("Describe the image.", picture())
    expected = alone(nano, good)

    async def use(engine: Engine) -> None:
        tickets = [engine.submit(each) for each in (good, bad, good, bad, good)]
        answers = await asyncio.gather(*map(text_of, tickets), return_exceptions=True)
        assert answers[::2] == [expected] * 3
        for error in answers[1::2]:
            assert isinstance(error, RequestError) and message in str(error)
            assert "Request " not in str(error)
        assert (engine.queued, engine.running, engine.stats.failed) == (0, 0, 2)

    with_engine(nano, use)


def test_a_row_that_fails_late_harms_no_other(nano: Nano) -> None:
    def fails(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > started + 3:
            raise KeyError("late")
        return logits

    started = next(iter(fv.stream_generate(*nano, asked("Hi"), **SMALL))).prompt_tokens
    good = request("Describe the image.", picture(), max_tokens=20)
    expected = alone(nano, good)

    async def use(engine: Engine) -> None:
        bad = engine.submit(request("Hi", logits_processor=fails))
        others = [engine.submit(good) for _ in range(3)]
        pieces = []
        with pytest.raises(RequestError, match="late"):
            async for piece in bad:
                pieces.append(piece)
        assert len(pieces) == 3
        assert [await text_of(ticket) for ticket in others] == [expected] * 3

    with_engine(nano, use)


def test_an_encoder_that_fails_harms_only_whose_image_it_was(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = request("Hi", picture(PANDA)), request("Hi", picture(PENGUINS))
    expected = alone(nano, good)
    encode, broken = FastVLM.encode_image, nano[1].preprocess(PENGUINS, 64, dtype=mx.uint8)

    def encode_image(self: FastVLM, pixels: mx.array) -> mx.array:
        if any(mx.array_equal(each, broken[0]) for each in pixels):
            raise RuntimeError("out of memory")
        return encode(self, pixels)

    monkeypatch.setattr(FastVLM, "encode_image", encode_image)

    async def use(engine: Engine) -> None:
        tickets = [engine.submit(each) for each in (good, bad, good)]
        answers = await asyncio.gather(*map(text_of, tickets), return_exceptions=True)
        assert [answers[0], answers[2]] == [expected] * 2
        assert isinstance(answers[1], RequestError) and "out of memory" in str(answers[1])

    with_engine(nano, use)


def test_a_prompt_over_the_context_is_refused_before_its_image_is_encoded(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = nano
    encoded: list[int] = []
    encode = FastVLM.encode_image

    def encode_image(self: FastVLM, pixels: mx.array) -> mx.array:
        encoded.append(len(pixels))
        return encode(self, pixels)

    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        monkeypatch.setattr(FastVLM, "encode_image", encode_image)
        with pytest.raises(ContextTooLong, match=r"has \d+ tokens.* limit is 200") as raised:
            await text_of(engine.submit(request("long " * 300, picture())))
        assert raised.value.tokens > 300 and raised.value.limit == 200
        assert encoded == []
        assert await text_of(engine.submit(request("Hi", picture())))
        assert encoded == [1]

    with_engine((model, replace(processor, max_length=200)), use)


# Pictures that arrive beside running answers


def test_running_answers_go_on_between_two_encodes(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    encode, decode = FastVLM.encode_image, scheduler.Batch._decode

    def encode_image(self: FastVLM, pixels: mx.array) -> mx.array:
        events.append("encode")
        return encode(self, pixels)

    def _decode(self: Any) -> mx.array:
        events.extend(["decode"] * bool(self._rows))
        return decode(self)

    def different(n: int) -> Image.Image:
        return Image.new("RGB", (64, 64), (n, 2 * n, 255 - n))

    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        monkeypatch.setattr(FastVLM, "encode_image", encode_image)
        monkeypatch.setattr(scheduler.Batch, "_decode", _decode)
        long = engine.submit(request("Hi", **LONG))
        await anext(long)
        many = [request("What are these?", *map(different, range(n, n + 9))) for n in (0, 9, 18)]
        tickets = [engine.submit(each) for each in many]
        found = [await text_of(ticket) for ticket in tickets]
        long.cancel()
        assert found == [alone(nano, each) for each in many]
        running = events[: len(events) - events[::-1].index("decode")]
        encodes = [n for n, event in enumerate(running) if event == "encode"]
        assert 4 <= len(encodes) <= 6  # 27 images, at most 8 at a time: they are encoded together
        assert all(running[n + 1] == "decode" for n in encodes)

    with_engine(nano, use)


# Places


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        tickets = [engine.submit(request("Hi", **LONG)) for _ in range(3)]
        with pytest.raises(QueueFull) as raised:
            engine.submit(request("Hi"))
        assert raised.value.retry_after >= 1
        await until(lambda: engine.running == 1)
        assert engine.queued == 2
        tickets[2].cancel()
        await until(lambda: engine.queued == 1)
        last = engine.submit(request("Hi"))
        for ticket in tickets:
            ticket.cancel()
        assert await text_of(last)
        assert engine.stats.refused == 1 and engine.stats.cancelled == 3

    with_engine(nano, use, max_batch=1, max_queue=2)


def test_a_cancelled_answer_frees_its_place_within_a_step(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        long = engine.submit(request("Hi", **LONG))
        waiting = engine.submit(request("Hello!"))
        assert await anext(aiter(long))
        steps = engine.stats.steps
        long.cancel()
        pieces = [piece async for piece in long]
        assert len(pieces) < 2000 - 50
        assert await text_of(waiting)
        assert engine.stats.steps - steps < len(pieces) + 6 + 3
        long.cancel()  # which ended
        assert engine.stats.cancelled == 1 and (engine.queued, engine.running) == (0, 0)

    with_engine(nano, use, max_batch=1)


def slow_picture() -> tuple[Any, threading.Event]:
    """The bytes of a picture in a file object that waits, and what lets it be read."""
    gate = threading.Event()

    class File(BytesIO):
        def read(self, *size: Any) -> bytes:
            gate.wait(20)
            return super().read(*size)

    return File(picture()), gate


def test_an_image_that_is_read_slowly_delays_nobody(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        file, gate = slow_picture()
        slow = engine.submit(request("What is this?", file))
        quick = request("What is this?", picture())
        assert await text_of(engine.submit(quick))
        assert (engine.queued, engine.running) == (1, 0)
        assert await text_of(engine.submit(request("Hello!")))
        gate.set()
        assert await text_of(slow) == alone(nano, quick)

    with_engine(nano, use)


def test_a_request_is_given_up_while_its_image_is_read(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        file, gate = slow_picture()
        slow = engine.submit(request("What is this?", file))
        await until(lambda: engine.ready)
        slow.cancel()
        await until(lambda: engine.queued == 0)
        assert await text_of(slow) == ""
        assert await text_of(engine.submit(request("Hello!")))
        gate.set()

    with_engine(nano, use, max_batch=1, max_queue=0)


def test_a_request_is_given_up_in_its_prefill(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, entered, gate = scheduler.Batch._prefill, threading.Event(), threading.Event()

    def gated(self: Any, requests: Any) -> None:
        entered.set()
        gate.wait(20)
        prefill(self, requests)

    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        monkeypatch.setattr(scheduler.Batch, "_prefill", gated)
        ticket = engine.submit(request("Hi", **LONG))
        await until(entered.is_set)
        ticket.cancel()
        gate.set()
        assert len([piece async for piece in ticket]) <= 1
        assert (engine.queued, engine.running) == (0, 0)

    with_engine(nano, use)


def test_a_wait_for_a_piece_may_be_given_up_and_repeated(nano: Nano) -> None:
    """As a server does that sends a sign of life meanwhile."""

    async def use(engine: Engine) -> None:
        file, gate = slow_picture()
        ticket = engine.submit(request("What is this?", file))
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(ticket), 0.02)
        gate.set()
        assert await text_of(ticket) == alone(nano, request("What is this?", picture()))

    with_engine(nano, use)


def test_a_request_whose_time_is_up_ends_wherever_it_is(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        file, gate = slow_picture()
        reading = Request(asked("Hi", file), SMALL, timeout=0.1)
        answering = Request(asked("Hi"), LONG, timeout=0.3)
        waiting = Request(asked("Hi"), SMALL, timeout=0.2)
        tickets = [engine.submit(each) for each in (reading, answering, waiting)]
        for ticket in tickets:
            with pytest.raises(RequestTimeout, match=r"longer than 0\.\d s"):
                await text_of(ticket)
        assert (engine.queued, engine.running, engine.stats.timed_out) == (0, 0, 3)
        gate.set()
        assert await text_of(engine.submit(request("Hello!")))

    with_engine(nano, use, max_batch=1)


# Its end


def test_closing_lets_what_runs_end_and_takes_nothing_more(nano: Nano) -> None:
    expected = alone(nano, request("Hello!"))

    async def use(engine: Engine) -> None:
        tickets = [engine.submit(request("Hello!")) for _ in range(3)]
        closing = asyncio.create_task(engine.close(30))
        await asyncio.sleep(0)
        late = engine.submit(request("Hello!"))
        assert [await text_of(ticket) for ticket in tickets] == [expected] * 3
        with pytest.raises(EngineDied, match="shutting down"):
            await text_of(late)
        await closing
        assert not engine.alive and not engine.ready

    with_engine(nano, use, max_batch=1)


def test_an_engine_that_was_never_started_leaves_nobody_waiting(nano: Nano) -> None:
    async def use() -> None:
        engine = Engine(*nano, name="nano")
        ticket = engine.submit(request("Hello!"))
        assert not engine.alive and not engine.ready
        await engine.close(5)
        with pytest.raises(EngineDied, match="shutting down"):
            await text_of(ticket)

    asyncio.run(asyncio.wait_for(use(), 3))


def test_closing_ends_what_takes_longer_than_the_grace(nano: Nano) -> None:
    async def use(engine: Engine) -> None:
        ticket = engine.submit(request("Hi", **LONG))
        assert await anext(ticket)
        start = time.perf_counter()
        await engine.close(0.1)
        assert 0.1 <= time.perf_counter() - start < 5
        with pytest.raises(EngineDied, match="shutting down"):
            await text_of(ticket)

    with_engine(nano, use)


def test_a_fault_of_the_engine_is_noticed_at_once_by_everyone(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> None:
        raise SystemError("Metal is gone")

    async def use(engine: Engine) -> None:
        file, gate = slow_picture()
        reading = engine.submit(request("Hi", file))
        ticket = engine.submit(request("Hi", **LONG))
        assert await anext(ticket)
        assert engine.alive and engine.ready
        monkeypatch.setattr(scheduler.Batch, "_decode", broken)
        start = time.perf_counter()
        for each in (ticket, reading, engine.submit(request("Hi"))):
            with pytest.raises(EngineDied, match="fault"):
                await text_of(each)
        assert not engine.alive and not engine.ready and time.perf_counter() - start < 1
        assert isinstance(engine.error, SystemError)
        with pytest.raises(EngineDied):
            await text_of(engine.submit(request("Hi")))
        gate.set()

    with_engine(nano, use)


def test_a_model_that_cannot_answer_is_noticed_at_the_start() -> None:
    model, processor = fv.load()
    model.language_model.norm.weight = model.language_model.norm.weight * mx.nan
    mx.eval(model.parameters())

    async def use(engine: Engine) -> None:
        await until(lambda: not engine.alive)
        assert not engine.ready and "NaN" in str(engine.error)

    with_engine((model, processor), use)


def test_an_event_loop_that_is_gone_stops_its_answers(nano: Nano) -> None:
    engine = Engine(*nano, name="nano", max_batch=1)
    engine.start()

    async def ask_and_leave() -> None:
        engine.submit(request("Hi", **LONG))
        await until(lambda: engine.running == 1)

    async def ask() -> str:
        try:
            return await text_of(engine.submit(request("Hello!")))
        finally:
            await engine.close(0)

    asyncio.run(ask_and_leave())
    assert asyncio.run(ask())


def test_a_closed_engine_leaves_no_threads(nano: Nano) -> None:
    before = set(threading.enumerate())

    async def use(engine: Engine) -> None:
        assert await text_of(engine.submit(request("Hello!", picture())))

    with_engine(nano, use)
    for _ in range(100):
        left = [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"max_queue": -1}, {"max_queue": 1.5}])
def test_bad_settings(nano: Nano, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Engine(*nano, name="nano", **settings)
