"""Videos of requests: a few frames with their times, within what the server allows."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import write_clip
from models import Nano
from serving import Served, chat, serving, started

import fastvlm_mlx as fv
from fastvlm_mlx.hub.resolve import NANO

pytestmark = [pytest.mark.needs(name) for name in ("fastapi", "uvicorn", "av")]
PATH = "/v1/chat/completions"
QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a panda, then one of penguins."""
    pictures = [
        np.asarray(fv.load_image(NANO / "images" / name).resize((256, 256)))
        for name in ("panda.png", "penguins.png")
    ]
    path = tmp_path_factory.mktemp("clips") / "zoo.mp4"
    return write_clip(path, [pictures[0]] * 20 + [pictures[1]] * 10)


@pytest.fixture(scope="module")
def served(nano: Nano, clip: Path) -> Iterator[Served]:
    with started(nano) as engine, serving(engine, media_root=clip.parent, max_images=8) as served:
        yield served


def asked(url: Any, more: int = 0) -> dict[str, Any]:
    part = {"type": "video_url", "video_url": url}
    return chat([part] * (1 + more) + [{"type": "text", "text": QUESTION}])


def data_uri(data: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def test_a_video_is_answered_as_in_the_library(served: Served, clip: Path, nano: Nano) -> None:
    expected = list(fv.stream_generate(*nano, QUESTION, video=clip, frames=8))
    for url in ({"url": data_uri(clip.read_bytes())}, str(clip), {"url": f"file://{clip}"}):
        reply = served.post(PATH, asked(url))
        assert reply.status_code == 200, reply.text
        found = reply.json()
        assert found["choices"][0]["message"]["content"] == "".join(r.text for r in expected)
        assert found["usage"]["prompt_tokens"] == expected[0].prompt_tokens


def responses(part: dict[str, Any], role: str = "user") -> tuple[str, dict[str, Any]]:
    content = [part, {"type": "input_text", "text": QUESTION}]
    return "/v1/responses", {"input": [{"role": role, "content": content}]}


def messages(part: dict[str, Any], role: str = "user") -> tuple[str, dict[str, Any]]:
    content = [part, {"type": "text", "text": QUESTION}]
    turns = [{"role": role, "content": content}, {"role": "user", "content": "So?"}]
    return "/v1/messages", {"messages": turns[: 1 + (role != "user")], "max_tokens": 64}


def ways(url: str) -> list[tuple[str, dict[str, Any]]]:
    """A question about a video through every interface but chat completions."""
    by_url = {"type": "url", "url": url}
    found = [
        responses({"type": "input_video", "video_url": url}),
        responses({"type": "video_url", "video_url": {"url": url}}),
        messages({"type": "video", "source": by_url}),
        messages(
            {
                "type": "tool_result",
                "tool_use_id": "1",
                "content": [{"type": "video", "source": by_url}],
            }
        ),
    ]
    if url.startswith("data:"):
        data = url.partition(",")[2]
        base64 = {"type": "base64", "media_type": "video/mp4", "data": data}
        found.append(messages({"type": "video", "source": base64}))
    return found


def said(reply: dict[str, Any]) -> str:
    message = reply["output"][0] if "output" in reply else reply
    return str(message["content"][0]["text"])


def test_every_interface_with_parts_shows_a_video(served: Served, clip: Path, nano: Nano) -> None:
    expected = list(fv.stream_generate(*nano, QUESTION, video=clip, frames=8))
    for url in (data_uri(clip.read_bytes()), str(clip)):
        for path, body in ways(url):
            reply = served.post(path, body)
            assert reply.status_code == 200, reply.text
            assert said(reply.json()) == "".join(r.text for r in expected)
            assert reply.json()["usage"]["input_tokens"] == expected[0].prompt_tokens


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.mp4", "/etc/passwd", "data:,nothing"])
def test_every_interface_refuses_the_same_videos(url: str, served: Served) -> None:
    chat_says = served.post(PATH, asked(url)).json()["error"]["message"]
    for path, body in ways(url):
        reply = served.post(path, body)
        assert reply.status_code == 400 and reply.json()["error"]["message"] == chat_says


def test_a_video_without_its_url_and_one_of_the_model(served: Served) -> None:
    for path, body in (
        responses({"type": "input_video"}),
        responses({"type": "input_video", "video_url": "x"}, role="assistant"),
        messages({"type": "video", "source": {"type": "url", "url": "x"}}, role="assistant"),
        messages({"type": "video"}),
    ):
        assert served.post(path, body).status_code == 400


def test_videos_share_the_images_that_are_allowed(served: Served, clip: Path) -> None:
    uri = data_uri(clip.read_bytes())
    two = served.post(PATH, asked(uri, more=1))
    assert two.status_code == 200, two.text
    many = served.post(PATH, asked(uri, more=8))
    assert many.status_code == 400 and "more than 8 images and videos" in many.text


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
REFUSED = {
    "text": (data_uri(b"no video at all " * 99), "not a video"),
    "a playlist": (data_uri(PLAYLIST), "not a video"),
    "a picture": (data_uri((NANO / "images" / "panda.png").read_bytes()), "not a video"),
    "an address": ("http://127.0.0.1:9/x.mp4", "are off here"),
    "a file elsewhere": ("/etc/passwd", "no such file below"),
    "bad base64": ("data:video/mp4;base64,%%%", "not well encoded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, served: Served) -> None:
    url, said = REFUSED[case]
    reply = served.post(PATH, asked({"url": url}))
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text


def test_limits_of_bytes_and_pixels(nano: Nano, clip: Path) -> None:
    uri = data_uri(clip.read_bytes())
    for limit, said in (({"max_image_bytes": 999}, "bytes"), ({"max_image_pixels": 999}, "pixels")):
        with started(nano) as engine, serving(engine, **limit) as served:
            reply = served.post(PATH, asked(uri))
        assert reply.status_code == 400 and said in reply.json()["error"]["message"]


def test_only_the_user_has_videos(served: Served) -> None:
    part = {"type": "video_url", "video_url": "x"}
    reply = served.post(PATH, chat([part], role="assistant"))
    assert reply.status_code == 400
