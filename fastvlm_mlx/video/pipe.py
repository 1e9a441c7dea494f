"""Pictures that another program writes one after the other, JPEG or PNG."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator

from .frame import Frame
from .source import Source, Stopwatch

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MOST = 200 * 2**20  # bytes of one picture
CHUNK = 2**16
END_OF_PNG = b"IEND"
# The second bytes of JPEG markers that have no length: fill bytes, TEM and the restarts
BARE = {0xFF, 0x00, 0x01, *range(0xD0, 0xD8)}


class PipeSource(Source):
    """The pictures on standard input.

    Args:
        read: gives more bytes, at most so many, and none at the end.
    """

    name = "standard input"

    def __init__(self, read: Callable[[int], bytes] | None = None):
        self._read = read or _read_stdin

    def frames(self) -> Iterator[Frame]:
        clock = Stopwatch()
        for picture in split_pictures(self._read):
            yield clock.frame(picture)


def _read_stdin(size: int) -> bytes:
    """Unbuffered: what is there is given at once, and a thread that waits holds no lock."""
    if sys.stdin is None:
        raise ValueError("Standard input is closed: frames are read from there.")
    if sys.stdin.isatty():
        raise ValueError(
            "Frames are read from standard input, and it is the terminal: pipe JPEG or PNG pictures"
            " into the command."
        )
    return os.read(sys.stdin.fileno(), size)


def split_pictures(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The bytes of each picture in a stream of them, as soon as its last byte is there.

    What stands between pictures is passed over, as is a picture without an end.

    Raises:
        ValueError: it begins with something else, or a picture has no end for too long.
    """
    data = Bytes(read)
    while data.wants(len(PNG)):
        if data.held.startswith(JPEG):
            end = _jpeg_end(data)
        elif data.held.startswith(PNG):
            end = _png_end(data)
        elif data.given:
            data.skip_to_picture()
            continue
        else:
            raise ValueError(
                "Standard input does not begin with a JPEG or PNG picture; videos go into a file, "
                "for --video."
            )
        if end is None:
            break
        yield data.give(end)
    if not data.given:
        raise ValueError("Standard input ended before there was a whole JPEG or PNG picture.")


class Bytes:
    """Bytes that come in pieces, held until they are given on."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read
        self.held = bytearray()
        self.given = 0  # pictures

    def wants(self, size: int) -> bool:
        """Wait until so many are held; False if the end comes first."""
        while len(self.held) < size:
            more = self._read(CHUNK)
            if not more:
                return False
            self.held += more
            if len(self.held) > MOST:
                raise ValueError(f"A picture on standard input has no end within {MOST:,} bytes.")
        return True

    def give(self, end: int) -> bytes:
        """The picture that is held, up to its end; it is held no more."""
        found = bytes(self.held[:end])
        del self.held[:end]
        self.given += 1
        return found

    def skip_to_picture(self) -> None:
        """Drop what comes before the next start of a picture."""
        found = [i for i in (self.held.find(start, 1) for start in (PNG, JPEG)) if i >= 0]
        # Without one, the last bytes may still begin it.
        del self.held[: min(found, default=len(self.held) - len(PNG) + 1)]


def _png_end(data: Bytes) -> int | None:
    """Where a PNG ends: behind its chunk IEND; None if its bytes end before."""
    at = len(PNG)
    while data.wants(at + 12):
        length = int.from_bytes(data.held[at : at + 4], "big")
        kind = bytes(data.held[at + 4 : at + 8])
        at += 12 + length
        if kind == END_OF_PNG:
            return at if data.wants(at) else None
    return None


def _jpeg_end(data: Bytes) -> int | None:
    """Where a JPEG ends: behind its last marker; None if its bytes end before.

    It is read marker by marker, since the preview within its metadata has an end of its own. Not a
    byte more is waited for, which might be the next picture's.
    """
    at: int | None = 2
    while at is not None and data.wants(at + 2):
        mark, kind = data.held[at : at + 2]
        if mark != 0xFF:
            at = _next_marker(data, at)  # behind the coded pixels
        elif kind == 0xD9:
            return at + 2
        elif kind == 0xD8:  # the next picture begins, and this one has no end
            return at
        elif kind in BARE:
            at += 1 if kind == 0xFF else 2
        elif data.wants(at + 4):
            at += 2 + int.from_bytes(data.held[at + 2 : at + 4], "big")
        else:
            break
    return None


def _next_marker(data: Bytes, at: int) -> int | None:
    """The next marker that does not belong to coded pixels."""
    marker = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
    while True:
        if found := marker.search(data.held, at):
            return found.start()
        at = max(at, len(data.held) - 1)
        if not data.wants(len(data.held) + 1):
            return None
