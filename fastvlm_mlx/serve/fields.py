"""The fields that requests of several interfaces share, and how they become a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SEEN = "images or videos"  # what only the user's messages have, for errors
FIRST_SEED = 2**64  # seeds are counted modulo this, as some clients send negative ones
SMALLEST_TOP_P = 1e-9  # 0, which OpenAI takes for the likeliest token, is no probability

Finite = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=64)]
Stop = StopText | StopTexts


class Model(BaseModel):
    """A request or a part of one: what it does not know, it ignores, as the interfaces do."""

    model_config = ConfigDict(extra="ignore", strict=False, protected_namespaces=())


class Url(Model):
    """The address of an image or video as chat completions wrap it."""

    url: str
    detail: str | None = None


class Reply(BaseModel):
    """A reply or a part of one; what is not set is not sent."""

    model_config = ConfigDict(protected_namespaces=())

    def json_text(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class ErrorReply(Reply):
    """An error in the envelope of the interface."""

    error: dict[str, Any] | str


def replies(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """What a route says of its replies: the model of a good one, and that of errors."""
    return {200: {"model": model}, "4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `generate`: those that were given, under their names there."""
    options = {name: value for name, value in given.items() if value is not None}
    if "seed" in options:
        options["seed"] %= FIRST_SEED
    if "top_p" in options:
        options["top_p"] = max(options["top_p"], SMALLEST_TOP_P)
    if "stop" in options:
        stop = options["stop"]
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return options


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(source: str) -> dict[str, Any]:
    return {"type": "image", "image": source}


def video_part(video: str | Url) -> dict[str, Any]:
    return {"type": "video", "video": video if isinstance(video, str) else video.url}
