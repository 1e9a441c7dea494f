import gzip
import math
import re
import threading
import time
import zlib
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from images import NOISE, assert_one_sentence, pixels, saved

from fastvlm_mlx import http
from fastvlm_mlx.image.load import load_image


class Site(BaseHTTPRequestHandler):
    """What a good or bad server does, by path."""

    stop = threading.Event()
    body = saved(NOISE)
    seen: ClassVar[list[str]] = []
    headers_seen: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        page, _, rest = self.path[1:].partition("/")
        getattr(self, "page_" + page.partition(".")[0].partition("?")[0])(rest)

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def trickle(self, data: bytes) -> None:
        while not self.stop.wait(0.05):
            self.wfile.write(data)

    def page_ok(self, rest: str) -> None:
        self.head(200, Content_Length=len(self.body))
        self.wfile.write(self.body)

    def page_undeclared(self, rest: str) -> None:
        self.head(200)
        self.wfile.write(self.body)

    def page_chunked(self, rest: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.head(200, Transfer_Encoding="chunked")
        for part in (self.body[:50], self.body[50:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def page_packed(self, rest: str) -> None:
        encoding, _, kind = rest.partition("/")
        packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding.lower(), bytes)
        body = packed(bytes(50 * 2**20) if kind == "bomb" else self.body)
        self.head(200, Content_Encoding=encoding)
        self.wfile.write({"short": body[:-9], "false": b"not packed"}.get(kind, body))

    def page_part(self, rest: str) -> None:
        self.head(206, Content_Length=50, Content_Range=f"bytes 0-49/{len(self.body)}")
        self.wfile.write(self.body[:50])

    def page_length(self, rest: str) -> None:
        self.head(200, Content_Length=rest * 5000)
        self.wfile.write(self.body)

    def page_secret(self, rest: str) -> None:
        user = b64decode(self.headers.get("Authorization", "Basic ").partition(" ")[2]).decode()
        if user == "me:pass@word":
            return self.page_ok(rest)
        self.head(401)

    def page_open(self, rest: str) -> None:
        self.page_ok(rest)
        self.wfile.flush()
        self.stop.wait()

    def page_redirect(self, rest: str) -> None:
        left = int(rest)
        self.head(302, Location=f"/redirect/{left - 1}" if left else "/ok.png")

    def page_away(self, rest: str) -> None:
        self.head(301, Location=rest)

    def page_status(self, rest: str) -> None:
        self.head(int(rest))

    def page_empty(self, rest: str) -> None:
        self.head(200, Content_Length=0)

    def page_text(self, rest: str) -> None:
        self.head(200)
        self.wfile.write(b"<html>a page about the picture</html>")

    def page_never(self, rest: str) -> None:
        self.stop.wait()

    def page_drip(self, rest: str) -> None:
        self.head(200, Content_Length=10_000)
        self.trickle(b"x")

    def page_headers(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
        self.trickle(b"x")

    def page_detour(self, rest: str) -> None:
        self.head(302, Location="/ok.png")
        self.trickle(b"x" * 2**16)

    def page_short(self, rest: str) -> None:
        self.head(200, Content_Length=len(self.body) + 1)
        self.wfile.write(self.body)

    def page_huge(self, rest: str) -> None:
        self.head(200, Content_Length=10**12)
        self.wfile.write(self.body)

    def page_endless(self, rest: str) -> None:
        self.head(200)
        while not self.stop.is_set():
            self.wfile.write(bytes(2**16))

    def page_garbage(self, rest: str) -> None:
        self.wfile.write(b"\0\1\2 this is not HTTP\r\n\r\n")

    def page_hangup(self, rest: str) -> None:
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass  # clients that go away are the point here


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Site.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def site(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "*")
    return server


# Images


@pytest.mark.parametrize(
    "page",
    [
        "ok.png",
        "ok.png?size=large&x=%20#part",
        "ok.png/with space/ünï",
        "undeclared",
        "chunked",
        "packed/gzip",
        "packed/GZIP",
        "packed/deflate",
        "packed/identity",
        "open",
        "redirect/0",
        "redirect/9",
        "detour",
    ],
)
def test_url(site: str, page: str) -> None:
    np.testing.assert_array_equal(pixels(f"{site}/{page}", timeout=5), NOISE)


def test_url_spelling(site: str) -> None:
    np.testing.assert_array_equal(pixels(site.replace("http", "HTTP") + "/ok.png"), NOISE)
    load_image(f"{site}/ok.png/a b%20ü")
    assert Site.seen[-1] == "/ok.png/a%20b%20%C3%BC"
    load_image(f"{site}/away/{site}/ok.png")  # a whole address to go to
    assert Site.seen[-1] == "/ok.png"


def test_the_switches_of_the_hub_do_not_concern_images(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    np.testing.assert_array_equal(pixels(f"{site}/redirect/1"), NOISE)
    sent = Site.headers_seen[-1]
    assert "hf_secret" not in str(sent) and "authorization" not in sent
    assert sent["user-agent"] == "Mozilla/5.0 (compatible; fastvlm-mlx)"
    assert sent["accept-encoding"] == "identity"


# Errors and limits


@pytest.mark.parametrize(
    "page, kind, said",
    [
        ("status/404", OSError, "404 Not Found"),
        ("status/403", OSError, "403 Forbidden"),
        ("status/500", OSError, "500 Internal Server Error"),
        ("status/599", OSError, "599"),
        ("status/304", OSError, "304"),
        ("status/302", OSError, "302"),
        ("part", OSError, "206 Partial Content"),
        ("status/204", OSError, "204 No Content"),
        ("packed/br", OSError, "packs it as 'br'"),
        ("packed/gzip+br", OSError, "packs it as 'gzip+br'"),
        ("packed/gzip/short", OSError, "not whole"),
        ("packed/gzip/false", OSError, "incorrect header"),
        ("packed/gzip/bomb", OSError, "max_bytes"),
        ("packed/deflate/bomb", OSError, "max_bytes"),
        ("length/9", OSError, "/length/9"),
        ("redirect/10", OSError, "more than 10 times"),
        ("away/file:///etc/passwd", OSError, "other than http"),
        ("away/ftp://example.org/x.png", OSError, "other than http"),
        ("empty", ValueError, "empty"),
        ("text", ValueError, "not an image"),
        ("short", OSError, "broke"),
        ("huge", OSError, "max_bytes"),
        ("endless", OSError, "max_bytes"),
        ("garbage", OSError, "not HTTP"),
        ("hangup", OSError, "disconnected"),
    ],
)
def test_url_errors(site: str, page: str, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        load_image(f"{site}/{page}", timeout=5, max_bytes=2**20)
    assert said in str(caught.value) and f"{site}/{page}" in str(caught.value)
    assert not isinstance(caught.value, TimeoutError)
    assert_one_sentence(caught.value)


def test_user_and_password_are_sent_and_never_shown(site: str) -> None:
    address = site.replace("://", "://me:pass%40word@")
    np.testing.assert_array_equal(pixels(f"{address}/secret"), NOISE)
    assert "me:" not in Site.seen[-1]
    for given in ("me:pass%40word", "me:pass@word", "me:" + "w" * 1000, "tok-en"):
        for page in ("secret/x", "status/404", "text", "garbage", "never"):
            address = f"{site.replace('://', f'://{given}@')}/{page}"
            with pytest.raises((OSError, ValueError)) as caught:
                load_image(address.replace("secret/x", "status/401"), timeout=0.3)
            said = str(caught.value)
            assert "://***@" in said and not re.search("pass|word|www|me:|tok-en", said), said
            assert_one_sentence(caught.value)


@pytest.mark.parametrize("source", ["ftp://me:word@a/x", "me://you:word@x"])
def test_passwords_elsewhere(source: Any) -> None:
    with pytest.raises((OSError, ValueError)) as caught:
        load_image(source)
    assert "word" not in str(caught.value)


LIMITS = [0, -1, math.nan, math.inf, 10**400, 10**5000, "5", None, True, [1]]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{type(limit).__name__}")
@pytest.mark.parametrize("name", ["timeout", "max_bytes"])
def test_limits_that_are_none(name: str, limit: Any) -> None:
    if (name, limit) == ("timeout", None):  # the default
        return
    with pytest.raises(ValueError, match=f"^{name} must be a number") as caught:
        load_image("http://127.0.0.1:1/x.png", **{name: limit})
    assert_one_sentence(caught.value)


def test_limits_of_any_kind(site: str) -> None:
    for options in ({"timeout": 86_400}, {"max_bytes": 1e9}, {"timeout": np.float64(5)}):
        np.testing.assert_array_equal(pixels(f"{site}/packed/gzip", **options), NOISE)


def test_lengths_that_no_file_has() -> None:
    for length, expected in (("9" * 5000, None), ("12", 12), ("", None), ("-1", None), ("²", None)):
        response = SimpleNamespace(headers={"Content-Length": length})
        assert http.content_length(response) == expected


@pytest.mark.parametrize("page", ["never", "drip", "headers"])
def test_url_deadline(site: str, page: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.3 seconds") as caught:
        load_image(f"{site}/{page}", timeout=0.3)
    assert time.monotonic() - start < 2
    assert f"{site}/{page}" in str(caught.value)
    assert_one_sentence(caught.value)


def test_no_download_goes_on_for_long(site: str) -> None:
    before = threading.enumerate()
    for page in ("drip", "endless"):
        with pytest.raises(TimeoutError):
            load_image(f"{site}/{page}", timeout=0.1, max_bytes=2**40)
    fetching = [t for t in threading.enumerate() if t not in before and "(fetch)" in t.name]
    for thread in fetching:
        thread.join(3)
        assert not thread.is_alive()


def test_url_size_limit_is_exact(site: str) -> None:
    size = len(Site.body)
    for page in ("ok.png", "undeclared", "chunked"):
        load_image(f"{site}/{page}", max_bytes=size)
        with pytest.raises(OSError, match=f"larger than max_bytes, {size - 1}"):
            load_image(f"{site}/{page}", max_bytes=size - 1)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://127.0.0.1:1"])
def test_unusable_proxies(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    with pytest.raises(OSError, match=r"'http://127\.0\.0\.1:1/x\.png'") as caught:
        load_image("http://127.0.0.1:1/x.png", timeout=5)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://[bad/x.png", "http:///x.png", "http://a:b:c/x.png"]
)
def test_bad_addresses(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(OSError) as caught:
        load_image(url, timeout=5)
    assert repr(url) in str(caught.value)
    assert_one_sentence(caught.value)
