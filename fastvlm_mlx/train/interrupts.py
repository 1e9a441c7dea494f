"""Ctrl-C, or a system that shuts down, ends a run after the step in progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ANSWER = b"\nStopping after this step; once more to stop at once.\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_asked(*, said: bool = False) -> Iterator[Callable[[], bool]]:
    """Whether the first Ctrl-C or SIGTERM of the block came; the second one ends it at once.

    Args:
        said: answer the first one on standard error.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals reach the main thread only
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if said:
            with suppress(OSError):
                os.write(2, ANSWER)  # not `print`, which this may have interrupted

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
