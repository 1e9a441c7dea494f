"""Arrays in files of a folder that several processes may share: bounded, each whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..checks import check_whole_number

ENTRY = re.compile(r"[0-9a-f]{32}\.array")
UNFINISHED = re.compile(ENTRY.pattern + r"\.\d+\.tmp")
ABANDONED = 3600  # seconds after which nobody goes on writing a file
TOTAL = ".total"  # the file that holds the size of all entries, locked while one changes it
DIGEST_BYTES = 16


class _Entry(NamedTuple):
    used: int  # in nanoseconds, when it was written or read last
    name: str
    size: int


@dataclass
class _Count:
    bytes: int


class CacheFolder:
    """Entries by name, of which those unused for longest make room for others.

    An entry that is damaged, or not what its name says, counts as missing and is deleted; files of
    other names in the folder are left alone. The bound holds for all processes together.

    Args:
        folder: made if there is none.
        max_bytes: of all entries together.
        own_stay: whether entries that were written or read since this was opened stay, so that no
            room may be left.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
        OSError: the folder can't be made, read or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, *, own_stay: bool = False):
        check_whole_number("max_bytes", max_bytes)
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._own_stay = own_stay
        self._oldest: deque[_Entry] = deque()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError("it can't be written to")
        with self._counting() as count:
            self._look(count)
            self._make_room(count, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, looked up."""
        return sum(entry.size for entry in self._entries())

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str) -> bytes | None:
        """An entry, if there is a whole one; for threads, since MLX has no part in it."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if not _is_whole(data, name):
            self.delete(name)
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def write(self, name: str, data: bytes) -> bool:
        """Keep an entry, as `to_entry` gives it; False if there is no room for it.

        Raises:
            OSError: it can't be written.
        """
        path = self._path(name)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        if len(data) > self.max_bytes:
            return False
        try:
            unfinished.write_bytes(data)
            with self._counting() as count:
                self._remove(name, count)
                if not self._make_room(count, len(data)):
                    return False
                os.replace(unfinished, path)
                count.bytes += len(data)
        finally:
            unfinished.unlink(missing_ok=True)
        return True

    def delete(self, name: str) -> None:
        """Forget an entry, if it is there and can be deleted."""
        with suppress(OSError), self._counting() as count:
            self._remove(name, count)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.array"

    @contextmanager
    def _counting(self) -> Iterator[_Count]:
        """The size of all entries, for one thread of one process at a time to change."""
        with (self.folder / TOTAL).open("a+b") as file:
            with suppress(OSError):  # some network disks lock nothing
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read(24)
            count = _Count(int(text) if text.isdigit() else self.nbytes)
            try:
                yield count
            finally:
                with suppress(OSError):  # of a full disk; then it is looked up again
                    file.truncate(0)
                    file.write(b"%d" % max(0, count.bytes))
                    file.flush()

    def _make_room(self, count: _Count, size: int) -> bool:
        """Delete entries until there is room for so many bytes; False if there can't be."""
        has_looked = self._own_stay
        while count.bytes + size > self.max_bytes:
            if not self._oldest:
                if has_looked:
                    return False
                self._look(count)
                has_looked = True
                continue
            entry = self._oldest.popleft()
            with suppress(FileNotFoundError):
                # One that was used meanwhile is found again when the folder is looked at anew.
                if self._path(entry.name).stat().st_mtime_ns == entry.used:
                    self._remove(entry.name, count)
        return True

    def _remove(self, name: str, count: _Count) -> None:
        path = self._path(name)
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            count.bytes -= size

    def _look(self, count: _Count) -> None:
        """Find out what is there, and delete unfinished files that nobody finishes."""
        self._oldest = deque(sorted(self._entries()))
        count.bytes = sum(entry.size for entry in self._oldest)
        before = time.time() - ABANDONED
        for found in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if UNFINISHED.fullmatch(found.name) and found.stat().st_mtime < before:
                    os.unlink(found.path)

    def _entries(self) -> Iterator[_Entry]:
        for found in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if ENTRY.fullmatch(found.name) and found.is_file():
                    stat = found.stat()
                    yield _Entry(stat.st_mtime_ns, found.name[:32], stat.st_size)


def to_entry(array: mx.array, name: str) -> bytes:
    """An array as a file holds it: dtype, shape and values, and a digest of these and its name."""
    dtype = str(array.dtype).removeprefix("mlx.core.")
    data = json.dumps([dtype, array.shape]).encode() + b"\n" + bytes_of(array)
    return data + _seal(data, name)


def from_entry(data: bytes) -> mx.array:
    """The array of an entry that is whole."""
    import numpy as np

    start = data.index(b"\n") + 1
    dtype, shape = json.loads(data[:start])
    values = np.frombuffer(data, np.uint8, len(data) - DIGEST_BYTES - start, start)
    # Not by MLX's own reader: its thread may end a process that is about to end.
    return mx.array(values).view(getattr(mx, dtype)).reshape(shape)


def _is_whole(data: bytes, name: str) -> bool:
    view = memoryview(data)
    return _seal(view[:-DIGEST_BYTES], name) == data[-DIGEST_BYTES:]


def _seal(data: bytes | memoryview, name: str) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES, key=name.encode()).digest()


def bytes_of(array: mx.array) -> memoryview:
    """What an array holds, without copying it."""
    import numpy as np

    return np.asarray(array.reshape(-1).view(mx.uint8)).data


def digest_of(*arrays: mx.array) -> str:
    """A digest of what arrays hold."""
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(bytes_of(array))
    return digest.hexdigest()
