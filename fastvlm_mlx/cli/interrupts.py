"""Ctrl-C stops an answer even where the exception that it raises gets lost.

Python raises KeyboardInterrupt wherever the main thread is at that moment. In the callback of a
weak reference it is printed and forgotten, and C++ code that tries one conversion after the other
takes it for a failed try. So a Ctrl-C is also noted, and looked for between pieces of an answer.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_noted = False


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """Note every Ctrl-C that comes in the block, unless the process was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    forget_interrupt()
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, _note)
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else hook(lost)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _note(number: int, frame: FrameType | None) -> Any:
    global _noted
    _noted = True
    raise KeyboardInterrupt


def forget_interrupt() -> None:
    """What was interrupted has ended, or something new begins."""
    global _noted
    _noted = False


def check_interrupt() -> None:
    """KeyboardInterrupt if there was a Ctrl-C since `forget_interrupt`."""
    if _noted:
        forget_interrupt()
        raise KeyboardInterrupt
