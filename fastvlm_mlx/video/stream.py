"""A stream from the network, such as a surveillance camera's (rtsp://)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from ..checks import brief
from .decode import container_frames, import_av, open_container
from .frame import Frame
from .source import Source

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "srt", "udp", "tcp", "rtp")
TIMEOUT = 10.0  # seconds without an answer, or without a byte
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d+)?")
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
        import_av()
        self.url = quoted_login(url)
        self.name = brief(without_login(self.url))
        self.timeout = timeout
        # Behind http there may be a film, whose beginning would pass unseen.
        self.ready = not self.url.lower().startswith("http")

    def frames(self) -> Iterator[Frame]:
        options = {"protocol_whitelist": ",".join(PROTOCOLS)}
        if self.url[:4].lower() == "rtsp":
            options["rtsp_transport"] = "tcp"  # whose packets are not lost on the way
        with open_container(
            self.url, self.name, options=options, timeout=(self.timeout, self.timeout)
        ) as container:
            # What has a length is a film: it is played at its own speed, and has an end.
            self.timed = container.duration is not None
            self.reconnects = not self.timed
            yield from container_frames(container, self.name, live=True)


def is_stream(text: str) -> bool:
    """Whether a text is the URL of a stream."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def quoted_login(url: str) -> str:
    """A URL with user name and password as URLs have them, however they were typed.

    A password may hold @ and / too, and so may a path. So the login is taken to end at the first @
    that a host follows which has a dot or a port, or else at the first that any host follows.
    """
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if HOST.fullmatch(authority):
        return url
    ends = [i for i, char in enumerate(rest) if char == "@"]
    hosts = {i: re.split(r"[/?#]", rest[i + 1 :], maxsplit=1)[0] for i in ends}
    hosts = {i: host for i, host in hosts.items() if HOST.fullmatch(host)}
    sure = [i for i, host in hosts.items() if re.search(r"[.:]|^localhost$", host)]
    if not hosts:
        return url
    end = min(sure or hosts)
    user, colon, password = rest[:end].partition(":")
    return f"{scheme}://{_quoted(user)}{colon}{_quoted(password)}@{rest[end + 1 :]}"


def without_login(url: str) -> str:
    """A URL as messages show it; where it may be unclear what belongs to the password, less of it
    is shown rather than more."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if "@" in rest else url


def _quoted(text: str) -> str:
    """Percent-encoded, but for what already is."""
    parts = re.split(r"(%[0-9A-Fa-f]{2})", text)
    return "".join(part if i % 2 else quote(part, safe="") for i, part in enumerate(parts))
