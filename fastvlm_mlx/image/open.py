"""A file → a PIL image whose pixels are not decoded yet: opened quietly, and in bounded time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import RLock
from typing import TYPE_CHECKING, Any, BinaryIO

from ..checks import reason

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

HEIC_MARKS = tuple(
    b"ftyp" + brand
    for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
)
PLAIN_PPM = (b"P1", b"P2", b"P3")
# How JPEG, PNG, GIF, WebP and HEIC or AVIF files begin in base64.
BASE64_START = re.compile(rb"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|AAAA..Z0eX)[A-Za-z0-9+/]{16}")
BASE64_SAID = "an image in base64; decode it, or put data:image/jpeg;base64, before the text"
# An image of a phone has some hundred pieces of metadata, and at most a few megabytes.
PIECE = 2**16  # bytes; whoever reads more at once reads the file, not a piece of its header
MAX_PIECES = 10_000
MAX_HEADER = 16 * 2**20  # bytes


def open_image(stream: BinaryIO, name: str) -> PILImage:
    """The image in a seekable file, its header read.

    Args:
        stream: the file, which stays open for the pixels.
        name: what errors call it.

    Raises:
        ValueError: not an image, or a damaged or an endless header.
    """
    from PIL import Image

    head = stream.read(32)
    if not head:
        raise ValueError(f"Cannot read {name}: it is empty.")
    stream = _without_comments(stream) if head[:2] in PLAIN_PPM else stream
    header = _Header(stream)
    try:
        with quiet_pil(), process_wide:
            image: PILImage = Image.open(header)
    except Image.DecompressionBombError as error:
        raise ValueError(f"Cannot read {name}: {reason(error).partition(',')[0]}.") from None
    except _EndlessHeaderError:
        raise ValueError(
            f"Cannot read {name}: its comments and metadata are too long; save it without them."
        ) from None
    except Exception:  # PIL's readers raise whatever bad bytes lead them to
        if head[4:12] not in HEIC_MARKS:
            raise ValueError(f"Cannot read {name}: it is {_no_image(head)}.") from None
        image = _open_heic(stream, name)
    if image.format == "EPS":  # to decode it, PIL would run Ghostscript
        raise ValueError(f"Cannot read {name}: it is PostScript; save it as PNG first.")
    header.whole = True
    return image


def _without_comments(stream: BinaryIO) -> BinaryIO:
    """A plain PPM as PIL reads it, which takes out each comment with a copy of what follows."""
    stream.seek(0)
    return BytesIO(re.sub(rb"#[^\r\n]*[\r\n]?", b"", stream.read()))


def _no_image(head: bytes) -> str:
    if BASE64_START.match(head):
        return BASE64_SAID
    return "not an image in PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or another format PIL knows"


def _open_heic(stream: BinaryIO, name: str) -> PILImage:
    """The primary image of a HEIC file; the plugin turns it upright and says so in its EXIF."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ValueError(
            f"Cannot read {name}: it is a HEIC photo, for which pillow-heif is needed: "
            "pip install 'fastvlm-mlx[heic]', or save it as JPEG first."
        ) from None
    try:
        stream.seek(0)
        return HeifImageFile(stream)
    except Exception as error:  # as in open_image
        raise ValueError(
            f"Cannot read {name}: it is a damaged HEIC photo: {reason(error)}."
        ) from None


class _EndlessHeaderError(Exception):
    """A header has more pieces, or more bytes in pieces, than an image can need."""


class _Header:
    """A file that gives out only so many pieces, until it may be read as a whole.

    Before it knows the size of an image, PIL reads comments byte by byte and joins metadata piece
    by piece, in a time that grows with the square of their number; meanwhile other threads wait.
    """

    def __init__(self, stream: BinaryIO):
        self.whole = False
        self._stream = stream
        self._pieces = self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        return self._count(self._stream.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._count(self._stream.readline(size))

    def _count(self, data: bytes) -> bytes:
        if not self.whole and len(data) <= PIECE:
            self._pieces += 1
            self._bytes += len(data)
            if self._pieces > MAX_PIECES or self._bytes > MAX_HEADER:
                raise _EndlessHeaderError
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# PIL in several threads

process_wide = RLock()  # for PIL's list of formats and the warning filters
_quiet_threads = 0
_quiet = warnings.catch_warnings()


@contextmanager
def quiet_pil() -> Iterator[None]:
    """Silence PIL's warnings: an image is read, or an error says why not.

    The filters belong to the process, so the first of several threads sets them and the last
    restores them.
    """
    global _quiet, _quiet_threads
    with process_wide:
        if _quiet_threads == 0:
            _quiet = warnings.catch_warnings()
            _quiet.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_threads += 1
    try:
        yield
    finally:
        with process_wide:
            _quiet_threads -= 1
            if _quiet_threads == 0:
                _quiet.__exit__(None, None, None)
