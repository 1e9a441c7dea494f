"""GET requests, for `image` and `hub`; in the import order it stands below `image`, above `checks`.

The client is huggingface_hub's, which finds proxies and certificates on every system. Which library
it comes from depends on the version of huggingface_hub, so it is reached through `get_session`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from .checks import masked, reason

MAX_REDIRECTS = 10

# Host and port → the address to connect to; OSError for a host that is not allowed
Pin = Callable[[str, int], str]


def hub_client() -> Any:
    """The session that huggingface_hub shares, as set up by the user; HF_HUB_OFFLINE stops it."""
    from huggingface_hub import get_session

    return get_session()


def plain_client() -> Any:
    """A new client of the same type, to be closed, for what is not on the Hub.

    It has no token, and HF_HUB_OFFLINE does not stop it.
    """
    return type(hub_client())()


def direct_client() -> Any:
    """As `plain_client`, but without proxies: it connects to the address that it is given."""
    return type(hub_client())(mounts={"http://": None, "https://": None})


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


def get_pinned(
    client: Any, url: str, pin: Pin, *, headers: Mapping[str, str], timeout: float
) -> Any:
    """As `get`, but for every host on the way, `pin` chooses the address that is connected to.

    So a host is looked up only once, and what was checked is what is asked. A URL with a user name
    or password is refused.

    Args:
        client: a `direct_client()`.
        url, headers, timeout: as in `get`.
        pin: see `Pin`.

    Raises:
        OSError: as `get` or `pin`, or the URL is not one.
        Exception: as `get`.
    """
    for _ in range(MAX_REDIRECTS + 1):
        request = _pinned_request(client, url, pin, headers, timeout)
        response = client.send(request, stream=True, follow_redirects=False)
        if not response.has_redirect_location:
            return response
        response.close()
        url = urljoin(url, response.headers["Location"])
    raise OSError(f"it redirects more than {MAX_REDIRECTS} times")


def _pinned_request(
    client: Any, url: str, pin: Pin, headers: Mapping[str, str], timeout: float
) -> Any:
    """A request to a URL's host at its checked address; TLS asks for the host's certificate."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise OSError("it leads to an address that is not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise OSError("it leads to an address other than http and https")
    if "@" in parts.netloc or "\\" in url:
        raise OSError("it leads to an address with a user name or password")
    address = pin(host, port or (443 if parts.scheme == "https" else 80))
    literal = f"[{address}]" if ":" in address else address
    netloc = literal if port is None else f"{literal}:{port}"
    name = f"[{host}]" if ":" in host else host
    return client.build_request(
        "GET",
        parts._replace(netloc=netloc, fragment="").geturl(),
        headers={**headers, "Host": name if port is None else f"{name}:{port}"},
        timeout=timeout,
        extensions={"sni_hostname": host},
    )


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
