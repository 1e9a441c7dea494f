"""Ollama's chat and generate, and what it says of models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ..version import __version__
from .ask import Answer, Question, Service, until_left
from .errors import ApiError, bad
from .fields import (
    Count,
    Finite,
    Model,
    Probability,
    Reply,
    Stop,
    image_part,
    options_of,
    replies,
    text_part,
)
from .openai_chat import TokenLogprob, logprobs_of
from .streams import Stream, json_reply, left, note, service_of
from .ticket import Timings

router = APIRouter(prefix="/api", tags=["Ollama"])
INTERFACE = "0.12.0"  # the version of Ollama whose interface this is
NEVER = "2318-01-01T00:00:00Z"  # when the model is put away; the client says "Forever" of it
STARTED = datetime.now(timezone.utc).isoformat()
SECOND = 1_000_000_000  # nanoseconds


class ModelOptions(Model):
    num_predict: Annotated[int, Field(lt=2**31)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    image_size: Count | None = Field(None, description="Side that the encoder sees, × 64 pixels.")


class Asked(Model):
    model: str | None = None
    stream: bool | None = None
    options: ModelOptions | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Message(Model):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[str] | None = None


class ChatRequest(Asked):
    messages: list[Message] = Field(default_factory=list)


class GenerateRequest(Asked):
    prompt: str | None = None
    system: str | None = None
    images: list[str] | None = None
    suffix: str | None = None
    raw: bool | None = None


class ShowRequest(Model):
    model: str | None = None
    name: str | None = None


class SaidMessage(Reply):
    role: Literal["assistant"]
    content: str


class Said(Reply):
    model: str
    created_at: str
    message: SaidMessage | None = None
    response: str | None = None
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[TokenLogprob] | None = None
    timings: Timings | None = None


class Details(Reply):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(Reply):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Reply):
    models: list[ListedModel]


class RunningModel(Reply):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Running(Reply):
    models: list[RunningModel]


class Shown(Reply):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(Reply):
    version: str
    fastvlm_mlx: str


# Requests


def _parts(role: str, content: str | None, images: Sequence[str] | None) -> list[dict[str, Any]]:
    """A message's images, which come first as in Ollama, and its text."""
    if images and role != "user":
        raise bad(f"A message of role {role} can't have images; send them as the user's.")
    sources = (i if i[:5].lower() == "data:" else f"data:;base64,{i}" for i in images or ())
    return [*map(image_part, sources), *([text_part(content)] if content else [])]


def _question(asked: Asked, messages: list[dict[str, Any]], service: Service) -> Question:
    given = asked.options or ModelOptions.model_validate({})
    same = ("temperature", "top_p", "top_k", "min_p", "stop", "image_size")
    penalties = ("frequency_penalty", "presence_penalty")
    options = {name: getattr(given, name) for name in (*same, *penalties)}
    options["stop"] = options["stop"] or None
    options["repetition_penalty"] = given.repeat_penalty
    options["seed"] = None if (given.seed or 0) < 0 else given.seed  # below 0 it is by chance
    most = given.num_predict if (given.num_predict or 0) > 0 else None  # below 0 it has no limit
    options["max_tokens"] = service.output_limit(most, "num_predict")
    constraint: dict[str, Any] | None = None
    if isinstance(asked.format, dict):
        constraint = {"schema": asked.format}
    elif asked.format == "json":
        constraint = {"schema": "json_object"}
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return Question(
        messages,
        options_of(options),
        logprobs=logprobs,
        constraint=constraint,
    )


# Replies


Write = Callable[[str], dict[str, Any]]


def _message(text: str) -> dict[str, Any]:
    return {"message": SaidMessage(role="assistant", content=text)}


def _response(text: str) -> dict[str, Any]:
    return {"response": text}


@router.post("/chat", responses=replies(Said))
async def chat(asked: ChatRequest, http: Request) -> Response:
    """Answer a conversation with images, by default in a stream of lines."""
    roles = {"tool": "user"}
    messages = [
        {"role": roles.get(m.role, m.role), "content": _parts(m.role, m.content, m.images)}
        for m in asked.messages
    ]
    return await _reply(asked, messages, http, _message)


@router.post("/generate", responses=replies(Said))
async def generate(asked: GenerateRequest, http: Request) -> Response:
    """Answer a question about images, by default in a stream of lines."""
    if asked.suffix or asked.raw:
        raise bad("suffix and raw are not for this model; leave them out.")
    messages = []
    if asked.prompt or asked.images:
        if asked.system:
            messages.append({"role": "system", "content": [text_part(asked.system)]})
        messages.append({"role": "user", "content": _parts("user", asked.prompt, asked.images)})
    return await _reply(asked, messages, http, _response)


