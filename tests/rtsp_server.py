"""A camera on the network: an RTSP server that sends MPEG-TS in RTP over its one connection."""

import base64
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
SDP += "m=video 0 RTP/AVP 33\r\na=control:1\r\n"
PACKET = 188 * 7  # bytes of a transport stream that go into a packet of RTP


class Camera:
    """Answers one connection after the other.

    Args:
        stream: the bytes of an MPEG transport stream.
        login: user:password that is asked for.
        then: what happens once all was sent: "close", or "silence".
    """

    def __init__(self, stream: bytes, login: str = "", then: str = "close"):
        self.stream, self.login, self.then = stream, login, then
        self.connections = 0
        self.logins: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        self.connections += 1
        held = b""
        with closing(connection), suppress(OSError):
            while data := connection.recv(4096):
                held += data
                while b"\r\n\r\n" in held:
                    request, _, held = held.partition(b"\r\n\r\n")
                    if self._answer(connection, request.decode()):
                        return

    def _answer(self, connection: socket.socket, request: str) -> bool:
        """Answer a request; whether the connection is to be closed."""
        first, *lines = request.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        method = first.split()[0]
        extra, body, status = "", "", "200 OK"
        if (given := headers.get("Authorization")) is not None:
            self.logins.append(base64.b64decode(given.split()[-1]).decode())
        if method != "OPTIONS" and self.login and self.logins[-1:] != [self.login]:
            status, extra = "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n'
        elif method == "DESCRIBE":
            body = SDP
            extra = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
        head = f"RTSP/1.0 {status}\r\nCSeq: {headers['CSeq']}\r\n{extra}\r\n"
        connection.sendall(head.encode() + body.encode())
        if method == "PLAY":
            self._play(connection)
            return True
        return False

    def _play(self, connection: socket.socket) -> None:
        for number, start in enumerate(range(0, len(self.stream), PACKET)):
            part = self.stream[start : start + PACKET]
            rtp = struct.pack(">BBHII", 0x80, 33, number % 65536, number * 900, 1) + part
            connection.sendall(b"$\0" + struct.pack(">H", len(rtp)) + rtp)
        if self.then == "silence":
            time.sleep(20)


@contextmanager
def tcp_server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server, on a port of its own, that answers each connection in a thread."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with server:
        yield server.getsockname()[1]
