"""Several processes or Macs that train one model: sums over all of them, and the death of one.

`mlx.launch` starts them. MLX waits for ever for a process that is gone, so each process listens to
the first one over a connection of its own, and ends when that closes or falls silent.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from .step import Sums

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by mlx.launch and by MPI
BEAT = 1.0  # seconds between signs of life
SILENCE = 6.0  # seconds after which a process is taken for dead
LOST = 75  # the exit status of a process whose peers are gone: try again
GONE = (
    "Another process of this run has ended or hangs: training stopped. The same command goes on "
    "from the last checkpoint."
)


class Ranks:
    """This process among those that train together; alone if none launched it.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        launched = any(name in os.environ for name in LAUNCHED)
        group = mx.distributed.init() if launched else None
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self._watch: _Watch | None = None
        if self.size > 1:
            self._watch = _Watch(self.rank, self.size)

    def add(self, sums: Sums) -> Sums:
        """The sums of all processes."""
        if self.size == 1:
            return sums
        names = sorted(sums.gradients)
        values = [sums.loss, sums.tokens, *(sums.gradients[name] for name in names)]
        loss, count, *gradients = _all_sum(values)
        return Sums(loss, count, dict(zip(names, gradients, strict=True)))

    def any(self, asked: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return asked
        (found,) = _all_sum([mx.array(float(asked))])
        return bool(found.item())

    def check_same(self, step: int) -> None:
        """Raise an OSError unless all processes go on from the same step."""
        if self.size > 1:
            (steps,) = _all_sum(
                [mx.array([float(step * (r == self.rank)) for r in range(self.size)])]
            )
            if mx.any(steps != step):
                raise OSError(
                    "The processes see different checkpoints: put --out on a disk that all of them "
                    "share."
                )

    def wait(self) -> None:
        """Until all processes have come to this point."""
        self.any(False)

    def close(self) -> None:
        """This process has done its part."""
        if self._watch is not None:
            self.wait()
            self._watch.close()


def _all_sum(values: list[mx.array]) -> list[mx.array]:
    """Each summed over all processes, in one message; the end of this process if that fails."""
    try:
        return _summed(values)
    except RuntimeError:  # as MLX reports a connection that is closed
        end_process()


def _summed(values: list[mx.array]) -> list[mx.array]:
    with mx.stream(mx.cpu):
        flat = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in values])
        flat = mx.distributed.all_sum(flat)
        ends = [0]
        for value in values:
            ends.append(ends[-1] + value.size)
        found = [
            flat[start:end].reshape(value.shape).astype(value.dtype)
            for value, start, end in zip(values, ends, ends[1:], strict=False)
        ]
        mx.eval(found)
    return found


class _Watch:
    """Ends this process when another one dies or hangs.

    The first process listens; the others connect to it. Each end sends a byte each `BEAT` seconds.
    """

    def __init__(self, rank: int, size: int):
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        port = _share_address(rank, self._listen(size) if rank == 0 else None)
        if rank:
            self._sockets.append(_connect(port))
        else:
            self._accept(size - 1)
        for each in self._sockets:
            threading.Thread(target=self._listen_to, args=(each,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _listen(self, size: int) -> tuple[str, int]:
        self._server = socket.create_server(("", 0), backlog=size)
        return _own_address(), self._server.getsockname()[1]

    def _accept(self, count: int) -> None:
        self._server.settimeout(60)
        for _ in range(count):
            connection, _ = self._server.accept()
            self._sockets.append(connection)
        self._server.close()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            for each in self._sockets:
                with suppress(OSError):
                    each.send(b".")

    def _listen_to(self, peer: socket.socket) -> None:
        peer.settimeout(SILENCE)
        said_goodbye = False
        try:
            while content := peer.recv(64):
                said_goodbye = said_goodbye or b"!" in content
        except OSError:
            pass
        if not (said_goodbye or self._closing.is_set()):
            end_process()

    def close(self) -> None:
        self._closing.set()
        for each in self._sockets:
            with suppress(OSError):
                each.sendall(b"!")
                each.close()


def _own_address() -> str:
    """By which the others reach the first process: as the ring's file of hosts says."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
        return socket.gethostbyname(hosts[0][0].rpartition(":")[0])
    return socket.gethostbyname(socket.gethostname())


def _share_address(rank: int, own: tuple[str, int] | None) -> tuple[str, int]:
    """The address that the first process listens at."""
    numbers = [0.0] * 5
    if own is not None:
        numbers = [float(part) for part in own[0].split(".")] + [float(own[1])]
    (found,) = _all_sum([mx.array(numbers)])
    numbers_found: Any = found.tolist()
    *host, port = map(int, numbers_found)
    return ".".join(map(str, host)), port


def _connect(address: tuple[str, int]) -> socket.socket:
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(address, timeout=5)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def end_process() -> NoReturn:
    """End at once with one sentence: the main thread may wait in MLX for a process that is gone."""
    _ending.acquire()  # only one thread says it
    with suppress(OSError):
        os.write(2, f"Error: {GONE}\n".encode())
    os._exit(LOST)


_ending = threading.Lock()
