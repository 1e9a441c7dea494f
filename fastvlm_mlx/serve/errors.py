"""What can go wrong with a request, in the words and the envelope of each interface."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What each interface calls an error of this status
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP's.
        message: a sentence, without contents of the request.
        code: OpenAI's short name for it, if there is one.
        param: which field of the request is wrong, if one is.
        headers: further ones of the reply.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong by itself."""
    return ApiError(400, message, code, param)


def too_long(tokens: int | str, limit: int, context: int) -> ApiError:
    """A prompt that leaves no room for an answer, or is longer than the server allows."""
    return bad(
        f"This model's maximum context length is {context} tokens with the answer. A prompt may "
        f"have at most {limit}, and this one has {tokens}, images included; shorten it, or use "
        "fewer or smaller images.",
        "messages",
        "context_length_exceeded",
    )


def failed() -> ApiError:
    """What is the server's own fault; what exactly, only its log says."""
    return ApiError(500, "The server failed at this request.")


def envelope(path: str, error: ApiError, request_id: str) -> dict[str, Any]:
    """An error as the interface at this path writes it."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(error.status, _other_type(error.status, "api_error"))
        said = {"type": kind, "message": error.message}
        return {"type": "error", "error": said, "request_id": request_id}
    if path.startswith("/api/"):
        return {"error": error.message}
    return {"error": openai_error(error)}


def openai_error(error: ApiError) -> dict[str, Any]:
    """The inner object of OpenAI's envelope, which stands in streams, too."""
    kind = OPENAI_TYPES.get(error.status, _other_type(error.status, "server_error"))
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def _other_type(status: int, of_server: str) -> str:
    return "invalid_request_error" if status < 500 else of_server
