"""Anthropic's messages, and the count of their tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import Field

from .ask import Answer, Question, Service, until_left
from .errors import ApiError, bad, envelope
from .fields import (
    SEEN,
    Count,
    Model,
    Probability,
    Reply,
    StopTexts,
    image_part,
    options_of,
    replies,
    text_part,
    video_part,
)
from .streams import event, event_stream, json_reply, left, note, service_of
from .ticket import Timings

router = APIRouter(tags=["Anthropic"])


class TextBlock(Model):
    type: Literal["text"]
    text: str


class Base64Source(Model):
    type: Literal["base64"]
    data: str


class UrlSource(Model):
    type: Literal["url"]
    url: str


class ImageBlock(Model):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class VideoBlock(Model):
    """A video beside the images, in their way; Anthropic's own interface has none."""

    type: Literal["video"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class ToolUseBlock(Model):
    type: Literal["tool_use"]
    name: str
    input: dict[str, Any]


class ThinkingBlock(Model):
    type: Literal["thinking", "redacted_thinking"]


ResultBlock = Annotated[TextBlock | ImageBlock | VideoBlock, Field(discriminator="type")]


class ToolResultBlock(Model):
    type: Literal["tool_result"]
    content: str | list[ResultBlock] | None = None


Block = Annotated[
    TextBlock | ImageBlock | VideoBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    Field(discriminator="type"),
]


class Message(Model):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block] | None = None


class Format(Model):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Model):
    format: Format | None = None


class CountRequest(Model):
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    system: str | list[TextBlock] | None = None
    image_size: Count | None = Field(None, description="Side that the encoder sees, × 64 pixels.")


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool | None = None
    stop_sequences: StopTexts | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None


class TextContent(Reply):
    type: Literal["text"]
    text: str


class Usage(Reply):
    input_tokens: int
    output_tokens: int


class MessageReply(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage
    timings: Timings | None = None


class TokenCount(Reply):
    input_tokens: int


# Requests


def _parts(role: str, content: str | Sequence[Block] | None) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return [text_part(content)] if content else []
    return [part for block in content for part in _block_parts(role, block)]


def _block_parts(role: str, block: Block) -> list[dict[str, Any]]:
    if isinstance(block, TextBlock):
        return [text_part(block.text)]
    if isinstance(block, (ImageBlock, VideoBlock)):
        if role != "user":
            raise bad(f"A message of role {role} can't have {SEEN}; send them as the user's.")
        make_part = image_part if isinstance(block, ImageBlock) else video_part
        return [make_part(_source(block))]
    if isinstance(block, ToolResultBlock):
        return _parts(role, block.content)
    if isinstance(block, ToolUseBlock):
        return [text_part(f"{block.name} {json.dumps(block.input)}")]
    return []


def _source(block: ImageBlock | VideoBlock) -> str:
    source = block.source
    if isinstance(source, UrlSource):
        return source.url
    return source.data if source.data[:5].lower() == "data:" else f"data:;base64,{source.data}"


def _question(asked: CountRequest, service: Service) -> Question:
    """What is asked; ApiError if it can't be."""
    service.check_model(asked.model)
    if isinstance(asked, MessagesRequest) and asked.messages[-1].role == "assistant":
        raise bad("The last message must be the user's: answers can't be begun for the model.")
    messages = [
        {"role": message.role, "content": _parts(message.role, message.content)}
        for message in asked.messages
    ]
    if system := _parts("system", asked.system):
        messages.insert(0, {"role": "system", "content": system})
    options: dict[str, Any] = {"image_size": asked.image_size}
    constraint = None
    if isinstance(asked, MessagesRequest):
        options |= {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k")}
        options |= {"stop": asked.stop_sequences or None}
        options |= {"max_tokens": service.output_limit(asked.max_tokens)}
        configured = asked.output_config.format if asked.output_config else None
        form = configured or asked.output_format
        constraint = None if form is None else {"schema": form.schema_}
    return Question(messages, options_of(options), constraint=constraint)


# Replies


@router.post("/v1/messages", responses=replies(MessageReply))
async def messages(asked: MessagesRequest, http: Request) -> Response:
    """Answer a conversation with images."""
    service = service_of(http)
    question = _question(asked, service)
    tickets, tokens = await service.submit(question)
    answer = Answer(tickets[0])
    begun = MessageReply(
        id=f"msg_{uuid4().hex}",
        type="message",
        role="assistant",
        model=service.engine.name,
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=Usage(input_tokens=tokens, output_tokens=0),
    )
    if asked.stream:
        return event_stream(_events(http, begun, answer, question), tickets)
    answers = await until_left(http.receive, service.answers(tickets))
    if answers is None:
        return left()
    note(http, question, answers)
    answer = answers[0]
    said = {
        "content": [TextContent(type="text", text=answer.text)],
        "usage": Usage(input_tokens=tokens, output_tokens=answer.last.generation_tokens),
        "timings": Timings(**answer.timings),
    }
    return json_reply(begun.model_copy(update=_stop(answer) | said))


def _stop(answer: Answer) -> dict[str, str | None]:
    """Why an answer ended, and the text at which it did."""
    if answer.last.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.last.stop_text}
    ended = answer.last.finish_reason != "length"
    return {"stop_reason": "end_turn" if ended else "max_tokens", "stop_sequence": None}


async def _events(
    http: Request, begun: MessageReply, answer: Answer, question: Question
) -> AsyncIterator[str]:
    """The events of a stream: a message begins, one block of text grows and ends, it ends."""

    def named(kind: str, **more: Any) -> str:
        return event({"type": kind, **more}, kind)

    service = service_of(http)
    yield named("message_start", message=begun.model_dump(exclude_unset=True))
    block = {"type": "text", "text": ""}
    yield named("content_block_start", index=0, content_block=block)
    try:
        async with aclosing(service.pieces([answer.ticket])) as pieces:
            async for came in pieces:
                if came is None:
                    yield named("ping")
                    continue
                answer.pieces.append(came[1])
                if came[1].text:
                    delta = {"type": "text_delta", "text": came[1].text}
                    yield named("content_block_delta", index=0, delta=delta)
    except ApiError as error:
        notes = http.scope["state"]["notes"]
        yield event(envelope(http.scope["path"], error, notes["id"]), "error")
        return
    finally:
        note(http, question, [answer])
    yield named("content_block_stop", index=0)
    usage = {"output_tokens": answer.last.generation_tokens}
    yield named("message_delta", delta=_stop(answer), usage=usage, timings=answer.timings)
    yield named("message_stop")


@router.post("/v1/messages/count_tokens", responses=replies(TokenCount))
async def count_tokens(asked: CountRequest, http: Request) -> Response:
    """The tokens of a conversation, those of its images included."""
    service = service_of(http)
    tokens = await service.count(_question(asked, service))
    return json_reply(TokenCount(input_tokens=tokens))
