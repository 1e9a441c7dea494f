"""Arrays kept in files, so that they are there again after a restart; written in the background."""

from __future__ import annotations

import logging
import os
from threading import Lock

import mlx.core as mx

from ..checkpoint.cache_folder import CacheFolder, from_entry, to_entry
from ..checks import reason, shown

LOG = logging.getLogger(__name__)
MAX_DISK_BYTES = 4 * 2**30
MOST_WAITING = 16  # arrays to be written; beyond, the disk is too slow to be of use


class Disk:
    """Keeps arrays by name, as a `CacheFolder` does.

    Args:
        folder: made if there is none; several processes may share it.
        max_bytes: of all files together.

    Raises:
        ValueError: `max_bytes` is not a whole number from 1.
        OSError: the folder can't be made, read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_DISK_BYTES):
        from concurrent.futures import ThreadPoolExecutor

        try:
            self._files = CacheFolder(folder, max_bytes)
        except OSError as error:
            where = shown(os.fspath(folder))
            raise type(error)(f"The cache can't be kept in {where}: {reason(error)}.") from None
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._waiting = 0
        self._warned = False
        self._writer = ThreadPoolExecutor(1, "fastvlm-disk")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._files.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> mx.array | None:
        """The array of a name, if there is one."""
        data = self._files.read(name)
        return None if data is None else from_entry(data)

    def write(self, name: str, array: mx.array) -> None:
        """Keep an array; it is written in the background."""
        with self._lock:
            if name in self or self._waiting >= MOST_WAITING:
                return
            self._waiting += 1
        self._writer.submit(self._write, name, to_entry(array, name))

    def flush(self) -> None:
        """Wait until all is written."""
        self._writer.submit(lambda: None).result()

    def delete(self, name: str) -> None:
        """Forget an array that turned out to be of no use."""
        self._files.delete(name)

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._files.write(name, data)
        except OSError as error:
            if not self._warned:
                LOG.warning("The cache's folder can't be written: %s.", reason(error))
            self._warned = True
        finally:
            with self._lock:
                self._waiting -= 1
