"""Videos of requests → the parts that show them: a few frames as images, with their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..generation.video import FRAMES, video_parts
from ..video.choose import choose_frames
from ..video.decode import pixels_of

PATIENCE = 30.0  # seconds that looking through a video may take

Messages = Sequence[Mapping[str, Any]]


def video_sources(messages: Messages) -> list[str]:
    """What names the videos of messages, in order."""
    return [part["video"] for m in messages for part in m["content"] if part["type"] == "video"]


def frames_of_each(videos: int, images: int, most: int) -> int:
    """How many frames of each video may be shown, beside images, within so many images in all."""
    return min(FRAMES, max(1, (most - images) // max(1, videos)))


def show(data: bytes, name: str, frames: int, most_pixels: int) -> list[dict[str, Any]]:
    """The parts that show a video.

    Args:
        data: its file.
        name: what errors call it.
        frames: the most.
        most_pixels: of a frame.

    Raises:
        ValueError, OSError: it is no video, is too large, or takes too long.
        ImportError: PyAV is not installed.
    """
    if (pixels := pixels_of(data)) > most_pixels:
        raise ValueError(f"The frames of {name} have {pixels:,} pixels; at most {most_pixels:,}.")
    return video_parts(choose_frames(data, frames, PATIENCE))


def with_frames(messages: Messages, shown: Sequence[Sequence[dict[str, Any]]]) -> Messages:
    """The messages with the parts that show each video in its place."""
    coming = iter(shown)
    replaced = []
    for message in messages:
        each = (next(coming) if part["type"] == "video" else [part] for part in message["content"])
        replaced.append({**message, "content": [part for parts in each for part in parts]})
    return replaced
