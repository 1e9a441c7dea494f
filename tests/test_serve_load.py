"""The command under load and under attack: others are answered, and nothing grows.

The server is a process of its own with the bundled model in float32, so that what it holds can be
counted and each answer is the one that `generate` gives.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from models import PANDA, PENGUINS, Nano
from serving import ANSWER, QUESTION, URI, chat, httpx, parts, serving_process, wait_until

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.asks import INTERFACES, Ask, Client, put_load

pytestmark = [
    pytest.mark.needs("fastapi"),
    pytest.mark.needs("uvicorn"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts what a process holds in /proc"),
]
CHAT = INTERFACES["chat"]
MOST_GROWTH = 40e6  # bytes of the process: what an allocator keeps of what was freed
MOST_MORE = 4  # file descriptors and threads
PATIENCE = 20.0  # seconds within which others are answered


def sizes(few: int, many: int) -> pytest.MarkDecorator:
    """A test in short, and as long as the word demands."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


class Server(NamedTuple):
    """The command in a process, and its URL."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def held(self) -> tuple[int, int, int]:
        """Bytes, file descriptors and threads."""
        proc = Path("/proc", str(self.process.pid))
        lines = (proc / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        descriptors = len(os.listdir(proc / "fd"))
        return int(status["VmRSS"].split()[0]) * 1024, descriptors, int(status["Threads"])

    def children(self) -> list[str]:
        """Processes that it has started and that live."""
        tasks = Path("/proc", str(self.process.pid), "task").iterdir()
        return [pid for task in tasks for pid in (task / "children").read_text().split()]

    def is_idle(self) -> bool:
        state = httpx.get(f"{self.url}/ready").json()
        return state == {"ready": True, "queued": 0, "running": 0}

    def ask(self, max_tokens: int = 16) -> str:
        """The question about penguins."""
        client = Client(self.url, "fastvlm")
        answer = client.ask(CHAT, Ask(QUESTION, PENGUINS.read_bytes(), max_tokens), stream=False)
        client.close()
        return answer.text


@contextmanager
def command(*flags: str) -> Iterator[Server]:
    small = ("--dtype", "float32", "--max-cache", "4000000", "--max-output-tokens", "64")
    with serving_process(*small, *flags) as (process, url):
        yield Server(process, url)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with command("--max-batch", "8", "--max-queue", "256") as server:
        assert server.ask() == ANSWER
        yield server


@contextmanager
def others_are_answered(server: Server) -> Iterator[None]:
    """Somebody asks one question after the other meanwhile, and gets each answer soon."""
    ended, waits, wrong = threading.Event(), [], []

    def go_on() -> None:
        while not ended.is_set():
            start = time.monotonic()
            try:
                if (text := server.ask()) != ANSWER:
                    wrong.append(text)
            except Exception as error:
                wrong.append(repr(error))
            waits.append(time.monotonic() - start)
            ended.wait(0.05)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not wrong and max(waits) < PATIENCE


def check_that_nothing_grows(server: Server, attack: Callable[[], Any]) -> None:
    """Attack twice: the second time nothing is to be held that was not after the first."""
    found = []
    for _ in range(2):
        with others_are_answered(server):
            attack()
        wait_until(server.is_idle, 60)
        wait_until(lambda: not sockets_of(server), 30)
        found.append(server.held())
    (memory, *first), (after, *second) = found
    assert after - memory < MOST_GROWTH
    assert all(b <= a + MOST_MORE for a, b in zip(first, second, strict=True)), found
    assert server.ask() == ANSWER


def sockets_of(server: Server) -> list[str]:
    """The connections that clients have to a server, or that it has not closed."""
    mine = f":{server.port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    gone = ("06", "0A")  # waits for stray packets, and listens
    return [x for x in lines if x.split()[1].endswith(mine) and x.split()[3] not in gone]


# Load


@sizes(3, 60)
def test_under_load_each_answer_is_the_one_alone(nano: Nano, server: Server, count: int) -> None:
    import fastvlm_mlx as fv

    images = [file.read_bytes() for file in (PENGUINS, PANDA)]
    asks = [Ask(q, i, 16) for i in (*images, None) for q in (QUESTION, "Describe the image.")]
    expected = {
        ask: fv.generate(*nano, ask.question, image=ask.image, max_tokens=16, temperature=0.0)
        for ask in asks
    }
    load = put_load(server.url, "fastvlm", expected, clients=32, seconds=count)
    assert load.answers > 32
    assert not load.wrong and not load.errors


def test_no_process_is_started_that_could_be_killed(server: Server) -> None:
    """All the work is in one process: there is none beside it to lose."""
    found = []
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda _: server.ask(), range(24))
        for _ in range(20):
            found += server.children()
            time.sleep(0.02)
        assert set(texts) == {ANSWER}
    assert not found


# Clients that leave


@sizes(40, 1000)
def test_clients_that_leave_in_mid_stream(server: Server, count: int) -> None:
    body = json.dumps(chat(parts(URI), stream=True, max_tokens=64)).encode()
    head = f"POST {CHAT.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"

    async def leave(draw: random.Random, room: asyncio.Semaphore) -> bytes:
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head.encode() + body)
            status = await reader.readline()
            for _ in range(draw.randrange(16)):
                await reader.readline()
            writer.transport.abort()
            return status

    async def leave_all() -> Counter[bytes]:
        draw, room = random.Random(count), asyncio.Semaphore(40)
        return Counter(await asyncio.gather(*(leave(draw, room) for _ in range(count))))

    def attack() -> None:
        assert asyncio.run(leave_all()) == {b"HTTP/1.1 200 OK\r\n": count}

    check_that_nothing_grows(server, attack)


# Clients that never end what they say


@pytest.mark.slow
def test_slow_bodies_and_headers_are_cut_off(server: Server) -> None:
    """A byte now and then keeps no connection: each is closed within half a minute."""
    head = f"POST {CHAT.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    starts = head + "Content-Length: 1000000\r\n\r\n{", head + "X-Padding: "

    async def dribble(start: str) -> float:
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(start.encode())
        ended = asyncio.ensure_future(reader.read())
        while not ended.done() and time.monotonic() - begun < 60:
            writer.write(b" ")
            await asyncio.wait([ended], timeout=1)
        writer.transport.abort()
        await asyncio.gather(ended, return_exceptions=True)
        return time.monotonic() - begun

    async def dribble_all() -> list[float]:
        return await asyncio.gather(*(dribble(start) for start in starts for _ in range(150)))

    def attack() -> None:
        assert max(asyncio.run(dribble_all())) < 30

    check_that_nothing_grows(server, attack)


# Requests that make no sense


def sound_images() -> list[bytes]:
    """Small pictures in every format that is read."""
    from PIL import Image

    found = []
    with Image.open(PANDA) as image:
        for mode, form in (("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "WEBP"), ("P", "GIF")):
            file = BytesIO()
            image.convert(mode).resize((40, 30)).save(file, form)
            found.append(file.getvalue())
    return found


def spoiled(image: bytes, draw: random.Random) -> bytes:
    """An image with bytes changed, doubled, left out, or the end cut off."""
    data = bytearray(image)
    for _ in range(draw.randrange(1, 9)):
        at = draw.randrange(len(data))
        how = draw.randrange(4)
        if how == 0:
            data[at] = draw.choice((0, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif how == 1:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
        elif how == 2 and len(data) > 80:
            del data[at : at + draw.randrange(1, 40)]
        elif how == 3 and len(data) > 80:
            del data[max(20, at) :]
    return bytes(data)


def image_requests(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions about spoiled images, through every interface."""
    draw, images = random.Random(7), sound_images()
    for _ in range(count):
        interface = draw.choice(list(INTERFACES.values()))
        ask = Ask("Hi", spoiled(draw.choice(images), draw), 1)
        yield interface.path, interface.body(ask) | {"stream": draw.random() < 0.3}


