"""A video in a prompt: a few of its frames as images, each with its time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..checks import check_whole_number
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages, check_messages, is_templated, read_messages
from ..text.prompt import build_prompt
from ..video.choose import choose_frames, no_frames
from ..video.decode import VideoSource, read_frames
from ..video.frame import Frame, timestamp
from .inputs import ImageSources, list_images, preprocess_images
from .options import Options

FRAMES = 8  # of a video, if nothing else is asked for
TOKENS_OF_A_TIME = 16  # at most, with the words beside it
CLOSE = 2.0  # seconds between frames, below which their times are given in tenths


def with_video(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSources,
    video: VideoSource,
    frames: int,
    options: Options,
) -> list[dict[str, Any]]:
    """A prompt with the frames of a video before what its first turn of the user's says.

    Args:
        model, processor, prompt: as `generate` takes them.
        image: must be none: a prompt has images or a video.
        video: as `read_frames` takes it.
        frames: the most frames; there are fewer, with a warning, where the model has no room.
        options: how the prompt is to be read and answered.

    Raises:
        ValueError, OSError: the video can't be read, or the prompt can't take one.
    """
    check_whole_number("frames", frames)
    if list_images(image):
        raise ValueError("Give image or video, not both; images may stand in parts of messages.")
    if is_templated(prompt):
        raise ValueError(
            "The prompt already went through a chat template: for a video, give the question by "
            "itself."
        )
    messages = check_messages(prompt)
    _, slots = read_messages(messages)
    if any(slot.image is None for slot in slots):
        raise ValueError("The prompt has places for images, and a video is given: it comes first.")
    count = min(frames, _room(model, processor, messages, len(slots), video, options))
    if count < frames:
        warnings.warn(
            f"{frames} frames do not fit into the {processor.max_length} tokens of the model: "
            f"{count} are taken; a smaller image_size makes room for more.",
            stacklevel=3,
        )
    chosen = choose_frames(video, count)
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise ValueError("The messages have no turn of the user's for the video to stand in.")
    content = messages[first]["content"]
    asked = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    messages[first]["content"] = [*video_parts(chosen), *asked]
    return messages


def video_parts(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    """The parts of a message that show frames of a video, each with its time."""
    apart = (frames[-1].time - frames[0].time) / max(1, len(frames) - 1)
    parts: list[dict[str, Any]] = []
    for frame in frames:
        time = timestamp(frame.time, tenths=0 < apart < CLOSE)
        parts.append({"type": "text", "text": f"Frame at {time}:\n"})
        parts.append({"type": "image", "image": frame.image})
    return parts


def _room(
    model: FastVLM,
    processor: Processor,
    messages: Messages,
    slots: int,
    video: VideoSource,
    options: Options,
) -> int:
    """How many frames fit beside an answer and the rest of a prompt; at least one.

    Images that the prompt has beside the video count as much as frames.
    """
    first = next(read_frames(video), None)
    if first is None:
        raise no_frames(video)
    pixels, sizes = preprocess_images(
        processor, [first.image], options.image_size, fast=options.fast
    )
    each = model.num_visual_tokens(pixels[0], sizes[0])
    rest = build_prompt(
        processor.tokenizer,
        messages,
        num_visual_tokens=[each] * slots,
        system=options.system,
        conv_mode=options.conv_mode,
    )
    left = processor.max_length - len(rest) - min(options.max_tokens, Options.max_tokens)
    return max(1, left // (each + TOKENS_OF_A_TIME))
