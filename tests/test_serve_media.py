"""Images of requests: what counts as one, and which addresses and files stay closed."""

import base64
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from models import PANDA, PENGUINS, Nano
from PIL import Image, ImageFile
from serving import (
    BASE64,
    PICTURE,
    QUESTION,
    URI,
    Puppet,
    chat,
    parts,
    says,
    serving,
    started,
)

import fastvlm_mlx as fv
from fastvlm_mlx import http
from fastvlm_mlx.image.addresses import NotPublicError, is_public, public_address

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
PATH = "/v1/chat/completions"
with Image.open(PENGUINS) as _penguins:
    PIXELS = _penguins.width * _penguins.height


def media(pin: Any = None, **settings: Any) -> Any:
    from fastvlm_mlx.serve.media import Media
    from fastvlm_mlx.serve.settings import Settings

    more = {} if pin is None else {"pin": pin}
    return Media(Settings(**settings), **more)


def opened(source: str, **settings: Any) -> Image.Image:
    return media(**settings).open(source, "image 1")


def refusal(source: str, pin: Any = None, **settings: Any) -> str:
    from fastvlm_mlx.serve.errors import ApiError

    with pytest.raises(ApiError) as caught:
        media(pin, **settings).open(source, "image 1")
    assert caught.value.status == 400
    assert caught.value.message.endswith(".") and "\n" not in caught.value.message
    return caught.value.message


def words(text: str) -> list[str]:
    return text.split()


# Ways of writing an image


URL_SAFE = BASE64.replace("+", "-").replace("/", "_")
WRITTEN = {
    "a data URI": URI,
    "a wrong type": f"data:image/jpeg;base64,{BASE64}",
    "no type": f"data:;base64,{BASE64}",
    "an odd type": f"data:APPLICATION/X-CAT;charset=utf-8;base64,{BASE64}",
    "no word base64": f"data:image/png,{BASE64}",
    "nothing before the comma": f"data:,{BASE64}",
    "upper case": f"DATA:image/png;BASE64,{BASE64}",
    "only base64": BASE64,
    "without padding": BASE64.rstrip("="),
    "with newlines": "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    "with carriage returns": "\r\n".join(BASE64[i : i + 64] for i in range(0, len(BASE64), 64)),
    "space around": f"\n {URI} \n",
    "the alphabet of URLs": f"data:image/png;base64,{URL_SAFE}",
    "percent signs": f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('=', '%3D')}",
}


@pytest.mark.parametrize("way", WRITTEN)
def test_an_image_is_read_however_it_is_written(way: str) -> None:
    assert opened(WRITTEN[way]).tobytes() == fv.load_image(PENGUINS).tobytes()


def saved(image: Image.Image, kind: str, **options: Any) -> str:
    file = BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("lead", ["", "data:image/x;base64,"])
def test_listed_kinds_are_decoded(kind: str, lead: str) -> None:
    image = Image.new("RGB", (8, 4), (200, 30, 30))
    assert opened(lead + saved(image, kind)).size == (8, 4)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "EPS", "PDF", "ICNS"])
def test_other_kinds_stay_shut_though_pil_reads_them(kind: str) -> None:
    written = saved(Image.new("RGB", (16, 16)), kind)
    assert "not an image in JPEG" in refusal(f"data:image/png;base64,{written}")


def test_turns_and_transparency_are_those_of_the_library() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert opened(turned).size == (4, 8)
    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    assert opened(saved(clear, "PNG")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5), (2, 2)])
def test_small_and_odd_images_answer(nano: Nano, size: tuple[int, int]) -> None:
    puppet = Puppet(*nano, script=says("Six."))
    with serving(puppet) as server:
        body = chat(parts(saved(Image.new("RGB", size), "PNG")))
        assert server.post(PATH, body).status_code in (200, 400)


