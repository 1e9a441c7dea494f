"""OpenAI's chat completions and list of models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ..generation.options import PENALTIES
from ..generation.response import Response as Piece
from .ask import Answer, Question, Service, until_left
from .errors import ApiError, bad, openai_error
from .fields import (
    SEEN,
    Count,
    Finite,
    Model,
    Probability,
    Reply,
    Seed,
    Stop,
    Url,
    image_part,
    options_of,
    replies,
    text_part,
    video_part,
)
from .streams import KEEP_ALIVE, event, event_stream, json_reply, left, note, service_of
from .ticket import Timings

router = APIRouter(tags=["OpenAI"])
STARTED = int(time.time())


class TextPart(Model):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImagePart(Model):
    type: Literal["image_url", "input_image"]
    image_url: Url | str


class VideoPart(Model):
    type: Literal["video_url", "input_video"]
    video_url: Url | str


class RefusalPart(Model):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | VideoPart | RefusalPart, Field(discriminator="type")]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Message(Model):
    role: Role
    content: str | list[Part] | None = None


class StreamOptions(Model):
    include_usage: bool | None = None


class JsonSchema(Model):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Model):
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = Field(None, description="The answer follows this expression.")
    guided_choice: list[str] | None = Field(None, description="The answer is one of these.")
    image_size: Count | None = Field(None, description="Side that the encoder sees, × 64 pixels.")


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: list[TokenLogprob] | None = None


class AnswerMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Reply):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Completion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class Chunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fastvlm: dict[str, Any]


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


# Requests


def parts_of(role: str, content: str | Sequence[Part] | None) -> list[dict[str, Any]]:
    """A message's content as parts: a text, none, or the parts that it has."""
    if content is None or isinstance(content, str):
        return [text_part(content)] if content else []
    return [_part(role, part) for part in content]


def _part(role: str, part: TextPart | ImagePart | VideoPart | RefusalPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return text_part(part.text)
    if isinstance(part, RefusalPart):
        return text_part(part.refusal)
    if role_of(role) != "user":
        raise bad(f"A message of role {role} can't have {SEEN}; send them as the user's.")
    if isinstance(part, VideoPart):
        return video_part(part.video_url)
    return image_part(part.image_url if isinstance(part.image_url, str) else part.image_url.url)


def role_of(role: str) -> str:
    """The model's name of a role; what a tool says reaches it as the user's."""
    return {"developer": "system", "tool": "user", "function": "user"}.get(role, role)


def constraint_of(request: ChatRequest) -> dict[str, Any] | None:
    """What the answer must follow; ApiError if that is several things, or a schema is missing."""
    wanted: dict[str, Any] = {}
    form = request.response_format
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise bad("response_format has no schema.", "response_format.json_schema.schema")
        wanted["schema"] = form.json_schema.schema_
    elif form is not None and form.type == "json_object":
        wanted["schema"] = "json_object"
    if request.guided_regex is not None:
        wanted["regex"] = request.guided_regex
    if request.guided_choice is not None:
        wanted["choices"] = request.guided_choice
    if len(wanted) > 1:
        raise bad("Give one of response_format, guided_regex and guided_choice.")
    return wanted or None


def question_of(request: ChatRequest, service: Service) -> Question:
    """What a request asks; ApiError if it contradicts itself."""
    service.check_model(request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
    asked = request.max_completion_tokens or request.max_tokens
    same = ("temperature", "top_p", "min_p", "seed", "stop", "image_size", *PENALTIES)
    options = {name: getattr(request, name) for name in same}
    options["top_k"] = None if request.top_k is None else max(request.top_k, 0)
    options["max_tokens"] = service.output_limit(asked)
    messages = [
        {"role": role_of(message.role), "content": parts_of(message.role, message.content)}
        for message in request.messages
    ]
    return Question(
        messages,
        options_of(options),
        n=request.n or 1,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        constraint=constraint_of(request),
    )


# Replies


@router.post("/v1/chat/completions", responses=replies(Completion))
async def chat_completions(asked: ChatRequest, http: Request) -> Response:
    """Answer a conversation with images."""
    service = service_of(http)
    question = question_of(asked, service)
    tickets, _ = await service.submit(question)
    head: dict[str, Any] = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time())}
    head["model"] = service.engine.name
    if asked.stream:
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return event_stream(_chunks(http, tickets, question, head, usage), tickets)
    answers = await until_left(http.receive, service.answers(tickets))
    if answers is None:
        return left()
    note(http, question, answers)
    reply = Completion(
        **head,
        object="chat.completion",
        choices=[_choice(service, n, answer, question) for n, answer in enumerate(answers)],
        usage=usage_of([answer.last for answer in answers]),
        timings=Timings(**answers[0].timings),
    )
    return json_reply(reply)


