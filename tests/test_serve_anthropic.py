"""Anthropic's messages, as its own client sees them."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from models import Nano
from serving import ANSWER, BASE64, QUESTION, Puppet, Served, piece

import fastvlm_mlx as fv

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
needs_anthropic = pytest.mark.needs("anthropic")
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def picture(data: str = BASE64, media_type: str = "image/png") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def text(said: str = QUESTION) -> dict[str, Any]:
    return {"type": "text", "text": said}


def asked(*blocks: Any, **more: Any) -> dict[str, Any]:
    content = list(blocks) or "Hi"
    return {
        "model": "nano",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": content}],
    } | more


@needs_anthropic
def test_an_answer_is_the_one_that_generate_gives(client: Any, nano: Nano) -> None:
    reply = client.messages.create(**asked(picture(), text()))
    assert [block.text for block in reply.content] == [ANSWER]
    assert (reply.type, reply.role, reply.stop_reason) == ("message", "assistant", "end_turn")
    alone = list(fv.stream_generate(*nano, QUESTION, image=f"data:;base64,{BASE64}"))[-1]
    assert reply.usage.input_tokens == alone.prompt_tokens
    assert reply.usage.output_tokens == alone.generation_tokens
    assert reply.model_extra["timings"]["first_token"] > 0


@needs_anthropic
def test_a_stream_has_the_same_text_and_true_numbers_from_its_start(
    client: Any, served: Served
) -> None:
    whole = client.messages.create(**asked(picture(), text()))
    with client.messages.stream(**asked(picture(), text())) as stream:
        begun = next(iter(stream))
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == ANSWER == final.content[0].text
    assert begun.message.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == "end_turn"


@needs_anthropic
def test_the_asynchronous_client_is_answered(served: Served) -> None:
    import anthropic

    async def ask() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none") as client:
            reply = await client.messages.create(**asked(picture(), text()))
            async with client.messages.stream(**asked(picture(), text())) as stream:
                return reply.content[0].text, await stream.get_final_text()

    assert asyncio.run(ask()) == (ANSWER, ANSWER)


@needs_anthropic
def test_a_stop_sequence_is_named(client: Any) -> None:
    stops = ["zebra", "peng"]
    reply = client.messages.create(**asked(picture(), text(), stop_sequences=stops))
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "peng")
    assert reply.content[0].text == "There are 6 "
    with client.messages.stream(**asked(picture(), text(), stop_sequences=stops)) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "peng")
    cut = client.messages.create(**asked(picture(), text(), max_tokens=2))
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)


@needs_anthropic
def test_tokens_are_counted_as_they_are_used(client: Any) -> None:
    body = asked(picture(), text(), system="Be brief.")
    del body["max_tokens"]
    counted = client.messages.count_tokens(**body).input_tokens
    used = client.messages.create(**body, max_tokens=1).usage.input_tokens
    assert counted == used
    long = asked(text("word " * 5000))
    del long["max_tokens"]
    assert client.messages.count_tokens(**long).input_tokens > 4096


@needs_anthropic
def test_errors_are_of_the_types_that_the_client_knows(client: Any) -> None:
    import anthropic

    create = client.messages.create
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(**asked(model="claude"))
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as wrong:
        create(**asked(), extra_body={"temperature": 2})
    assert wrong.value.body["type"] == "error"
    assert wrong.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="4096"):
        create(**asked(text("word " * 5000)))


def reply_of(played: Served, body: Any) -> Any:
    reply = played.post(PATH, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_options_reach_the_model(played: Served, puppet: Puppet) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 20}
    reply_of(played, asked(**options, stop_sequences=["x"], metadata={"user_id": "me"}))
    assert puppet.requests[0].options == {**options, "stop": ("x",), "max_tokens": 64}


@pytest.mark.parametrize(
    "system", ["Be brief.", [text("Be "), text("brief.")]], ids=["text", "list"]
)
def test_the_system_prompt_may_be_a_list(played: Served, puppet: Puppet, system: Any) -> None:
    reply_of(played, asked(system=system))
    first = puppet.requests[0].prompt[0]
    assert first["role"] == "system"
    assert "".join(part["text"] for part in first["content"]) == "Be brief."


@pytest.mark.parametrize("system", [None, "", []], ids=str)
def test_an_empty_system_prompt_is_none(played: Served, puppet: Puppet, system: Any) -> None:
    reply_of(played, asked(system=system))
    assert [message["role"] for message in puppet.requests[0].prompt] == ["user"]


def test_images_may_stand_inside_tool_results(played: Served, puppet: Puppet) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [text("A photo:"), picture()]}
    plain = {"type": "tool_result", "tool_use_id": "2", "content": "42"}
    turns = [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "…", "signature": "…"},
                {"type": "tool_use", "id": "1", "name": "look", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [result, plain, text("And?")]},
    ]
    reply_of(played, asked(messages=turns))
    kinds = [[part["type"] for part in message["content"]] for message in puppet.requests[0].prompt]
    assert kinds == [["text"], ["text"], ["text", "image", "text", "text"]]


@pytest.mark.parametrize("media_type", ["image/jpeg", "", "text/plain", "image/svg+xml"])
def test_the_kind_of_an_image_is_read_from_its_bytes(
    played: Served, puppet: Puppet, media_type: str
) -> None:
    reply_of(played, asked(picture(media_type=media_type), text()))
    (image, _) = puppet.requests[0].prompt[0]["content"]
    assert image["image"].tobytes() == fv.load_image(base64.b64decode(BASE64)).tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        {"messages": [{"role": "user", "content": [picture("AAAA")]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "assistant", "content": [picture()]},
                {"role": "user", "content": ""},
            ]
        },
        {"stop_sequences": [""]},
        {"temperature": -1},
        {"top_k": "many"},
        {"system": 7},
    ],
    ids=lambda wrong: json.dumps(wrong)[:60],
)
def test_wrong_fields_are_refused_in_a_sentence(played: Served, puppet: Puppet, wrong: Any) -> None:
    reply = played.post(PATH, asked() | wrong)
    assert reply.status_code == 400
    body = reply.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["message"].endswith(".")
    assert not puppet.requests


def events_of(lines: list[str]) -> list[tuple[str, Any]]:
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    values = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")
    ]
    return list(zip(names, values, strict=True))


def test_the_events_of_a_stream_are_those_of_the_interface(played: Served, puppet: Puppet) -> None:
    puppet.script = [0.25, *puppet.script]
    found = events_of(played.lines(PATH, asked(stream=True)))
    names = [name for name, _ in found]
    assert names == [value["type"] for _, value in found]
    assert "ping" in names
    assert [name for name in names if name != "ping"] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_failure_in_a_stream_is_one_error_and_no_success_after_it(
    played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import EngineDied

    puppet.script = [piece("Six"), EngineDied("The engine has stopped.")]
    *others, (name, value) = events_of(played.lines(PATH, asked(stream=True)))
    assert name == "error"
    assert value["error"]["type"] == "overloaded_error"
    assert {"error", "message_stop", "message_delta"}.isdisjoint(name for name, _ in others)


def test_a_full_queue_and_a_timeout_come_in_the_envelope(played: Served, puppet: Puppet) -> None:
    from fastvlm_mlx.serve.ticket import QueueFull, RequestTimeout

    puppet.script = [RequestTimeout("too long")]
    late = played.post(PATH, asked())
    assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout_error")
    puppet.refuse = QueueFull(2.5)
    full = played.post(PATH, asked())
    assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
    assert full.headers["retry-after"] == "3"
