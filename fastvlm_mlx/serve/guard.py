"""What every HTTP request passes first: who may ask, how much, and what is written down of it."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, envelope, failed
from .logs import log_failure, log_request
from .settings import Settings

READING = ("GET", "HEAD", "OPTIONS")
# Open without a key: the page asks for it, and orchestrators have none. So are the page's files.
OPEN = ("/health", "/ready")
WITH_KEY = ("/v1/", "/api/", "/metrics", "/openapi.json")
BODY_PATIENCE = 15.0  # seconds that a body may take, whatever its size
BODY_RATE = 10_000  # bytes per second, at least, beyond them


class Guard:
    """Lets requests through to an application, or answers why not; logs each.

    Args:
        app: the application.
        settings: what is allowed.
        on_done: is told path, status and seconds of each request.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, on_done: Callable[[str, int, float], None]
    ):
        self._app = app
        self._settings = settings
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        try:
            self._check(exchange)
            body = await _read_body(exchange, receive, self._settings.max_body)
            _treat_as_json(scope)
            await self._app(scope, _replay(body, receive), exchange.send)
        except ApiError as error:
            await exchange.refuse(error)
        except Exception as error:  # whose text may hold what was asked, so it is not shown
            log_failure(error)
            await exchange.refuse(failed())
        finally:
            seconds = time.perf_counter() - exchange.start
            self._on_done(scope["path"], exchange.status, seconds)
            log_request(scope, exchange.status, seconds, exchange.notes)

    def _check(self, exchange: Exchange) -> None:
        """ApiError unless host, origin and key are right."""
        if not self._host_is_known(exchange.header("host")):
            raise ApiError(
                403,
                "The Host header names another server; start this one with --allowed-host NAME if "
                "it is reached by that name.",
            )
        origin = exchange.header("origin")
        if exchange.scope["method"] not in READING and origin is not None:
            own = f"{exchange.scope['scheme']}://{exchange.header('host')}"
            if origin not in (own, *self._settings.cors):
                raise ApiError(
                    403, "Web pages of other origins may not ask; allow one with --cors ORIGIN."
                )
        if exchange.path.startswith(WITH_KEY) and not self._key_is_right(exchange):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY or as "
                "x-api-key.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _host_is_known(self, host: str | None) -> bool:
        """Whether a Host header is an address or a known name, not one that was led here."""
        name = _without_port((host or "").lower()).rstrip(".")
        known = ("localhost", *(allowed.lower() for allowed in self._settings.allowed_hosts))
        return name in known or name.endswith(".localhost") or _is_address(name)

    def _key_is_right(self, exchange: Exchange) -> bool:
        key = self._settings.api_key
        if key is None or exchange.scope["method"] == "OPTIONS":
            return True
        scheme, _, token = (exchange.header("authorization") or "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(exchange.header("x-api-key") or "")
        return any(hmac.compare_digest(text.encode("latin-1"), key.encode()) for text in given)


class Exchange:
    """A request and what was answered so far.

    Attributes:
        path: without the prefix of a proxy.
        id: of the request, which the reply's headers have.
        status: of the reply; 499 if the client left before it.
        notes: what the log says of it beyond that.
    """

    def __init__(self, scope: Scope, send: Send):
        self.scope = scope
        self.path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self.start = time.perf_counter()
        self.id = uuid4().hex
        self.status = 499
        self.notes: dict[str, Any] = {"id": self.id}
        scope.setdefault("state", {})["notes"] = self.notes
        self._send = send

    def header(self, name: str) -> str | None:
        """A header; None if it is missing, "" if it is there several times."""
        found = [value for key, value in self.scope["headers"] if key == name.encode()]
        return (found[0].decode("latin-1") if len(found) == 1 else "") if found else None

    async def send(self, message: Message) -> None:
        """Pass a part of the reply on, with the headers that all have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = (b"x-request-id", b"request-id")  # OpenAI's and Anthropic's
            more = [(name, self.id.encode()) for name in names]
            more.append((b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Reply with an error, if no reply has begun; a client that sends on is cut off."""
        if self.status != 499:
            self.notes["after_start"] = error.status
            return
        body = json.dumps(envelope(self.path, error, self.id)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers |= error.headers
        if error.status in (408, 413):
            headers["connection"] = "close"
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": encoded}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})


async def _read_body(exchange: Exchange, receive: Receive, limit: int) -> bytes:
    """The whole body; ApiError if it is too large or comes too slowly."""
    too_large = ApiError(413, f"The request is larger than {limit:,} bytes.", "request_too_large")
    declared = exchange.header("content-length") or "0"
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
        raise too_large
    body = bytearray()
    while True:
        allowed = BODY_PATIENCE + len(body) / BODY_RATE
        left = exchange.start + allowed - time.perf_counter()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise ApiError(408, "The request's body came too slowly.", "timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client left.")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what follows it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    def again() -> Awaitable[Message]:
        return _ready(waiting.pop()) if waiting else receive()

    return again


async def _ready(message: Message) -> Message:
    return message


def _treat_as_json(scope: Scope) -> None:
    """Have a body read as JSON whatever its type, as by curl's default, which Ollama's users send.

    A foreign web page gains nothing by a type that needs no preflight: its Origin was refused.
    """
    if scope["method"] not in READING:
        others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not name.endswith(":") else host


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
