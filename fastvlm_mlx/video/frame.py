"""A frame: when it was, and how its picture is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


@dataclass(eq=False)
class Frame:
    """A frame of a video or of a live source.

    Most frames of a live source are never looked at, so a picture is made only when it is asked
    for, and then kept.

    Attributes:
        time: seconds since the first frame of its source.
        read: makes the picture; ValueError or OSError if it can't be read.
        arrived: when it was read, on the clock of `time.monotonic`.
    """

    time: float
    read: Callable[[], PILImage]
    arrived: float = field(default_factory=monotonic)

    @cached_property
    def image(self) -> PILImage:
        """The picture: upright, in RGB, with square pixels."""
        return self.read()

    def age(self) -> float:
        """Seconds since it was read."""
        return monotonic() - self.arrived


def timestamp(seconds: float, *, tenths: bool = False) -> str:
    """A time as players show it: 0:07, 1:02:03, with tenths 0:07.5."""
    units = int(seconds * 10) if tenths else int(seconds) * 10
    minutes, rest = divmod(units, 600)
    hours, minutes = divmod(minutes, 60)
    shown = f"{rest // 10:02}" + (f".{rest % 10}" if tenths else "")
    return f"{hours}:{minutes:02}:{shown}" if hours else f"{minutes}:{shown}"
