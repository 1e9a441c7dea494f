"""Processes that share the work of a run: under `mlx.launch`, or by mistake."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

import mlx.core as mx

from ..checks import shown

TOGETHER = 32  # images in a row that one process takes
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by mlx.launch and by MPI


class Share:
    """This process's part of the images: those at every nth place, some in a row.

    Each process holds a lock on a file beside the manifest as long as it lives, so that the first
    one, which writes the output, knows which have died, and does their part.

    Args:
        manifest: of the run, which all of them open.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    Raises:
        OSError: another run writes the same output.
    """

    def __init__(self, manifest: Path):
        group = mx.distributed.init() if any(name in os.environ for name in LAUNCHED) else None
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self._manifest = manifest
        lock = _try_lock(self._lock_file(self.rank))
        self.wait()
        if lock is None:
            raise BlockingIOError(
                f"Another process writes captions with the manifest {shown(str(manifest))}: wait "
                "until it has ended."
            )
        self._lock: IO[bytes] | None = lock

    def owner(self, place: int) -> int:
        """The rank of the process that has the image at this place."""
        return place // TOGETHER % self.size

    def lives(self, rank: int) -> bool:
        """Whether another process is still there."""
        lock = _try_lock(self._lock_file(rank))
        if lock is None:
            return True
        self._lock_file(rank).unlink()
        lock.close()
        return False

    def wait(self) -> None:
        """Until all processes have come to this point."""
        if self.size > 1:
            with mx.stream(mx.cpu):
                mx.eval(mx.distributed.all_sum(mx.array(1)))

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            with suppress(OSError):
                self._lock_file(self.rank).unlink()
            self._lock.close()
            self._lock = None

    def _lock_file(self, rank: int) -> Path:
        return self._manifest.with_name(f"{self._manifest.name}.lock{rank}")


def _try_lock(file: Path) -> IO[bytes] | None:
    """The file, locked; None if another process holds it."""
    import fcntl

    stream = file.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream
