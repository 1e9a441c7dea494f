"""Videos in a prompt: a few frames of each as images, with their times."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import brief, check_whole_number, shown
from ..image.download import MAX_DOWNLOAD, download_bytes
from ..image.load import from_data_url
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
TIMEOUT = 60.0  # seconds, of a download
# Parts of messages, as OpenAI-like interfaces, transformers and mlx-vlm write them
VIDEO_PARTS = ("video", "video_url", "input_video")
SOURCES = ("video", "video_url", "url", "path")


def with_frames(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    image: ImageSources,
    video: VideoSource | None,
    frames: int,
    options: Options,
) -> Messages:
    """A prompt with frames in the places of its videos, which then is one with images only.

    Args:
        model, processor, prompt, image: as `generate` takes them.
        video: stands before what the first turn of the user's says; others stand in parts of
            messages: {"type": "video", "video": …} or {"type": "video_url", "video_url":
            {"url": …}}. A path, an http, https or data URL, bytes, or a file object.
        frames: of each video, the most; there are fewer, with a warning, where the model has no
            room.
        options: how the prompt is to be read and answered.

    Raises:
        ValueError, OSError: a video can't be read, or the prompt can't take one.
    """
    if video is not None:
        prompt = _put_first(prompt, image, video)
    if not has_videos(prompt):
        return prompt
    check_whole_number("frames", frames)
    messages = check_messages(prompt)
    videos = [source_of(part) for part in _parts(messages) if _is_video(part)]
    fetched = [fetch(source) for source in videos]
    count = min(frames, _room(model, processor, messages, fetched, options))
    if count < frames:
        warnings.warn(
            f"{frames} frames do not fit into the {processor.max_length} tokens of the model: "
            f"{count} are taken; a smaller image_size makes room for more.",
            stacklevel=4,
        )
    return _replaced(messages, [video_parts(choose_frames(source, count)) for source in fetched])


def has_videos(prompt: Messages) -> bool:
    """Whether videos stand in parts of a prompt."""
    return not isinstance(prompt, str) and any(map(_is_video, _parts(check_messages(prompt))))


def video_parts(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    """The parts of a message that show frames of a video, each with its time."""
    apart = (frames[-1].time - frames[0].time) / max(1, len(frames) - 1)
    parts: list[dict[str, Any]] = []
    for frame in frames:
        time = timestamp(frame.time, tenths=0 < apart < CLOSE)
        parts.append({"type": "text", "text": f"Frame at {time}:\n"})
        parts.append({"type": "image", "image": frame.image})
    return parts


def source_of(part: Mapping[str, Any]) -> VideoSource:
    """The video that a part has, under whichever key; ValueError if it has none."""
    given = [part[key] for key in SOURCES if part.get(key) is not None]
    source = given[0] if len(given) == 1 else None
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise ValueError(
            'A video part must be {"type": "video", "video": …} or {"type": "video_url", '
            f'"video_url": {{"url": …}}}}, found {shown(dict(part))}.'
        )
    return source


def fetch(video: VideoSource) -> VideoSource:
    """A video as `read_frames` takes it: the bytes of one at an http, https or data URL.

    Raises:
        ValueError: a data URL that is not well encoded.
        OSError: a download did not arrive, is larger than 100 MB, or took too long.
    """
    if not isinstance(video, str):
        return video
    if video[:5].lower() == "data:":
        return from_data_url(video, brief(video, 40))
    if video.lower().startswith(("http://", "https://")):
        return download_bytes(video, shown(video), TIMEOUT, MAX_DOWNLOAD)
    return video


def _put_first(prompt: Messages, image: ImageSources, video: VideoSource) -> list[dict[str, Any]]:
    """The prompt with a video as the first part of the user's first turn."""
    if list_images(image):
        raise ValueError("Give image or video, not both; images may stand in parts of messages.")
    if is_templated(prompt):
        raise ValueError(
            "The prompt already went through a chat template: for a video, give the question by "
            "itself."
        )
    messages = check_messages(prompt)
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise ValueError("The messages have no turn of the user's for the video to stand in.")
    content = first["content"]
    if isinstance(content, str):
        _, slots = read_messages([first])
        if slots:
            raise ValueError(
                "The prompt has places for images, and a video is given, which comes first."
            )
        content = [{"type": "text", "text": content}]
    first["content"] = [{"type": "video", "video": video}, *content]
    return messages


def _parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    contents = [message["content"] for message in messages]
    return [part for content in contents if not isinstance(content, str) for part in content]


def _is_video(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in VIDEO_PARTS


def _replaced(
    messages: Sequence[Mapping[str, Any]], shown: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The messages with other parts in the places of their videos."""
    coming = iter(shown)
    replaced = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            each = [next(coming) if _is_video(part) else [part] for part in content]
            content = [part for parts in each for part in parts]
        replaced.append({**message, "content": content})
    return replaced


def _room(
    model: FastVLM,
    processor: Processor,
    messages: Sequence[Mapping[str, Any]],
    videos: Sequence[VideoSource],
    options: Options,
) -> int:
    """How many frames of each video fit beside an answer and the rest of a prompt; at least one.

    Images that the prompt has beside the videos count as much as frames.
    """
    each = max(_tokens_of_a_frame(model, processor, video, options) for video in videos)
    without = _replaced(messages, [[]] * len(videos))
    _, slots = read_messages(without)
    rest = build_prompt(
        processor.tokenizer,
        without,
        num_visual_tokens=[each] * len(slots),
        system=options.system,
        conv_mode=options.conv_mode,
    )
    left = processor.max_length - len(rest) - min(options.max_tokens, Options.max_tokens)
    return max(1, left // (each + TOKENS_OF_A_TIME) // len(videos))


def _tokens_of_a_frame(
    model: FastVLM, processor: Processor, video: VideoSource, options: Options
) -> int:
    first = next(read_frames(video), None)
    if first is None:
        raise no_frames(video)
    images = [first.image]
    pixels, sizes = preprocess_images(processor, images, options.image_size, fast=options.fast)
    return model.num_visual_tokens(pixels[0], sizes[0])
