"""Chat turns → token ids, with a place for every visual token."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import IMAGE_TOKEN_INDEX
from .messages import (
    IMAGE_PLACE,
    Messages,
    Turn,
    check_number,
    is_templated,
    read_messages,
)
from .template import GUARD, render_turns
from .tokenizer import SURROGATES, Tokenizer

OPENED_QUESTION = "<|im_start|>user\n"
ANSWER_PLACE = "\ud803"  # where an answer stands: a lone surrogate, which no text has


def build_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    num_visual_tokens: Sequence[int],
    system: str | None = None,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    conv_mode: str | None = None,
) -> list[int]:
    """Token ids of a chat, up to where the assistant's answer begins.

    Images go where user turns say `<image>` or have image parts. Without any such place, all of
    them go before the first user turn, each followed by a newline, as in the original's
    `predict.py`. Only the template brings control tokens: in a turn, `<|im_end|>` is text, and so
    is `<image>` in a turn that is not the user's or in a text part.

    A text that went through a ChatML template as a whole is taken as it is: its control tokens are
    control tokens.

    Args:
        tokenizer: the model's.
        messages: as in `apply_chat_template`; images in parts are places like any other.
        num_visual_tokens: for each image, in order, how many visual tokens it has.
        system: the system prompt; by default the template's own.
        image_token_index: the id that holds the place of each visual token.
        conv_mode: one of `CONV_MODES`, instead of the tokenizer's chat template.

    Raises:
        ValueError: as in `apply_chat_template`; also if there are marks, but not one per image, no
            user turn for the images to go into, two system prompts, or `system` or `conv_mode` for
            a text that is templated already.
    """
    text = render_prompt(
        tokenizer, messages, images=len(num_visual_tokens), system=system, conv_mode=conv_mode
    )
    return encode_prompt(tokenizer, text, num_visual_tokens, image_token_index)


def render_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    images: int,
    system: str | None = None,
    conv_mode: str | None = None,
    add_generation_prompt: bool = True,
    answers: bool = True,
) -> str:
    """The text of a chat as `encode_prompt` reads it: with IMAGE_PLACE where each image stands, and
    no whole control token but the template's own.

    Args:
        tokenizer, messages, system, conv_mode: as in `build_prompt`.
        images: how many there are.
        add_generation_prompt: whether to open the assistant's turn at the end.
        answers: whether to write the assistant's turns; otherwise each is an ANSWER_PLACE.

    Raises:
        ValueError: as `build_prompt`.
    """
    turns, slots = read_messages(messages)
    if is_templated(messages):
        if system is not None or conv_mode is not None:
            raise ValueError(
                "The prompt already went through a chat template: leave system and conv_mode out, "
                "or give the question by itself."
            )
        text = turns[0]["content"] if slots else _place_in_text(turns[0]["content"], images)
    else:
        turns = _add_system(turns, system)
        turns = turns if slots else _place_first(turns, images)
        turns = [{**turn, "content": _guard(tokenizer, turn["content"])} for turn in turns]
        if not answers:
            turns = [_without_answer(turn) for turn in turns]
        text = render_turns(tokenizer, turns, add_generation_prompt, conv_mode)
    check_number(text.count(IMAGE_PLACE), images)
    return text


def encode_prompt(
    tokenizer: Tokenizer,
    text: str,
    num_visual_tokens: Sequence[int],
    image_token_index: int = IMAGE_TOKEN_INDEX,
) -> list[int]:
    """Token ids of a text of `render_prompt`'s, or of a part of one that begins and ends at a
    control token; arguments as in `build_prompt`."""
    first, *others = text.split(IMAGE_PLACE)
    ids = tokenizer.encode(first, allow_special=True)
    for count, text in zip(num_visual_tokens, others, strict=True):
        ids += [image_token_index] * count + tokenizer.encode(text, allow_special=True)
    return ids


def _add_system(turns: list[Turn], system: str | None) -> list[Turn]:
    if system is None:
        return turns
    if turns[0]["role"] == "system":
        raise ValueError("The system prompt is given twice: as `system` and as a message.")
    return [{"role": "system", "content": SURROGATES.sub("", system)}, *turns]


def _place_first(turns: list[Turn], images: int) -> list[Turn]:
    """Put the places of images before the first question."""
    places = f"{IMAGE_PLACE}\n" * images
    for n, turn in enumerate(turns):
        if turn["role"] == "user":
            return [*turns[:n], {**turn, "content": places + turn["content"]}, *turns[n + 1 :]]
    if images:
        raise ValueError("There is no user message for the images to go into.")
    return turns


def _without_answer(turn: Turn) -> Turn:
    return {**turn, "content": ANSWER_PLACE} if turn["role"] == "assistant" else turn


def _place_in_text(text: str, images: int) -> str:
    """As `_place_first`, in a text that is templated already."""
    if images and OPENED_QUESTION not in text:
        raise ValueError("There is no user message for the images to go into.")
    places = f"{IMAGE_PLACE}\n" * images
    return text.replace(OPENED_QUESTION, OPENED_QUESTION + places, 1)


def _guard(tokenizer: Tokenizer, content: str) -> str:
    """Set off every character that begins or ends a control token.

    After rendering, only the template's own control tokens are whole, whatever the template did to
    the content (trimming, conditions), and `encode` drops the guards before it splits the text into
    tokens. So text on both sides of a guard is still split as one, as in the original.
    """
    edges = {char for token in tokenizer.controls for char in (token[0], token[-1])}
    return content.translate({ord(char): f"{GUARD}{char}{GUARD}" for char in edges})
