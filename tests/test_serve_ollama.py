"""Ollama's interface, as its own client sees it."""

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from models import Nano
from serving import ANSWER, BASE64, PICTURE, QUESTION, Puppet, Served, piece, says

import fastvlm_mlx as fv

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
needs_ollama = pytest.mark.needs("ollama")
TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    import ollama

    client = ollama.Client(host=served.url)
    yield client
    client._client.close()  # it has no method for it


MESSAGES = [{"role": "user", "content": QUESTION, "images": [PICTURE]}]


@needs_ollama
def test_an_answer_is_the_one_that_generate_gives(client: Any, nano: Nano) -> None:
    reply = client.chat(model="nano", messages=MESSAGES)
    assert reply.message.content == ANSWER
    assert (reply.done, reply.done_reason) == (True, "stop")
    alone = list(fv.stream_generate(*nano, QUESTION, image=PICTURE))[-1]
    assert reply.prompt_eval_count == alone.prompt_tokens
    assert reply.eval_count == alone.generation_tokens
    assert all(isinstance(getattr(reply, name), int) for name in TIMES)
    assert 10**6 < reply.prompt_eval_duration < reply.total_duration < 60 * 10**9
    generated = client.generate(model="nano:latest", prompt=QUESTION, images=[BASE64])
    assert generated.response == ANSWER


@needs_ollama
def test_a_stream_has_the_same_text(client: Any) -> None:
    parts = list(client.chat(model="nano", messages=MESSAGES, stream=True))
    assert "".join(part.message.content for part in parts) == ANSWER
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "stop"
    parts = list(client.generate("nano", QUESTION, images=[PICTURE], stream=True))
    assert "".join(part.response for part in parts) == ANSWER


@needs_ollama
def test_the_asynchronous_client_is_answered(served: Served) -> None:
    import ollama

    async def ask() -> tuple[str, str]:
        client = ollama.AsyncClient(host=served.url)
        whole = await client.chat(model="nano", messages=MESSAGES)
        stream = await client.chat(model="nano", messages=MESSAGES, stream=True)
        return whole.message.content, "".join([part.message.content async for part in stream])

    assert asyncio.run(ask()) == (ANSWER, ANSWER)


@needs_ollama
def test_the_model_is_listed_and_shown(client: Any) -> None:
    import ollama

    (listed,) = client.list().models
    assert listed.model == "nano:latest"
    assert listed.size > 10**6 and len(listed.digest) == 64
    shown = client.show(listed.model)
    assert shown.capabilities == ["completion", "vision"]
    for details in (listed.details, shown.details):
        assert details.family == "qwen2"
        assert details.families == ["qwen2"]
        assert all([details.format, details.parameter_size, details.quantization_level])
    assert shown.modelinfo["qwen2.context_length"] == 4096
    with pytest.raises(ollama.ResponseError) as missing:
        client.show("llava")
    assert missing.value.status_code == 404


@needs_ollama
def test_the_loaded_model_is_running_for_good(client: Any, nano: Nano) -> None:
    import mlx.core as mx

    (listed,), (running,) = client.list().models, client.ps().models
    assert running.model == running.name == listed.model
    assert (running.size, running.digest) == (listed.size, listed.digest)
    assert running.details == listed.details
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    assert running.size_vram == (running.size if on_gpu else 0)
    assert running.context_length == nano[1].max_length == 4096
    years = running.expires_at.year - datetime.now().year
    assert years > 20  # of which Ollama's command says Forever


@needs_ollama
def test_errors_are_the_clients(client: Any) -> None:
    import ollama

    with pytest.raises(ollama.ResponseError) as missing:
        client.chat(model="llava", messages=MESSAGES)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="4096") as long:
        client.generate(model="nano", prompt="word " * 5000)
    assert long.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="image 1"):
        client.generate(model="nano", prompt="What?", images=[b"no image"])


def test_ollamas_own_command_finds_a_server(played: Served) -> None:
    """It asks so before anything else."""
    import httpx

    assert httpx.head(f"{played.url}/").status_code == 200


def test_the_version_is_a_version(played: Served) -> None:
    major, minor, patch = played.get("/api/version").json()["version"].split(".")
    assert int(major) * 1000 + int(minor) >= 6 and patch.isdecimal()


