"""Questions to a server through every interface that it has, and what it answers."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATIENCE = 300  # seconds that a client waits for the next bytes


class Ask(NamedTuple):
    """A question: its text, its picture's file if there is one, and the tokens of its answer."""

    question: str
    image: bytes | None = None
    max_tokens: int = 32


class Interface(NamedTuple):
    """How a question is put, and where the text of its answer stands.

    Attributes:
        path: of the URL.
        body: a question → JSON.
        whole: an answer → its text.
        piece: an event of a streamed answer → the text that it adds.
    """

    path: str
    body: Callable[[Ask], dict[str, Any]]
    whole: Callable[[dict[str, Any]], str]
    piece: Callable[[dict[str, Any]], str]


def in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def data_uri(image: bytes) -> str:
    return f"data:image/jpeg;base64,{in_base64(image)}"


def user(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def to_chat(ask: Ask) -> dict[str, Any]:
    shown = [{"type": "image_url", "image_url": {"url": data_uri(ask.image)}}] if ask.image else []
    text = {"type": "text", "text": ask.question}
    return {"messages": user([*shown, text]), "max_tokens": ask.max_tokens, "temperature": 0}


def to_responses(ask: Ask) -> dict[str, Any]:
    shown = [{"type": "input_image", "image_url": data_uri(ask.image)}] if ask.image else []
    text = {"type": "input_text", "text": ask.question}
    return {"input": user([*shown, text]), "max_output_tokens": ask.max_tokens, "temperature": 0}


def to_messages(ask: Ask) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/jpeg"}
    shown = (
        [{"type": "image", "source": source | {"data": in_base64(ask.image)}}] if ask.image else []
    )
    text = {"type": "text", "text": ask.question}
    return {"messages": user([*shown, text]), "max_tokens": ask.max_tokens, "temperature": 0}


def to_ollama(ask: Ask) -> dict[str, Any]:
    images = {"images": [in_base64(ask.image)]} if ask.image else {}
    message = {"role": "user", "content": ask.question, **images}
    return {"messages": [message], "options": {"num_predict": ask.max_tokens, "temperature": 0}}


def to_generate(ask: Ask) -> dict[str, Any]:
    images = {"images": [in_base64(ask.image)]} if ask.image else {}
    options = {"num_predict": ask.max_tokens, "temperature": 0}
    return {"prompt": ask.question, "options": options, **images}


def of_chat(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


def of_responses(event: dict[str, Any]) -> str:
    return event["delta"] if event.get("type") == "response.output_text.delta" else ""


def of_messages(event: dict[str, Any]) -> str:
    return event["delta"].get("text", "") if event.get("type") == "content_block_delta" else ""


def text_of_output(reply: dict[str, Any]) -> str:
    """The text of a whole answer of /v1/responses."""
    parts = [part for item in reply["output"] for part in item.get("content") or ()]
    return "".join(part.get("text", "") for part in parts)


OPENAI_AND_ANTHROPIC = {
    "chat": Interface(
        "/v1/chat/completions", to_chat, lambda r: r["choices"][0]["message"]["content"], of_chat
    ),
    "responses": Interface("/v1/responses", to_responses, text_of_output, of_responses),
    "messages": Interface(
        "/v1/messages",
        to_messages,
        lambda r: "".join(part.get("text", "") for part in r["content"]),
        of_messages,
    ),
}
OLLAMA = {
    "ollama chat": Interface(
        "/api/chat", to_ollama, lambda r: r["message"]["content"], lambda r: r["message"]["content"]
    ),
    "ollama generate": Interface(
        "/api/generate", to_generate, lambda r: r["response"], lambda r: r["response"]
    ),
}
INTERFACES = OPENAI_AND_ANTHROPIC | OLLAMA


class Answer(NamedTuple):
    """What came: its text, the seconds to its first piece if it was streamed, and to its end."""

    text: str
    first: float | None
    seconds: float


class Client:
    """Asks a server over one connection, which it opens again where the server closed it."""

    def __init__(self, url: str, model: str):
        self._model = model
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)

    def ask(self, interface: Interface, ask: Ask, stream: bool) -> Answer:
        """An answer; RuntimeError if the server gives none, OSError if it can't be reached."""
        body = interface.body(ask) | {"model": self._model, "stream": stream}
        start = time.perf_counter()
        try:
            reply = self._send(interface.path, json.dumps(body).encode())
            if stream:
                return _read_stream(interface, reply, start)
            text = interface.whole(json.loads(reply.read()))
        except Exception as error:
            self.close()  # what is left of the answer is no other's
            if isinstance(error, HTTPException) and not isinstance(error, OSError):
                raise RuntimeError(f"The server ended an answer: {error!r}") from None
            raise
        return Answer(text, None, time.perf_counter() - start)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _send(self, path: str, body: bytes) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", path, body, headers)
        reply = self._connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status} from {path}: {reply.read()[:300]!r}")
        return reply


