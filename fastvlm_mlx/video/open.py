"""What a person names as a source → the source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeAlias

from ..checks import is_whole_number, shown
from ..image.load import ImageSource
from .camera import CameraSource
from .decode import VideoSource
from .folder import FolderSource
from .pipe import PipeSource
from .screen import ScreenSource
from .source import FileSource, PictureSource, Source
from .stream import StreamSource, is_stream

# A camera's number, a stream's URL, "screen", "-", a folder, a video file, or pictures
AnySource: TypeAlias = "Source | int | VideoSource | Iterable[ImageSource]"


def open_source(given: AnySource) -> Source:
    """The source that is meant; nothing of it is read yet.

    Raises:
        ValueError: it is none.
        FileNotFoundError: there is no such file or folder.
    """
    if isinstance(given, Source):
        return given
    if is_whole_number(given, 0):
        return CameraSource(given)  # type: ignore[arg-type]
    if isinstance(given, (bytes, bytearray)) or hasattr(given, "read"):
        return FileSource(given)  # type: ignore[arg-type]
    if isinstance(given, (str, os.PathLike)):
        return _named(os.fspath(given))
    if isinstance(given, Iterable):
        return PictureSource(given)
    raise ValueError(
        f"There are no frames in {shown(given)}: a source is a camera's number, the URL of a "
        'stream, a video file, a folder, "screen", "-" for standard input, or pictures.'
    )


def _named(name: str) -> Source:
    if name == "-":
        return PipeSource()
    if is_stream(name):
        return StreamSource(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return FolderSource(path)
    if name == "screen" and not os.path.exists(path):
        return ScreenSource()
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"There is no video {shown(name)}: a source is a file, a folder, the URL of a stream, "
            '"screen", "-" for standard input, or the number of a camera.'
        )
    return FileSource(path)
