"""The application on a socket, until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from math import ceil
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from ..checks import reason, shown
from .app import create_app
from .engine import Engine
from .logs import log_to_stderr
from .settings import Place, Settings

if TYPE_CHECKING:
    import uvicorn

IDLE = 75  # seconds that a connection may stay open between two requests
HEADER_PATIENCE = 15.0  # seconds that the headers of a request may take
MOST_HEADERS = 64 * 1024  # bytes of them


def listen(place: Place) -> socket.socket:
    """A socket that listens at a place; OSError, a sentence, if it can't."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        raise OSError(
            f"Cannot listen at {shown(place.host)}, port {place.port}: {reason(error)}; choose "
            "another with --host and --port."
        ) from None


def run(engine: Engine, settings: Settings, place: Place, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then running answers end within the grace, and it returns.

    Args:
        engine: not yet started.
        settings: what is allowed.
        place: where it listens.
        listening: the socket there, from `listen`.
    """
    import uvicorn

    log_to_stderr()
    config = configure(create_app(engine, settings), place)
    engine.start()
    # uvicorn raises a signal that ended it again, for the handlers of before: these let it be.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        asyncio.run(engine.close(0))


def configure(app: FastAPI, place: Place) -> uvicorn.Config:
    """How uvicorn serves an application."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=ceil(place.grace),
        h11_max_incomplete_event_size=MOST_HEADERS,
        ssl_certfile=place.certfile,
        ssl_keyfile=place.keyfile,
    )


def _protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, which by itself waits for ever for the headers of a request."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Wait for the end of the headers; not while a request is answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(HEADER_PATIENCE, self.transport.close)

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
