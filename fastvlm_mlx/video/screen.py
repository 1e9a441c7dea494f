"""The screen of this machine, through mss."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ..checks import reason
from .frame import Frame
from .source import Source

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

RATE = 10.0  # pictures a second: each takes a good part of a core
ALLOW_ON_A_MAC = (
    "macOS does not let this program see the screen: allow it for your terminal in System Settings "
    "→ Privacy & Security → Screen & System Audio Recording, then start the terminal again."
)


class ScreenSource(Source):
    """A monitor by its number from 1, or with 0 all of them as one picture."""

    ready = True

    def __init__(self, monitor: int = 1):
        self.monitor = monitor
        self.name = f"screen {monitor}"

    def frames(self) -> Iterator[Frame]:
        try:
            import mss
        except ImportError:
            raise ImportError(
                "Reading the screen needs mss: pip install 'fastvlm-mlx[video]'."
            ) from None
        if _mac_says_no():
            raise PermissionError(ALLOW_ON_A_MAC)
        try:
            grabber: Any = mss.mss()
        except Exception as error:  # of its own types: no display, Wayland
            raise OSError(f"The screen can't be read: {reason(error)}.") from None
        with grabber:
            yield from self._grabbed(grabber)

    def _grabbed(self, grabber: Any) -> Iterator[Frame]:
        monitors = grabber.monitors
        if not 0 <= self.monitor < len(monitors):
            raise ValueError(f"There is no screen {self.monitor}: there are {len(monitors) - 1}.")
        start = monotonic()
        while True:
            now = monotonic()
            try:
                shot = grabber.grab(monitors[self.monitor])
            except Exception as error:  # as above
                raise OSError(f"The screen can't be read: {reason(error)}.") from None
            yield Frame(now - start, partial(_picture, shot.size, shot.bgra), now)
            sleep(max(0.0, now + 1 / RATE - monotonic()))


def _picture(size: tuple[int, int], bgra: bytes) -> PILImage:
    from PIL import Image

    return Image.frombytes("RGB", size, bgra, "raw", "BGRX")


def _mac_says_no() -> bool:
    """Whether macOS is known to show this program only the desktop's background."""
    if sys.platform != "darwin":
        return False
    import ctypes

    with suppress(OSError, AttributeError):
        graphics = ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
        graphics.CGPreflightScreenCaptureAccess.restype = ctypes.c_bool
        return not graphics.CGPreflightScreenCaptureAccess()
    return False
