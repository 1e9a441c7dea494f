"""Who may ask the server, how much, and what it writes down of it."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import Nano
from serving import Puppet, Served, chat, events, httpx, parts, piece, says, serving, wait_until

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
PATH = "/v1/chat/completions"
POSTS = {
    "/v1/chat/completions": chat(),
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": chat(max_tokens=5),
    "/v1/messages/count_tokens": chat(),
    "/api/chat": chat(stream=False),
    "/api/generate": {"prompt": "Hi", "stream": False},
    "/api/show": {"model": "nano"},
}


@pytest.fixture
def puppet(nano: Nano) -> Puppet:
    return Puppet(*nano, script=says("Six", " penguins", "."))


@pytest.fixture
def plain(puppet: Puppet) -> Iterator[Served]:
    with serving(puppet, allowed_hosts=("cat.example",), max_body=100_000) as server:
        yield server


# Origins


FOREIGN = [
    "https://evil.example",
    "null",
    "",
    "http://localhost",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}",
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:{port}@evil.example",
    "http://evil.example/127.0.0.1:{port}",
    "HTTP://127.0.0.1:{port}",
    "http://127.0.0.1:{port}, http://127.0.0.1:{port}",
]


@pytest.mark.parametrize("kind", ["application/json", "text/plain", None], ids=str)
def test_a_foreign_page_gets_403_on_every_post_and_starts_nothing(
    plain: Served, puppet: Puppet, kind: str | None
) -> None:
    port = plain.url.rpartition(":")[2]
    for path, body in POSTS.items():
        for origin in FOREIGN:
            headers = {"Origin": origin.format(port=port)} | (
                {"Content-Type": kind} if kind else {}
            )
            reply = httpx.post(plain.url + path, content=json.dumps(body), headers=headers)
            assert reply.status_code == 403, (path, origin)
    assert not puppet.requests


def test_its_own_page_and_what_is_no_page_may_ask(plain: Served, puppet: Puppet) -> None:
    for path, body in POSTS.items():
        assert plain.post(path, body).status_code == 200
        assert plain.post(path, body, headers={"Origin": plain.url}).status_code == 200


def test_two_origins_are_refused(plain: Served, puppet: Puppet) -> None:
    twice = [("Origin", plain.url), ("Origin", plain.url)]
    assert plain.post(PATH, chat(), headers=twice).status_code == 403


def test_without_cors_no_reply_lets_a_page_read_it(plain: Served) -> None:
    origin = {"Origin": "https://app.example"}
    assert "access-control-allow-origin" not in plain.get("/v1/models", headers=origin).headers
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    reply = httpx.options(plain.url + PATH, headers=asked)
    assert "access-control-allow-origin" not in reply.headers


def test_a_page_that_cors_names_may_ask_and_others_may_not(puppet: Puppet) -> None:
    with serving(puppet, cors=("https://app.example",), api_key="secret") as server:
        origin = {"Origin": "https://app.example"}
        asked = {
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        reply = httpx.options(server.url + PATH, headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        refused = server.post(PATH, chat(), headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        key = {"Authorization": "Bearer secret"}
        assert server.post(PATH, chat(), headers=origin | key).status_code == 200
        for other in (
            "https://app.example.evil.example",
            "https://APP.example",
            "http://app.example",
        ):
            reply = server.post(PATH, chat(), headers={"Origin": other} | key)
            assert reply.status_code == 403
            assert "access-control-allow-origin" not in reply.headers


# Hosts


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:{port}", True),
        ("127.0.0.1", True),
        ("localhost:{port}", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        ("page.localhost:{port}", True),
        ("192.168.1.20:{port}", True),
        ("[::1]:{port}", True),
        ("cat.example:{port}", True),
        ("Cat.Example", True),
        ("evil.example", False),
        ("evil.example:{port}", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("2130706433", False),
        ("cat.example@evil.example", False),
        ("", False),
    ],
)
def test_only_addresses_and_known_names_are_hosts(plain: Served, host: str, allowed: bool) -> None:
    host = host.format(port=plain.url.rpartition(":")[2])
    for path in ("/health", "/v1/models", "/"):
        reply = plain.get(path, headers={"Host": host})
        assert reply.status_code == (200 if allowed else 403), path


# Keys


@pytest.fixture(scope="module")
def locked(nano: Nano) -> Iterator[Served]:
    with serving(Puppet(*nano), api_key="geheim") as server:
        yield server


WRONG_KEYS = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "geheim"},
    {"Authorization": "Basic geheim"},
    {"Authorization": "Bearer geheimer"},
    {"Authorization": "Bearer"},
    {"x-api-key": ""},
    {"x-api-key": "Geheim"},
    {"x-api-key": "gehe\u00edm".encode("latin-1")},
]


@pytest.mark.parametrize("headers", WRONG_KEYS, ids=str)
def test_without_the_key_nothing_is_told(locked: Served, headers: Any) -> None:
    locked.engine.begin(says("Six."))
    for path, body in POSTS.items():
        reply = locked.post(path, body, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "geheim" not in reply.text
    for path in ("/v1/models", "/v1/models/nano", "/api/tags", "/api/ps", "/metrics"):
        assert locked.get(path, headers=headers).status_code == 401, path
    assert not locked.engine.requests


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer geheim"},
        {"authorization": "bearer geheim"},
        {"x-api-key": "geheim"},
        {"x-api-key": "geheim", "Authorization": "Bearer other"},
    ],
    ids=str,
)
def test_the_key_works_everywhere_in_both_headers(locked: Served, headers: Any) -> None:
    locked.engine.begin(says("Six."))
    for path, body in POSTS.items():
        assert locked.post(path, body, headers=headers).status_code == 200, path
    for path in ("/v1/models", "/api/tags", "/metrics"):
        assert locked.get(path, headers=headers).status_code == 200, path


def test_the_page_and_the_health_need_no_key(locked: Served) -> None:
    for path in ("/", "/health", "/ready"):
        assert locked.get(path).status_code == 200


def test_each_interface_refuses_in_its_own_words(locked: Served) -> None:
    openai = locked.post(PATH, chat()).json()
    assert openai["error"]["code"] == "invalid_api_key"
    anthropic = locked.post("/v1/messages", chat()).json()
    assert anthropic["error"]["type"] == "authentication_error"
    assert isinstance(locked.post("/api/chat", chat()).json()["error"], str)


# Bodies


def test_a_body_that_is_too_large_is_refused_declared_or_not(plain: Served, puppet: Puppet) -> None:
    large = json.dumps(chat("x" * 200_000)).encode()
    assert httpx.post(plain.url + PATH, content=large).status_code == 413
    chunked = httpx.post(plain.url + PATH, content=iter([large[:50_000], large[50_000:]]))
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"
    assert not puppet.requests


def test_a_body_that_only_claims_to_be_large_is_refused_at_once(plain: Served) -> None:
    with raw(
        plain, f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
    ) as (reply):
        assert b" 413 " in reply.recv(1000)


def raw(server: Served, text: str) -> socket.socket:
    """A connection on which this was sent."""
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(text.encode())
    return connection


def test_slow_bodies_are_cut_off_while_others_are_answered(
    plain: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.serve import guard

    monkeypatch.setattr(guard, "BODY_PATIENCE", 3.0)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    slow = [raw(plain, head + "{") for _ in range(20)]
    assert plain.post(PATH, chat()).status_code == 200
    for connection in slow:
        with connection:
            assert b" 408 " in read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1000), b""))


def test_slow_headers_are_cut_off(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm_mlx.serve import server

    monkeypatch.setattr(server, "HEADER_PATIENCE", 0.3)
    start = time.monotonic()
    with raw(plain, "POST / HTTP/1.1\r\nHost: loc") as connection:
        while not_closed(connection):
            connection.sendall(b"a")
            assert time.monotonic() - start < 5
    with raw(plain, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b" 200 " in connection.recv(5000)
        connection.sendall(b"GET /he")  # the next request on it
        while not_closed(connection):
            assert time.monotonic() - start < 10


def not_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.1)
    try:
        return connection.recv(5000) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_an_idle_connection_lives_for_half_a_minute(plain: Served) -> None:
    from fastvlm_mlx.serve import server

    assert server.IDLE > 30
    with httpx.Client(base_url=plain.url) as client:
        client.get("/health")
        (connection,) = client._transport._pool.connections
        client.get("/health")
        assert client._transport._pool.connections == [connection]


def test_an_answer_that_takes_longer_than_headers_may_is_not_cut_off(
    plain: Served, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.serve import server

    monkeypatch.setattr(server, "HEADER_PATIENCE", 0.2)
    puppet.script = [0.8, *says("Six.")]
    assert plain.post(PATH, chat()).json()["choices"][0]["message"]["content"] == "Six."


# What is told and written down


SECRET = "Hast du die Kirschen gesehen"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fastvlm_mlx.serve")
    return caplog


def written(log: pytest.LogCaptureFixture, count: int = 1) -> list[dict[str, Any]]:
    """The lines of the log, once there are so many: a reply is sent before its line is written."""
    from fastvlm_mlx.serve.logs import JsonLines

    def lines() -> list[dict[str, Any]]:
        found = [record for record in log.records if "serve" in record.name]
        return [json.loads(JsonLines().format(record)) for record in found]

    wait_until(lambda: len(lines()) >= count)
    return lines()


def test_a_log_has_numbers_and_no_contents(
    plain: Served, puppet: Puppet, log: pytest.LogCaptureFixture
) -> None:
    reply = plain.post(f"{PATH}?secret={SECRET[:4]}", chat(parts(text=SECRET)))
    (line,) = written(log)
    assert (line["path"], line["status"], line["method"]) == (PATH, 200, "POST")
    assert line["prompt_tokens"] == 20 and line["generated_tokens"] == 3
    assert line["id"] == reply.headers["x-request-id"] == reply.headers["request-id"]
    assert line["time"].endswith("Z") and line["seconds"] > 0
    said = json.dumps(written(log))
    assert SECRET[:4] not in said and "penguins" not in said


def test_a_log_has_prompts_and_answers_where_it_is_asked_for(
    puppet: Puppet, log: pytest.LogCaptureFixture
) -> None:
    with serving(puppet, log_prompts=True) as server:
        server.post(PATH, chat(parts(text=SECRET)))
        server.lines(PATH, chat(parts(text=SECRET), stream=True))
    for line in written(log, 2):
        assert line["prompt"] == [{"role": "user", "text": SECRET}]
        assert line["answers"] == ["Six penguins."]


WRONG = [
    chat(SECRET, temperature=SECRET),
    chat([{"type": SECRET}]),
    chat([{"type": "image_url", "image_url": {"url": SECRET}}]),
    chat([{"type": "image_url", "image_url": {"url": f"http://{SECRET}/a.png"}}]),
    chat([{"type": "image_url", "image_url": {"url": f"file:///{SECRET}"}}]),
    chat([{"type": "image_url", "image_url": {"url": f"data:;base64,{SECRET}"}}]),
    chat(role=SECRET),
    chat(stop=[SECRET, ""]),
    chat(model=SECRET),
    {SECRET: SECRET},
    [SECRET],
]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: json.dumps(body)[:40])
def test_errors_and_logs_never_repeat_a_request(
    plain: Served, log: pytest.LogCaptureFixture, body: Any
) -> None:
    for path in POSTS:
        reply = plain.post(path, body)
        assert SECRET not in reply.text, path
    broken = httpx.post(plain.url + PATH, content=json.dumps(body)[:-1])
    assert broken.status_code == 400
    assert SECRET not in broken.text
    assert SECRET not in json.dumps(written(log), ensure_ascii=False)


def test_a_fault_of_the_server_is_told_without_contents(
    plain: Served, puppet: Puppet, log: pytest.LogCaptureFixture
) -> None:
    puppet.refuse = RuntimeError(SECRET)
    reply = plain.post(PATH, chat(SECRET))
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    failure, request = written(log, 2)
    assert failure["level"] == request["level"] == "error"
    assert "RuntimeError at serving.py" in failure["error"]
    assert SECRET not in reply.text and SECRET not in json.dumps(written(log))
    puppet.refuse, puppet.script = None, [piece("Six"), RuntimeError(SECRET)]
    *_, last = events(plain.lines(PATH, chat(SECRET, stream=True)))
    assert last["error"]["type"] == "server_error"
    assert SECRET not in json.dumps(written(log, 4))


def test_the_page_has_a_strict_policy_and_no_file_beside_it_is_served(
    puppet: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.serve import app

    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("index.html", "app.js"):
        (folder / name).write_text(name, encoding="utf-8")
    (tmp_path / "app.py").write_text("secret", encoding="utf-8")
    monkeypatch.setattr(app, "PAGE", folder)
    with serving(puppet, api_key="geheim") as server:
        for path, text in (
            ("/", "index.html"),
            ("/app.js", "app.js"),
            ("/index.html", "index.html"),
        ):
            reply = server.get(path)
            assert (reply.status_code, reply.text) == (200, text)
            policy = dict(
                rule.strip().partition(" ")[::2]
                for rule in reply.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert "unsafe" not in str(policy)
            assert reply.headers["x-content-type-options"] == "nosniff"
        assert_closed(server)


def assert_closed(server: Served) -> None:
    """Nothing beside the page's own files is served."""
    for path in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/app.py", "/page/../app.py"):
        assert httpx.get(server.url + path).status_code == 404, path


def test_what_is_not_there_is_said_in_the_interface_s_words(plain: Served) -> None:
    assert plain.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert plain.get("/v1/messages").status_code == 405
    assert plain.get("/v1/messages").json()["type"] == "error"
    assert isinstance(plain.post("/api/nothing", {}).json()["error"], str)