def _choice(service: Service, index: int, answer: Answer, question: Question) -> Choice:
    wanted = question.logprobs is not None
    return Choice(
        index=index,
        message=AnswerMessage(role="assistant", content=answer.text, refusal=None),
        logprobs=logprobs_of(service, answer.pieces) if wanted else None,
        finish_reason=answer.last.finish_reason or "stop",
    )


async def _chunks(
    http: Request, tickets: Any, question: Question, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """The events of a stream: a role and texts for each answer, then usage, if asked for."""

    def chunk(*choices: ChunkChoice, **more: Any) -> str:
        whole = Chunk(**head, object="chat.completion.chunk", choices=list(choices), **more)
        return f"data: {whole.json_text()}\n\n"

    service, nothing = service_of(http), {"usage": None} if with_usage else {}
    answers = [Answer(ticket) for ticket in tickets]
    for n in range(len(tickets)):
        begun = Delta(role="assistant", content="")
        yield chunk(ChunkChoice(index=n, delta=begun, logprobs=None, finish_reason=None), **nothing)
    try:
        async with aclosing(service.pieces(tickets)) as pieces:
            async for came in pieces:
                if came is None:
                    yield KEEP_ALIVE
                    continue
                n, piece = came
                answers[n].pieces.append(piece)
                last = piece.finish_reason is not None
                more = {"timings": Timings(**answers[n].timings)} if last else {}
                if last or piece.text or question.logprobs is not None:
                    yield chunk(_chunk_choice(service, n, piece, question), **nothing, **more)
    except ApiError as error:
        yield event({"error": openai_error(error)})
        return
    finally:
        note(http, question, answers)
    if with_usage:
        yield chunk(usage=usage_of([answer.last for answer in answers]))
    yield "data: [DONE]\n\n"


def _chunk_choice(service: Service, index: int, piece: Piece, question: Question) -> ChunkChoice:
    wanted = question.logprobs is not None
    return ChunkChoice(
        index=index,
        delta=Delta(content=piece.text) if piece.text else Delta(),
        logprobs=logprobs_of(service, [piece]) if wanted else None,
        finish_reason=piece.finish_reason,
    )


def usage_of(last: Sequence[Piece]) -> Usage:
    """Tokens of a prompt, images included, and of all answers to it."""
    prompt, answer = last[0].prompt_tokens, sum(piece.generation_tokens for piece in last)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=CachedTokens(cached_tokens=last[0].cached_tokens),
    )


def logprobs_of(service: Service, pieces: Sequence[Piece]) -> ChoiceLogprobs:
    """The log probabilities of an answer's tokens, without that of its end."""
    ends = service.engine.processor.tokenizer.eos_token_ids
    return ChoiceLogprobs(
        content=[_token_logprob(service, piece) for piece in pieces if piece.token not in ends],
        refusal=None,
    )


def _token_logprob(service: Service, piece: Piece) -> TokenLogprob:
    assert piece.logprobs is not None
    own = _top_logprob(service, piece.token, piece.logprobs.logprob)
    top = [_top_logprob(service, token, value) for token, value in piece.logprobs.top]
    return TokenLogprob(**dict(own), top_logprobs=top)


def _top_logprob(service: Service, token: int, logprob: float) -> TopLogprob:
    data = service.engine.processor.tokenizer.token_bytes(token, skip_special_tokens=False)
    text = data.decode("utf-8", "replace")
    return TopLogprob(token=text, logprob=max(logprob, -9999.0), bytes=list(data))


# Models


@router.get("/v1/models", response_model=ModelList)
async def models(http: Request) -> Any:
    """The loaded model."""
    return {"object": "list", "data": [_card(service_of(http))]}


@router.get("/v1/models/{name:path}", responses=replies(ModelCard))
async def model(name: str, http: Request) -> Any:
    """The loaded model by one of its names."""
    service_of(http).check_model(name)
    return _card(service_of(http))


def _card(service: Service) -> dict[str, Any]:
    engine, settings = service.engine, service.settings
    processor = engine.processor
    facts = {
        "precision": service.facts.precision,
        "parameters": service.facts.parameter_size,
        "image_size": processor.image_size,
        "patch_size": processor.patch_size,
        "visual_tokens": processor.num_visual_tokens(),
        "context": service.context,
        "max_images": settings.max_images,
        "max_output_tokens": settings.max_output_tokens,
        "remote_images": settings.allow_remote_images,
    }
    about = {"created": STARTED, "owned_by": "fastvlm-mlx", "fastvlm": facts}
    return {"id": engine.name, "object": "model", **about}
