"""A URL → the bytes of an image, whole and in time."""

from __future__ import annotations

from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

from .. import http
from ..checks import reason

TIMEOUT = 10.0  # seconds, of a download
MAX_DOWNLOAD = 100 * 2**20  # bytes
HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; fastvlm-mlx)",
    "Accept-Encoding": "identity",
}


def download_bytes(url: str, name: str, timeout: float, max_bytes: int) -> bytes:
    """The body at an http or https URL.

    The client's timeouts start again with each byte, and looking up a host has none, so the
    deadline is kept here and a thread that misses it is left behind.

    Args:
        url: where it is.
        name: what errors call it.
        timeout: seconds from the first step to the last byte.
        max_bytes: the largest body.

    Raises:
        TimeoutError: it did not arrive in time.
        OSError: it is larger than `max_bytes`, or did not arrive whole.
    """
    try:
        client = http.plain_client()
    except Exception as error:  # a proxy it can't use
        raise OSError(f"Cannot read {name}: {reason(error)}.") from None
    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def fetch() -> None:
        try:
            # It stops itself later, so that it is the deadline below that is reported.
            answers.put(_fetch(client, url, timeout + 1, max_bytes))
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


def _fetch(client: Any, url: str, timeout: float, max_bytes: int) -> bytes:
    """The body at `url`; any exception says why there is none."""
    with client, closing(http.get(client, url, headers=HEADERS, timeout=timeout)) as response:
        if not response.is_success:
            raise OSError(f"the server answered {response.status_code} {response.reason_phrase}")
        return _read_body(response, timeout, max_bytes)


def _read_body(response: Any, timeout: float, max_bytes: int) -> bytes:
    deadline = monotonic() + timeout
    _check_size(http.content_length(response) or 0, max_bytes)
    data = bytearray()
    for part in http.body(response):
        data += part
        _check_size(len(data), max_bytes)
        if monotonic() > deadline:
            raise OSError("it took too long")
    return bytes(data)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"it is larger than max_bytes, {max_bytes:,}")
