"""A Ctrl-C while the `fastvlm` command is still being imported ends it without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # the exit code, as shells have it


def quiet_start() -> None:
    """If this process is the command, end it at once at a Ctrl-C, until `begin`.

    Nothing was begun that could be lost. KeyboardInterrupt would not do: a library that is being
    imported may take it for a failure of its own.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def begin() -> None:
    """From now on a Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this is `fastvlm …` or `python -m fastvlm_mlx …`, whose name is "-m" at first."""
    name = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    is_module = name == "-m" and __package__ in sys.orig_argv
    return is_module or name in ("fastvlm", "fastvlm.exe")


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
