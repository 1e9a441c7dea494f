"""Servers in processes of their own: this library's and mlx-vlm's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

PEER_SERVER = Path(__file__).resolve().with_name("peer_server.py")
START = 300.0  # seconds that a server may take until it answers


class Server:
    """A server that runs until it is closed; its logs go to a file.

    Args:
        command: that starts it, without its port.
        ready: the path that answers 200 once it can be asked.
        log: the file of what it says.

    Raises:
        RuntimeError: it ends, or does not answer in time.
    """

    def __init__(self, command: Iterable[str], ready: str, log: Path):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)], stdout=file, stderr=subprocess.STDOUT
            )
        try:
            self._wait(self.url + ready)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def resident(self) -> int:
        """Bytes of physical memory that it has now."""
        asked = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.run(asked, capture_output=True, text=True).stdout or 0) * 1024

    def close(self) -> int:
        """End it as a service manager does; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _wait(self, url: str) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended: {self.log.read_text()[-2000:]}")
            try:
                with urlopen(url, timeout=5) as reply:
                    if reply.status == 200:
                        return
            except (URLError, OSError):
                time.sleep(0.05)
        raise RuntimeError(f"The server is not ready after {START:g} s.")


def our_server(folder: Path | str, log: Path, *flags: str) -> Server:
    """This library's, with a model in a folder, in float32."""
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--model", os.fspath(folder)]
    return Server([*command, "--dtype", "float32", *flags], "/ready", log)


def peer_server(python: str, folder: Path, log: Path) -> Server:
    """mlx-vlm's, with its own Python."""
    return Server([python, str(PEER_SERVER), str(folder)], "/health", log)


def free_port() -> int:
    """A port at which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