def test_lines_are_streamed_by_default(played: Served, puppet: Puppet) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}]}
    reply = played.post("/api/chat", body)
    assert reply.headers["content-type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in reply.text.splitlines()]
    assert [line["message"]["content"] for line in lines] == ["Six", " penguins", "."]
    assert last["done"] and last["done_reason"] == "stop"
    assert all(isinstance(last[name], int) for name in TIMES)
    assert last["timings"]["queue"] == 0.5
    whole = played.post("/api/chat", body | {"stream": False})
    assert whole.headers["content-type"] == "application/json"
    assert whole.json()["message"] == {"role": "assistant", "content": "Six penguins."}


def test_curl_without_a_content_type_is_answered(played: Served, puppet: Puppet) -> None:
    """curl -d sends a form's type, as all examples of Ollama's documentation do."""
    import httpx

    for kind in ("application/x-www-form-urlencoded", "text/plain", None):
        headers = {} if kind is None else {"Content-Type": kind}
        body = json.dumps({"prompt": "Hi", "stream": False})
        reply = httpx.post(f"{played.url}/api/generate", content=body, headers=headers)
        assert reply.json()["response"] == "Six penguins."


def test_options_reach_the_model(played: Served, puppet: Puppet) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 0}
    options |= {"frequency_penalty": 0.5, "presence_penalty": -0.25}
    more = {"num_predict": 9, "repeat_penalty": 1.1, "stop": ["x"], "num_ctx": 2048}
    body = {"prompt": "Hi", "stream": False, "options": options | more, "keep_alive": "5m"}
    assert played.post("/api/generate", body).status_code == 200
    wanted = options | {"max_tokens": 9, "repetition_penalty": 1.1, "stop": ("x",)}
    assert puppet.requests[0].options == wanted


def test_numbers_below_zero_are_no_limit_and_no_seed(played: Served, puppet: Puppet) -> None:
    body = {"prompt": "Hi", "options": {"num_predict": -1, "seed": -1, "stop": []}}
    assert played.post("/api/generate", body).status_code == 200
    assert puppet.requests[0].options == {"max_tokens": 4096}


def test_a_system_prompt_and_images_have_their_places(played: Served, puppet: Puppet) -> None:
    body = {"prompt": "Hi", "system": "Be brief.", "images": [BASE64, BASE64]}
    assert played.post("/api/generate", body).status_code == 200
    system, user = puppet.requests[0].prompt
    assert system["role"] == "system"
    assert [part["type"] for part in user["content"]] == ["image", "image", "text"]


def test_without_a_question_the_model_is_loaded(played: Served, puppet: Puppet) -> None:
    for path in ("/api/generate", "/api/chat"):
        reply = played.post(path, {"model": "nano"}).json()
        assert (reply["done"], reply["done_reason"]) == (True, "load")
    assert not puppet.requests


def test_a_waiting_stream_shows_signs_of_life(played: Served, puppet: Puppet) -> None:
    puppet.script = [0.35, *says("Six.")]
    lines = [json.loads(line) for line in played.lines("/api/generate", {"prompt": "Hi"})]
    assert [line["response"] for line in lines][:2] == ["", ""]
    assert "".join(line["response"] for line in lines) == "Six."


def test_a_failure_in_a_stream_is_one_error_and_no_success_after_it(
    played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import EngineDied

    puppet.script = [piece("Six"), EngineDied("The engine has stopped.")]
    lines = [json.loads(line) for line in played.lines("/api/generate", {"prompt": "Hi"})]
    assert [line.get("done") for line in lines] == [False, None]
    assert lines[-1] == {"error": "The engine has stopped."}


def test_logprobs_come_with_the_tokens(served: Served) -> None:
    body = {"prompt": QUESTION, "images": [BASE64], "logprobs": True, "top_logprobs": 2}
    reply = served.post("/api/generate", body | {"stream": False}).json()
    assert "".join(token["token"] for token in reply["logprobs"]) == ANSWER
    assert all(len(token["top_logprobs"]) == 2 for token in reply["logprobs"])


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/api/chat", {"messages": "Hi"}),
        ("/api/chat", {"messages": [{"role": "king", "content": "Hi"}]}),
        ("/api/chat", {"messages": [{"role": "assistant", "content": "", "images": [BASE64]}]}),
        ("/api/generate", {"prompt": "Hi", "images": ["not base64!"]}),
        ("/api/generate", {"prompt": "Hi", "options": {"temperature": "warm"}}),
        ("/api/generate", {"prompt": "Hi", "options": {"stop": [""]}}),
        ("/api/generate", {"prompt": "Hi", "format": "xml"}),
        ("/api/generate", {"prompt": "Hi", "suffix": "x"}),
        ("/api/generate", {"prompt": "Hi", "options": {"num_predict": 10**6}}),
    ],
    ids=str,
)
def test_wrong_fields_are_refused_in_a_sentence(
    played: Served, puppet: Puppet, path: str, wrong: Any
) -> None:
    reply = played.post(path, wrong)
    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}
    assert reply.json()["error"].endswith(".")
    assert not puppet.requests
