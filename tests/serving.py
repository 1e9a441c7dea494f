"""A server of the package on a port of this machine, over the real engine or a puppet."""

import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from models import PENGUINS, Nano

from fastvlm_mlx.generation.response import Response

httpx = pytest.importorskip("httpx")  # comes with the clients

PICTURE = PENGUINS.read_bytes()
BASE64 = base64.b64encode(PICTURE).decode()
URI = f"data:image/png;base64,{BASE64}"
QUESTION = "How many penguins are there?"
ANSWER = "There are 6 penguins."


class Served(NamedTuple):
    """A running server."""

    url: str
    engine: Any
    app: Any

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with httpx.Client(timeout=60) as client:
            return client.post(self.url + path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        with httpx.Client(timeout=60) as client:
            return client.get(self.url + path, **more)

    def lines(self, path: str, body: Any) -> list[str]:
        """A streamed reply, line by line."""
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", self.url + path, json=body) as reply,
        ):
            assert reply.status_code == 200
            return list(reply.iter_lines())


@contextmanager
def serving(engine: Any, *, pin: Any = None, **settings: Any) -> Iterator[Served]:
    """Serve an engine that was started."""
    import uvicorn

    from fastvlm_mlx.serve.app import create_app
    from fastvlm_mlx.serve.server import configure, listen
    from fastvlm_mlx.serve.settings import Place, Settings

    more = {} if pin is None else {"pin": pin}
    app, place = create_app(engine, Settings(**settings), **more), Place(port=0, grace=1)
    listening = listen(place)
    server = uvicorn.Server(configure(app, place))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", engine, app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving_process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its URL once it is ready."""
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(line.split()[2] for line in process.stderr if line.startswith("Serving at "))
        reading = threading.Thread(target=process.stderr.read, daemon=True)
        reading.start()

        def ready() -> bool:
            try:
                return httpx.get(f"{url}/ready", verify=False).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, 60)
            yield process, url
        finally:
            process.kill()
            reading.join()


@contextmanager
def started(nano: Nano, **sizes: Any) -> Iterator[Any]:
    """A real engine over the bundled model."""
    from fastvlm_mlx.serve.engine import Engine

    engine = Engine(*nano, name="nano", **sizes)
    engine.start()
    wait_until(lambda: engine.ready)
    try:
        yield engine
    finally:
        asyncio.run(engine.close(5))


def wait_until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def piece(text: str, n: int = 1, finish_reason: str | None = None, **more: Any) -> Response:
    """A piece of an answer as an engine gives it."""
    times = dict.fromkeys(("preprocess_time", "encode_time", "prefill_time", "ttft"), 0.25)
    return Response(
        text=text,
        token=5,
        prompt_tokens=20,
        generation_tokens=n,
        **times,
        generation_tps=8.0,
        peak_memory=0.0,
        finish_reason=finish_reason,
        **more,
    )


@dataclass
class Puppet:
    """In the place of an engine: it says what it is told, when it is told.

    Attributes:
        script: what each ticket is given: pieces, exceptions, and seconds to wait.
        refuse: what `submit` raises.
    """

    model: Any
    processor: Any
    script: list[Any] = field(default_factory=list)
    refuse: Exception | None = None
    name: str = "nano"
    alive: bool = True
    ready: bool = True
    queued: int = 0
    running: int = 0
    step_seconds: float = 0.0
    requests: list[Any] = field(default_factory=list)
    tickets: list[Any] = field(default_factory=list)
    cancelled: list[Any] = field(default_factory=list)

    def begin(self, script: list[Any]) -> None:
        """Start anew, with another script."""
        self.script, self.refuse, self.alive, self.ready = script, None, True, True
        for kept in (self.requests, self.tickets, self.cancelled):
            kept.clear()

    def submit(self, request: Any) -> Any:
        from fastvlm_mlx.serve.ticket import Ticket

        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        ticket = Ticket(request, self._cancel)
        self.tickets.append(ticket)
        self._task = asyncio.ensure_future(self._play(ticket, list(self.script)))
        return ticket

    async def _play(self, ticket: Any, script: list[Any]) -> None:
        from fastvlm_mlx.serve.ticket import Timings

        for item in script:
            if isinstance(item, (int, float)):
                await asyncio.sleep(item)
                continue
            if isinstance(item, Response) and item.finish_reason is not None:
                ticket.timings = Timings.of(item, 0.5)
            ticket.put(item)

    def _cancel(self, ticket: Any) -> None:
        self.cancelled.append(ticket)
        ticket.put(None)


def says(*texts: str, finish_reason: str = "stop", **last: Any) -> list[Any]:
    """The script of an answer in these pieces."""
    ends = [None] * (len(texts) - 1) + [finish_reason]
    more: list[dict[str, Any]] = [{} for _ in texts[1:]] + [last]
    return [
        piece(text, n, end, **each)
        for n, (text, end, each) in enumerate(zip(texts, ends, more, strict=True), 1)
    ]


def chat(content: Any = QUESTION, role: str = "user", **more: Any) -> dict[str, Any]:
    """The body of a request to OpenAI's interface."""
    return {"messages": [{"role": role, "content": content}], **more}


def parts(*images: str, text: str = QUESTION) -> list[dict[str, Any]]:
    """Parts as OpenAI's interface has them: images, then a text."""
    shown = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [*shown, {"type": "text", "text": text}]


def events(lines: list[str]) -> list[Any]:
    """The values of server-sent events, without comments."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(value) for value in data if value != "[DONE]"]