BAD = {
    "empty": "data:image/png;base64,",
    "no comma": "data:image/png;base64",
    "not base64": "data:image/png;base64,!!!!",
    "text": "data:text/plain,hello",
    "a svg": "data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>",
    "half an image": f"data:image/png;base64,{BASE64[: len(BASE64) // 2]}",
    "only a mark": "data:image/png;base64," + base64.b64encode(PICTURE[:8]).decode(),
    "nothing": "",
    "an ftp URL": "ftp://example.com/a.png",
    "a blob": "blob:http://localhost/1",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_refused_in_a_sentence(kind: str) -> None:
    assert "image 1" in refusal(BAD[kind])


def test_pixels_are_limited_by_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = saved(Image.new("RGB", (100, 100)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + b"\0" * 4
    said = refusal(base64.b64encode(huge).decode())
    assert "pixels" in said
    assert "at most 9,999" in refusal(fits, max_image_pixels=9_999)


def test_bytes_and_images_are_limited(nano: Nano) -> None:
    assert "more than 100 bytes" in refusal(URI, max_image_bytes=100)
    with serving(Puppet(*nano, script=says("Six.")), max_image_pixels=PIXELS) as server:
        assert server.post(PATH, chat(parts(*[URI] * 4))).status_code == 200
        reply = server.post(PATH, chat(parts(*[URI] * 5)))
        assert reply.status_code == 400
        assert "together" in reply.json()["error"]["message"]
    with serving(Puppet(*nano, script=says("Six.")), max_images=2) as server:
        assert server.post(PATH, chat(parts(URI, URI))).status_code == 200
        reply = server.post(PATH, chat(parts(URI, URI, URI)))
        assert reply.status_code == 400
        assert "3 images; at most 2" in reply.json()["error"]["message"]


# Addresses


NOT_PUBLIC = words(
    """
    127.0.0.1 127.1.2.3 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.254
    192.168.0.1 192.168.255.255 169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200
    192.0.0.192 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16 192.88.99.1 :: ::1 ::ffff:127.0.0.1
    ::ffff:7f00:1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:8.8.8.8 ::127.0.0.1
    64:ff9b::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2002:a9fe:a9fe::
    2001:0:7f00:1::1 2001::1 2001:db8::1 fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1
    ff02::1 100::1 5f00::1 3fff::1
    """
)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(NotPublicError):
        public_address("cat.example", 443, lambda host, port: [address])
    with pytest.raises(NotPublicError):  # beside one that is
        public_address("cat.example", 443, lambda host, port: ["93.184.216.34", address])


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "172.32.0.1"])
def test_addresses_that_are_public(address: str) -> None:
    assert public_address("cat.example", 80, lambda host, port: [address]) == address


def test_what_has_no_address_is_refused() -> None:
    for found in ([], ["no address"], ["127.0.0.1 "]):
        with pytest.raises(OSError):
            public_address("cat.example", 80, lambda host, port, found=found: found)


# As the system reads them: inet_aton's decimal, octal, hexadecimal and short forms, names, ports.
TRICKS = words(
    r"""
    http://127.0.0.1/a.png http://127.1/a.png http://127.0.1/a.png http://2130706433/a.png
    http://0x7f000001/a.png http://0x7f.0.0.1/a.png http://0x7f.1/a.png http://0177.0.0.1/a.png
    http://0177.0.0.01/a.png http://017700000001/a.png http://0/a.png http://0.0.0.0/a.png
    http://127.0.0.1./a.png http://localhost/a.png http://LOCALHOST/a.png
    http://localhost./a.png http://[::1]/a.png http://[::]/a.png http://[0:0:0:0:0:0:0:1]/a.png
    http://[::ffff:127.0.0.1]/a.png http://[::ffff:7f00:1]/a.png http://[::127.0.0.1]/a.png
    http://[64:ff9b::7f00:1]/a.png http://[fe80::1]/a.png http://[fe80::1%25lo]/a.png
    http://[fd00:ec2::254]/latest/meta-data http://169.254.169.254/latest/meta-data
    http://2852039166/latest/meta-data http://0xa9fea9fe/ http://0251.0376.0251.0376/
    http://[::ffff:a9fe:a9fe]/ http://10.0.0.1/a.png http://192.168.1.1/a.png
    http://172.16.5.4/a.png http://100.100.100.200/a.png http://127.0.0.1:22/a.png
    http://user@127.0.0.1/a.png http://user:pass@93.184.216.34/a.png
    http://93.184.216.34@127.0.0.1/a.png http://93.184.216.34%40127.0.0.1/a.png
    http://127.0.0.1#@93.184.216.34/ http://①②⑦.⓪.⓪.①/a.png http://127。0。0。1/a.png
    http://93.184.216.34\@127.0.0.1/a.png http://127.0.0.1%00.example/a.png http:///a.png
    http://:80/a.png http://127.0.0.1:99999/a.png http://[127.0.0.1]/a.png
    https://127.0.0.1/a.png https://[::1]:443/a.png HTTP://127.0.0.1/a.png http://0x7f000001:80/
    http://00000177.1/a.png http://127.0.0.1\t/a.png
    """
)


@pytest.mark.parametrize("url", TRICKS)
def test_no_trick_reaches_an_address_that_is_not_public(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[Any] = []

    def connect(address: Any, *rest: Any, **more: Any) -> Any:
        connected.append(address)
        raise OSError("no connection in this test")

    monkeypatch.setattr(socket, "create_connection", connect)
    refusal(url, allow_remote_images=True)
    assert not connected


def test_there_are_many_tricks() -> None:
    assert len(set(TRICKS)) >= 50


def test_remote_images_are_off_by_default() -> None:
    looked: list[str] = []
    said = refusal("http://93.184.216.34/a.png", lambda host, port: looked.append(host))
    assert "--allow-remote-images" in said and not looked


# Servers that redirect, and names that change


class Site(BaseHTTPRequestHandler):
    """Pictures and redirects; it notes who asked for what."""

    seen: list[tuple[str, str]]
    target = ""

    def do_GET(self) -> None:
        self.seen.append((self.headers["Host"], self.path))
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", self.target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[type[Site], int]]:
    handler = type("Handler", (Site,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield handler, server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def pinned(addresses: dict[str, list[str]]) -> tuple[Callable[[str, int], str], list[str]]:
    """A pin by a resolver of its own; where it is asked for a public address, it gives the site's,
    as a network would that leads there."""
    asked: list[str] = []

    def pin(host: str, port: int) -> str:
        asked.append(host)
        answers = addresses.get(host, [host])
        public_address(
            host, port, lambda host, port: answers[min(asked.count(host), len(answers)) - 1 :]
        )
        return "127.0.0.1"

    return pin, asked


def test_a_public_image_is_fetched_from_the_address_that_was_checked(
    site: tuple[type[Site], int],
) -> None:
    handler, port = site
    pin, asked = pinned({"cat.example": ["93.184.216.34"]})
    url = f"http://cat.example:{port}/a.png?x=1#here"
    image = media(pin, allow_remote_images=True).open(url, "image 1")
    assert image.tobytes() == fv.load_image(PENGUINS).tobytes()
    assert handler.seen == [(f"cat.example:{port}", "/a.png?x=1")]
    assert asked == ["cat.example"]


def test_redirects_are_followed_where_each_address_is_public(site: tuple[type[Site], int]) -> None:
    handler, port = site
    handler.target = f"http://dog.example:{port}/b.png"
    pin, asked = pinned({"cat.example": ["93.184.216.34"], "dog.example": ["93.184.216.35"]})
    media(pin, allow_remote_images=True).open(f"http://cat.example:{port}/away", "image 1")
    assert asked == ["cat.example", "dog.example"]
    handler.target = "/c.png"  # the same host
    media(pin, allow_remote_images=True).open(f"http://cat.example:{port}/away", "image 1")
    assert handler.seen[-1] == (f"cat.example:{port}", "/c.png")


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/b.png",
        "http://2130706433:{port}/b.png",
        "http://[::ffff:127.0.0.1]:{port}/b.png",
        "//127.0.0.1:{port}/b.png",
        "http://169.254.169.254/latest/meta-data",
        "http://inside.example:{port}/b.png",
        "http://user:pass@cat.example:{port}/b.png",
        "file:///etc/passwd",
        "ftp://cat.example/b.png",
        "data:image/png;base64,AAAA",
        "http://[bad",
        "/away",
    ],
)
def test_no_redirect_leads_inside(site: tuple[type[Site], int], target: str) -> None:
    handler, port = site
    handler.target = target.format(port=port)
    names = {"cat.example": ["93.184.216.34"], "inside.example": ["10.0.0.7"]}
    names |= {"2130706433": ["127.0.0.1"]}
    pin, _ = pinned(names)
    refusal(f"http://cat.example:{port}/away", pin, allow_remote_images=True)
    assert {path for _, path in handler.seen} == {"/away"}
    assert len(handler.seen) <= http.MAX_REDIRECTS + 1


def test_a_name_is_looked_up_once_so_that_it_cant_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name is public when it is checked, and local when it is asked again."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1"]])
    connected: list[str] = []

    def look_up(host: str, port: int, *rest: Any, **more: Any) -> Any:
        found = [host] if host == "93.184.216.34" else next(answers)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    def connect(address: Any, *rest: Any, **more: Any) -> Any:
        connected.append(address[0])
        raise OSError("no connection in this test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    refusal("http://rebound.example/a.png", allow_remote_images=True)
    assert connected == ["93.184.216.34"]
    refusal("http://rebound.example/a.png", allow_remote_images=True)
    assert connected == ["93.184.216.34"]


def test_a_proxy_of_the_environment_is_not_asked(
    site: tuple[type[Site], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, port = site
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    pin, _ = pinned({"cat.example": ["93.184.216.34"]})
    media(pin, allow_remote_images=True).open(f"http://cat.example:{port}/a.png", "image 1")
    assert handler.seen == [(f"cat.example:{port}", "/a.png")]


def test_a_remote_image_is_limited_in_bytes(site: tuple[type[Site], int]) -> None:
    _, port = site
    pin, _ = pinned({"cat.example": ["93.184.216.34"]})
    said = refusal(
        f"http://cat.example:{port}/a.png", pin, allow_remote_images=True, max_image_bytes=100
    )
    assert "100" in said


# Files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an image, and traps around it."""
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    for path in (root / "cat.png", root / "deep" / "a cat.png", tmp_path / "secret.png"):
        path.write_bytes(PICTURE)
    (tmp_path / "media-other").mkdir()
    (tmp_path / "media-other" / "cat.png").write_bytes(PICTURE)
    (root / "inner.png").symlink_to(root / "cat.png")
    (root / "outer.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "hop.png").symlink_to("up/secret.png")
    os.mkfifo(root / "pipe.png")
    (root / "text.png").write_text("no image", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "cat.png",
        "./cat.png",
        "deep/../cat.png",
        "deep/a cat.png",
        "inner.png",
        "{root}/cat.png",
        "file:{root}/cat.png",
        "file://{root}/cat.png",
        "file://localhost{root}/deep/a%20cat.png",
    ],
)
def test_files_below_the_media_root_are_read(root: Path, name: str) -> None:
    image = opened(name.format(root=root), media_root=root)
    assert image.tobytes() == fv.load_image(PENGUINS).tobytes()


@pytest.mark.parametrize(
    "name",
    words(
        """
        ../secret.png deep/../../secret.png {root}/../secret.png {outside}/secret.png outer.png
        up/secret.png hop.png ../media-other/cat.png {root}-other/cat.png loop.png pipe.png deep
        missing.png file://{outside}/secret.png file://{root}/../secret.png
        file://{root}/%2e%2e/secret.png file://other.host{root}/cat.png file:../secret.png
        file:////etc/passwd /etc/passwd /dev/zero /proc/self/environ ~/secret.png text.png
        ..%2fsecret.png cat.png%00.png ....//secret.png file:///dev/stdin . ..
        """
    ),
)
def test_no_other_file_is_read(root: Path, name: str) -> None:
    said = refusal(name.format(root=root, outside=root.parent), media_root=root)
    assert "secret" not in said and str(root) not in said


def test_a_missing_file_and_a_forbidden_one_look_alike(root: Path) -> None:
    assert refusal("missing.png", media_root=root) == refusal("outer.png", media_root=root)


def test_files_are_closed_by_default(root: Path) -> None:
    for name in (str(root / "cat.png"), f"file://{root}/cat.png", "cat.png"):
        assert "--media-root" in refusal(name)


def test_a_file_that_is_too_large_is_not_read(root: Path) -> None:
    assert "too large" in refusal("cat.png", media_root=root, max_image_bytes=100)


def test_a_file_whose_bytes_changed_is_another_picture(nano: Nano, tmp_path: Path) -> None:
    from fastvlm_mlx.serve.cache import RequestCache

    file = tmp_path / "now.png"
    answers = []
    with (
        started(nano, cache=RequestCache(nano[0])) as engine,
        serving(engine, media_root=tmp_path) as server,
    ):
        for cached, picture in ((0, PENGUINS), (1, PENGUINS), (0, PANDA), (1, PENGUINS)):
            file.write_bytes(picture.read_bytes())
            reply = server.post(PATH, chat(parts("now.png"))).json()
            assert reply["timings"]["cached_images"] == cached
            answers.append(reply["choices"][0]["message"]["content"])
    assert answers[0] == answers[1] == answers[3] == fv.generate(*nano, QUESTION, PENGUINS)
    assert answers[2] == fv.generate(*nano, QUESTION, PANDA)


# One picture by every way


def test_a_picture_is_known_again_by_whichever_way_it_comes(
    nano: Nano, root: Path, site: tuple[type[Site], int]
) -> None:
    from fastvlm_mlx.serve.cache import RequestCache

    _, port = site
    pin, _ = pinned({"cat.example": ["93.184.216.34"]})
    ways = [URI, BASE64, "cat.png", f"file://{root}/cat.png", f"http://cat.example:{port}/a.png"]
    allowed = {"media_root": root, "allow_remote_images": True}
    with (
        started(nano, cache=RequestCache(nano[0])) as engine,
        serving(engine, pin=pin, **allowed) as server,
    ):
        first = server.post(PATH, chat(parts(URI))).json()
        assert first["timings"]["cached_images"] == 0
        for way in ways:
            reply = server.post(PATH, chat(parts(way, text="What is this?"))).json()
            assert reply["timings"]["cached_images"] == 1, way
            assert reply["timings"]["cached_tokens"] > 16, way
            usage = reply["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
        generated = {"prompt": QUESTION, "images": [BASE64], "stream": False}
        again = server.post("/api/generate", generated).json()
        assert again["timings"]["cached_images"] == 1
        assert again["response"] == first["choices"][0]["message"]["content"]