def _read_stream(interface: Interface, reply: HTTPResponse, start: float) -> Answer:
    """A streamed answer, event by event."""
    pieces, first = [], None
    for event in _events(reply):
        if event.get("error"):
            raise RuntimeError(f"An answer broke off: {event['error']}")
        piece = interface.piece(event)
        if piece and first is None:
            first = time.perf_counter() - start
        pieces.append(piece)
    reply.close()
    return Answer("".join(pieces), first, time.perf_counter() - start)


def _events(reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream: server-sent ones, or a JSON object a line."""
    for line in reply:
        data = line.decode().removeprefix("data: ").strip()
        if data.startswith("{"):
            yield json.loads(data)


@dataclass
class Load:
    """What clients found who asked a server for some time.

    Attributes:
        seconds: from the first question to the last answer.
        firsts: seconds to the first token of each streamed answer.
        answers: that came.
        wrong, errors: the first of what came in place of an answer, or of the right one; their
            numbers.
    """

    seconds: float = 0.0
    answers: int = 0
    firsts: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return self.answers / self.seconds

    def first_at(self, share: float) -> float:
        """The seconds to the first token that this share of the answers keep within."""
        found = sorted(self.firsts) or [float("nan")]
        return found[min(len(found) - 1, int(share * len(found)))]


def put_load(
    url: str,
    model: str,
    expected: Mapping[Ask, str | None],
    interfaces: Mapping[str, Interface] = INTERFACES,
    *,
    clients: int,
    seconds: float,
    seed: int = 0,
) -> Load:
    """Let clients ask for some seconds, each one thing after another, drawn by chance.

    Args:
        url: of the server.
        model: what its model is called there.
        expected: the questions, and what each is answered if that is known.
        interfaces: through which they are asked.
        clients: that ask at the same time.
        seconds: after which they ask no more.
        seed: of what is drawn.
    """
    load, asks, start = Load(), list(expected), time.perf_counter()

    def ask_on(number: int) -> None:
        draw, client = random.Random(f"{seed} {number}"), Client(url, model)
        while time.perf_counter() - start < seconds:
            name, ask, stream = (
                draw.choice(list(interfaces)),
                draw.choice(asks),
                draw.random() < 0.5,
            )
            _note(load, client, interfaces, name, ask, stream, expected[ask])
        client.close()

    threads = [Thread(target=ask_on, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - start
    return load


def _note(
    load: Load,
    client: Client,
    interfaces: Mapping[str, Interface],
    name: str,
    ask: Ask,
    stream: bool,
    expected: str | None,
) -> None:
    """Ask once, and note what came."""
    where = f"{name}{', streamed' if stream else ''}: {ask.question}"
    try:
        answer = client.ask(interfaces[name], ask, stream)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        load.errors.append(f"{where} {error!r}")
        time.sleep(0.1)  # a server that refuses is not asked without a pause
        return
    load.answers += 1
    if answer.first is not None:
        load.firsts.append(answer.first)
    if expected is not None and answer.text != expected:
        load.wrong.append(f"{where} {answer.text!r}, not {expected!r}")
