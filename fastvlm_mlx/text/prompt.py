"""Chat turns → token ids, with a place for every visual token."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import IMAGE_TOKEN_INDEX
from .template import GUARD, IMAGE_PLACE, Messages, apply_chat_template, check_messages
from .tokenizer import SURROGATES, Tokenizer

IMAGE_MARK = "<image>"  # where an image stands in a text; also its token in readers that need one


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

    Images go where user turns say `<image>`. Without such a mark, all of them go before the first
    user turn, each followed by a newline, as in the original's `predict.py`. Only the template
    brings control tokens: in a turn, `<|im_end|>` is text, and so is `<image>` in a turn that is
    not the user's.

    Args:
        tokenizer: the model's.
        messages: as in `apply_chat_template`.
        num_visual_tokens: for each image, in order, how many visual tokens it has.
        system: the system prompt; by default the template's own.
        image_token_index: the id that holds the place of each visual token.
        conv_mode: one of `CONV_MODES`, instead of the tokenizer's chat template.

    Raises:
        ValueError: as in `apply_chat_template`; also if there are marks, but not one per image, no
            user turn for the images to go into, or two system prompts.
    """
    turns = check_messages(messages)
    if system is not None:
        if turns[0]["role"] == "system":
            raise ValueError("The system prompt is given twice: as `system` and as a message.")
        turns = [{"role": "system", "content": system}, *turns]
    turns = _place_images(turns, len(num_visual_tokens))
    turns = [{**turn, "content": _guard(tokenizer, turn["content"])} for turn in turns]
    first, *others = apply_chat_template(tokenizer, turns, conv_mode=conv_mode).split(IMAGE_PLACE)
    _check_number(len(others), len(num_visual_tokens))
    ids = tokenizer.encode(first, allow_special=True)
    for count, text in zip(num_visual_tokens, others, strict=True):
        ids += [image_token_index] * count + tokenizer.encode(text, allow_special=True)
    return ids


def check_marks(messages: Messages, images: int) -> None:
    """ValueError if user turns have image marks, but not one per image."""
    users = [turn["content"] for turn in check_messages(messages) if turn["role"] == "user"]
    if marks := sum(content.count(IMAGE_MARK) for content in users):
        _check_number(marks, images)


def _check_number(marks: int, images: int) -> None:
    if marks != images:
        raise ValueError(
            f"The prompt has {marks} {IMAGE_MARK} mark(s) for {images} image(s): "
            "write one mark for each image."
        )


def _place_images(messages: list[dict[str, str]], images: int) -> list[dict[str, str]]:
    """Replace the user's marks by IMAGE_PLACE; without any, mark the first question."""
    turns = [{**turn, "content": SURROGATES.sub("", turn["content"])} for turn in messages]
    questions = [turn for turn in turns if turn["role"] == "user"]
    if images and not questions:
        raise ValueError("There is no user message for the images to go into.")
    if not any(IMAGE_MARK in turn["content"] for turn in questions):
        for turn in questions[:1]:
            turn["content"] = f"{IMAGE_MARK}\n" * images + turn["content"]
    for turn in questions:
        turn["content"] = turn["content"].replace(IMAGE_MARK, IMAGE_PLACE)
    return turns


def _guard(tokenizer: Tokenizer, content: str) -> str:
    """Set off every character that begins or ends a control token.

    After rendering, only the template's own control tokens are whole, whatever the template did to
    the content (trimming, conditions), and `encode` drops the guards before it splits the text into
    tokens. So text on both sides of a guard is still split as one, as in the original.
    """
    edges = {char for token in tokenizer.controls for char in (token[0], token[-1])}
    return content.translate({ord(char): f"{GUARD}{char}{GUARD}" for char in edges})
