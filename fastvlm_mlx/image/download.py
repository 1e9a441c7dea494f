"""A URL → the bytes of an image, whole and in time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

from .. import http
from ..checks import is_number, reason, shown

TIMEOUT = 10.0  # seconds, of a download
MAX_DOWNLOAD = 100 * 2**20  # bytes
MAX_TIMEOUT = 24 * 3600
HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; fastvlm-mlx)",
    "Accept-Encoding": "identity",
}


def check_limits(timeout: float, max_bytes: int) -> None:
    """ValueError unless both are numbers that a download can keep to."""
    if not (is_number(timeout) and 0 < timeout <= MAX_TIMEOUT):
        raise ValueError(
            f"timeout must be a number of seconds above 0 and up to {MAX_TIMEOUT:,}, found "
            f"{shown(timeout)}."
        )
    if not (is_number(max_bytes) and max_bytes > 0):
        raise ValueError(f"max_bytes must be a number above 0, found {shown(max_bytes)}.")


def download_bytes(
    url: str, name: str, timeout: float, max_bytes: int, pin: http.Pin | None = None
) -> bytes:
    """The body at an http or https URL.

    The client's timeouts start again with each byte, and looking up a host has none, so the
    deadline is kept here and a thread that misses it is left behind.

    Args:
        url: where it is.
        name: what errors call it.
        timeout: seconds from the first step to the last byte.
        max_bytes: the largest body.
        pin: what chooses the address of each host on the way, instead of the system; then no proxy
            is used.

    Raises:
        TimeoutError: it did not arrive in time.
        OSError: it is larger than `max_bytes`, or did not arrive whole.
    """
    try:
        client = http.plain_client() if pin is None else http.direct_client()
    except Exception as error:  # a proxy it can't use
        raise OSError(f"Cannot read {name}: {reason(error)}.") from None
    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def fetch() -> None:
        try:
            # It stops itself later, so that it is the deadline below that is reported.
            answers.put(_fetch(client, url, timeout + 1, max_bytes, pin))
        except Exception as error:
            answers.put(error)

    Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except Empty:
        raise TimeoutError(
            f"Cannot read {name}: it did not arrive within {timeout:g} seconds."
        ) from None
    if isinstance(answer, Exception):
        raise OSError(f"Cannot read {name}: {reason(answer)}.") from None
    return answer


def _fetch(client: Any, url: str, timeout: float, max_bytes: int, pin: http.Pin | None) -> bytes:
    """The body at `url`; any exception says why there is none."""
    with client, closing(_ask(client, url, timeout, pin)) as response:
        if response.status_code not in (200, 203):  # a part, which nobody asked for, is no success
            raise OSError(f"the server answered {response.status_code} {response.reason_phrase}")
        return _read_body(response, timeout, max_bytes)


def _ask(client: Any, url: str, timeout: float, pin: http.Pin | None) -> Any:
    if pin is None:
        return http.get(client, url, headers=HEADERS, timeout=timeout)
    return http.get_pinned(client, url, pin, headers=HEADERS, timeout=timeout)


def _read_body(response: Any, timeout: float, max_bytes: int) -> bytes:
    deadline = monotonic() + timeout
    _check_size(http.content_length(response) or 0, max_bytes)
    unpack = _unpacker(response.headers.get("Content-Encoding", ""), max_bytes)
    received, data = 0, bytearray()
    for part in filter(None, http.body(response)):
        received += len(part)
        data += unpack(part)
        _check_size(max(received, len(data)), max_bytes)
        if monotonic() > deadline:
            raise OSError("it took too long")
    unpack(b"")
    return bytes(data)


def _unpacker(encoding: str, max_bytes: int) -> Callable[[bytes], bytes]:
    """What turns each part of a body into a part of the file; an empty one ends the body."""
    import zlib

    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return lambda part: part
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise OSError(f"the server packs it as {shown(encoding)}, which it was asked not to do")
    packed = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip's frame or zlib's

    def unpack(part: bytes) -> bytes:
        if not part and not packed.eof:
            raise OSError("the connection broke: what the server packed is not whole")
        return packed.decompress(part, int(max_bytes) + 1)  # one byte more is too large

    return unpack


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"it is larger than max_bytes, {max_bytes:,}")
