"""A video → its frames: in time, upright, with square pixels, in the colours that ffmpeg shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from io import BytesIO
from math import inf
from struct import unpack
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from ..checks import reason, shown
from ..image.decode import MAX_PIXELS
from .frame import Frame

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image as PILImage

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"
# In a row, after which a file is taken to have nothing more
MOST_BROKEN_PACKETS = 1000
USUAL_RATE = 25.0  # frames a second, where nothing says how many
PATIENCE = 10.0  # seconds that a live source may say that nothing is there yet
# A step back by more than this many seconds begins a new count, as where a recorder was restarted
# or a transport stream's counter ran over; a smaller one is an error in a pts.
JUMP = 1.0
# A file may name others to be opened, as playlists do: only what stands on this disk beside a path,
# and nothing where the bytes may be a stranger's.
FOR_PATHS = {"protocol_whitelist": "file,crypto,data"}
# And only formats that videos come in, rather than all that FFmpeg ever met.
FOR_BYTES = {
    "protocol_whitelist": "data",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,avi,gif,flv,ogg,asf,"
    "h264,hevc,ivf",
}


def import_av() -> Any:
    """PyAV; ImportError with the way to install it."""
    try:
        import av
    except ImportError:
        raise ImportError("Reading video needs PyAV: pip install 'fastvlm-mlx[video]'.") from None
    return av


def read_frames(video: VideoSource, *, keyframes: bool = False) -> Iterator[Frame]:
    """The frames of a video file in order.

    Args:
        video: a path (`~` is expanded), the bytes of a file, or a binary file object that can seek.
        keyframes: only those that are coded by themselves, which is many times faster.

    Raises:
        ValueError: not a video, or one that nothing here can decode.
        FileNotFoundError, IsADirectoryError, OSError: the file can't be read.
    """
    with open_file(video) as container:
        yield from container_frames(container, name_of(video), keyframes=keyframes)


@contextmanager
def open_file(video: VideoSource) -> Iterator[InputContainer]:
    """A video file, opened; errors as `read_frames`."""
    name = name_of(video)
    if isinstance(video, (str, os.PathLike)):
        source: Any = os.path.expanduser(os.fspath(video))
        if os.path.isdir(source):
            raise IsADirectoryError(f"Cannot read {name}: it is a folder, not a video.")
        if not os.path.exists(source):
            raise FileNotFoundError(f"Cannot read {name}: there is no such file.")
    else:
        source = BytesIO(video) if isinstance(video, (bytes, bytearray, memoryview)) else video
        if not (hasattr(source, "seekable") and source.seekable()):
            raise ValueError(
                f"Cannot read {shown(video)}: a video is a path, bytes or a binary file object "
                "that can seek."
            )
        source.seek(0)
    allowed = FOR_PATHS if isinstance(source, str) else FOR_BYTES
    # `file:` keeps libav from reading a name with a colon as a URL.
    source = f"file:{source}" if isinstance(source, str) else source
    with open_container(source, name, options=allowed) as container:
        yield container


def name_of(video: VideoSource) -> str:
    """What errors call a video."""
    if isinstance(video, (str, os.PathLike)):
        return shown(os.fspath(video))
    return "the bytes of the video" if isinstance(video, bytes) else "the video file object"


@contextmanager
def open_container(source: Any, name: str, **arguments: Any) -> Iterator[InputContainer]:
    """What PyAV opens, with its errors as sentences; closed at the end, whatever happens.

    Args:
        source: for `av.open`.
        name: what errors call it.
        **arguments: for `av.open`.
    """
    av = import_av()
    start, (patience, _) = monotonic(), arguments.get("timeout", (inf, inf))
    try:
        container = av.open(source, metadata_errors="replace", **arguments)
    except (av.error.FFmpegError, OSError) as error:
        if monotonic() - start >= patience:  # whatever came of an answer that was cut short
            raise TimeoutError(f"Cannot read {name}: it did not answer in time.") from None
        if isinstance(error, (av.error.InvalidDataError, av.error.ArgumentError)):
            raise ValueError(f"Cannot read {name}: it is not a video that FFmpeg knows.") from None
        raise as_os_error(error, name) from None
    with container:
        yield container


def as_os_error(error: BaseException, name: str) -> OSError:
    """An error of FFmpeg's as one of the system's, with a sentence."""
    kinds = (PermissionError, FileNotFoundError, TimeoutError, ConnectionError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
    said = "it did not answer in time" if _timed_out(error) else reason(error)
    return kind(f"Cannot read {name}: {said}.")


def _timed_out(error: BaseException) -> bool:
    av = import_av()
    return isinstance(error, (TimeoutError, av.error.ExitError))


def container_frames(
    container: InputContainer, name: str, *, keyframes: bool = False, live: bool = False
) -> Iterator[Frame]:
    """The frames of an opened container.

    Args:
        container: what was opened; it stays open.
        name: what errors call it.
        keyframes: as in `read_frames`.
        live: decode without holding frames back, at the cost of threads.

    Raises:
        ValueError: it has no video, or none that can be decoded.
        OSError: it can't be read further.
    """
    stream = video_stream(container, name)
    stream.thread_type = "SLICE" if live else "AUTO"
    if keyframes:
        stream.codec_context.skip_frame = "NONKEY"
    rate = stream.average_rate or stream.guessed_rate or USUAL_RATE
    timeline = Timeline(stream.time_base, 1 / float(rate))
    aspect = stream.sample_aspect_ratio or Fraction(1)
    for frame in _decoded(container, stream, name):
        pts = frame.dts if frame.pts is None else frame.pts
        yield Frame(timeline.at(pts), partial(to_picture, frame, aspect))


def video_stream(container: InputContainer, name: str) -> VideoStream:
    """The stream that FFmpeg would show; ValueError if there is none that can be decoded.

    Cover pictures of music files count as streams of one frame, and are no video.
    """
    av = import_av()
    if container.format.name == "tty":  # any file named .txt, which FFmpeg shows as a terminal
        raise ValueError(f"Cannot read {name}: it is a text, not a video.")
    found = [s for s in container.streams.video if not _is_cover(s, av)]
    if not found:
        raise ValueError(f"Cannot read {name}: it has no video in it.")
    best = container.streams.best("video")
    stream = best if best in found else found[0]
    if stream.codec_context is None:
        raise ValueError(
            f"Cannot read {name}: nothing here decodes its codec; convert it to H.264 first: "
            "ffmpeg -i VIDEO -c:v libx264 OTHER.mp4"
        )
    size = stream.codec_context.width * stream.codec_context.height
    if size > MAX_PIXELS:
        raise ValueError(
            f"Cannot read {name}: its frames have {size:,} pixels; at most "
            f"{MAX_PIXELS:,} can be read."
        )
    return stream


def _is_cover(stream: Any, av: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Iterator[VideoFrame]:
    """Decoded frames, past packets that are broken."""
    av = import_av()
    broken, last = 0, monotonic()
    while broken < MOST_BROKEN_PACKETS:
        try:
            for packet in container.demux(stream):
                try:
                    for frame in packet.decode():
                        yield frame
                        broken, last = 0, monotonic()
                except av.error.InvalidDataError:
                    broken += 1
            return
        except av.error.InvalidDataError:  # between packets; demuxing goes on behind it
            broken += 1
        except av.error.EOFError:
            return
        except av.error.BlockingIOError:  # how a Mac's cameras say that no frame is there yet
            if monotonic() - last > PATIENCE:
                raise TimeoutError(f"{name} gave no frame for {PATIENCE:.0f} seconds.") from None
            sleep(0.002)
        except (av.error.FFmpegError, OSError) as error:
            raise as_os_error(error, name) from None


class Timeline:
    """Seconds from the first frame on that never run backwards.

    Args:
        time_base: seconds of one unit of pts; None if a stream has none.
        step: seconds between frames, where pts are missing.
    """

    def __init__(self, time_base: Fraction | None, step: float):
        self._base = float(time_base or 0)
        self._step = step
        self._start: float | None = None  # what is taken from a pts' seconds
        self._last = 0.0
        self._any = False

    def at(self, pts: int | None) -> float:
        """The time of the next frame."""
        expected = self._last + self._step if self._any else 0.0
        self._any = True
        if pts is None or not self._base:
            self._last = expected
            return expected
        seconds = pts * self._base
        if self._start is None or seconds - self._start < self._last - JUMP:
            self._start = seconds - expected
        self._last = max(self._last, seconds - self._start)
        return self._last


def to_picture(frame: VideoFrame, aspect: Fraction = Fraction(1)) -> PILImage:
    """A decoded frame in RGB, as it is to be seen.

    swscale converts by the matrix and the range that the frame names (BT.601 if it names none), as
    in ffmpeg.

    Args:
        frame: in any pixel format.
        aspect: width of a pixel over its height.

    Raises:
        ValueError: its pixels can't be converted.
    """
    from av.error import FFmpegError
    from PIL import Image

    width = max(1, round(frame.width * aspect))
    try:
        rgb = frame.reformat(width=width, format="rgb24", interpolation="BICUBIC")
    except (FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"A frame can't be converted to RGB: {reason(error)}.") from None
    return Image.fromarray(_turned(rgb.to_ndarray(), _display_matrix(frame)))


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) for which the pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = unpack("9i", bytes(data)[:36])
    return matrix[0], matrix[1], matrix[3], matrix[4]


def _turned(pixels: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Turned in quarters and mirrored as a display matrix says."""
    import numpy as np

    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    pixels = pixels[::-1] if d < 0 else pixels
    return np.ascontiguousarray(pixels)


def duration_of(video: VideoSource) -> float | None:
    """Seconds of a video file as it says itself; None if it does not."""
    with open_file(video) as container:
        return None if container.duration is None else container.duration / 1_000_000


def pixels_of(video: VideoSource) -> int:
    """How many pixels the frames of a video file have as it says itself, before any is decoded."""
    with open_file(video) as container:
        coded = video_stream(container, name_of(video)).codec_context
        return coded.width * coded.height
