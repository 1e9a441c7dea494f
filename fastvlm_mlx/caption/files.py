"""Files that are whole at any time: replaced at once, or appended to by whole records."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checks import shown


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; once the block has ended well, it takes the place of `file`."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        if file.exists():
            shutil.copymode(file, draft)
        os.replace(draft, file)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and error.filename is None:
            raise _named(error, file) from None
        raise


def replace_bytes(file: Path, data: bytes) -> None:
    """Write a file whole, or leave the old one."""
    with replacing(file) as draft:
        draft.write_bytes(data)


class AppendedFile:
    """A file that grows by whole records; made if there is none."""

    def __init__(self, file: Path):
        # Unbuffered, so that records are written in one step
        self._stream = file.open("ab", buffering=0)
        self._file = file
        self.size = self._stream.tell()

    def append(self, data: bytes) -> None:
        """Write records; where that fails, nothing of them stays."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:
            self._stream.truncate(self.size)
            raise _named(error, self._file) from None
        self.size += len(data)

    def close(self) -> None:
        """Close it, its contents on the disk."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def _named(error: OSError, file: Path) -> OSError:
    """An error that says which file it is about, as those of writing don't."""
    return OSError(error.errno, error.strerror, str(file)) if error.strerror else error


def check_target(file: Path) -> None:
    """Refuse a place that can't be written to, before anything is computed.

    Raises:
        FileNotFoundError: its folder doesn't exist.
        IsADirectoryError: it is a folder.
        PermissionError: its folder, or the file itself, is not ours to write.
    """
    name = shown(str(file))
    if file.is_dir():
        raise IsADirectoryError(f"Cannot write {name}: it is a folder.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {name}: its folder does not exist.")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise PermissionError(f"Cannot write {name}: it is not allowed.")
