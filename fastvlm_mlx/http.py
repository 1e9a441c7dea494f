"""GET requests for images and models; stands with `checks` and `progress`, below every room.

The client is the one that huggingface_hub uses: it knows the proxies and the certificates of every
system. Its name differs between versions of huggingface_hub, so only its session is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .checks import reason

MAX_REDIRECTS = 10


def hub_client() -> Any:
    """The session that huggingface_hub shares, as the user set it up; HF_HUB_OFFLINE stops it."""
    from huggingface_hub import get_session

    return get_session()


def plain_client() -> Any:
    """A client of its own for what is not on the Hub: HF_HUB_OFFLINE does not concern it.

    Close it after use.
    """
    return type(hub_client())()


def get(client: Any, url: str, *, headers: Mapping[str, str], timeout: float) -> Any:
    """Response to a GET request, with its redirects followed and its body not yet read.

    Close it after use. Its status may be any, and redirects to other hosts go without
    `Authorization`.

    Args:
        client: one of the above.
        url: http or https.
        headers: of the request.
        timeout: seconds for each step: to connect, to send, and between two parts of the answer.

    Raises:
        OSError: more than `MAX_REDIRECTS`, or one to an address other than http and https.
        Exception: whatever else the client raises, of types of its own.
    """
    request = client.build_request("GET", url, headers=dict(headers), timeout=timeout)
    for _ in range(MAX_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        request = response.next_request
        if request is None:
            return response
        response.close()  # unread, since the body of a redirect may never end
        if request.url.scheme not in ("http", "https"):
            raise OSError("it redirects to an address other than http and https")
    raise OSError(f"it redirects more than {MAX_REDIRECTS} times")


def body(response: Any) -> Iterator[bytes]:
    """The body of a response in parts, as sent; ConnectionError if it breaks off."""
    try:
        yield from response.iter_raw()
    except Exception as error:  # of the client's own types
        raise ConnectionError(f"the connection broke: {reason(error)}") from None


def content_length(response: Any) -> int | None:
    """How many bytes the body of a response has as it is sent; None if not declared."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None
