"""OpenAI's responses. Nothing is kept between them: a conversation is sent whole each time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import Field

from .ask import Answer, Question, Service, until_left
from .errors import ApiError, bad, openai_error
from .fields import (
    SEEN,
    Count,
    Model,
    Probability,
    Reply,
    Seed,
    Url,
    image_part,
    options_of,
    replies,
    text_part,
    video_part,
)
from .openai_chat import TokenLogprob, logprobs_of, role_of
from .streams import KEEP_ALIVE, event, event_stream, json_reply, left, note, service_of
from .ticket import Timings

router = APIRouter(tags=["OpenAI"])
LOGPROBS = "message.output_text.logprobs"
VISUAL = ("input_image", "input_video", "video_url")  # types of parts


class Part(Model):
    type: Literal[
        "input_text", "output_text", "text", "refusal", "input_image", "input_video", "video_url"
    ]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    video_url: Url | str | None = None
    file_id: str | None = None


class Item(Model):
    """A message, with or without its type, or a record of another kind, of which some are passed
    over."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    output: str | list[Part] | None = None


class Format(Model):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class Text(Model):
    format: Format | None = None


class ResponsesRequest(Model):
    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: Seed | None = None
    stream: bool | None = None
    text: Text | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    image_size: Count | None = Field(None, description="Side that the encoder sees, × 64 pixels.")


class OutputText(Reply):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Reply):
    id: str
    type: Literal["message"]
    status: str
    role: Literal["assistant"]
    content: list[OutputText]


class CachedTokens(Reply):
    cached_tokens: int


class ReasoningTokens(Reply):
    reasoning_tokens: int


