"""GET requests, for `image` and `hub`; in the import order it stands below `image`, above `checks`.

The client is huggingface_hub's, which finds proxies and certificates on every system. Which library
it comes from depends on the version of huggingface_hub, so it is reached through `get_session`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .checks import masked, reason

MAX_REDIRECTS = 10


def hub_client() -> Any:
    """The session that huggingface_hub shares, as set up by the user; HF_HUB_OFFLINE stops it."""
    from huggingface_hub import get_session

    return get_session()


def plain_client() -> Any:
    """A new client of the same type, to be closed, for what is not on the Hub.

    It has no token, and HF_HUB_OFFLINE does not stop it.
    """
    return type(hub_client())()


def get(client: Any, url: str, *, headers: Mapping[str, str], timeout: float) -> Any:
    """The response to a GET request, after redirects: of any status, unread, and to be closed.

    Args:
        client: `hub_client()` or a `plain_client()`.
        url: http or https.
        headers: of the request; redirects to other hosts go without `Authorization`.
        timeout: seconds for each step: connecting, sending, and every wait for more bytes.

    Raises:
        OSError: more than `MAX_REDIRECTS`, or one to an address other than http and https.
        Exception: no response; the client has types of its own.
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


def public(url: str) -> str:
    """A URL as messages show it: without user name and password."""
    return masked(url)


def body(response: Any) -> Iterator[bytes]:
    """The body of a response in parts, as sent; ConnectionError if it breaks off."""
    try:
        yield from response.iter_raw()
    except Exception as error:  # of the client's own types
        raise ConnectionError(f"the connection broke: {reason(error)}") from None


def content_length(response: Any) -> int | None:
    """How many bytes the body of a response has as it is sent; None if not declared."""
    return number(response.headers.get("Content-Length", ""))


def number(header: str) -> int | None:
    """A whole number from 0; None for another text, or one longer than any that is meant."""
    return int(header) if header.isdecimal() and len(header) < 20 else None
