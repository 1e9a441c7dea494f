"""The newest frame of a source: a thread reads them, and holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from threading import Condition, Event, Thread
from time import monotonic

from ..checks import reason
from .frame import Frame
from .source import Source

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a source is opened again
END_WAIT = 2.0  # seconds that a thread has to end, before it is left behind


class Newest:
    """Reads a source in a thread of its own, and gives its newest frame.

    Frames that come while nobody asks are dropped. A source that breaks off is opened again, after
    waits that grow until a frame has come; one that could not be opened at all is an error.

        with closing(Newest(source)) as newest:
            for frame in newest: ...

    Args:
        source: read from its start.
        note: is told of breaks, from the reader's thread.
        wait: waits so many seconds, or less if the event is set.
    """

    def __init__(
        self,
        source: Source,
        note: Callable[[str], None] = lambda said: None,
        wait: Callable[[Event, float], object] = Event.wait,
    ):
        self.source = source
        self.dropped = 0
        self._note = note
        self._wait = wait
        self._stop = Event()
        self._changed = Condition()
        self._frame: Frame | None = None
        self._ended = False
        self._error: Exception | None = None
        self._came = 0  # frames
        self._first_start = self._last_time = 0.0
        self._thread = Thread(target=self._run, name=f"frames of {source.name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        """Wait for a frame that was not given yet; the source's errors."""
        with self._changed:
            self.wait()
            if (frame := self._frame) is None:
                raise StopIteration
            self._frame = None
            return frame

    def wait(self) -> None:
        """Wait until a frame is there or the source has ended; its errors."""
        with self._changed:
            # In steps, since on some systems a signal does not end a longer wait.
            while self._frame is None and not self._ended:
                self._changed.wait(0.5)
            if self._frame is None and self._error is not None:
                raise self._error

    def close(self) -> None:
        """End the thread, and with it the source."""
        self._stop.set()
        self._thread.join(END_WAIT)

    def _run(self) -> None:
        try:
            self._read_until_end()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_until_end(self) -> None:
        breaks = 0
        while not self._stop.is_set():
            came, error = self._came, None
            try:
                self._read()
            except (ValueError, OSError) as found:
                error = found
                if not self._came or not self.source.reconnects:
                    raise
            if self._stop.is_set() or not self.source.reconnects:
                return
            if not self._came:
                raise OSError(f"Cannot read {self.source.name}: it ended before its first frame.")
            breaks = 1 if self._came > came else breaks + 1
            seconds = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(breaks - 1, 9))
            said = "it ended" if error is None else reason(error)
            self._note(f"{self.source.name} broke off ({said}); again in {seconds:g} s.")
            self._wait(self._stop, seconds)

    def _read(self) -> None:
        frames = self.source.frames()
        with closing(frames):  # type: ignore[type-var]
            start = monotonic()
            if not self._came:
                self._first_start = start
            before = max(self._last_time, start - self._first_start)  # of earlier connections
            for frame in frames:
                self._last_time = frame.time = before + frame.time
                if self.source.timed:
                    frame.arrived = self._play(start + frame.time)
                if self._stop.is_set():
                    return
                self._put(frame)

    def _play(self, due: float) -> float:
        """Wait until a frame of a file is to be shown; when that was."""
        if (ahead := due - monotonic()) > 0:
            self._stop.wait(ahead)
        return max(due, monotonic())

    def _put(self, frame: Frame) -> None:
        with self._changed:
            self.dropped += self._frame is not None
            self._frame = frame
            self._came += 1
            self._changed.notify_all()
