"""A stream from the network, such as a surveillance camera's (rtsp://)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from ..checks import brief, masked
from .decode import container_frames, open_container
from .frame import Frame
from .source import Source

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "srt", "udp", "tcp", "rtp")
TIMEOUT = 10.0  # seconds without an answer, or without a byte
# What a stream may lead to: never to files of this machine.
PROTOCOLS = (*SCHEMES, "srtp", "tls", "httpproxy", "crypto", "data")


class StreamSource(Source):
    """A stream; when it breaks off, it is opened again.

    Args:
        url: of one of `SCHEMES`. User name and password may hold any characters.
        timeout: seconds that it may be silent.
    """

    reconnects = True

    def __init__(self, url: str, timeout: float = TIMEOUT):
        self.url = quoted_login(url)
        self.name = brief(masked(self.url))
        self.timeout = timeout

    def frames(self) -> Iterator[Frame]:
        options = {"protocol_whitelist": ",".join(PROTOCOLS), "fflags": "nobuffer"}
        if self.url[:4].lower() == "rtsp":
            options["rtsp_transport"] = "tcp"  # whose packets are not lost on the way
        with open_container(
            self.url, self.name, options=options, timeout=(self.timeout, self.timeout)
        ) as container:
            self.reconnects = container.duration is None  # one that has a length has an end
            yield from container_frames(container, self.name, live=True)


def is_stream(text: str) -> bool:
    """Whether a text is the URL of a stream."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def quoted_login(url: str) -> str:
    """A URL with user name and password as URLs have them, however they were typed.

    The last @ before the path ends them; where none is there, a slash (or ? or #) is part of the
    password if what stands before it is not a host and its port.
    """
    scheme, _, rest = url.partition("://")
    authority = re.match(r"[^/?#]*", rest)
    host = authority.group() if authority else ""
    if "@" in host:
        login, _, host = host.rpartition("@")
        rest = host + rest[len(login) + 1 + len(host) :]
    elif "@" in rest and re.search(r":(?!\d*$)", host):
        login, _, rest = rest.rpartition("@")
    else:
        return url
    user, colon, password = login.partition(":")
    return f"{scheme}://{_quoted(user)}{colon}{_quoted(password)}@{rest}"


def _quoted(text: str) -> str:
    """Percent-encoded, but for what already is."""
    parts = re.split(r"(%[0-9A-Fa-f]{2})", text)
    return "".join(part if i % 2 else quote(part, safe="") for i, part in enumerate(parts))
