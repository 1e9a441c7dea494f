"""A camera of this machine: AVFoundation on a Mac, Video4Linux on Linux."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checks import reason, shown
from .decode import container_frames, import_av
from .frame import Frame
from .source import Source

# Frames a second that are tried in turn: AVFoundation takes only what a camera offers.
RATES = ("30", "60", "25", "24", "20", "15", "10", "5")
MOST_TRIED = 12
# AVFoundation's answers to whether this program may use the camera
RESTRICTED, DENIED = 1, 2
ALLOW_ON_A_MAC = (
    "macOS does not let this program use the camera: allow it for your terminal in System Settings "
    "→ Privacy & Security → Camera, then start the terminal again."
)


ELSEWHERE = "Cameras are read on macOS and Linux only; elsewhere, give frames on standard input."
VIDEO4LINUX = Path("/sys/class/video4linux")


class CameraSource(Source):
    """A camera by its number, from 0."""

    reconnects = ready = True

    def __init__(self, number: int = 0):
        import_av()
        self.number = number
        self.name = f"camera {number}"

    def frames(self) -> Iterator[Frame]:
        with open_camera(self.number) as container:
            yield from container_frames(container, self.name, live=True)


def list_cameras() -> dict[int, str]:
    """The names of this machine's cameras by number; ImportError, OSError if they can't be told."""
    import_av()
    if sys.platform == "darwin":
        return _list_on_a_mac()
    if sys.platform == "linux":
        return _list_on_linux(VIDEO4LINUX)
    raise OSError(ELSEWHERE)


def find_camera(wanted: str) -> int:
    """The number of the camera that is meant by its number, its name or a part of that.

    Raises:
        ValueError: several have such a name, or it is neither a number nor a name.
        FileNotFoundError: none has.
    """
    if wanted.isascii() and wanted.isdecimal():
        return int(wanted)
    names = list_cameras()
    parts = {n: name for n, name in names.items() if wanted.casefold() in name.casefold()}
    found = {n: name for n, name in parts.items() if name.casefold() == wanted.casefold()} or parts
    if wanted.strip() and len(found) == 1:
        return next(iter(found))
    there = ", ".join(f"{name} ({n})" for n, name in (found or names).items()) or "none"
    if found:
        raise ValueError(f"Several cameras are called {shown(wanted)}: {there}; give a number.")
    raise FileNotFoundError(f"There is no camera {shown(wanted)}; those found: {there}.")


def _list_on_linux(folder: Path) -> dict[int, str]:
    """Of the devices of one camera the first has its pictures, and the others facts about them."""
    cameras = {}
    for device in folder.glob("video*"):
        with suppress(OSError, ValueError):
            if (device / "index").read_text("ascii").strip() == "0":
                name = (device / "name").read_text("utf-8", "replace").strip()
                cameras[int(device.name.removeprefix("video"))] = name
    return dict(sorted(cameras.items()))


def _list_on_a_mac() -> dict[int, str]:
    import av

    with _logged(av.logging.INFO) as logs, suppress(av.error.FFmpegError, OSError):
        av.open("", format="avfoundation", options={"list_devices": "true"})
    return listed_cameras("\n".join(message for _, _, message in logs))


def listed_cameras(said: str) -> dict[int, str]:
    """The cameras in what AVFoundation logs, which names microphones after them."""
    _, _, devices = said.partition("video devices:")
    videos, _, _ = devices.partition("audio devices:")
    found = re.findall(r"\[(\d+)\] (.*)", videos)
    return {int(number): name.strip() for number, name in found if "Capture screen" not in name}


def open_camera(number: int) -> Any:
    """The container of a camera; OSError with a sentence if it can't be opened."""
    open_it = {"darwin": _open_on_a_mac, "linux": _open_on_linux}.get(sys.platform)
    if open_it is None:
        raise OSError(ELSEWHERE)
    try:
        return open_it(number)
    except ValueError as error:  # this PyAV was built without the system's cameras
        raise OSError(
            f"Camera {number} can't be opened: {reason(error)}; pip install --upgrade av."
        ) from None