async def _reply(asked: Asked, messages: list[Any], http: Request, write: Write) -> Response:
    service = service_of(http)
    service.check_model(asked.model)
    if not messages:  # which loads the model, in Ollama
        return json_reply(_said(service, write(""), done=True, done_reason="load"))
    question = _question(asked, messages, service)
    tickets, _ = await service.submit(question)
    if asked.stream is not False:
        lines = _lines(http, Answer(tickets[0]), question, write)
        return Stream(lines, tickets, "application/x-ndjson")
    answers = await until_left(http.receive, service.answers(tickets))
    if answers is None:
        return left()
    note(http, question, answers)
    answer = answers[0]
    said = write(answer.text) | _logprobs(service, answer, question) | _ended(answer)
    return json_reply(_said(service, said, done=True))


async def _lines(
    http: Request, answer: Answer, question: Question, write: Write
) -> AsyncIterator[str]:
    """A line for each piece, and a last one that says how the answer ended."""
    service = service_of(http)
    try:
        async with aclosing(service.pieces([answer.ticket])) as pieces:
            async for came in pieces:
                piece = Answer(answer.ticket, [] if came is None else [came[1]])
                answer.pieces += piece.pieces
                if came is None or piece.text or question.logprobs is not None:
                    said = write(piece.text) | _logprobs(service, piece, question)
                    yield _said(service, said, done=False).json_text() + "\n"
    except ApiError as error:
        yield ErrorLine(error=error.message).json_text() + "\n"
        return
    finally:
        note(http, question, [answer])
    yield _said(service, write("") | _ended(answer), done=True).json_text() + "\n"


class ErrorLine(Reply):
    error: str


def _said(service: Service, what: dict[str, Any], **more: Any) -> Said:
    now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    return Said(model=service.engine.name, created_at=now, **what, **more)


def _logprobs(service: Service, answer: Answer, question: Question) -> dict[str, Any]:
    if question.logprobs is None:
        return {}
    return {"logprobs": logprobs_of(service, answer.pieces).content}


def _ended(answer: Answer) -> dict[str, Any]:
    """How an answer ended, with times in whole nanoseconds."""
    last, times = answer.last, answer.timings
    rate = times["tokens_per_second"]
    decoding = (last.generation_tokens - 1) / rate if rate else 0.0
    return {
        "done_reason": last.finish_reason or "stop",
        "total_duration": round((times["first_token"] + decoding) * SECOND),
        "load_duration": round((times["queue"] + times["read"]) * SECOND),
        "prompt_eval_count": last.prompt_tokens,
        "prompt_eval_duration": round((times["encode"] + times["prefill"]) * SECOND),
        "eval_count": last.generation_tokens,
        "eval_duration": round(decoding * SECOND),
        "timings": Timings(**times),
    }


# Models


@router.get("/tags", response_model=Tags)
async def tags(http: Request) -> Any:
    """The loaded model."""
    service = service_of(http)
    return {"models": [_listed(service) | {"modified_at": STARTED}]}


@router.get("/ps", response_model=Running)
async def running(http: Request) -> Any:
    """The loaded model, how long it stays in memory, and how much of it is the GPU's."""
    service = service_of(http)
    on_gpu, context = service.facts.gpu_bytes, service.context
    more = {"expires_at": NEVER, "size_vram": on_gpu, "context_length": context}
    return {"models": [_listed(service) | more]}


@router.post("/show", responses=replies(Shown))
async def show(asked: ShowRequest, http: Request) -> Any:
    """The loaded model in detail."""
    service = service_of(http)
    service.check_model(asked.model or asked.name)
    facts, text = service.facts, service.engine.model.config.text
    info = {
        "general.architecture": facts.family,
        "general.parameter_count": facts.parameters,
        f"{facts.family}.context_length": service.context,
        f"{facts.family}.embedding_length": text.hidden_size,
        f"{facts.family}.block_count": text.num_hidden_layers,
        f"{facts.family}.vision.image_size": service.engine.processor.image_size,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": service.engine.processor.tokenizer.chat_template or "",
        "details": _details(service),
        "model_info": info,
        "capabilities": ["completion", "vision"],
        "modified_at": STARTED,
    }


@router.get("/version", response_model=Version)
async def version() -> Any:
    """The version of Ollama whose interface this is, and of this server."""
    return {"version": INTERFACE, "fastvlm_mlx": __version__}


def _listed(service: Service) -> dict[str, Any]:
    name, facts = f"{service.engine.name}:latest", service.facts
    return {
        "name": name,
        "model": name,
        "size": facts.bytes,
        "digest": facts.digest,
        "details": _details(service),
    }


def _details(service: Service) -> dict[str, Any]:
    facts = service.facts
    return {
        "parent_model": "",
        "format": "mlx",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.precision,
    }
