"""Answers that follow a schema, an expression or a list, through every interface."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import ANSWER, BASE64, QUESTION, URI, Served, chat, events, parts

pytestmark = [
    pytest.mark.needs("fastapi"),
    pytest.mark.needs("uvicorn"),
    pytest.mark.needs("llguidance"),
]
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "what": {"enum": ["penguins", "pandas"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "certain": {"type": "boolean"},
    },
    "required": ["what", "count", "certain"],
    "additionalProperties": False,
}


def assert_valid(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["what", "count", "certain"]  # in the schema's order
    assert found["what"] in ("penguins", "pandas")
    assert found["count"] in range(100) and isinstance(found["certain"], bool)


def form(schema: Any = SCHEMA) -> dict[str, Any]:
    json_schema = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def text_of(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_openai_s_chat_whole_and_streamed(served: Served) -> None:
    body = chat(parts(URI), **form(), temperature=1.0, seed=3)
    whole = text_of(served.post(PATH, body))
    assert_valid(whole)
    deltas = [e["choices"][0]["delta"] for e in events(served.lines(PATH, body | {"stream": True}))]
    assert "".join(delta.get("content", "") for delta in deltas) == whole


@pytest.mark.needs("openai")
def test_openai_s_client_parses_a_pydantic_model(served: Served) -> None:
    import openai
    from pydantic import BaseModel, Field

    class Found(BaseModel):
        count: int = Field(ge=0, le=99)  # nano would go on with digits for ever
        certain: bool

    messages = chat(parts(URI))["messages"]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        reply = client.chat.completions.parse(
            model="nano", messages=messages, response_format=Found, max_tokens=64
        )
    assert isinstance(reply.choices[0].message.parsed, Found)


def test_the_other_interfaces(served: Served) -> None:
    text = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    reply = served.post("/v1/responses", {"input": "Count.", "text": text}).json()
    assert_valid(reply["output"][0]["content"][0]["text"])
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = chat("Count.", max_tokens=64, output_config=config)
    assert_valid(served.post("/v1/messages", body).json()["content"][0]["text"])
    body = {"prompt": QUESTION, "images": [BASE64], "format": SCHEMA, "stream": False}
    assert_valid(served.post("/api/generate", body).json()["response"])


def test_any_object(served: Served) -> None:
    body = chat("Count.", response_format={"type": "json_object"}, max_tokens=200, seed=1)
    choice = served.post(PATH, body).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert choice["message"]["content"].startswith("{")
    body = {"prompt": "Count.", "format": "json", "stream": False, "options": {"num_predict": 4}}
    assert served.post("/api/generate", body).json()["response"].startswith("{")


def test_an_expression_and_choices(served: Served) -> None:
    digits = text_of(served.post(PATH, chat(parts(URI), guided_regex=r"[0-9]{2}-[a-c]")))
    assert re.fullmatch(r"[0-9]{2}-[a-c]", digits)
    choice = text_of(served.post(PATH, chat(parts(URI), guided_choice=["yes", "no"])))
    assert choice in ("yes", "no")


def test_free_and_constrained_answers_come_together(served: Served) -> None:
    def ask(n: int) -> str:
        return text_of(served.post(PATH, chat(parts(URI), **(form() if n % 2 else {}))))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    assert texts[::2] == [ANSWER] * 4
    assert len(set(texts[1::2])) == 1
    assert_valid(texts[1])


def test_a_truncated_answer_says_length(served: Served) -> None:
    choice = served.post(PATH, chat("Count.", **form(), max_tokens=3)).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_logprobs_under_a_constraint_are_numbers(served: Served) -> None:
    body = chat(parts(URI), **form(), logprobs=True, top_logprobs=5)
    reply = served.post(PATH, body)
    assert "NaN" not in reply.text and "Infinity" not in reply.text
    tokens = reply.json()["choices"][0]["logprobs"]["content"]
    assert all(-10_000 <= token["logprob"] <= 0.001 for token in tokens)


DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}
BAD = {
    "no schema": 7,
    "an unknown type": {"type": "penguin"},
    "an unsupported keyword": {"type": "array", "uniqueItems": True},
    "too deep": DEEP,
    "too large": {"enum": ["x" * 1000 + str(n) for n in range(2000)]},
    "nothing fits": {"type": "integer", "minimum": 5, "maximum": 4},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_schema_that_can_t_be_used_is_no_free_text(
    served: Served, kind: str, stream: bool
) -> None:
    reply = served.post(PATH, chat("Count.", **form(BAD[kind]), stream=stream))
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].endswith(".")
    assert served.get("/health").status_code == 200


def test_an_expression_that_can_t_be_used_is_refused(served: Served) -> None:
    for field in ({"guided_regex": "("}, {"guided_choice": []}, {"guided_choice": [""]}):
        assert served.post(PATH, chat("Count.", **field)).status_code == 400
    assert served.post(PATH, chat("Hi", **form(), guided_regex="a")).status_code == 400
