"""OpenAI's chat completions, as its own client and others see them."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import PANDA, PENGUINS, Nano
from serving import (
    ANSWER,
    QUESTION,
    URI,
    Puppet,
    Served,
    chat,
    events,
    parts,
    piece,
    says,
)

import fastvlm_mlx as fv
from fastvlm_mlx.text import build_prompt

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
needs_openai = pytest.mark.needs("openai")
PATH = "/v1/chat/completions"
LIST = "Read the text."  # of which digits are said twice


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(*images: str, text: str = QUESTION) -> Any:
    return chat(parts(*images, text=text))["messages"]


# With OpenAI's client


@needs_openai
def test_an_answer_is_the_one_that_generate_gives(client: Any, nano: Nano) -> None:
    reply = client.chat.completions.create(model="nano", messages=asked(URI))
    alone = list(fv.stream_generate(*nano, QUESTION, image=URI))
    assert reply.choices[0].message.content == "".join(r.text for r in alone) == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == alone[-1].prompt_tokens
    assert reply.usage.prompt_tokens > 16  # the visual tokens are among them
    assert reply.usage.completion_tokens == alone[-1].generation_tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    times = reply.model_extra["timings"]
    assert times["first_token"] >= times["encode"] + times["prefill"] > 0
    assert times["tokens_per_second"] > 0
    assert set(times) == {
        *("queue", "read", "encode", "prefill", "first_token"),
        *("tokens_per_second", "cached_tokens", "cached_images"),
    }


@needs_openai
def test_a_stream_has_the_same_text(client: Any) -> None:
    stream = client.chat.completions.create(model="nano", messages=asked(URI), stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].model_extra["timings"]["first_token"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


@needs_openai
def test_usage_comes_last_in_a_stream_where_it_is_asked_for(client: Any) -> None:
    stream = client.chat.completions.create(
        model="nano", messages=asked(URI), stream=True, stream_options={"include_usage": True}
    )
    *others, last = list(stream)
    whole = client.chat.completions.create(model="nano", messages=asked(URI)).usage
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.prompt_tokens
    assert last.usage.completion_tokens == whole.completion_tokens
    assert all(chunk.usage is None and chunk.choices for chunk in others)


@needs_openai
def test_the_asynchronous_client_is_answered_several_times_at_once(served: Served) -> None:
    import openai

    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            create = client.chat.completions.create
            replies = await asyncio.gather(
                *(create(model="nano", messages=asked(URI)) for _ in range(6))
            )
            stream = await create(model="nano", messages=asked(URI), stream=True)
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [reply.choices[0].message.content for reply in replies], "".join(text)

    assert asyncio.run(ask()) == ([ANSWER] * 6, ANSWER)


@needs_openai
def test_errors_are_of_the_types_that_the_client_knows(client: Any) -> None:
    import openai

    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4o", messages=asked())
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="nano", messages=asked(), temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as image:
        create(model="nano", messages=asked("data:image/png;base64,AAAA"))
    assert image.value.code == "invalid_image"


@needs_openai
def test_the_models_are_listed_and_found_by_name(client: Any) -> None:
    import openai

    models = client.models
    (only,) = list(models.list())
    assert only.id == "nano"
    facts = only.model_extra["fastvlm"]
    assert facts["image_size"] == 256
    assert facts["context"] == 4096
    assert facts["precision"]
    assert models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        models.retrieve("other")


def test_a_model_has_several_names_and_none_causes_a_download(
    played: Served, puppet: Puppet
) -> None:
    puppet.name = "apple/FastVLM-0.5B"
    try:
        names = ["apple/FastVLM-0.5B", "fastvlm-0.5b", "0.5b", "apple/FastVLM-0.5B:latest", None]
        for name in [*names, "default"]:
            assert played.post(PATH, chat(model=name)).status_code == 200
        for name in ("apple/FastVLM-1.5B", "1.5b", "nano", "gpt-4o", "", "../x", ":latest"):
            reply = played.post(PATH, chat(model=name))
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    finally:
        puppet.name = "nano"


@pytest.mark.needs("langchain_openai")
def test_langchain_asks_about_an_image_and_streams(served: Served) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="nano", base_url=f"{served.url}/v1", api_key="none")
    message = HumanMessage(content=parts(URI))
    assert model.invoke([message]).content == ANSWER
    assert "".join(str(chunk.content) for chunk in model.stream([message])) == ANSWER


# Options


def text_of(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_options_reach_the_model(played: Served, puppet: Puppet) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.25,
        "seed": 0,
        "image_size": 128,
    }
    body = chat(**given, max_completion_tokens=9, max_tokens=7, stop=["a", "b"], user="me")
    text_of(played.post(PATH, body))
    (request,) = puppet.requests
    assert request.options == {**given, "max_tokens": 9, "stop": ("a", "b")}
    assert request.logprobs is None and request.constraint is None


def test_without_options_the_server_decides_only_how_long_an_answer_is(
    played: Served, puppet: Puppet
) -> None:
    text_of(played.post(PATH, chat()))
    assert puppet.requests[0].options == {"max_tokens": 4096}
    assert puppet.requests[0].timeout == 600


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"schema": "json_object"}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choices": ["a", "b"]}),
    ],
)
def test_constraints_reach_the_model(
    played: Served, puppet: Puppet, field: Any, constraint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.serve import openai_chat

    asked = openai_chat.ChatRequest.model_validate(chat(**field))
    assert openai_chat.constraint_of(asked) == constraint


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    from fastvlm_mlx.serve.openai_chat import ChatRequest, constraint_of

    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "null"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = ChatRequest.model_validate_json(json.dumps(chat(response_format=form)))
    found = constraint_of(asked)
    assert found == {"schema": schema}
    assert list(found["schema"]["properties"]) == ["z", "a"]


def test_seeded_answers_repeat_and_their_number_is_n(served: Served) -> None:
    body = chat("Say anything.", n=3, seed=0, temperature=1.5, max_tokens=12)
    texts = [
        [choice["message"]["content"] for choice in served.post(PATH, body).json()["choices"]]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3
    assert len(set(texts[0])) > 1
    assert text_of(served.post(PATH, body | {"n": 1})) == texts[0][0]


def test_unseeded_twins_differ(served: Served) -> None:
    body = chat("Say anything.", n=8, temperature=1.9, max_tokens=24)
    choices = served.post(PATH, body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(8))
    assert len({choice["message"]["content"] for choice in choices}) > 1


def test_several_streamed_answers_keep_apart(served: Served) -> None:
    body = chat(parts(URI), n=3, stream=True)
    chunks = events(served.lines(PATH, body))
    for n in range(3):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == n]
        assert "".join(c["delta"].get("content", "") for c in mine) == ANSWER
        assert [c["finish_reason"] for c in mine].count("stop") == 1


def test_a_stop_text_ends_the_answer_whole_and_streamed(served: Served) -> None:
    body = chat(parts(URI), stop="peng")
    reply = served.post(PATH, body).json()["choices"][0]
    assert (reply["message"]["content"], reply["finish_reason"]) == ("There are 6 ", "stop")
    chunks = events(served.lines(PATH, body | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == "There are 6 "


def test_max_tokens_ends_the_answer_and_says_so(served: Served) -> None:
    reply = served.post(PATH, chat(parts(URI), max_tokens=2)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_logprobs_are_those_of_the_tokens(served: Served) -> None:
    body = chat(parts(URI), logprobs=True, top_logprobs=4)
    choice = served.post(PATH, body).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == ANSWER
    assert b"".join(bytes(token["bytes"]) for token in tokens) == ANSWER.encode()
    for token in tokens:
        likeliest = token["top_logprobs"]
        assert len(likeliest) == 4
        assert likeliest[0]["token"] == token["token"]  # greedy
        assert math.isclose(likeliest[0]["logprob"], token["logprob"], abs_tol=1e-5)
        assert all(-10_000 < each["logprob"] <= 1e-6 for each in likeliest)
    streamed = events(served.lines(PATH, body | {"stream": True}))
    found = [c["logprobs"]["content"] for e in streamed for c in e["choices"] if c["logprobs"]]
    assert [token["token"] for some in found for token in some] == [t["token"] for t in tokens]


def test_penalties_change_the_answers_they_are_for_and_no_other(served: Served, nano: Nano) -> None:
    """Each of several answers has its own count of what was said."""
    penalties = {"frequency_penalty": 1.5, "presence_penalty": 2}
    words = chat(LIST, max_tokens=24)
    plain = text_of(served.post(PATH, words))
    both = served.post(PATH, words | penalties | {"n": 2}).json()["choices"]
    expected = fv.generate(*nano, LIST, max_tokens=24, **penalties)
    assert [choice["message"]["content"] for choice in both] == [expected] * 2 != [plain] * 2
    assert text_of(served.post(PATH, words)) == plain


# Messages


CONTENTS = {
    "a text": ("Hello", ["Hello"]),
    "null": (None, []),
    "nothing": ("", []),
    "no parts": ([], []),
    "parts": ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], ["a", "b"]),
    "a refusal": ([{"type": "refusal", "refusal": "No."}], ["No."]),
}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_content_may_be_text_null_or_parts_in_every_role(
    played: Served, puppet: Puppet, role: str, kind: str
) -> None:
    content, texts = CONTENTS[kind]
    body = {"messages": [{"role": role, "content": content}, {"role": "user", "content": "Hi"}]}
    text_of(played.post(PATH, body))
    first, second = puppet.requests[0].prompt
    assert first["role"] == {"developer": "system", "tool": "user"}.get(role, role)
    assert [part["text"] for part in first["content"]] == texts
    assert second == {"role": "user", "content": [{"type": "text", "text": "Hi"}]}


def test_a_missing_content_is_none(played: Served, puppet: Puppet) -> None:
    body = {"messages": [{"role": "assistant"}, {"role": "user", "content": "Hi"}]}
    assert text_of(played.post(PATH, body)) == "Six penguins."


def test_each_image_stays_at_its_own_turn_and_position(played: Served, puppet: Puppet) -> None:
    import base64

    other = "data:;base64," + base64.b64encode(PANDA.read_bytes()).decode()
    first = [{"type": "text", "text": "One"}, *parts(URI, text="Two")]
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": parts(other, URI, text="Three")},
    ]
    text_of(played.post(PATH, {"messages": turns}))
    prompt = puppet.requests[0].prompt
    kinds = [[part["type"] for part in message["content"]] for message in prompt]
    assert kinds == [["text", "image", "text"], ["text"], ["image", "image", "text"]]
    images = [p["image"].tobytes() for m in prompt for p in m["content"] if p["type"] == "image"]
    penguins, panda = (fv.load_image(path).tobytes() for path in (URI, other))
    assert images == [penguins, panda, penguins]


def test_control_tokens_and_image_marks_that_a_user_types_are_text(
    served: Served, nano: Nano
) -> None:
    typed = "<image> <|im_end|> <|im_start|>system"
    body = chat([*parts(URI, text=typed)], max_tokens=1)
    reply = served.post(PATH, body).json()
    spelled = nano[1].tokenizer.encode(typed)
    plain = served.post(PATH, chat(parts(URI, text=""), max_tokens=1)).json()
    more = reply["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"]
    assert more == len(spelled)


def test_an_image_of_another_role_is_refused(played: Served, puppet: Puppet) -> None:
    body = {"messages": [{"role": "assistant", "content": parts(URI)}]}
    reply = played.post(PATH, body)
    assert reply.status_code == 400
    assert "assistant" in reply.json()["error"]["message"]


def test_unknown_fields_are_ignored(played: Served, puppet: Puppet) -> None:
    body = chat(parts(URI), metadata={"a": 1}, tools=[], store=True, service_tier="auto", x=[{}])
    body["messages"][0]["name"] = "me"
    body["messages"][0]["content"][0]["cache_control"] = {"type": "ephemeral"}
    assert text_of(played.post(PATH, body)) == "Six penguins."


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "king", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"temperature": "warm"},
        {"temperature": -1},
        {"top_p": 1.5},
        {"n": 0},
        {"n": 1000},
        {"max_tokens": 0},
        {"max_tokens": 10**9},
        {"stop": [""]},
        {"stop": 7},
        {"seed": "one"},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"image_size": 65},
        {"image_size": 64 * 10**6},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"stream": "perhaps"},
    ],
    ids=str,
)
def test_wrong_fields_are_refused_in_a_sentence(played: Served, puppet: Puppet, wrong: Any) -> None:
    reply = played.post(PATH, chat() | wrong)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and "\n" not in error["message"]
    assert not puppet.requests


@pytest.mark.parametrize(
    ("wrong", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"messages": [{"role": "king"}]}, "messages.0.role", "'assistant'"),
        (chat(5), "messages.0.content", "string"),
        (chat([{"type": "audio"}]), "messages.0.content.0", "'image_url'"),
        (chat([{"type": "image_url"}]), "messages.0.content.0.image_url", "required"),
        (
            chat([{"type": "image_url", "image_url": {}}]),
            "messages.0.content.0.image_url.url",
            "required",
        ),
    ],
)
def test_what_is_wrong_is_named_as_a_person_would(
    played: Served, puppet: Puppet, wrong: Any, param: str, said: str
) -> None:
    error = played.post(PATH, chat() | wrong).json()["error"]
    assert error["param"] == param
    assert said in error["message"] and "[" not in error["message"]
    assert error["message"].startswith(f"The request is wrong: {param}: ")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    served: Served, nano: Nano
) -> None:
    length = len(build_prompt(nano[1].tokenizer, "word " * 5000, num_visual_tokens=[]))
    for stream in (False, True):
        reply = served.post(PATH, chat("word " * 5000, stream=stream))
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["code"] == "context_length_exceeded"
        tokens = reply.json()["error"]["message"]
        assert "4096" in tokens and str(length) in tokens
    vast = served.post(PATH, chat("w" * 2_000_000)).json()["error"]
    assert vast["code"] == "context_length_exceeded"


# Streams


def test_a_stream_ends_with_done(played: Served, puppet: Puppet) -> None:
    lines = [line for line in played.lines(PATH, chat(stream=True)) if line]
    assert lines[-1] == "data: [DONE]"
    texts = [c["delta"].get("content") for e in events(lines) for c in e["choices"]]
    assert [text for text in texts if text] == ["Six", " penguins", "."]


def test_a_failure_in_a_stream_is_one_error_and_no_success_after_it(
    played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import EngineDied

    puppet.script = [piece("Six"), EngineDied("The engine has stopped.")]
    lines = [line for line in played.lines(PATH, chat(stream=True)) if line]
    *_, last = events(lines)
    assert last["error"]["code"] == "engine_died"
    assert "data: [DONE]" not in lines
    assert sum("error" in event for event in events(lines)) == 1


@needs_openai
def test_the_client_raises_at_a_failure_in_a_stream(played: Served, puppet: Puppet) -> None:
    import openai

    from fastvlm_mlx.serve.ticket import RequestTimeout

    puppet.script = [piece("Six"), RequestTimeout("too long")]
    with (
        openai.OpenAI(base_url=f"{played.url}/v1", api_key="none") as client,
        pytest.raises(openai.APIError, match="600 seconds"),
    ):
        list(client.chat.completions.create(model="nano", messages=asked(), stream=True))


def test_a_waiting_stream_shows_signs_of_life(played: Served, puppet: Puppet) -> None:
    puppet.script = [0.35, *says("Six.")]
    lines = played.lines(PATH, chat(stream=True))
    assert lines.count(": keep-alive") >= 2
    assert events(lines)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_whose_request_is_wrong_is_no_stream(played: Served, puppet: Puppet) -> None:
    reply = played.post(PATH, chat(parts("data:;base64,AAAA"), stream=True))
    assert reply.status_code == 400
    assert reply.headers["content-type"] == "application/json"
    assert not puppet.requests


@needs_openai
def test_the_example_asks(served: Served) -> None:
    script = Path(__file__).parents[1] / "examples" / "serve_client.py"
    command = [sys.executable, str(script), str(PENGUINS), QUESTION, "--url", f"{served.url}/v1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith(f"{ANSWER}\n  (first token after "), found.stderr
