"""What is kept of a watch: answers as JSON lines, and as subtitles."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import reason, shown
from .watch import Answer

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

THUMBNAIL = 160  # pixels along the longer side
SHORTEST = 0.2  # seconds that a subtitle stands at least
LAST = 4.0  # seconds that the last subtitle stands


def as_record(answer: Answer, *, thumbnail: bool = False) -> dict[str, Any]:
    """An answer as an object for JSON; times are in seconds."""
    found: dict[str, Any] = {
        "at": local_time(answer.at).isoformat(timespec="milliseconds"),
        "time": round(answer.time, 3),
        "text": answer.text,
        "age": round(answer.age, 4),
        "seconds": round(answer.seconds, 4),
        "ttft": round(answer.ttft, 4),
        "image_size": answer.image_size,
        "skipped": answer.skipped,
    }
    if answer.response is not None:
        found |= {
            "tokens": answer.response.generation_tokens,
            "finish_reason": answer.response.finish_reason,
        }
    if answer.yes is not None and answer.probability is not None:
        found |= {"yes": answer.yes, "turned": answer.turned}
        found |= {"probability": round(answer.probability, 4)}
    if thumbnail:
        found["thumbnail"] = thumbnail_url(answer.image)
    return found


def local_time(at: float) -> datetime:
    """A moment in seconds since 1970, in this machine's time zone."""
    return datetime.fromtimestamp(at).astimezone()


def thumbnail_url(image: PILImage) -> str:
    """A small copy of a picture as a data: URI."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = BytesIO()
    small.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"


class JsonLines:
    """Appends an object per answer to a file, each line whole or not at all.

    Args:
        path: what it holds is kept; half a line at its end is ended first.
        thumbnails: whether each line has a small picture of its frame.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, *, thumbnails: bool = False):
        self._thumbnails = thumbnails
        with _named(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            if self._file.seek(0, os.SEEK_END) and not _ends_a_line(self._file):
                self._file.write(b"\n")

    def write(self, answer: Answer) -> None:
        """Append a line, in one step."""
        record = as_record(answer, thumbnail=self._thumbnails)
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


class Subtitles:
    """Writes a subtitle per answer to an SRT file, each from its frame's time to the next one's.

    Args:
        path: must not exist, or be empty.

    Raises:
        FileExistsError: something stands there.
        OSError: it can't be written.
    """

    def __init__(self, path: Path):
        with _named(path):
            if path.exists() and path.stat().st_size:
                raise FileExistsError(f"{shown(str(path))} is there already; name another file.")
            self._file = path.open("w", encoding="utf-8", newline="\n")
        self._count = 0
        self._open: Answer | None = None
        self._last = 0.0

    def write(self, answer: Answer) -> None:
        """Begin a subtitle and end the one before, or go on with it if the text is the same."""
        self._last = answer.time
        if self._open is not None and self._open.text == answer.text:
            return
        self._end(answer.time)
        self._open = answer

    def close(self) -> None:
        """End the last subtitle, and the file."""
        if self._open is not None:
            self._end(self._last + LAST)
        self._file.close()

    def _end(self, time: float) -> None:
        shown, self._open = self._open, None
        text = "" if shown is None else "\n".join(filter(str.strip, shown.text.splitlines()))
        if shown is None or not text:  # an empty line would end a subtitle
            return
        self._count += 1
        start, end = srt_time(shown.time), srt_time(max(time, shown.time + SHORTEST))
        self._file.write(f"{self._count}\n{start} --> {end}\n{text}\n\n")
        self._file.flush()


def srt_time(seconds: float) -> str:
    """A time as SRT files have it: 00:01:02,345."""
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, seconds = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02},{milliseconds:03}"


class _named:
    """Errors of the system in the block say which file can't be written."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(f"{shown(str(self.path))} can't be written: {reason(error)}.")
