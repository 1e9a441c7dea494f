"""A few frames that stand for a whole video: by scene, and uniformly within each."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from ..checks import check_whole_number
from ..progress import progress_bar
from .changes import difference, sketch
from .decode import VideoSource, duration_of, name_of, read_frames
from .frame import Frame

if TYPE_CHECKING:
    import numpy as np

APART = 0.2  # seconds between the frames that are looked at
CUT = 20.0  # of 255: a greater mean change from one of them to the next is another scene
LONG = 300.0  # seconds, from which on keyframes are enough to choose from, if they are many
LONG_WORK = 60.0  # seconds of video, from which on progress is shown
KEYFRAMES = 4  # for each frame to be chosen


class Look(NamedTuple):
    """A frame that was looked at: its number in the video, its time, and what is new in it."""

    number: int
    time: float
    change: float


def choose_frames(video: VideoSource, count: int, patience: float = inf) -> list[Frame]:
    """At most `count` frames of a video file, in order, their pictures read.

    The video is cut into scenes where its picture changes most, and each scene gives frames spread
    evenly over it, the more the longer it is: of a single scene, they are uniform in time. It is
    read twice, so that only those frames are ever held.

    Args:
        video: as `read_frames` takes it.
        count: at least 1.
        patience: seconds that it may take.

    Raises:
        ValueError, OSError: as `read_frames`, or it has no frame that can be decoded.
        TimeoutError: it takes longer than `patience`.
    """
    check_whole_number("frames", count)
    deadline = monotonic() + patience
    duration = duration_of(video)
    keyframes = duration is not None and duration > LONG
    looks = _look_through(video, duration, keyframes, deadline)
    if keyframes and len(looks) < KEYFRAMES * count:
        keyframes = False
        looks = _look_through(video, duration, keyframes, deadline)
    if not looks:
        raise no_frames(video)
    return _read_chosen(video, spread(looks, count), keyframes, deadline)


def no_frames(video: VideoSource) -> ValueError:
    """What is wrong with a video that has no frames."""
    return ValueError(f"Cannot read {name_of(video)}: none of its frames can be decoded.")


def _look_through(
    video: VideoSource, duration: float | None, keyframes: bool, deadline: float
) -> list[Look]:
    """What changes from frame to frame, with the frames `APART`."""
    looks: list[Look] = []
    last: np.ndarray | None = None
    bar = progress_bar(
        round(duration or 0) or None, "Video", unit="s", shown=(duration or 0) > LONG_WORK
    )
    with bar:
        for number, frame in enumerate(read_frames(video, keyframes=keyframes)):
            _check_time(video, deadline)
            if looks and frame.time < looks[-1].time + APART:
                continue
            try:
                now = sketch(frame.image)
            except ValueError:  # a damaged one, between others
                continue
            change = 0.0 if last is None else difference(now, last)
            last = now
            bar.update(max(0, int(frame.time) - bar.n))
            looks.append(Look(number, frame.time, change))
    return looks


def spread(looks: Sequence[Look], count: int) -> list[int]:
    """The numbers of the frames to take, in order."""
    scenes = list(_scenes(looks, count))
    shares = _shares([_length(scene) for scene in scenes], [len(s) for s in scenes], count)
    chosen = []
    for scene, share in zip(scenes, shares, strict=True):
        start, length = scene[0].time, _length(scene)
        wanted = [start + length * (i + 0.5) / share for i in range(share)]
        chosen += [_nearest(scene, time).number for time in wanted]
    return sorted(set(chosen))


def _scenes(looks: Sequence[Look], most: int) -> Iterator[Sequence[Look]]:
    """The looks, cut before the greatest changes, into so many scenes at most."""
    cuts = [i for i in range(1, len(looks)) if looks[i].change > CUT]
    cuts = sorted(heapq.nlargest(most - 1, cuts, key=lambda i: looks[i].change))
    for start, end in zip([0, *cuts], [*cuts, len(looks)], strict=True):
        yield looks[start:end]


def _length(scene: Sequence[Look]) -> float:
    return scene[-1].time - scene[0].time + APART


def _shares(lengths: Sequence[float], most: Sequence[int], count: int) -> list[int]:
    """How many frames each scene gives: one, and the rest in proportion to their lengths."""
    shares = [1] * len(lengths)
    while sum(shares) < count:
        open_ones = [i for i in range(len(lengths)) if shares[i] < most[i]]
        if not open_ones:
            break
        shares[max(open_ones, key=lambda i: lengths[i] / shares[i])] += 1
    return shares


def _nearest(scene: Sequence[Look], time: float) -> Look:
    """The frame that is seen at a time: each is for as long as they are apart."""
    return min(scene, key=lambda look: abs(look.time + APART / 2 - time))


def _check_time(video: VideoSource, deadline: float) -> None:
    if monotonic() > deadline:
        raise TimeoutError(f"Cannot read {name_of(video)}: it takes too long; send a shorter one.")


def _read_chosen(
    video: VideoSource, numbers: Sequence[int], keyframes: bool, deadline: float
) -> list[Frame]:
    chosen, wanted = [], set(numbers)
    for number, frame in enumerate(read_frames(video, keyframes=keyframes)):
        _check_time(video, deadline)
        if number in wanted:
            _ = frame.image
            chosen.append(frame)
        if number == numbers[-1]:
            break
    return chosen
