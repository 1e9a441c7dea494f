"""Messages, as several libraries write them → turns of text in which images have their places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..checks import brief
from .tokenizer import SURROGATES

ROLES = ("system", "user", "assistant")
IMAGE_MARK = "<image>"  # where an image stands in a text; also its token in readers that need one
IMAGE_PLACE = "\ud801"  # where it stands in a turn: a lone surrogate, which no text has
# The types of parts that OpenAI's two interfaces, Anthropic's, transformers and mlx-vlm have, and
# the keys under which they name an image.
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
SOURCES = ("image", "image_url", "url", "path", "base64", "source")
# Closed turns and then an opened one of the assistant's, in which the answer may have begun.
TEMPLATED = re.compile(
    r"\s*<\|im_start\|>(?:system|user|assistant)\n.*<\|im_end\|>"
    r"\s*<\|im_start\|>assistant(?:\n(?:(?!<\|im_(?:start|end)\|>).)*)?",
    re.DOTALL,
)

Messages = str | Sequence[Mapping[str, Any]]
"""A text, a list of messages, or the parts of one user turn."""
Turn = dict[str, str]


class Slot(NamedTuple):
    """A place for an image: the number of its turn, and the image itself if its part has it."""

    turn: int
    image: Any


def read_messages(messages: Messages) -> tuple[list[Turn], list[Slot]]:
    """Messages as turns of text, with IMAGE_PLACE where images stand, and a slot for each of these.

    A message's content is a text, in which a user marks the places of images by `<image>`, or a
    list of parts, in which an image stands where its part stands, followed by a newline as in the
    original's prompts, and `<image>` is text.

    Raises:
        ValueError: malformed messages; the sentence names the turn.
    """
    turns, slots = [], []
    for number, message in enumerate(check_messages(messages), 1):
        try:
            text, images = _read_content(message["role"], message["content"])
        except ValueError as error:
            raise ValueError(f"Turn {number} of the messages: {error}") from None
        turns.append({"role": message["role"], "content": text})
        slots += [Slot(number, image) for image in images]
    return turns, slots


def collect_images(messages: Messages, images: Sequence[Any]) -> list[Any]:
    """The images of messages in order: those in their parts, and the next of `images` elsewhere.

    Raises:
        ValueError: malformed messages, or there are places, but not one per image.
    """
    _, slots = read_messages(messages)
    waiting = [slot.turn for slot in slots if slot.image is None]
    if not slots or len(waiting) == len(images):
        rest = iter(images)
        placed = [next(rest) if slot.image is None else slot.image for slot in slots]
        return [*placed, *rest]
    if all(isinstance(message["content"], str) for message in check_messages(messages)):
        check_number(len(waiting), len(images))
    first = f" (the first in turn {waiting[0]})" if waiting else ""
    raise ValueError(
        f"The messages have {len(waiting)} image part(s) or mark(s) without a source{first} for "
        f"{len(images)} image(s) given beside them: give one image for each."
    )


def check_number(marks: int, images: int) -> None:
    """ValueError unless there is one image mark per image."""
    if marks != images:
        raise ValueError(
            f"The prompt has {marks} {IMAGE_MARK} mark(s) for {images} image(s): "
            "write one mark for each image."
        )


def read_question(prompt: Messages, images: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The content of one user turn as a conversation keeps it, and the images that stand in it.

    Args:
        prompt: a text, the parts of a turn, or a list of one message.
        images: those given beside it.

    Raises:
        ValueError: as `collect_images`, or it is not one turn of the user's.
    """
    if is_templated(prompt):
        raise ValueError(
            "The question already went through a chat template, which a conversation does by "
            "itself: give only its text."
        )
    messages = check_messages(prompt)
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise ValueError("Ask one question at a time: a text, or one message of the user's.")
    found = collect_images(messages, images)
    content, (_, slots) = messages[0]["content"], read_messages(messages)
    before = 0 if slots else len(found)
    if isinstance(content, str):
        return f"{IMAGE_MARK}\n" * before + content, found
    kept = [
        {"type": "image"} if part["type"] in IMAGE_PARTS else {"type": "text", "text": part["text"]}
        for part in content
    ]
    return [{"type": "image"}] * before + kept, found


def is_templated(prompt: Messages) -> bool:
    """Whether a prompt is a text that already went through a ChatML template as a whole."""
    return isinstance(prompt, str) and TEMPLATED.fullmatch(prompt) is not None


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as a list of turns with role and content; ValueError if they are malformed."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        found = brief(repr(messages))
        raise ValueError(f"A prompt must be a text or a list of messages, found {found}.")
    if not messages:
        raise ValueError("There are no messages: give at least one, from the user.")
    if all(isinstance(m, Mapping) and "type" in m and "role" not in m for m in messages):
        return [{"role": "user", "content": messages}]
    for number, message in enumerate(messages, 1):
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), (str, list, tuple)):
            raise ValueError(
                f"Turn {number} of the messages must have a role (system, user or assistant) and, "
                f"as content, a text or a list of parts, found {brief(repr(message))}."
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _read_content(role: str, content: str | Sequence[Any]) -> tuple[str, list[Any]]:
    """A message's text with IMAGE_PLACE for images, and these: None for one without a source."""
    if isinstance(content, str):
        text = SURROGATES.sub("", content)
        marks = text.count(IMAGE_MARK) if role == "user" else 0
        return text.replace(IMAGE_MARK, IMAGE_PLACE) if marks else text, [None] * marks
    text, images = "", []
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text += SURROGATES.sub("", part["text"])
        elif kind not in IMAGE_PARTS:
            raise ValueError(
                f'part {number} must be {{"type": "text", "text": …}} or {{"type": "image", '
                f'"image": …}}, found {brief(repr(part))}.'
            )
        elif role != "user":
            raise ValueError(f"part {number} is an image, which only the user's turns can have.")
        else:
            images.append(_source(part, f"part {number}"))
            text += f"{IMAGE_PLACE}\n"
    return text, images


def _source(part: Mapping[str, Any], name: str) -> Any:
    """The image that a part has, under whichever key; None for {"type": "image"} by itself."""
    given = {key: part[key] for key in SOURCES if part.get(key) is not None}
    if len(given) > 1:
        raise ValueError(f"{name} has its image twice, as {' and '.join(given)}; leave one out.")
    if not given:
        if part["type"] == "image":
            return None
        raise ValueError(f"{name} has no image: give its URL as image_url.")
    ((key, source),) = given.items()
    if isinstance(source, Mapping):
        return _from_mapping(key, source, name)
    if key == "base64" and isinstance(source, str) and not source.startswith("data:"):
        return f"data:;base64,{source}"
    return source


def _from_mapping(key: str, source: Mapping[str, Any], name: str) -> str:
    """The URL in OpenAI's {"url": …, "detail": …}, or in Anthropic's {"type": "url", "url": …} and
    {"type": "base64", "media_type": …, "data": …}."""
    if isinstance(url := source.get("url"), str):
        return url
    if key != "source":
        raise ValueError(f'{name} has no image: {key} must be a URL or {{"url": …}}.')
    if not isinstance(data := source.get("data"), str):
        raise ValueError(
            f'{name} has no image: its source must be {{"type": "base64", "media_type": …, '
            '"data": …} or {"type": "url", "url": …}.'
        )
    return (
        data if data.startswith("data:") else f"data:{source.get('media_type', '')};base64,{data}"
    )
