"""Clients that leave, bodies without sense, engines that die: the server answers the others."""

import base64
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from command import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Nano
from serving import (
    ANSWER,
    BASE64,
    QUESTION,
    URI,
    Puppet,
    Served,
    chat,
    events,
    httpx,
    parts,
    piece,
    says,
    serving,
    serving_process,
    started,
    wait_until,
)

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
PATH = "/v1/chat/completions"
EXAMPLES = int(os.environ.get("FASTVLM_EXAMPLES", 50))  # of hostile requests


@pytest.fixture(scope="module")
def played(nano: Nano) -> Iterator[Served]:
    with serving(Puppet(*nano), keep_alive=0.1, max_output_tokens=64) as server:
        yield server


# Clients that leave


ASKED = {
    PATH: chat(),
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": chat(max_tokens=5),
    "/api/chat": chat(),
    "/api/generate": {"prompt": "Hi"},
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("path", ASKED)
def test_who_leaves_before_anything_came_frees_the_place(
    played: Served, puppet: Puppet, path: str, stream: bool
) -> None:
    puppet.script = [60]
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
        if stream:
            client.timeout = httpx.Timeout(30)
            with client.stream("POST", played.url + path, json=ASKED[path] | {"stream": True}):
                wait_until(lambda: puppet.tickets)
            raise httpx.ReadTimeout("it left by itself")
        client.post(played.url + path, json=ASKED[path] | {"stream": False})
    wait_until(lambda: puppet.cancelled, 3)
    assert puppet.cancelled[0] in puppet.tickets


@pytest.mark.parametrize("path", ASKED)
def test_who_leaves_in_a_stream_frees_the_place(played: Served, puppet: Puppet, path: str) -> None:
    puppet.script = [piece("Six"), 60]
    with (
        httpx.Client() as client,
        client.stream("POST", played.url + path, json=ASKED[path] | {"stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        while "Six" not in next(lines):
            pass
    wait_until(lambda: puppet.cancelled, 3)


def answer_for_ever(engine: Any) -> None:
    """Have an engine's answers run to their limit."""
    import mlx.core as mx

    def never_ends(tokens: mx.array, logits: mx.array) -> mx.array:
        ends = mx.array(sorted(engine.processor.tokenizer.eos_token_ids))
        return logits.at[:, ends].add(-1e9)

    submit = engine.submit
    engine.submit = lambda request: submit(
        replace(request, options={**request.options, "logits_processor": never_ends})
    )


def test_no_place_is_lost_to_clients_that_leave(nano: Nano) -> None:
    """With the real engine: clients leave in the middle of long answers, and nothing is left."""
    with started(nano, max_batch=4) as engine, serving(engine) as server:
        answer_for_ever(engine)
        body = chat("Go on.", stream=True)
        before = threading.active_count()

        def leave(_: int) -> None:
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", server.url + PATH, json=body) as reply,
            ):
                next(reply.iter_lines())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(leave, range(40)))
        wait_until(lambda: not engine.running and not engine.queued, 20)
        del engine.submit
        assert (
            server.post(PATH, chat(parts(URI))).json()["choices"][0]["message"]["content"] == ANSWER
        )
        assert threading.active_count() <= before + 8


# Engines that are full, slow or dead


def test_a_full_queue_is_told_with_a_time_to_wait(played: Served, puppet: Puppet) -> None:
    from fastvlm_mlx.serve.ticket import QueueFull

    puppet.refuse = QueueFull(1.2)
    for path, body in ASKED.items():
        reply = played.post(path, body)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "2"), path
        assert "error" in reply.json()


def test_a_real_queue_fills_and_empties(nano: Nano) -> None:
    with started(nano, max_batch=1, max_queue=1) as engine, serving(engine) as server:
        body = chat("Go on.", temperature=1.5, max_tokens=300, seed=1)
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: server.post(PATH, body), range(12)))
        codes = [reply.status_code for reply in replies]
        assert set(codes) == {200, 429}
        assert all(int(r.headers["retry-after"]) >= 1 for r in replies if r.status_code == 429)
        assert len({r.text for r in replies if r.status_code == 429}) == 1
        assert server.post(PATH, body).status_code == 200