def _open_on_linux(number: int) -> Any:
    import av

    device = f"/dev/video{number}"
    if not os.path.exists(device):
        raise FileNotFoundError(f"There is no camera {number}: {device} does not exist.")
    try:
        return av.open(device, format="v4l2", options={"input_format": "mjpeg"})
    except (av.error.FFmpegError, OSError):
        pass  # it has no JPEG, which is the fastest; whatever it has then
    try:
        return av.open(device, format="v4l2")
    except (av.error.FFmpegError, OSError) as error:
        raise _linux_error(error, number, device) from None


def _linux_error(error: Exception, number: int, device: str) -> OSError:
    said = reason(error)
    if isinstance(error, PermissionError):
        return PermissionError(
            f"Camera {number} can't be opened: this user may not read {device}; join its group with"
            " sudo usermod -aG video $USER, and log in again."
        )
    if "busy" in said.lower():
        return OSError(f"Camera {number} can't be opened: another program is using it.")
    return OSError(f"Camera {number} can't be opened: {said}.")


def _open_on_a_mac(number: int) -> Any:
    """Try the camera's frame rates in turn, those first that it is known to have."""
    import av

    if _mac_authorization() in (RESTRICTED, DENIED):
        raise PermissionError(ALLOW_ON_A_MAC)
    waiting, tried = [*RATES], 0
    said, error = "", None
    while waiting and tried < MOST_TRIED:
        rate, tried = waiting.pop(0), tried + 1
        with _logged() as logs:
            try:
                options = {"framerate": rate, "pixel_format": "nv12"}
                return av.open(f"{number}:none", format="avfoundation", options=options)
            except (av.error.FFmpegError, OSError) as found:
                error = found
        said = " ".join(message for _, _, message in logs)
        if "framerate" not in said.lower():
            break
        if tried == 1:
            waiting = offered_rates(said) + waiting
    raise _mac_error(error, said, number)


@contextmanager
def _logged(least: int | None = None) -> Iterator[list[Any]]:
    """What FFmpeg logs in this thread, of a level from errors on: its errors only have a number."""
    import av

    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR if least is None else least)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as logs:
            yield logs
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def offered_rates(said: str) -> list[str]:
    """The frame rates in what AVFoundation logs of a camera's modes, the highest first.

    It logs such as `1280x720@[15.000000 30.000030]fps`, and takes these numbers to the digit.
    """
    found = {rate for pair in re.findall(r"@\[([\d.]+) ([\d.]+)\]fps", said) for rate in pair}
    return sorted(found, key=float, reverse=True)


def _mac_error(error: Exception | None, said: str, number: int) -> OSError:
    lower = said.lower()
    if "not authorized" in lower or "permission" in lower or isinstance(error, PermissionError):
        return PermissionError(ALLOW_ON_A_MAC)
    if "invalid device index" in lower or "not found" in lower:
        return FileNotFoundError(f"There is no camera {number}.")
    if "in use" in lower or "cannot use" in lower:
        return OSError(f"Camera {number} can't be opened: another program is using it.")
    why = "it gives none" if error is None else reason(error)
    return OSError(f"Camera {number} can't be opened: {why}.")


def _mac_authorization() -> int | None:
    """AVCaptureDevice's authorizationStatusForMediaType: of video; None if it can't be asked."""
    import ctypes

    with suppress(OSError, AttributeError, ValueError):
        objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        frameworks = "/System/Library/Frameworks"
        foundation = ctypes.CDLL(f"{frameworks}/AVFoundation.framework/AVFoundation")
        objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p
        device = objc.objc_getClass(b"AVCaptureDevice")
        selector = objc.sel_registerName(b"authorizationStatusForMediaType:")
        video = ctypes.c_void_p.in_dll(foundation, "AVMediaTypeVideo")
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        ask = ctypes.CFUNCTYPE(ctypes.c_long, *kinds)(("objc_msgSend", objc))
        return int(ask(device, selector, video))
    return None
