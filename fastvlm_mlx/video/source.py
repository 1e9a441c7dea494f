"""Sources of frames: what they have in common, files, and pictures that a program makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from time import monotonic
from typing import Any

from ..image.load import ImageSource, load_image
from .decode import VideoSource, import_av, name_of, read_frames
from .frame import Frame


class Source:
    """Where frames come from.

    Attributes:
        name: what messages call it, without passwords.
        live: its frames come by themselves, and of those that nobody took only the newest counts.
        timed: its frames are there at once, but were made at a speed of their own.
        reconnects: where it breaks off, it is worth opening again.
        ready: a frame comes soon once it is open, so that whether one does is seen before a model
            is loaded.
    """

    name = "the source"
    live = True
    timed = False
    reconnects = False
    ready = False

    def frames(self) -> Iterator[Frame]:
        """Open the source, and give its frames until it ends.

        Raises:
            ValueError, OSError: it can't be opened, or not be read further.
            ImportError: a library for it is not installed.
        """
        raise NotImplementedError


class FileSource(Source):
    """A video file."""

    live, timed = False, True

    def __init__(self, video: VideoSource):
        import_av()  # what is not installed is said before anything else is done
        self.video = video
        self.name = name_of(video)

    def frames(self) -> Iterator[Frame]:
        return read_frames(self.video)


class PictureSource(Source):
    """Pictures that a program makes, one after the other; none is passed over."""

    live = False
    name = "the pictures"

    def __init__(self, pictures: Iterable[ImageSource]):
        self.pictures = pictures

    def frames(self) -> Iterator[Frame]:
        clock = Stopwatch()
        for picture in self.pictures:
            yield picture if isinstance(picture, Frame) else clock.frame(picture)


class Stopwatch:
    """Makes frames of pictures that come without a time."""

    def __init__(self) -> None:
        self._start: float | None = None

    def frame(self, picture: Any) -> Frame:
        """A frame of now."""
        now = monotonic()
        if self._start is None:
            self._start = now
        return Frame(now - self._start, partial(load_image, picture), now)
