"""Streamed replies, and what routes find of their server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .ask import Answer, Question, Service
from .fields import Reply
from .media import image_parts
from .ticket import Ticket

KEEP_ALIVE = ": keep-alive\n\n"  # a comment in a stream of events


class Stream(StreamingResponse):
    """A reply that is sent as it comes; whatever ends it, its answers are given up.

    Args:
        source: what is sent.
        tickets: of the answers.
        media_type: of the reply.
    """

    def __init__(self, source: AsyncIterator[str], tickets: Sequence[Ticket], media_type: str):
        # Proxies such as nginx would hold pieces back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(source, headers=headers, media_type=media_type)
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


def event_stream(events: AsyncIterator[str], tickets: Sequence[Ticket]) -> Stream:
    """A reply of server-sent events."""
    return Stream(events, tickets, "text/event-stream")


def event(value: Any, name: str | None = None) -> str:
    """An event with a value in JSON, and its name if it has one."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(value)}\n\n"


def json_reply(reply: Reply) -> Response:
    return Response(reply.json_text(), media_type="application/json")


def left() -> Response:
    """The reply to a client that left, which nobody reads; its status is nginx's for the log."""
    return Response(status_code=499)


def service_of(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


def note(http: Request, question: Question, answers: Sequence[Answer]) -> None:
    """Have the log say how much was asked and answered, and what, if the server may log that."""
    notes = http.scope["state"]["notes"]
    lasts = [answer.last for answer in answers if answer.pieces]
    if lasts:
        notes["prompt_tokens"] = lasts[0].prompt_tokens
        notes["generated_tokens"] = sum(last.generation_tokens for last in lasts)
        notes["time_to_first_token"] = round(lasts[0].ttft, 4)
    notes["images"] = len(image_parts(question.messages))
    if service_of(http).settings.log_prompts:
        notes["prompt"] = [
            {"role": m["role"], "text": "".join(p.get("text", "<image>") for p in m["content"])}
            for m in question.messages
        ]
        notes["answers"] = [answer.text for answer in answers]
