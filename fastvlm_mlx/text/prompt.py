"""Chat turns → token ids, with the places where images go."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..config import IMAGE_TOKEN_INDEX
from .template import GUARD, IMAGE_PLACE, Messages, _checked, apply_chat_template
from .tokenizer import SURROGATES, Tokenizer

IMAGE_MARK = "<image>"


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

    Images go where user turns say `<image>`; without such a mark all go before the first user
    turn, each with a newline after it, as in `predict.py` of the original. Control tokens come
    from the template alone: in a turn, `<|im_end|>` is text, and so is `<image>` in a turn that
    is not the user's.

    Args:
        tokenizer: the model's.
        messages: as in `apply_chat_template`.
        num_visual_tokens: for each image, in order, how many visual tokens it has.
        system: the system prompt, if not the template's own.
        image_token_index: the id that holds each visual token's place.
        conv_mode: one of `CONV_MODES`, instead of the tokenizer's chat template.

    Raises:
        ValueError: as in `apply_chat_template`; also if there are marks, but not one an image, or
            no user turn for the images, or two system prompts.
    """
    turns = _checked(messages)
    if system is not None:
        if turns[0]["role"] == "system":
            raise ValueError("The system prompt is given twice: as `system` and as a message.")
        turns = [{"role": "system", "content": system}, *turns]
    turns = _place_images(turns, len(num_visual_tokens))
    turns = [{**turn, "content": _guard(tokenizer, turn["content"])} for turn in turns]
    text = apply_chat_template(tokenizer, turns, conv_mode=conv_mode)
    pieces = text.split(IMAGE_PLACE)
    return _join(
        tokenizer,
        pieces,
        num_visual_tokens,
        allow_special=True,
        image_token_index=image_token_index,
    )


def check_marks(messages: Messages, images: int) -> None:
    """ValueError if user turns have image marks, but not one an image."""
    users = [turn["content"] for turn in _checked(messages) if turn["role"] == "user"]
    marks = sum(content.count(IMAGE_MARK) for content in users)
    if marks not in (0, images):
        raise _marks_differ(marks, images)


def encode_with_images(
    tokenizer: Tokenizer,
    text: str,
    num_visual_tokens: Sequence[int],
    *,
    allow_special: bool = False,
    image_token_index: int = IMAGE_TOKEN_INDEX,
) -> list[int]:
    """Token ids of a text as it stands, with images at its `<image>` marks.

    The original's `tokenizer_image_token`, with one id for each visual token instead of one for
    each image.

    Raises:
        ValueError: the text has more or fewer marks than there are images.
    """
    pieces = text.split(IMAGE_MARK)
    return _join(
        tokenizer,
        pieces,
        num_visual_tokens,
        allow_special=allow_special,
        image_token_index=image_token_index,
    )


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[mx.array, list[int]]:
    """Left-pad token ids to int32 [B, T]; also gives the left padding of each sequence."""
    length = max(map(len, sequences), default=0)
    padding = [length - len(ids) for ids in sequences]
    rows = [[pad_id] * n + list(ids) for n, ids in zip(padding, sequences, strict=True)]
    return mx.array(rows, dtype=mx.int32).reshape(len(rows), length), padding


def _place_images(messages: list[dict[str, str]], images: int) -> list[dict[str, str]]:
    """Put IMAGE_PLACE for the user's marks, or before the first question if there are none."""
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

    After rendering, only the template's own control tokens are whole, whatever it did to the
    content (trim, conditions), and `encode` drops the guards before it cuts text into tokens. So
    text on both sides of a seam is still cut as one, as the original does.
    """
    edges = {char for token in tokenizer.controls for char in (token[0], token[-1])}
    return content.translate({ord(char): f"{GUARD}{char}{GUARD}" for char in edges})


def _marks_differ(marks: int, images: int) -> ValueError:
    return ValueError(
        f"The prompt has {marks} {IMAGE_MARK} mark(s) for {images} image(s): "
        "write one mark for each image."
    )


def _join(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    num_visual_tokens: Sequence[int],
    *,
    allow_special: bool,
    image_token_index: int,
) -> list[int]:
    marks, images = len(pieces) - 1, len(num_visual_tokens)
    if marks != images:
        raise _marks_differ(marks, images)
    ids = tokenizer.encode(pieces[0], allow_special=allow_special)
    for count, piece in zip(num_visual_tokens, pieces[1:], strict=True):
        ids += [image_token_index] * count + tokenizer.encode(piece, allow_special=allow_special)
    return ids
