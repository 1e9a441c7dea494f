"""A path, URL, bytes, PIL image or array → an image, as a person sees it."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from contextlib import suppress
from inspect import iscoroutinefunction
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import mlx.core as mx

from ..checks import brief, reason, shown
from .decode import Picture, Purpose, from_array, from_file, from_pil
from .download import MAX_DOWNLOAD, TIMEOUT, check_limits, download_bytes
from .open import BASE64_SAID, BASE64_START

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | PILImage | np.ndarray | mx.array"
)
# What counts as an image where a folder is searched for them; a file given by name may be any.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".heic", ".heif", ".avif"}


def load_image(
    source: ImageSource, *, timeout: float = TIMEOUT, max_bytes: int = MAX_DOWNLOAD
) -> PILImage:
    """Read an image as a person sees it: upright, in RGB, on white, without metadata.

    EXIF orientation is applied, transparency is laid over white, and only the first of several
    frames is read, of a HEIC photo the primary one. The source itself is never changed.

    Grey samples and integers keep the high 8 of their bits. A file may say how many they have
    (TIFF's BitsPerSample below 16, or MaxSampleValue); otherwise they have the fewest of 8, 10, 12,
    14 and 16 that hold the greatest value, since cameras store 12 bits in 16. Of 16-bit colour the
    high byte remains.

    Args:
        source: a path (`~` is expanded), an http, https, file or data URL, the bytes of an image
            file, a binary file object (read from where it stands, at its end from its start), a PIL
            image, or an array of any library, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: integers,
            bool, or float in [0, 1]. HEIC photos need pillow-heif, the extra `heic`, which comes
            with the package on a Mac.
        timeout: seconds that a download may take, from the first step to the last byte.
        max_bytes: the largest download, in bytes.

    Raises:
        ValueError: not an image, a damaged one, more than `MAX_PIXELS`, an unusable array, or a
            timeout or max_bytes that is no number above 0.
        FileNotFoundError, IsADirectoryError: nothing, or a folder, at that path.
        TimeoutError: the download took longer than `timeout`.
        OSError: the file or URL cannot be read, or the download is larger than `max_bytes`.
    """
    picture = read_picture(source, timeout, max_bytes)
    image = picture.upright()
    image = image.copy() if image is picture.image else image
    image.info.clear()  # an old orientation there would turn the image again when it is read again
    return image


def read_picture(
    source: ImageSource,
    timeout: float | None = None,
    max_bytes: int = MAX_DOWNLOAD,
    purpose: Purpose | None = None,
) -> Picture:
    """Read an image as `load_image` does, but leave it unturned.

    Args:
        source, timeout, max_bytes: as in `load_image`; `timeout` None is its default.
        purpose: what the image is decoded for; None for itself.

    Raises:
        ValueError, OSError: as `load_image`.
    """
    import numpy as np
    from PIL import Image

    timeout = TIMEOUT if timeout is None else timeout
    check_limits(timeout, max_bytes)
    if isinstance(source, Image.Image):
        return from_pil(source, purpose)
    if isinstance(source, (np.ndarray, mx.array)):
        return from_array(source, purpose)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return from_file(BytesIO(source), "image bytes", purpose)
    if isinstance(source, str):
        return _read_named(source, timeout, max_bytes, purpose)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _read_path(path, shown(path), purpose)
    if hasattr(source, "read"):
        return from_file(_read_all(source), "the file object", purpose)
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        return from_array(source, purpose)
    raise ValueError(
        f"Cannot read {shown(source)}: an image is a path, URL, bytes, binary file object, PIL "
        f"image or array, not {type(source).__name__}."
    )


def _read_named(source: str, timeout: float, max_bytes: int, purpose: Purpose | None) -> Picture:
    """The image at a path or URL."""
    if source[:5].lower() == "data:":
        name = brief(source, 40)
        return from_file(BytesIO(from_data_url(source, name)), name, purpose)
    name = shown(source)
    scheme, is_url, rest = source.partition("://")
    if not is_url or not scheme.isalnum():
        if BASE64_START.match(source[:32].encode(errors="replace")) and not os.path.exists(source):
            raise ValueError(f"Cannot read {name}: it is {BASE64_SAID}.")
        return _read_path(source, name, purpose)
    if scheme.lower() in ("http", "https"):
        return from_file(BytesIO(download_bytes(source, name, timeout, max_bytes)), name, purpose)
    if scheme.lower() == "file":
        return _read_path(_from_file_url(rest, name), name, purpose)
    raise ValueError(f"Cannot read {name}: the URL of an image is http, https, file or data.")


def _read_path(path: str, name: str, purpose: Purpose | None) -> Picture:
    path = _expand(path)
    try:
        _check_kind(path, name)
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise FileNotFoundError(f"Cannot read {name}: there is no such file.") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"Cannot read {name}: it is a folder, not a file.") from None
    except OSError as error:
        raise type(error)(f"Cannot read {name}: {reason(error)}.") from None
    except UnicodeEncodeError:
        raise ValueError(f"Cannot read {name}: it is not a path (half a character).") from None
    with stream:
        return from_file(stream if stream.seekable() else _read_pipe(stream, name), name, purpose)


def _check_kind(path: str, name: str) -> None:
    """Refuse what could keep a reader waiting for ever."""
    if "\0" in path:
        raise ValueError(f"Cannot read {name}: it is not a path (a zero byte).")
    mode = os.stat(path).st_mode
    given_by_shell = stat.S_ISFIFO(mode) and path.startswith(("/dev/", "/proc/"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or given_by_shell):
        what = "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ValueError(f"Cannot read {name}: it is {what}, not a file.")


def _read_pipe(stream: BinaryIO, name: str) -> BinaryIO:
    data = stream.read(MAX_DOWNLOAD + 1)
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"Cannot read {name}: the pipe gives more than {MAX_DOWNLOAD:,} bytes.")
    return BytesIO(data)


def _read_all(stream: Any) -> BinaryIO:
    """What a file object holds from where it stands; from its start if that is its end, as when it
    was just written."""
    if iscoroutinefunction(stream.read):
        raise ValueError(
            "Cannot read the file object: it is read with await; pass the bytes that `await "
            "image.read()` gives, or its `file` if it is an UploadFile."
        )
    try:
        data = None if isinstance(stream, TextIOBase) else stream.read()
        if data == b"" and hasattr(stream, "seek"):
            stream.seek(0)
            data = stream.read()
    except Exception as error:  # closed, write-only, or of a type that raises its own
        raise ValueError(f"Cannot read the file object: {reason(error)}.") from None
    if not isinstance(data, bytes):
        raise ValueError("Cannot read the file object: it gives no bytes; open it in mode 'rb'.")
    return BytesIO(data)


def _from_file_url(rest: str, name: str) -> str:
    from urllib.parse import unquote

    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"Cannot read {name}: a file URL has three slashes before its path.")
    return unquote(path, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def from_data_url(url: str, name: str) -> bytes:
    """The bytes in a data URL; ValueError, which calls it `name`, if it is not well encoded."""
    from base64 import b64decode
    from urllib.parse import unquote_to_bytes

    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError(f"Cannot read {name}: a data URL has a comma before its data.")
    try:
        data = unquote_to_bytes(payload)
        if not header.lower().endswith(";base64"):
            return data
        data = b"".join(data.split())
        return b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise ValueError(f"Cannot read {name}: its data is not well encoded.") from None


# Files that a person points to


def image_files(folder: str | os.PathLike[str], recursive: bool = False) -> list[Path]:
    """The images of a folder by their suffixes, sorted, without hidden files.

    Among these are the `._` files that macOS leaves beside others on foreign disks.

    Args:
        folder: where to look; `~` is expanded.
        recursive: look into its folders too, hidden ones excepted.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    root = Path(_expand(folder))
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {shown(os.fspath(folder))} of images.")
    return sorted(
        file
        for file in (root.rglob("*") if recursive else root.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
        if not any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_file()
    )


def dragged_path(text: str) -> str:
    """The path or URL in what a person typed, pasted or dragged into a terminal.

    Terminals escape spaces with backslashes or put quotes around, and leave a space behind; file
    managers copy file URLs. Of the possible readings, the first that exists is taken.
    """
    read = _unquoted(text)
    if read[:7].lower() == "file://":
        with suppress(ValueError):  # it has no path
            read = _from_file_url(read[7:], shown(read))
    read = _expand(read)
    return next((path for path in (text, text.strip()) if _exists(path)), read)


def _unquoted(text: str) -> str:
    """A word of a shell without quotes and backslashes; another text without space around."""
    stripped = text.strip()
    if "://" in text and stripped[0] not in "'\"":  # a backslash in a URL is its own
        return stripped
    try:
        words = shlex.split(text)
    except ValueError:  # a quote alone
        return stripped
    return words[0] if len(words) == 1 else stripped


def _expand(path: str | os.PathLike[str]) -> str:
    """A path with `~` or `~name` as a home directory, if it is one."""
    try:
        return os.path.expanduser(os.fspath(path))
    except ValueError:  # a name with a zero byte or half a character
        return os.fspath(path)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # not a path at all
        return False
