"""A URL → a whole file, resumed where an earlier try stopped; a zip archive → a folder."""

from __future__ import annotations

import errno
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .. import http
from ..checks import brief, is_litter, reason
from ..progress import progress_bar
from .target import check_free, put_in_place

if TYPE_CHECKING:
    import zipfile

CHUNK = 2**20
TIMEOUT = 20  # seconds in which a server must say something
TRIES = 5  # in a row that bring little or nothing
MAX_WAIT = 60  # seconds that a server may ask us to wait
BUSY = (408, 425, 429, 500, 502, 503, 504)
# Weights hardly compress: an archive that grows by more than this is a bomb, unless it is small.
MAX_RATIO = 20
MAX_SMALL = 64 * 2**20
MAX_FILES = 10_000
MAX_DEPTH = 32  # folders
MAX_NAME, MAX_PATH = 255, 700  # bytes; macOS takes 1,024 with the target's own


class DiskFullError(OSError):
    """There is no room for what is being written."""


class _UnreachableError(ConnectionError):
    """No answer at all."""


class _BusyError(ConnectionError):
    """The server asks for another try, after `wait` seconds if it says when."""

    def __init__(self, said: str, wait: int | None):
        super().__init__(said)
        self.wait = wait


def fetch(
    url: str,
    target: str | Path,
    *,
    name: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Path:
    """Download a file, which appears at `target` only when it is whole.

    Until then, `.part` follows its name. A cut connection is resumed a few times, and what arrived
    is kept for the next call, unless the file has changed on the server.

    Args:
        url: http or https.
        target: where the file goes; nothing is done if it exists.
        name: for the progress bar, by default the target's.
        size: in bytes, if known.
        sha256: in hexadecimal, if known.
        headers: of the request; redirects to other hosts go without `Authorization`.
        progress: show a bar.

    Returns:
        The target.

    Raises:
        FileNotFoundError: there is no such file on the server.
        PermissionError: the server refuses it.
        OSError: no connection, a full disk, or a damaged file; the message says which.
    """
    from filelock import FileLock

    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{target}.lock")
    with FileLock(lock):
        if not target.exists():  # another process may have made it meanwhile
            part = Path(f"{target}.part")
            with (
                progress_bar(None, name or target.name, unit="B", shown=progress) as bar,
                disk_full_said(target),
            ):
                try:
                    _complete(url, part, size, headers or {}, bar)
                except OSError as error:
                    if is_disk_full(error):
                        _discard(part)
                    raise
            _check(url, part, size, sha256)
            part.replace(target)
            _validator(part).unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    return target


def _complete(url: str, part: Path, size: int | None, headers: Mapping[str, str], bar: Any) -> None:
    """Ask for what is missing from `part` until nothing is."""
    failures, reached = 0, False
    while True:
        before = _length(part)
        try:
            return _continue(url, part, size, headers, bar)
        except ConnectionError as problem:
            reached = reached or not isinstance(problem, _UnreachableError)
            failures = 0 if _length(part) - before >= CHUNK else failures + 1
            if failures == TRIES or not reached:
                kept = _length(part)
                hint = f"{kept:,} bytes are kept: try again to go on" if kept else "try again later"
                address = http.public(url)
                raise OSError(f"Can't download {address} ({problem}); {hint}.") from None
            wait = problem.wait if isinstance(problem, _BusyError) else None
            time.sleep(2 ** (failures - 1) if wait is None else wait)


def _continue(url: str, part: Path, size: int | None, headers: Mapping[str, str], bar: Any) -> None:
    """One request for the rest of a file; after a ConnectionError another may help."""
    validator = _validator(part)
    start = _length(part) if validator.is_file() else 0
    if size is not None and start == size:
        return
    asked = {**headers, "Accept-Encoding": "identity"}
    if start:
        asked |= {"Range": f"bytes={start}-", "If-Range": validator.read_text(encoding="latin-1")}
    with closing(_open(url, asked)) as response:
        _refuse(url, response)
        first, total = _range(response)
        changed = start > 0 and _changed(response, validator)
        if response.status_code == 416 and start == total and not changed:
            return
        if response.status_code != 200 and (changed or first != start):
            _discard(part)
            raise ConnectionError("the file has changed on the server")
        if size is not None and total not in (None, size):
            raise OSError(f"{http.public(url)} has {total:,} bytes where {size:,} are expected.")
        check_room(part.with_suffix(""), (total or 0) - first)
        bar.total, bar.n = total, first
        bar.refresh()
        with part.open("ab" if first else "wb") as file:
            if not first:  # after the truncation, so that it never vouches for older bytes
                _write_validator(response, validator)
            for chunk in http.body(response):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _length(part) != total:
        raise ConnectionError("the connection was cut")


def _open(url: str, headers: Mapping[str, str]) -> Any:
    """Response to a GET request; its body is read later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return http.get(http.hub_client(), url, headers=headers, timeout=TIMEOUT)
    except OfflineModeIsEnabled:
        raise OSError(f"Can't download {http.public(url)}: HF_HUB_OFFLINE is set.") from None
    except Exception as error:  # the HTTP client has types of its own
        raise _UnreachableError(reason(error)) from None


def _refuse(url: str, response: Any) -> None:
    """Raise what a response without the file means."""
    status = response.status_code
    if status in (200, 206, 416):
        return
    if status in BUSY:
        seconds = http.number(response.headers.get("Retry-After", ""))
        if seconds is not None and seconds > MAX_WAIT:
            raise OSError(
                f"{http.public(url)}: the server answered {status}; try again in {seconds} seconds."
            )
        raise _BusyError(f"the server answered {status}", seconds)
    if status in (404, 410):
        raise FileNotFoundError(
            f"There is no file at {http.public(url)} (the server answered {status})."
        )
    if status in (401, 403):
        raise PermissionError(
            f"You may not download {http.public(url)} (the server answered {status})."
        )
    raise OSError(f"Can't download {http.public(url)}: the server answered {status}.")


def _range(response: Any) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of a response; the size is None if unknown."""
    if response.status_code == 200:
        packed = response.headers.get("Content-Encoding")
        return 0, None if packed else http.content_length(response)
    said = re.fullmatch(
        r"bytes (?:(\d{1,19})-\d+|\*)/(\d{1,19}|\*)", response.headers.get("Content-Range", "")
    )
    if not said:
        return -1, None
    first, total = said.groups()
    return int(first or -1), None if total == "*" else int(total)


def _validator(part: Path) -> Path:
    """The file that remembers which version of a file `part` belongs to."""
    return part.with_name(f"{part.name}.version")


def _version(response: Any) -> str:
    """What `If-Range` takes: a strong ETag or a date; empty if the server sends neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _write_validator(response: Any, validator: Path) -> None:
    if version := _version(response):
        validator.write_text(version, encoding="latin-1")
    else:
        validator.unlink(missing_ok=True)


def _changed(response: Any, validator: Path) -> bool:
    """Whether a server that ignores `If-Range` sends another version of the file."""
    return _version(response) not in ("", validator.read_text(encoding="latin-1"))


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _check(url: str, part: Path, size: int | None, sha256: str | None) -> None:
    """Remove a file that is not the one that was promised, and raise."""
    found = _length(part)
    if size is not None and found != size:
        wrong = f"it has {found:,} bytes where {size:,} are expected"
    elif sha256 is not None and (other := file_sha256(part)) != sha256:
        wrong = f"its SHA-256 is {other} where {sha256} is expected"
    else:
        return
    _discard(part)
    raise OSError(
        f"{http.public(url)} arrived damaged and was removed ({wrong}); download it again."
    )


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: str | Path, target: str | Path, *, progress: bool = True) -> Path:
    """Unpack a zip archive to a folder, which appears only when it is whole.

    A single folder that holds everything is left out, and so is what macOS adds.

    Args:
        archive: the zip file.
        target: the folder to write, which must not exist or be empty.
        progress: show a bar.

    Returns:
        The target.

    Raises:
        ValueError: the archive is broken, or an entry would leave the folder, is a link, is
            encrypted, lies too deep, or is suspiciously large.
        FileExistsError: the target exists and is not empty.
        OSError: a file can't be written.
    """
    import zipfile
    import zlib

    broken = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError)
    archive, target = Path(archive), Path(target)
    check_free(target)
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    try:
        with disk_full_said(target), zipfile.ZipFile(archive) as whole:
            members = _members(whole, archive)
            total = sum(info.file_size for info, _ in members)
            temporary.mkdir(parents=True)
            check_room(target, total)
            with progress_bar(total, target.name, unit="B", shown=progress) as bar:
                for info, path in members:
                    _extract(whole, info, temporary / path, bar)
        put_in_place(temporary, target)
    except broken as error:
        raise ValueError(f"{archive} is not a whole zip archive ({error}).") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # the archive points to before its own beginning
            raise
        raise ValueError(f"{archive} is not a whole zip archive.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _members(whole: zipfile.ZipFile, archive: Path) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive, all of them checked, and their paths in the target."""
    files = {}
    for info in whole.infolist():
        if problem := _problem(info):
            name = brief(repr(info.orig_filename))
            raise ValueError(f"{archive} is not safe to unpack: {name} {problem}.")
        path = PurePosixPath(info.filename)
        if info.is_dir() or path.parts[0] == "__MACOSX" or is_litter(path.name):
            continue
        if str(path).casefold() in files:
            name = brief(repr(info.filename))
            raise ValueError(f"{archive} is not safe to unpack: {name} is there twice.")
        files[str(path).casefold()] = (info, path)
    members = list(files.values())
    total = sum(info.file_size for info, _ in members)
    if not members:
        raise ValueError(f"{archive} holds no files.")
    if len(members) > MAX_FILES:
        raise ValueError(f"{archive} holds {len(members):,} files, more than {MAX_FILES:,}.")
    if total > max(MAX_RATIO * archive.stat().st_size, MAX_SMALL):
        raise ValueError(
            f"{archive} is not safe to unpack: {archive.stat().st_size:,} bytes "
            f"would become {total:,}."
        )
    tops = {path.parts[0] for _, path in members}
    if len(tops) == 1 and all(len(path.parts) > 1 for _, path in members):
        return [(info, PurePosixPath(*path.parts[1:])) for info, path in members]
    return members


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why an entry must not be unpacked."""
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        return "would leave the folder"
    if "\0" in name or "\\" in name or not PurePosixPath(name).parts:
        return "is no file name"
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        return f"lies {len(parts) - 1:,} folders deep"
    if len(name.encode()) > MAX_PATH or max(len(part.encode()) for part in parts) > MAX_NAME:
        return "has too long a name"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 1:
        return "is encrypted"
    return None


def _extract(whole: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, bar: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole.open(info) as source, path.open("xb") as file:
        while chunk := source.read(CHUNK):  # never more than the size that was checked
            file.write(chunk)
            bar.update(len(chunk))
    if path.stat().st_size != info.file_size:
        raise EOFError(f"{info.filename!r} is cut short")


def check_room(path: Path, needed: int) -> None:
    """DiskFullError if the disk of `path` has fewer bytes left than needed."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DiskFullError(
            f"There is no room for {path}: it needs {needed / 1e9:.1f} GB more "
            f"and the disk has {free / 1e9:.1f} GB left."
        )


def missing(target: Path, size: int) -> int:
    """How many bytes `fetch` still has to download of a file of `size` bytes."""
    return 0 if target.exists() else max(size - _length(Path(f"{target}.part")), 0)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_full_said(path: Path) -> Iterator[None]:
    """Turn the system's error about a full disk into one that names `path`."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk is full and {path} is not written; free some space and try again."
        ) from None
