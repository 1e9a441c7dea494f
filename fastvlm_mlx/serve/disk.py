"""Arrays in files of a folder: bounded, and there again after a restart."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx

from ..checkpoint.files import cached_entries
from ..checks import check_whole_number, reason, shown

LOG = logging.getLogger(__name__)
MAX_DISK_BYTES = 4 * 2**30
MOST_WAITING = 16  # arrays to be written; beyond, the disk is too slow to be of use


class Disk:
    """Keeps arrays by name; the least recently used files are deleted where there is no room.

    Each file appears whole or not at all. One that is damaged, or not what its name says, counts as
    missing and is deleted; files of other names in the folder are left alone. Processes may share
    a folder.

    Args:
        folder: made if there is none.
        max_bytes: of all files together.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
        OSError: the folder can't be made, read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_DISK_BYTES):
        from concurrent.futures import ThreadPoolExecutor

        check_whole_number("max_bytes", max_bytes)
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._waiting = 0
        self._warned = False
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        try:
            self._sizes.update(cached_entries(self.folder))
        except OSError as error:
            where = shown(os.fspath(self.folder))
            raise type(error)(f"The cache can't be kept in {where}: {reason(error)}.") from None
        self._evict()
        self._writer = ThreadPoolExecutor(1, "fastvlm-disk")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str) -> mx.array | None:
        """The array of a name, if there is one."""
        if name not in self:
            return None
        path = self._path(name)
        try:
            array = _from_bytes(path.read_bytes(), name)
            os.utime(path)
        except Exception:  # MLX's reader raises whatever bad bytes lead it to
            self._delete(name)
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return array

    def write(self, name: str, array: mx.array) -> None:
        """Keep an array; it is written in the background."""
        with self._lock:
            if name in self._sizes or self._waiting >= MOST_WAITING:
                return
            self._waiting += 1
        self._writer.submit(self._write, name, _to_bytes(array, name))

    def flush(self) -> None:
        """Wait until all is written."""
        self._writer.submit(lambda: None).result()

    def delete(self, name: str) -> None:
        """Forget an array that turned out to be of no use."""
        self._delete(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            if len(data) <= self.max_bytes:
                self._evict(len(data))
                unfinished.write_bytes(data)
                os.replace(unfinished, path)
                with self._lock:
                    self._sizes[name] = len(data)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if not self._warned:
                LOG.warning("The cache's folder can't be written: %s.", reason(error))
            self._warned = True
        finally:
            with self._lock:
                self._waiting -= 1

    def _evict(self, room: int = 0) -> None:
        """Delete what was used least recently, until there is room for so many bytes."""
        while self.nbytes + room > self.max_bytes and self._sizes:
            self._delete(next(iter(self._sizes)))

    def _delete(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            LOG.warning("A file of the cache can't be deleted: %s.", reason(error))


def _to_bytes(array: mx.array, name: str) -> bytes:
    file = BytesIO()
    mx.save_safetensors(file, {"array": array}, {"name": name, "digest": digest_of(array)})
    return file.getvalue()


def _from_bytes(data: bytes, name: str) -> mx.array:
    """The array in a file; ValueError if it is not whole or not of this name."""
    loaded: Any = mx.load(BytesIO(data), format="safetensors", return_metadata=True)
    tensors, metadata = loaded
    array: mx.array = tensors["array"]
    if metadata != {"name": name, "digest": digest_of(array)}:
        raise ValueError("another array")
    return array


def digest_of(*arrays: mx.array) -> str:
    """A digest of what arrays hold."""
    import numpy as np

    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(np.asarray(array.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()
