"""What holds in every interface, whole and streamed."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from models import Nano
from serving import (
    BASE64,
    URI,
    Puppet,
    Served,
    chat,
    events,
    httpx,
    parts,
    says,
    serving,
    started,
    wait_until,
)

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
OLLAMA_CHAT, OLLAMA = "/api/chat", "/api/generate"
PATHS = (CHAT, RESPONSES, MESSAGES, OLLAMA_CHAT, OLLAMA)


def asked(path: str, text: str = "Hi", image: str | None = None, **more: Any) -> dict[str, Any]:
    """A question in the form of an interface; the image is in base64."""
    found: dict[str, Any]
    if path == RESPONSES:
        shown = [] if image is None else [{"type": "input_image", "image_url": image}]
        content = [*shown, {"type": "input_text", "text": text}]
        found = {"input": [{"role": "user", "content": content}]}
    elif path == MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": image}
        shown = [] if image is None else [{"type": "image", "source": source}]
        content = [*shown, {"type": "text", "text": text}]
        found = {"messages": [{"role": "user", "content": content}], "max_tokens": 64}
    elif path == CHAT:
        found = chat(text if image is None else parts(image, text=text))
    else:
        images = {} if image is None else {"images": [image]}
        message = {"role": "user", "content": text, **images}
        found = {"messages": [message]} if path == OLLAMA_CHAT else {"prompt": text, **images}
    return found | more


def reason(path: str, reply: dict[str, Any]) -> tuple[str | None, str]:
    """The kind of an error, if the interface has kinds, and its sentence."""
    error = reply["error"]
    if path.startswith("/api/"):
        assert set(reply) == {"error"}
        return None, error
    assert path != MESSAGES or reply["type"] == "error"
    return error["type"], error["message"]


def is_alive(line: str) -> bool:
    """Whether a line of a stream is a sign of life without text."""
    if line.startswith("{"):
        said = json.loads(line)
        return not said["done"] and not (
            said.get("response") or said.get("message", {}).get("content")
        )
    return line in (": keep-alive", "event: ping")


@pytest.mark.parametrize("path", PATHS)
def test_a_waiting_stream_shows_signs_of_life(path: str, played: Served, puppet: Puppet) -> None:
    puppet.script = [0.45, *says("Six.")]
    lines = played.lines(path, asked(path, stream=True))
    text = next(i for i, line in enumerate(lines) if "Six" in line)
    assert sum(map(is_alive, lines[:text])) >= 2
    assert not any(map(is_alive, lines[text:]))


def test_signs_of_life_come_at_least_every_15_seconds() -> None:
    from fastvlm_mlx.serve.settings import Settings

    assert Settings().keep_alive < 15


@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_and_a_timeout_come_in_the_envelope(
    path: str, played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import QueueFull, RequestTimeout

    puppet.refuse = QueueFull(3)
    for stream in (True, False):
        full = played.post(path, asked(path, stream=stream))
        assert (full.status_code, full.headers["retry-after"]) == (429, "3")
        assert reason(path, full.json())[0] in (None, "rate_limit_error")
    puppet.refuse = None
    puppet.script = [RequestTimeout()]
    late = played.post(path, asked(path, stream=False))
    kind, said = reason(path, late.json())
    assert late.status_code == 504 and kind in (None, "timeout_error") and "seconds" in said
    last = [line for line in played.lines(path, asked(path, stream=True)) if line][-1]
    assert "seconds" in last and "error" in last


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    path: str, served: Served, nano: Nano
) -> None:
    lengths = set()
    for stream in (True, False):
        reply = served.post(path, asked(path, "word " * 5000, stream=stream))
        assert reply.status_code == 400
        kind, said = reason(path, reply.json())
        assert kind in (None, "invalid_request_error") and "4096" in said
        lengths.add(said.split("this one has ")[1].split(",")[0])
    assert len(lengths) == 1 and int(lengths.pop()) > 5000


@pytest.mark.parametrize("path", PATHS)
def test_a_server_may_allow_shorter_prompts(path: str, nano: Nano) -> None:
    puppet = Puppet(*nano, script=says("Six."))
    with serving(puppet, max_prompt_tokens=40) as server:
        assert server.post(path, asked(path, stream=False)).status_code == 200
        reply = server.post(path, asked(path, "word " * 60, stream=False))
    assert reply.status_code == 400 and "at most 40" in reason(path, reply.json())[1]
    assert len(puppet.requests) == 1


SPELLED = "Ça va? 日本 🐧🐼👩‍🚀 stays whole."


@pytest.fixture(scope="module")
def spelling(nano: Nano) -> Iterator[Served]:
    """A server whose model says one sentence, of letters that take several tokens each."""
    import mlx.core as mx

    tokenizer = nano[1].tokenizer
    ids = [*tokenizer.encode(SPELLED), min(tokenizer.eos_token_ids)]

    def one_letter_after_the_other() -> Any:
        coming = iter(ids)

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            wanted = next(coming, ids[-1])
            return mx.where(mx.arange(logits.shape[-1]) == wanted, logits, -mx.inf)

        return process

    with started(nano) as engine, serving(engine) as server:
        submit = engine.submit
        engine.submit = lambda request: submit(
            replace(
                request,
                options={**request.options, "logits_processor": one_letter_after_the_other()},
            )
        )
        yield server


def deltas(path: str, lines: list[str]) -> list[str]:
    """The pieces of text in a stream."""
    if path.startswith("/api/"):
        said = map(json.loads, lines)
        return [each.get("response") or each.get("message", {}).get("content", "") for each in said]
    if path == CHAT:
        return [c["delta"].get("content") or "" for e in events(lines) for c in e["choices"]]
    kind = "content_block_delta" if path == MESSAGES else "response.output_text.delta"
    found = [each["delta"] for each in events(lines) if each["type"] == kind]
    return [each if isinstance(each, str) else each["text"] for each in found]


@pytest.mark.parametrize("path", PATHS)
def test_no_piece_has_half_a_character(path: str, spelling: Served) -> None:
    pieces = deltas(path, spelling.lines(path, asked(path, stream=True)))
    assert "".join(pieces) == SPELLED and len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("path", [path for path in PATHS if path != RESPONSES])  # which has none
def test_a_stop_text_across_tokens_is_cut_off_and_what_was_held_back_comes(
    path: str, spelling: Served
) -> None:
    for stop, said in (("🐼👩‍🚀 st", "Ça va? 日本 🐧"), ("whole!", SPELLED), ("ole.\n", SPELLED)):
        more: dict[str, Any] = {"stop": [stop]}
        if path == MESSAGES:
            more = {"stop_sequences": [stop]}
        elif path != CHAT:
            more = {"options": more}
        pieces = deltas(path, spelling.lines(path, asked(path, stream=True, **more)))
        assert "".join(pieces) == said


@pytest.mark.parametrize("path", PATHS)
def test_another_model_is_not_found(path: str, played: Served, puppet: Puppet) -> None:
    reply = played.post(path, asked(path, model="llava:7b"))
    assert reply.status_code == 404
    assert reason(path, reply.json())[0] in (None, "not_found_error")
    assert not puppet.requests


@pytest.mark.parametrize("path", PATHS)
def test_images_are_checked_before_a_stream_begins(
    path: str, played: Served, puppet: Puppet
) -> None:
    for broken in ("AAAA", BASE64[:400]):
        image = broken if path not in (CHAT, RESPONSES) else f"data:image/png;base64,{broken}"
        reply = played.post(path, asked(path, image=image, stream=True))
        assert reply.status_code == 400 and "image" in reason(path, reply.json())[1]
        assert reply.headers["content-type"] == "application/json"
    assert not puppet.requests


@pytest.mark.parametrize("path", PATHS)
def test_who_leaves_while_an_image_is_read_takes_no_place(
    path: str, played: Served, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = played.app.state.service.media
    read = type(media).open

    def slowly(self: Any, source: str, name: str) -> Any:
        time.sleep(1.2)
        return read(self, source, name)

    monkeypatch.setattr(type(media), "open", slowly)
    puppet.script = [60]
    image = URI if path in (CHAT, RESPONSES) else BASE64
    for stream in (True, False):
        before = len(puppet.cancelled)
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
            client.post(played.url + path, json=asked(path, image=image, stream=stream))
        wait_until(lambda before=before: len(puppet.cancelled) > before, 5)
    wait_until(lambda: len(puppet.tickets) == len(puppet.requests) == 2, 5)


def test_a_slow_grammar_keeps_nobody_waiting(
    played: Served, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    from fastvlm_mlx.serve import ask

    make = ask.make_constraint

    def slowly(processor: Any, vocab_size: int, options: Any) -> Any:
        if options.schema is not None:
            time.sleep(1.5)
        return make(processor, vocab_size, options)

    monkeypatch.setattr(ask, "make_constraint", slowly)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(played.post, CHAT, chat(response_format=form))
        time.sleep(0.2)
        start = time.monotonic()
        assert played.post(CHAT, chat()).status_code == 200
        assert played.get("/health").status_code == 200
        assert time.monotonic() - start < 1 and not slow.done()
        assert slow.result().status_code == 200