class Usage(Reply):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Whole(Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: str
    model: str
    output: list[OutputMessage]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    text: dict[str, Any]
    tools: list[Any]
    tool_choice: str
    parallel_tool_calls: bool
    previous_response_id: None
    metadata: dict[str, Any]
    usage: Usage | None
    timings: Timings | None = None


# Requests


def _parts(role: str, content: str | Sequence[Part] | None) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return [text_part(content)] if content else []
    return [_part(role, part) for part in content]


def _part(role: str, part: Part) -> dict[str, Any]:
    if part.type not in VISUAL:
        text = part.refusal if part.type == "refusal" else part.text
        return text_part(text or "")
    if role != "user":
        raise bad(f"A message of role {role} can't have {SEEN}; send them as the user's.", "input")
    if part.type != "input_image":
        if part.video_url is None:
            raise bad("A video needs its video_url; files are not kept here.", "input")
        return video_part(part.video_url)
    if part.image_url is None:
        raise bad("An image needs its image_url; files are not kept here.", "input")
    return image_part(part.image_url)


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation; ApiError if it has no message."""
    items = (
        [Item(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
    )
    messages = []
    for item in items:
        if item.type in (None, "message"):
            if item.role is None:
                raise bad("A message of the input has no role.", "input")
            role = role_of(item.role)
            messages.append({"role": role, "content": _parts(role, item.content)})
        elif item.type == "function_call_output":
            messages.append({"role": "user", "content": _parts("user", item.output)})
    if not messages:
        raise bad("The input has no message.", "input")
    if asked.instructions:
        system = {"role": "system", "content": [text_part(asked.instructions)]}
        messages.insert(0, system)
    return messages


def _question(asked: ResponsesRequest, service: Service) -> Question:
    service.check_model(asked.model)
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(asked, name):
            raise bad(f"{name} needs what is not kept here: send the whole conversation.", name)
    options = {
        name: getattr(asked, name) for name in ("temperature", "top_p", "seed", "image_size")
    }
    options["max_tokens"] = service.output_limit(asked.max_output_tokens, "max_output_tokens")
    wanted = LOGPROBS in (asked.include or ()) or bool(asked.top_logprobs)
    return Question(
        _messages(asked),
        options_of(options),
        logprobs=(asked.top_logprobs or 0) if wanted else None,
        constraint=_constraint(asked.text.format if asked.text else None),
    )


def _constraint(form: Format | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"schema": "json_object"}
    if form.schema_ is None:
        raise bad("text.format has no schema.", "text.format.schema")
    return {"schema": form.schema_}


# Replies


@router.post("/v1/responses", responses=replies(Whole))
async def responses(asked: ResponsesRequest, http: Request) -> Response:
    """Answer a conversation with images."""
    service = service_of(http)
    question = _question(asked, service)
    tickets, _ = await service.submit(question)
    begun = _begun(asked, service)
    if asked.stream:
        events = _events(http, begun, Answer(tickets[0]), question)
        return event_stream(_numbered(events), tickets)
    answers = await until_left(http.receive, service.answers(tickets))
    if answers is None:
        return left()
    note(http, question, answers)
    output = _output(service, answers[0], question, f"msg_{uuid4().hex}")
    return json_reply(_ended(begun, answers[0], output))


def _begun(asked: ResponsesRequest, service: Service) -> Whole:
    """The response before anything is said."""
    form = asked.text.format if asked.text else None
    shown = {"type": "text"} if form is None else form.model_dump(exclude_unset=True, by_alias=True)
    return Whole(
        id=f"resp_{uuid4().hex}",
        object="response",
        created_at=int(time.time()),
        status="in_progress",
        model=service.engine.name,
        output=[],
        error=None,
        incomplete_details=None,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        text={"format": shown},
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=False,
        previous_response_id=None,
        metadata={},
        usage=None,
    )


def _output(service: Service, answer: Answer, question: Question, id: str) -> OutputMessage:
    pieces = answer.pieces if question.logprobs is not None else []
    logprobs = logprobs_of(service, pieces).content
    said = OutputText(type="output_text", text=answer.text, annotations=[], logprobs=logprobs)
    status = "incomplete" if answer.last.finish_reason == "length" else "completed"
    return OutputMessage(id=id, type="message", status=status, role="assistant", content=[said])


def _ended(begun: Whole, answer: Answer, output: OutputMessage) -> Whole:
    """The response, whole."""
    last, cut = answer.last, answer.last.finish_reason == "length"
    usage = Usage(
        input_tokens=last.prompt_tokens,
        input_tokens_details=CachedTokens(cached_tokens=last.cached_tokens),
        output_tokens=last.generation_tokens,
        output_tokens_details=ReasoningTokens(reasoning_tokens=0),
        total_tokens=last.prompt_tokens + last.generation_tokens,
    )
    end = {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [output],
        "usage": usage,
        "timings": Timings(**answer.timings),
    }
    return begun.model_copy(update=end)


Event = dict[str, Any]


async def _numbered(events: AsyncIterator[Event | None]) -> AsyncIterator[str]:
    """Events with their numbers, which have no gap; None becomes a comment that has none."""
    numbers = count()
    async for found in events:
        if found is None:
            yield KEEP_ALIVE
        else:
            yield event({**found, "sequence_number": next(numbers)}, found["type"])


async def _events(
    http: Request, begun: Whole, answer: Answer, question: Question
) -> AsyncIterator[Event | None]:
    """The events of a stream: a response begins, one text of one message grows, all end."""
    service, id = service_of(http), f"msg_{uuid4().hex}"
    place = {"item_id": id, "output_index": 0, "content_index": 0}
    shown = begun.model_dump(exclude_unset=True)
    yield {"type": "response.created", "response": shown}
    yield {"type": "response.in_progress", "response": shown}
    empty = {"id": id, "type": "message", "status": "in_progress", "role": "assistant"}
    yield {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**empty, "content": []},
    }
    nothing = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **place, "part": nothing}
    try:
        async with aclosing(service.pieces([answer.ticket])) as pieces:
            async for came in pieces:
                if came is None:
                    yield None
                    continue
                answer.pieces.append(came[1])
                if came[1].text or question.logprobs is not None:
                    piece = Answer(answer.ticket, [came[1]])
                    yield _delta(_output(service, piece, question, id).content[0], place)
    except ApiError as error:
        told = openai_error(error)
        yield {"type": "error", **{name: told[name] for name in ("code", "message", "param")}}
        return
    finally:
        note(http, question, [answer])
    for last in _last_events(begun, answer, _output(service, answer, question, id), place):
        yield last


def _delta(piece: OutputText, place: dict[str, Any]) -> Event:
    logprobs = [logprob.model_dump() for logprob in piece.logprobs]
    kind = "response.output_text.delta"
    return {"type": kind, **place, "delta": piece.text, "logprobs": logprobs}


def _last_events(
    begun: Whole, answer: Answer, output: OutputMessage, place: dict[str, Any]
) -> list[Event]:
    item, whole = output.model_dump(), _ended(begun, answer, output)
    part = item["content"][0]
    text = {"text": part["text"], "logprobs": part["logprobs"]}
    return [
        {"type": "response.output_text.done", **place, **text},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": f"response.{whole.status}", "response": whole.model_dump(exclude_unset=True)},
    ]
