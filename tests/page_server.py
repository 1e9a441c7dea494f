"""A server with the page's files and a model that says what a test tells it to."""

import base64
import contextlib
import json
import mimetypes
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from threading import Thread
from typing import Any

from PIL import Image

PREFIX = "/a/proxy's/way/"  # the page must work below any path
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
TIMINGS = {
    "queue": 0.0011,
    "read": 0.0032,
    "encode": 0.0884,
    "prefill": 0.0417,
    "first_token": 0.142,
    "tokens_per_second": 63.14,
    "cached_tokens": 12,
    "cached_images": 1,
}
Pieces = Iterable[str | float | dict]


@dataclass
class Refusal:
    """An error reply instead of an answer."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class PageServer:
    """Answers with what `reply` gives: texts, pauses in seconds, or whole chunks."""

    reply: Callable[[dict], Pieces | Refusal] = lambda body: ["There are ", "6 penguins."]
    key: str = ""
    port: int = 0
    healthy: bool = True
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "id": "FastVLM-0.5B",
            "fastvlm": {"precision": "4 bits", "image_size": 1024, "patch_size": 64},
        }
    )
    asked: list[dict] = field(default_factory=list)
    left: int = 0
    """Clients that went away in the middle of an answer."""
    broken: bool = False
    stranger: bool = False
    """Whether requests are refused for the host that they name."""
    finish: str = "stop"
    """Why an answer ends."""

    def start(self) -> None:
        self.broken = False
        self.open: set[socket.socket] = set()
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """As a killed process: nothing listens any more and every connection breaks."""
        self.broken = True
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}{PREFIX}"


def pictures(body: dict) -> list[Image.Image]:
    """Those of all messages, in order."""
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    addresses = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(BytesIO(base64.b64decode(a.split(",")[1]))) for a in addresses]


def handler(server: PageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.open.add(self.connection)

        def finish(self) -> None:
            server.open.discard(self.connection)
            super().finish()

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.removeprefix(PREFIX)
            if name == "health":
                self.send(200 if server.healthy else 503, {"status": "ok"})
            elif name == "v1/models":
                self.allowed() and self.send(200, {"object": "list", "data": [server.model]})
            else:
                self.send_page(name or "index.html")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            server.asked.append(body)
            reply = server.reply(body)
            if isinstance(reply, Refusal):
                self.send(reply.status, {"error": {"message": reply.message}}, reply.headers)
                return
            try:
                self.stream(reply)
            except OSError:
                server.left += 1

        def allowed(self) -> bool:
            if server.stranger:
                self.send(403, {"error": {"message": "Another server is meant."}})
                return False
            given = self.headers.get("Authorization")
            if server.key and given != f"Bearer {server.key}":
                self.send(401, {"error": {"message": "A key is needed."}})
                return False
            return True

        def send(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
            self.send_bytes(json.dumps(body).encode(), "application/json", status, headers)

        def send_page(self, name: str) -> None:
            file = files("fastvlm_mlx").joinpath("serve", "page", name)
            if not file.is_file():
                return self.send(404, {"error": {"message": f"There is no {name}."}})
            content = file.read_bytes()
            kind = mimetypes.guess_type(name)[0] or ""
            self.send_bytes(content, kind, 200, {"Content-Security-Policy": POLICY})

        def send_bytes(self, content: bytes, kind: str, status: int, headers: dict | None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def stream(self, pieces: Pieces) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            self.write(b": keep-alive\n\n")
            for piece in pieces:
                if server.broken:
                    return
                if isinstance(piece, float):
                    time.sleep(piece)
                elif isinstance(piece, str):
                    self.chunk({"choices": [{"index": 0, "delta": {"content": piece}}]})
                else:
                    self.chunk(piece)
                if isinstance(piece, dict) and "error" in piece:
                    return
            self.end(server.finish)

        def end(self, finish: str) -> None:
            self.chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            usage = {"prompt_tokens": 283, "completion_tokens": 9, "total_tokens": 292}
            self.chunk({"choices": [], "usage": usage, "timings": TIMINGS})
            self.write(b"data: [DONE]\n\n")

        def chunk(self, body: dict) -> None:
            data = f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
            # A character of several bytes comes in two parts.
            cut = next((n for n, byte in enumerate(data) if 0x80 <= byte < 0xC0), 0)
            self.write(data[:cut])
            time.sleep(0.03 if cut else 0)
            self.write(data[cut:])

        def write(self, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()

    return Handler