def test_of_several_answers_none_is_left_if_one_finds_no_place(
    played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import QueueFull

    puppet.script, submit = [60], puppet.submit

    def once(request: Any) -> Any:
        if puppet.requests:
            raise QueueFull(1)
        return submit(request)

    puppet.submit = once  # type: ignore[method-assign]
    try:
        assert played.post(PATH, chat(n=3)).status_code == 429
    finally:
        del puppet.submit
    assert puppet.cancelled == puppet.tickets


def test_the_time_of_an_answer_is_limited(nano: Nano) -> None:
    with started(nano) as engine, serving(engine, timeout=0.3) as server:
        answer_for_ever(engine)
        body = chat("Go on.")
        reply = server.post(PATH, body)
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "timeout"
        *_, last = events(server.lines(PATH, body | {"stream": True}))
        assert last["error"]["type"] == "timeout_error"


def test_a_dead_engine_is_told_at_once(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm_mlx.serve.engine import Engine

    with started(nano) as engine, serving(engine) as server:
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        monkeypatch.setattr(Engine, "_step", lambda self: 1 / 0)
        assert server.post(PATH, chat()).status_code == 503
        time.sleep(0.5)
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        for path, body in ASKED.items():
            reply = server.post(path, body | {"stream": False})
            assert reply.status_code == 503, path
        assert "fastvlm_alive 0.0" in server.get("/metrics").text


def test_an_engine_that_hangs_is_told(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not end: `/health` fails until it does."""
    from fastvlm_mlx.serve.engine import Engine

    step, going_on = Engine._step, threading.Event()

    def hang(engine: Engine) -> None:
        going_on.wait(30)
        step(engine)

    with started(nano) as engine, serving(engine, stall_timeout=0.2) as server:
        monkeypatch.setattr(Engine, "_step", hang)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post, PATH, chat(max_tokens=4))
            wait_until(lambda: server.get("/health").status_code == 503, 5)
            assert server.get("/health").json() == {"status": "hung", "model": "nano"}
            assert not server.get("/ready").json()["ready"]
            going_on.set()
            assert asked.result().status_code == 200
        wait_until(lambda: server.get("/health").status_code == 200, 5)
        assert server.get("/ready").status_code == 200


# Bodies that make no sense


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["user", "system", "nano", "text", "image_url", URI, f"{URI[:99]}", "\ud800"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = """messages model stream stream_options max_tokens max_completion_tokens temperature top_p
top_k min_p frequency_penalty presence_penalty repetition_penalty seed stop n logprobs top_logprobs
response_format image_size input instructions max_output_tokens text include system stop_sequences
output_config prompt images options format suffix raw name role content type image_url source data
output num_predict""".split()  # noqa: SIM905
PART = st.fixed_dictionaries(
    {},
    optional={
        "type": JSON
        | st.sampled_from(["text", "image_url", "image", "input_image", "tool_result"]),
        "text": JSON | st.text(max_size=30),
        "image_url": JSON | st.fixed_dictionaries({"url": JSON}),
        "source": JSON | st.fixed_dictionaries({"type": st.just("base64"), "data": JSON}),
        "content": JSON,
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON},
    optional={"content": JSON | st.lists(PART, max_size=4), "images": JSON},
)
BODY = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8),
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, max_size=4)},
        optional={name: JSON for name in FIELDS if name != "messages"},
    ),
    st.fixed_dictionaries({"input": st.lists(MESSAGE, max_size=4)}),
    st.fixed_dictionaries({"prompt": JSON}, optional={"options": JSON, "images": JSON}),
)
PATHS = [*ASKED, "/v1/messages/count_tokens", "/api/show"]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(PATHS), body=BODY)
def test_no_body_is_the_server_s_fault(played: Served, path: str, body: Any) -> None:
    played.engine.begin(says("Six."))
    reply = asked(played, path, json.dumps(body).encode())
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert "error" in reply.json()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
def test_no_bytes_are_the_server_s_fault(played: Served, path: str, body: bytes) -> None:
    played.engine.begin(says("Six."))
    reply = asked(played, path, body)
    assert reply.status_code < 500 and reply.status_code != 200
    assert "error" in reply.json()


def asked(played: Served, path: str, body: bytes) -> httpx.Response:
    return httpx.post(played.url + path, content=body, timeout=60)


HOSTILE = {
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"max_tokens": ' + b"9" * 10_000 + b"}",
    "a huge exponent": b'{"temperature": 1e999999}',
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "a"}], "repetition_penalty": Infinity}',
    "bad utf-8": b'{"messages": "\xff\xfe"}',
    "utf-16": '{"messages": []}'.encode("utf-16"),
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "many keys": json.dumps({str(n): n for n in range(20_000)}).encode(),
    "many messages": json.dumps({"messages": [{"role": "user", "content": ""}] * 20_000}).encode(),
    "nothing": b"",
    "null": b"null",
    "zero bytes": b"\0" * 1000,
}


@pytest.mark.parametrize("path", PATHS)
def test_no_hostile_body_is_the_server_s_fault(played: Served, puppet: Puppet, path: str) -> None:
    for kind, body in HOSTILE.items():
        reply = asked(played, path, body)
        assert reply.status_code < 500, (kind, reply.text)
    assert played.get("/health").status_code == 200


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    at=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    values=st.lists(st.integers(0, 255), min_size=8, max_size=8),
    length=st.integers(0, 4000),
)
def test_no_broken_image_is_the_server_s_fault(
    played: Served, at: list[int], values: list[int], length: int
) -> None:
    played.engine.begin(says("Six."))
    data = bytearray(base64.b64decode(BASE64))
    for place, value in zip(at, values, strict=False):
        data[place % len(data)] = value
    cut = bytes(data[: max(16, len(data) - length)])
    image = base64.b64encode(cut).decode()
    assert asked(played, PATH, json.dumps(chat(parts(image))).encode()).status_code in (200, 400)


def test_the_openapi_document_describes_every_route(played: Served) -> None:
    document = played.get("/openapi.json").json()
    assert {*PATHS, "/v1/models", "/api/tags", "/api/ps", "/api/version"} <= set(document["paths"])
    for path in PATHS:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert {"200", "4XX", "5XX"} <= set(operation["responses"])


# Many at once


def test_mixed_clients_get_their_own_answers(nano: Nano) -> None:
    """Each answer is the one that its question has alone."""
    import fastvlm_mlx as fv

    notes = {"penguins": (QUESTION, URI), "text": ("What is this?", None), "hi": ("Hello", None)}
    alone = {name: fv.generate(*nano, q, image=i, max_tokens=12) for name, (q, i) in notes.items()}

    def ask(n: int) -> tuple[str, str]:
        name = list(notes)[n % 3]
        question, image = notes[name]
        images = [image] if image else []
        if n % 4 == 0:
            reply = server.post(PATH, chat(parts(*images, text=question), max_tokens=12)).json()
            return name, reply["choices"][0]["message"]["content"]
        if n % 4 == 1:
            body = chat(parts(*images, text=question), max_tokens=12, stream=True)
            deltas = [e["choices"][0]["delta"] for e in events(server.lines(PATH, body))]
            return name, "".join(delta.get("content", "") for delta in deltas)
        if n % 4 == 2:
            given = {"stream": False, "options": {"num_predict": 12}}
            body = {"prompt": question, "images": [BASE64] if image else [], **given}
            return name, server.post("/api/generate", body).json()["response"]
        source = {"type": "base64", "media_type": "image/png", "data": BASE64}
        shown = [{"type": "image", "source": source}] if image else []
        body = chat([*shown, {"type": "text", "text": question}], max_tokens=12)
        return name, server.post("/v1/messages", body).json()["content"][0]["text"]

    with started(nano) as engine, serving(engine) as server, ThreadPoolExecutor(12) as pool:
        for name, text in pool.map(ask, range(48)):
            assert text == alone[name]
        assert engine.running == engine.queued == 0


# Figures


def test_the_metrics_count_what_was_done(nano: Nano) -> None:
    script = says("Six", " penguins", ".")
    script[0].cached_tokens, script[0].cached_images = 7, 1
    puppet = Puppet(*nano, script=script)
    with serving(puppet) as server:
        server.post(PATH, chat(parts(URI, URI)))
        server.get("/somewhere/else")
        puppet.queued, puppet.running = 3, 2
        reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    figures = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in reply.text.splitlines())
        if not name.startswith("#")
    }
    assert figures[f'fastvlm_requests_total{{route="{PATH}",status="200"}}'] == 1
    assert figures['fastvlm_requests_total{route="other",status="404"}'] == 1
    assert figures["fastvlm_images_total"] == 2
    assert figures["fastvlm_generated_tokens_total"] == 3
    assert figures["fastvlm_prompt_tokens_total"] == 20
    assert figures["fastvlm_cached_prompt_tokens_total"] == 7
    assert figures["fastvlm_cached_images_total"] == 1
    for stage in ("queue_seconds", "encode_seconds", "prefill_seconds", "tokens_per_second"):
        assert figures[f"fastvlm_{stage}_count"] == 1, stage
    assert figures['fastvlm_answers_total{reason="stop"}'] == 1
    assert figures["fastvlm_time_to_first_token_seconds_count"] == 1
    assert figures["fastvlm_time_to_first_token_seconds_sum"] == 0.25
    assert figures["fastvlm_queued_requests"] == 3
    assert figures["fastvlm_batch_size"] == 2
    assert figures["fastvlm_alive"] == 1
    assert figures["fastvlm_active_memory_bytes"] > 10**6


# The command


def pictures(count: int) -> list[str]:
    """Different pictures, which no cache takes for one another."""
    from PIL import Image

    found = []
    for n in range(count):
        file = BytesIO()
        Image.new("RGB", (32, 32), (n, 0, 0)).save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


def test_sigterm_lets_answers_end_and_exits_with_0() -> None:
    with serving_process("--grace", "30") as (process, url):
        body = chat(parts(*pictures(3)), stream=True)
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", url + PATH, json=body) as reply,
        ):
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert events(rest)[-1]["choices"][0]["finish_reason"] == "stop"
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl")
    return certificate, key


def test_sigterm_cuts_answers_off_after_the_grace_and_exits_with_0(
    certificate: tuple[Path, Path],
) -> None:
    files = ("--certfile", str(certificate[0]), "--keyfile", str(certificate[1]))
    with serving_process("--grace", "1", *files) as (process, url):
        assert url.startswith("https://")
        body = chat(parts(*pictures(16)), stream=True, n=6)
        with (
            httpx.Client(timeout=60, verify=False) as client,
            client.stream("POST", url + PATH, json=body) as reply,
        ):
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            rest = []
            with suppress(httpx.TransportError):
                rest += list(lines)
        assert "data: [DONE]" not in rest
        assert process.wait(30) == 0
        assert time.monotonic() - start < 30


BAD_FLAGS = {
    "a port that is none": (["--port", "70000"], "65535"),
    "a port below 0": (["--port", "-1"], "port"),
    "a host that is none": (["--host", "no.such.host.invalid"], "--host"),
    "a certificate that is none": (["--certfile", "pyproject.toml"], "PEM"),
    "a certificate that is not there": (["--certfile", "missing.pem"], "missing.pem"),
    "a key without a certificate": (["--keyfile", "pyproject.toml"], "--certfile"),
    "a media root that is not there": (["--media-root", "missing"], "missing"),
    "an origin with a path": (["--cors", "https://a.example/"], "https://example.com"),
    "every origin": (["--cors", "*"], "https://example.com"),
    "an empty key": (["--api-key", " "], "key"),
    "a limit of nothing": (["--max-images", "0"], "max_images"),
    "no time": (["--timeout", "0"], "timeout"),
    "a batch of nothing": (["--max-batch", "0"], "max_batch"),
    "a cache that is a file": (["--cache-dir", "pyproject.toml"], "pyproject.toml"),
    "a cache below nothing": (["--max-cache", "-1"], "max_cache"),
    "a model that is not there": (["--model", "./missing"], "missing"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_bad_flags_end_the_command_with_a_sentence(kind: str, run: Run) -> None:
    flags, said = BAD_FLAGS[kind]
    result = run("serve", "--port", "0", *flags)
    assert result.code == 2
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and last.endswith(".") and said in last


def test_a_port_in_use_is_found_before_the_model_is_loaded(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", taken.getsockname()[1])
    assert result.code == 2
    assert "in use" in result.err and "--port" in result.err and "Loading" not in result.err


def test_a_missing_extra_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm_mlx.cli import serve

    monkeypatch.setattr(serve, "NEEDED", ("no_such_library",))
    result = run("serve")
    assert result.code == 2
    assert "pip install 'fastvlm-mlx[serve]'" in result.err


def test_help_teaches_with_examples(run: Run) -> None:
    result = run("serve", "--help")
    assert result.code == 0
    for word in ("fastvlm serve --model", "curl", "FASTVLM_API_KEY", "--allow-remote-images"):
        assert word in result.out


def test_an_open_server_without_a_key_is_warned_about(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.serve import server

    monkeypatch.setattr(server, "run", lambda *given: None)
    warned = run("serve", "--host", "0.0.0.0", "--port", "0")
    assert "Warning" in warned.err and "FASTVLM_API_KEY" in warned.err
    assert "Warning" not in run("serve", "--port", "0").err
    locked = run("serve", "--host", "0.0.0.0", "--port", "0", "--api-key", "geheim")
    assert "Warning" not in locked.err and "geheim" not in locked.err
