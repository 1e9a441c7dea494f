"""New pictures of a folder, as they appear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import sleep

from ..checks import shown
from ..image.load import image_files
from .frame import Frame
from .source import Source, Stopwatch

EVERY = 0.25  # seconds between looks into the folder

# When a file was written, and how many bytes it has
Stamp = tuple[int, int]


class FolderSource(Source):
    """Pictures that are put into a folder from now on, each of them, in order.

    A picture is taken once it has not changed from one look to the next, so that it is whole; one
    that is written anew is a new one.

    Args:
        folder: must exist; folders in it are not looked into.
        every: seconds between looks.
    """

    live = False

    def __init__(self, folder: str | os.PathLike[str], every: float = EVERY):
        self.folder = Path(os.path.expanduser(folder))
        self.name = shown(os.fspath(folder))
        self.every = every

    def frames(self) -> Iterator[Frame]:
        clock, taken = Stopwatch(), self._stamps()
        before = taken
        while True:
            sleep(self.every)
            now = self._stamps()
            whole = [path for path, stamp in now.items() if before.get(path) == stamp]
            new = [path for path in whole if now[path] != taken.get(path) and now[path][1]]
            for path in sorted(new, key=lambda path: now[path]):
                yield clock.frame(path)
            # What is gone is forgotten, and what is still being written is not yet taken.
            kept = {path: taken[path] for path in now if path in taken}
            taken = kept | {path: now[path] for path in new}
            before = now

    def _stamps(self) -> dict[Path, Stamp]:
        found = {}
        for path in image_files(self.folder):
            with suppress(FileNotFoundError):  # removed meanwhile
                status = path.stat()
                found[path] = (status.st_mtime_ns, status.st_size)
        return found
