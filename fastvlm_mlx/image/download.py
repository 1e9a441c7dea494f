"""The bytes of an image at a URL."""

from __future__ import annotations

from typing import Any

from .wording import _reason

MAX_REDIRECTS = 10
TIMEOUT = 10.0  # seconds, of a download
MAX_DOWNLOAD = 100 * 2**20  # bytes


def _download(url: str, name: str, timeout: float, max_bytes: int) -> bytes:
    """The body at `url`, whole and in time.

    A socket's timeout starts again with each byte, and looking up a host has none, so the deadline
    is kept here and a thread that misses it is left behind.
    """
    from queue import Empty, SimpleQueue
    from threading import Thread

    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def fetch() -> None:
        try:
            # It stops itself later, so that it is the deadline below that is reported.
            answers.put(_fetch(url, timeout + 1, max_bytes))
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
        raise OSError(f"Cannot read {name}: {_reason(answer)}.") from None
    return answer


def _fetch(url: str, timeout: float, max_bytes: int) -> bytes:
    """The body at `url`; any exception says why there is none."""
    from http.client import responses
    from string import punctuation
    from urllib import request
    from urllib.error import HTTPError
    from urllib.parse import quote, urljoin

    # No redirect handler: urllib's reads the body of a redirect, however long it is.
    opener = request.OpenerDirector()
    opener.add_handler(request.ProxyHandler())
    opener.add_handler(request.HTTPHandler())
    opener.add_handler(request.HTTPSHandler())
    opener.add_handler(request.HTTPDefaultErrorHandler())
    opener.add_handler(request.HTTPErrorProcessor())
    headers = {"User-Agent": "Mozilla/5.0 (compatible; fastvlm-mlx)"}
    url = quote(url, safe=punctuation)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = opener.open(request.Request(url, headers=headers), timeout=timeout)
        except HTTPError as answer:
            answer.close()
            location = answer.headers.get("Location")
            if answer.code not in (301, 302, 303, 307, 308) or not location:
                phrase = responses.get(answer.code, "")
                raise OSError(f"the server answered {answer.code} {phrase}") from None
            url = urljoin(url, quote(location, encoding="latin-1", safe=punctuation))
            if not url.lower().startswith(("http://", "https://")):
                raise OSError("it redirects to an address other than http and https") from None
        else:
            with response:
                return _read_body(response, timeout, max_bytes)
    raise OSError(f"it redirects more than {MAX_REDIRECTS} times")


def _read_body(response: Any, timeout: float, max_bytes: int) -> bytes:
    """The body of an `http.client.HTTPResponse`."""
    from time import monotonic

    deadline = monotonic() + timeout
    length = response.length  # None if not declared
    body = bytearray()
    while length is None or len(body) < length:
        if max(length or 0, len(body)) > max_bytes:
            raise OSError(f"it is larger than max_bytes, {max_bytes:,}")
        if monotonic() > deadline:
            raise OSError("it took too long")
        part = response.read1(2**16 if length is None else min(2**16, length - len(body)))
        if not part:
            break
        body += part
    if len(body) < (length or 0):
        raise OSError(f"the connection broke after {len(body):,} of {length:,} bytes")
    return bytes(body)