@sizes(60, 5000)
def test_spoiled_images_are_answered_or_refused(server: Server, count: int) -> None:
    def attack() -> None:
        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:

            def send(asked: tuple[str, dict[str, Any]]) -> int:
                reply = client.post(server.url + asked[0], json=asked[1])
                assert reply.status_code in (200, 400), reply.text
                assert reply.status_code == 200 or "error" in reply.json()
                return reply.status_code

            codes = Counter(pool.map(send, image_requests(count)))
        assert set(codes) == {200, 400}

    check_that_nothing_grows(server, attack)


@pytest.mark.needs("schemathesis")
@sizes(40, 5000)
def test_requests_made_from_the_openapi_document(server: Server, count: int) -> None:
    """Half of them follow the document that the server has, half break it."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
    cases = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in modes
        if operation.body or mode is GenerationMode.POSITIVE
    ]
    codes: Counter[int] = Counter()

    @seed(1)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.one_of(cases))
    def ask(case: Any) -> None:
        reply = case.call(base_url=server.url, timeout=60)
        codes[reply.status_code] += 1
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert "error" in reply.json()

    check_that_nothing_grows(server, ask)
    assert codes.total() >= count and {200, 400} <= set(codes)


# A queue that is full


@sizes(40, 1000)
def test_a_full_queue_refuses_some_and_answers_the_others(count: int) -> None:
    with command("--max-batch", "2", "--max-queue", "2") as server:
        body = chat(parts(URI), max_tokens=16)

        def send(_: int) -> tuple[int, str]:
            reply = client.post(server.url + CHAT.path, json=body)
            if reply.status_code == 429:
                assert int(reply.headers["retry-after"]) >= 1
                return 429, ""
            return reply.status_code, reply.json()["choices"][0]["message"]["content"]

        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(32) as pool:
            set(pool.map(send, range(count)))
            before = server.held()
            found = set(pool.map(send, range(count)))
        assert found == {(200, ANSWER), (429, "")}
        wait_until(server.is_idle)
        after = server.held()
        assert after[0] - before[0] < MOST_GROWTH and after[2] <= before[2] + MOST_MORE
        assert server.ask() == ANSWER


# The end


@sizes(1, 5)
def test_sigterm_under_load_ends_every_answer(count: int) -> None:
    """Who has begun to get an answer gets it whole; the others hear that nobody will answer."""
    for _ in range(count):
        with command("--max-batch", "4") as server, ThreadPoolExecutor(24) as pool:
            assert server.ask() == ANSWER
            going = [pool.submit(ask_to_the_end, server) for _ in range(24)]
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            found = [each.result() for each in going]
            assert server.process.wait(30) == 0
        assert {last for *_, last in found} <= {"refused", "unreachable"}
        assert {text for answers in found for text in answers[:-1]} == {ANSWER}


def ask_to_the_end(server: Server) -> list[str]:
    """The streamed answers to one question after the other, and what came in the last's place."""
    client, found = Client(server.url, "fastvlm"), []
    ask = Ask(QUESTION, PENGUINS.read_bytes(), 16)
    try:
        while True:
            found.append(client.ask(CHAT, ask, stream=True).text)
    except RuntimeError as error:
        return [*found, "refused" if str(error).startswith("503") else str(error)]
    except OSError:
        return [*found, "unreachable"]
    finally:
        client.close()
