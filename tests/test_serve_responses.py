"""OpenAI's responses, as its own client sees them."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from serving import ANSWER, QUESTION, URI, Puppet, Served, events, piece

pytestmark = [pytest.mark.needs("fastapi"), pytest.mark.needs("uvicorn")]
needs_openai = pytest.mark.needs("openai")
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text(said: str = QUESTION) -> dict[str, Any]:
    return {"type": "input_text", "text": said}


PICTURE = {"type": "input_image", "image_url": URI, "detail": "auto"}
ASKED: list[Any] = [{"role": "user", "content": [PICTURE, text()]}]


@needs_openai
def test_an_answer_with_its_usage(client: Any) -> None:
    reply = client.responses.create(model="nano", input=ASKED)
    assert reply.output_text == ANSWER
    assert (reply.status, reply.error, reply.incomplete_details) == ("completed", None, None)
    usage = reply.usage
    assert usage.input_tokens > 16
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert reply.model_extra["timings"]["first_token"] > 0
    cut = client.responses.create(model="nano", input=ASKED, max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"


@needs_openai
def test_a_stream_has_the_same_text_and_numbers_without_gaps(client: Any) -> None:
    with client.responses.stream(model="nano", input=ASKED) as stream:
        found = list(stream)
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    assert [event.sequence_number for event in found] == list(range(len(found)))
    deltas = [event.delta for event in found if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    others = [event.type for event in found if event.type != "response.output_text.delta"]
    assert others == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


@needs_openai
def test_the_asynchronous_client_is_answered(served: Served) -> None:
    import openai

    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            whole = await client.responses.create(model="nano", input=ASKED)
            stream = await client.responses.create(model="nano", input=ASKED, stream=True)
            deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            return whole.output_text, "".join(deltas)

    assert asyncio.run(ask()) == (ANSWER, ANSWER)


@needs_openai
def test_an_output_may_be_replayed_as_input(client: Any) -> None:
    first = client.responses.create(model="nano", input=ASKED)
    items = [
        *ASKED,
        *(item.model_dump() for item in first.output),
        {"role": "user", "content": "?"},
    ]
    again = client.responses.create(model="nano", input=items, max_output_tokens=4)
    assert again.usage.input_tokens > first.usage.input_tokens


def prompt_of(played: Served, puppet: Puppet, **body: Any) -> Any:
    reply = played.post(PATH, {"model": "nano"} | body)
    assert reply.status_code == 200, reply.text
    return [
        (m["role"], [part.get("text", "an image") for part in m["content"]])
        for m in puppet.requests[0].prompt
    ]


def test_items_need_no_type_and_replayed_texts_no_id(played: Served, puppet: Puppet) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [PICTURE, text("Hi")]},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "message", "role": "user", "content": ""},
    ]
    assert prompt_of(played, puppet, input=items) == [
        ("system", ["Be brief."]),
        ("user", ["an image", "Hi"]),
        ("assistant", ["Hello."]),
        ("user", ["42"]),
        ("user", []),
    ]


def test_instructions_are_the_system_prompt(played: Served, puppet: Puppet) -> None:
    found = prompt_of(played, puppet, input="Hi", instructions="Be brief.")
    assert found == [("system", ["Be brief."]), ("user", ["Hi"])]


def test_logprobs_are_included_where_they_are_asked_for(served: Served) -> None:
    body = {"input": ASKED, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (said,) = served.post(PATH, body).json()["output"][0]["content"]
    assert "".join(token["token"] for token in said["logprobs"]) == ANSWER
    assert all(len(token["top_logprobs"]) == 2 for token in said["logprobs"])


def test_a_failure_in_a_stream_is_one_error_and_no_success_after_it(
    played: Served, puppet: Puppet
) -> None:
    from fastvlm_mlx.serve.ticket import EngineDied

    puppet.script = [0.25, piece("Six"), EngineDied("The engine has stopped.")]
    found = events(played.lines(PATH, {"input": "Hi", "stream": True}))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[-1]["type"] == "error"
    assert found[-1]["code"] == "engine_died"
    kinds = {event["type"] for event in found[:-1]}
    assert kinds.isdisjoint({"error", "response.completed", "response.output_text.done"})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"input": []},
        {"input": 7},
        {"input": [{"content": "Hi"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}]},
        {"input": [{"role": "assistant", "content": [PICTURE]}]},
        {"input": [{"type": "web_search_call", "id": "1"}]},
        {"input": "Hi", "previous_response_id": "resp_1"},
        {"input": "Hi", "background": True},
        {"input": "Hi", "text": {"format": {"type": "json_schema"}}},
        {"input": "Hi", "max_output_tokens": 10**6},
    ],
    ids=lambda wrong: str(wrong)[:50],
)
def test_wrong_fields_are_refused_in_a_sentence(played: Served, puppet: Puppet, wrong: Any) -> None:
    reply = played.post(PATH, wrong)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    assert not puppet.requests
