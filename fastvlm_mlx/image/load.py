"""A path, URL, bytes, PIL image or array → an image, as a person sees it."""

from __future__ import annotations

import os
import sys
from io import BytesIO, TextIOBase
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import mlx.core as mx

from ..checks import brief, reason
from .decode import Picture, Reduction, from_array, from_file, from_pil
from .download import MAX_DOWNLOAD, TIMEOUT, download_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | PILImage | np.ndarray | mx.array"
)
# What counts as an image where a folder is searched for them; a file given by name may be any.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def load_image(
    source: ImageSource, *, timeout: float = TIMEOUT, max_bytes: int = MAX_DOWNLOAD
) -> PILImage:
    """Read an image as a person sees it: upright, in RGB, on white, without metadata.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey keeps its high byte,
    and only the first of several frames is read. The source itself is never changed.

    Args:
        source: a path (`~` is expanded), an http, https, file or data URL, the bytes of an image
            file, a binary file object (read from where it stands), a PIL image, or an array
            [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: uint8, bool, or float in [0, 1].
        timeout: seconds that a download may take, from the first step to the last byte.
        max_bytes: the largest download, in bytes.

    Raises:
        ValueError: not an image, a damaged one, more than `MAX_PIXELS`, or an unusable array.
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
    reduction: Reduction | None = None,
) -> Picture:
    """Read an image as `load_image` does, but leave it unturned.

    Args:
        source, timeout, max_bytes: as in `load_image`; `timeout` None is its default.
        reduction: how much smaller a JPEG in a file may be decoded; None for not at all.

    Raises:
        ValueError, OSError: as `load_image`.
    """
    import numpy as np
    from PIL import Image

    timeout = TIMEOUT if timeout is None else timeout
    if isinstance(source, Image.Image):
        return from_pil(source)
    if isinstance(source, (np.ndarray, mx.array)):
        return from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return from_file(BytesIO(source), "image bytes", reduction)
    if isinstance(source, str):
        return _read_named(source, timeout, max_bytes, reduction)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _read_path(path, brief(repr(path)), reduction)
    if hasattr(source, "read"):
        return from_file(_read_all(source), "the file object", reduction)
    raise ValueError(
        f"Cannot read {brief(repr(source))}: an image is a path, URL, bytes, binary file object, "
        f"PIL image or array, not {type(source).__name__}."
    )


def _read_named(
    source: str, timeout: float, max_bytes: int, reduction: Reduction | None
) -> Picture:
    """The image at a path or URL."""
    if source[:5].lower() == "data:":
        name = brief(source, 40)
        return from_file(BytesIO(_from_data_url(source, name)), name, reduction)
    name = brief(repr(source))
    scheme, is_url, rest = source.partition("://")
    if not is_url or not scheme.isalnum():
        return _read_path(source, name, reduction)
    if scheme.lower() in ("http", "https"):
        return from_file(BytesIO(download_bytes(source, name, timeout, max_bytes)), name, reduction)
    if scheme.lower() == "file":
        return _read_path(_from_file_url(rest, name), name, reduction)
    raise ValueError(f"Cannot read {name}: the URL of an image is http, https, file or data.")


def _read_path(path: str, name: str, reduction: Reduction | None) -> Picture:
    try:
        stream = open(os.path.expanduser(path), "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise FileNotFoundError(f"Cannot read {name}: there is no such file.") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"Cannot read {name}: it is a folder, not a file.") from None
    except OSError as error:
        raise type(error)(f"Cannot read {name}: {reason(error)}.") from None
    except ValueError as error:  # a zero byte or half a character
        raise ValueError(f"Cannot read {name}: it is not a path ({reason(error)}).") from None
    with stream:
        seekable = stream if stream.seekable() else BytesIO(stream.read())
        return from_file(seekable, name, reduction)


def _read_all(stream: BinaryIO) -> BinaryIO:
    data = None if isinstance(stream, TextIOBase) else stream.read()
    if not isinstance(data, bytes):
        raise ValueError("Cannot read the file object: it gives no bytes; open it in mode 'rb'.")
    return BytesIO(data)


def _from_file_url(rest: str, name: str) -> str:
    from urllib.parse import unquote

    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"Cannot read {name}: a file URL has three slashes before its path.")
    return unquote(path, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def _from_data_url(url: str, name: str) -> bytes:
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
