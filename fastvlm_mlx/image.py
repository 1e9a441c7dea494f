"""The first step: a path, URL, bytes, PIL image or array becomes pixels.

`load_image` reads any of them as an upright RGB image on white, `preprocess` brings that to the
size and form the vision encoder takes. Its pixels are those that PIL gives, got with fewer copies,
less padding and several threads.
"""

from __future__ import annotations

import ast
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO, TextIOBase
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import mlx.core as mx

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | PILImage | np.ndarray | mx.array"
)

MAX_PIXELS = 178_956_970  # where PIL, left to itself, speaks of a decompression bomb
MAX_PADDED_PIXELS = 2**30  # of rows padded to squares: seconds of work, but little memory
MAX_REDIRECTS = 10
TIMEOUT = 10.0  # seconds, of a download
MAX_DOWNLOAD = 100 * 2**20  # bytes
LINES_AT_ONCE = 256
MAX_THREADS = 8  # each may hold a decoded image
PIXELS_FOR_THREADS = 2**20  # with fewer, threads save too little
FAST_MARGIN = 1.5  # by so much a reduced image stays larger than what it is resized to
HEIC_MARKS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")

# What PIL calls the turn that each EXIF orientation asks for; from 5 on, width becomes height
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
FROM_THE_RIGHT, FROM_THE_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)


def load_image(
    source: ImageSource, *, timeout: float = TIMEOUT, max_bytes: int = MAX_DOWNLOAD
) -> PILImage:
    """Read an image as a person sees it: upright, in RGB, on white, without metadata.

    EXIF orientation is applied, transparency laid over white, 16-bit grey keeps its high byte, and
    of several frames the first counts. The source itself is never changed.

    Args:
        source: A path (`~` is expanded), an http, https, file or data URL, the bytes of an image
            file, a binary file object (read from where it stands), a PIL image, or an array
            [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: uint8, bool, or float in [0, 1].
        timeout: Seconds that a download may take, from the first step to the last byte.
        max_bytes: The largest download, in bytes.

    Raises:
        ValueError: Not an image, a damaged one, more than `MAX_PIXELS`, or an unusable array.
        FileNotFoundError, IsADirectoryError: Nothing, or a folder, at that path.
        TimeoutError: The download took longer than `timeout`.
        OSError: The file or URL cannot be read, or the download is larger than `max_bytes`.
    """
    picture = _read(source, timeout, max_bytes)
    image = picture.upright()
    image = image.copy() if image is picture.image else image
    image.info.clear()  # with its old orientation, the image would be turned again when read again
    return image


def expand_to_square(image: PILImage, fill: tuple[int, int, int] = (0, 0, 0)) -> PILImage:
    """Centre an RGB image on a square of its longer side (LLaVA's `expand2square`).

    An odd pixel of padding goes to the right or the bottom. A square image is returned as it is.
    """
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(
    image: ImageSource | list[Any] | tuple[Any, ...],
    image_size: int = 1024,
    mode: str | None = "pad",
    grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
    *,
    fast: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Bring an image to the size and form the vision encoder takes.

    Args:
        image: Anything `load_image` reads or, but for mode "anyres", a list or tuple of such, which
            are decoded in parallel.
        image_size: The side S, in pixels: a multiple of 64.
        mode: The checkpoint's `image_aspect_ratio`. "pad" pads to a square with black; "square" (or
            None, "", "none") resizes the short side to S and keeps the centre, as transformers'
            `CLIPImageProcessor` does; "anyres" (LLaVA 1.6) gives the image squeezed to S × S, then
            the tiles of the best fitting of `grid_pinpoints`, row by row.
        grid_pinpoints: For "anyres": the sizes to choose from, as in `anyres_grid`.
        fast: Let the JPEG decoder make a photo 2, 4 or 8 times smaller, as long as it stays 1.5
            times as large as what it is resized to. It halves the time for 12 megapixels at S =
            1024. On photos, the mean error was below 0.5 of 255 and 99.9 % of the values were
            within 18; `benchmarks/preprocess.py` measures it on yours. Other formats, PIL images
            and arrays stay exact.
        dtype: float32, or uint8 for the bytes themselves, from 0 to 255: a quarter of the memory.

    Returns:
        `dtype` [N, S, S, 3], RGB, floats in [0, 1]: one for each image, or with "anyres" 1 + tiles.

    Raises:
        ValueError: A bad size, mode, grid or dtype, or an image too long to resize.
        ValueError, OSError: Whatever `load_image` finds.
    """
    images = image if isinstance(image, (list, tuple)) else [image]
    if mode == "anyres" and isinstance(image, (list, tuple)):
        raise ValueError('Mode "anyres" takes one image at a time, not a list of images.')
    if not images:
        raise ValueError("The list of images is empty: preprocess needs at least one.")
    each = preprocess_each(images, image_size, mode, grid_pinpoints, fast=fast, dtype=dtype)
    pixel_values = [pixels for pixels, _ in each]
    return pixel_values[0] if len(pixel_values) == 1 else mx.concatenate(pixel_values)


def preprocess_each(
    images: Sequence[ImageSource],
    image_size: int = 1024,
    mode: str | None = "pad",
    grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
    *,
    fast: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> Iterator[tuple[mx.array, tuple[int, int]]]:
    """Preprocess images one by one, while threads decode and resize those that follow.

    Args:
        images, image_size, mode, grid_pinpoints, fast, dtype: As in `preprocess`, but "anyres"
            takes several images too. PIL images that are not yet decoded wait for one another.

    Yields:
        For each image, in order: its pixels, as `preprocess` gives them, and its upright (width,
        height).

    Raises:
        ValueError: On the call: a bad size, mode, grid or dtype. At an image: it is too long.
        ValueError, OSError: At an image: whatever `load_image` finds.
    """
    if not isinstance(image_size, int) or image_size <= 0 or image_size % 64:
        raise ValueError(f"image_size must be a positive multiple of 64, not {image_size!r}.")
    if not isinstance(dtype, mx.Dtype) or dtype not in (mx.float32, mx.uint8):
        raise ValueError(f"dtype must be mlx.core.float32 or uint8, not {dtype!r}.")
    resize, reduction = _of_mode(image_size, mode, grid_pinpoints)
    work = partial(_read_and_resize, resize=resize, reduction=reduction if fast else None)
    # Arrays of MLX are computed on the thread that made them.
    mx.eval([image for image in images if isinstance(image, mx.array)])
    found = _ahead(work, images)
    return ((mx.array(p) / 255 if dtype == mx.float32 else mx.array(p), size) for p, size in found)


def anyres_grid(
    size: tuple[int, int], grid_pinpoints: str | Sequence[Sequence[int]], image_size: int
) -> tuple[int, int]:
    """How many tiles "anyres" cuts from an image (LLaVA's `get_anyres_image_grid_shape`).

    Args:
        size: (width, height) of the upright image.
        grid_pinpoints: Sizes [[width, height], …], multiples of `image_size`, or the same as the
            string a config.json holds.
        image_size: The side of a tile, in pixels.

    Returns:
        (tiles across, tiles down).

    Raises:
        ValueError: An argument is not as described.
    """
    if image_size <= 0:
        raise ValueError(f"image_size must be positive, not {image_size}.")
    if len(size) != 2 or min(size) <= 0:
        raise ValueError(f"The size of an image must be (width, height), not {size!r}.")
    width, height = _best_resolution(size, _parse_pinpoints(grid_pinpoints, image_size))
    return width // image_size, height // image_size


# Pictures: images between decoding and resizing


class _Picture(NamedTuple):
    """A decoded image, not yet turned upright.

    Attributes:
        image: RGB; perhaps the source itself, so not to be changed.
        orientation: EXIF's, from 1 to 8.
        full_size: (width, height) of the upright image in the file.
        shrink: How many of its pixels are one of `image`, each way.
    """

    image: PILImage
    orientation: int
    full_size: tuple[int, int]
    shrink: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return _upright(self.image.size, self.orientation)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Where the image is in its pixels: the last ones stored may be a part of a pixel each."""
        width, height = (edge / self.shrink for edge in self.full_size)
        left = self.size[0] - width if self.orientation in FROM_THE_RIGHT else 0
        top = self.size[1] - height if self.orientation in FROM_THE_BOTTOM else 0
        return left, top, left + width, top + height

    def upright(self) -> PILImage:
        """The whole image, or, if it must be turned, a copy."""
        return self._turn(self.image)

    def crop(self, left: int, top: int, right: int, bottom: int) -> PILImage:
        """A part of the upright image, black beyond its edges."""
        width, height = self.size
        if self.orientation in FROM_THE_RIGHT:
            left, right = width - right, width - left
        if self.orientation in FROM_THE_BOTTOM:
            top, bottom = height - bottom, height - top
        if self.orientation >= 5:
            left, top, right, bottom = top, left, bottom, right
        return self._turn(_crop(self.image, left, top, right, bottom))

    def _turn(self, image: PILImage) -> PILImage:
        from PIL.Image import Transpose

        if self.orientation == 1:
            return image
        return image.transpose(Transpose[TURNS[self.orientation]])


# How a mode resizes a picture, with how many threads
Resize: TypeAlias = Callable[[_Picture, int], "list[PILImage]"]
# How much smaller it lets an image of this upright (width, height) be decoded
Reduction: TypeAlias = Callable[[tuple[int, int]], float]


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


def _crop(image: PILImage, left: int, top: int, right: int, bottom: int) -> PILImage:
    """A part of an RGB image, black beyond its edges."""
    from PIL import Image

    part = Image.new("RGB", (right - left, bottom - top))
    part.paste(image, (-left, -top))
    return part


# Sources


def _read(
    source: ImageSource,
    timeout: float | None = None,
    max_bytes: int = MAX_DOWNLOAD,
    reduction: Reduction | None = None,
) -> _Picture:
    """What `load_image` reads, before its last copy."""
    import numpy as np
    from PIL import Image

    timeout = TIMEOUT if timeout is None else timeout
    if isinstance(source, Image.Image):
        with _one_at_a_time:  # it may be the same for two threads
            return _to_rgb(source, "the PIL image")
    if isinstance(source, (np.ndarray, mx.array)):
        return _to_rgb(_from_array(source), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(BytesIO(source), "image bytes", reduction)
    if isinstance(source, str):
        return _read_named(source, timeout, max_bytes, reduction)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _open(path, _brief(repr(path)), reduction)
    if hasattr(source, "read"):
        return _decode(_read_all(source), "the file object", reduction)
    raise ValueError(
        f"Cannot read {_brief(repr(source))}: an image is a path, URL, bytes, binary file object, "
        f"PIL image or array, not {type(source).__name__}."
    )


def _read_named(
    source: str, timeout: float, max_bytes: int, reduction: Reduction | None
) -> _Picture:
    """The image at a path or URL."""
    if source[:5].lower() == "data:":
        name = _brief(source, 40)
        return _decode(BytesIO(_from_data_url(source, name)), name, reduction)
    name = _brief(repr(source))
    scheme, is_url, rest = source.partition("://")
    if not is_url or not scheme.isalnum():
        return _open(source, name, reduction)
    if scheme.lower() in ("http", "https"):
        return _decode(BytesIO(_download(source, name, timeout, max_bytes)), name, reduction)
    if scheme.lower() == "file":
        return _open(_from_file_url(rest, name), name, reduction)
    raise ValueError(f"Cannot read {name}: the URL of an image is http, https, file or data.")


def _open(path: str, name: str, reduction: Reduction | None) -> _Picture:
    try:
        stream = open(os.path.expanduser(path), "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise FileNotFoundError(f"Cannot read {name}: there is no such file.") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"Cannot read {name}: it is a folder, not a file.") from None
    except OSError as error:
        raise type(error)(f"Cannot read {name}: {_reason(error)}.") from None
    except ValueError as error:  # a zero byte or half a character
        raise ValueError(f"Cannot read {name}: it is not a path ({_reason(error)}).") from None
    with stream:
        seekable = stream if stream.seekable() else BytesIO(stream.read())
        return _decode(seekable, name, reduction)


def _read_all(stream: BinaryIO) -> BinaryIO:
    data = None if isinstance(stream, TextIOBase) else stream.read()
    if not isinstance(data, bytes):
        raise ValueError("Cannot read the file object: it gives no bytes; open it in mode 'rb'.")
    return BytesIO(data)


def _from_file_url(rest: str, name: str) -> str:
    from urllib.request import url2pathname

    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"Cannot read {name}: a file URL has three slashes before its path.")
    return url2pathname(path)


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


def _download(url: str, name: str, timeout: float, max_bytes: int) -> bytes:
    """The body at `url`, whole and in time.

    A socket's timeout starts again with each byte, and looking up a host has none, so the deadline
    is kept here and a thread that misses it is left behind.
    """
    from queue import Empty, SimpleQueue
    from threading import Thread

    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def fetch() -> None:
        try:
            # It stops itself later, so that it is the deadline below that is reported.
            answers.put(_fetch(url, timeout + 1, max_bytes))
        except Exception as error:
            answers.put(error)

    Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except Empty:
        raise TimeoutError(
            f"Cannot read {name}: it did not arrive within {timeout:g} seconds."
        ) from None
    if isinstance(answer, Exception):
        raise OSError(f"Cannot read {name}: {_reason(answer)}.") from None
    return answer


def _fetch(url: str, timeout: float, max_bytes: int) -> bytes:
    """The body at `url`; any exception says why there is none."""
    from http.client import responses
    from string import punctuation
    from urllib import request
    from urllib.error import HTTPError
    from urllib.parse import quote, urljoin

    # No redirect handler: urllib's reads the body of a redirect, however long it is.
    opener = request.OpenerDirector()
    opener.add_handler(request.ProxyHandler())
    opener.add_handler(request.HTTPHandler())
    opener.add_handler(request.HTTPSHandler())
    opener.add_handler(request.HTTPDefaultErrorHandler())
    opener.add_handler(request.HTTPErrorProcessor())
    headers = {"User-Agent": "Mozilla/5.0 (compatible; fastvlm-mlx)"}
    url = quote(url, safe=punctuation)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = opener.open(request.Request(url, headers=headers), timeout=timeout)
        except HTTPError as answer:
            answer.close()
            location = answer.headers.get("Location")
            if answer.code not in (301, 302, 303, 307, 308) or not location:
                phrase = responses.get(answer.code, "")
                raise OSError(f"the server answered {answer.code} {phrase}") from None
            url = urljoin(url, quote(location, encoding="latin-1", safe=punctuation))
            if not url.lower().startswith(("http://", "https://")):
                raise OSError("it redirects to an address other than http and https") from None
        else:
            with response:
                return _read_body(response, timeout, max_bytes)
    raise OSError(f"it redirects more than {MAX_REDIRECTS} times")


def _read_body(response: Any, timeout: float, max_bytes: int) -> bytes:
    """The body of an `http.client.HTTPResponse`."""
    from time import monotonic

    deadline = monotonic() + timeout
    length = response.length  # None if not declared
    body = bytearray()
    while length is None or len(body) < length:
        if max(length or 0, len(body)) > max_bytes:
            raise OSError(f"it is larger than max_bytes, {max_bytes:,}")
        if monotonic() > deadline:
            raise OSError("it took too long")
        part = response.read1(2**16 if length is None else min(2**16, length - len(body)))
        if not part:
            break
        body += part
    if len(body) < (length or 0):
        raise OSError(f"the connection broke after {len(body):,} of {length:,} bytes")
    return bytes(body)


def _from_array(source: np.ndarray | mx.array) -> PILImage:
    import numpy as np
    from PIL import Image

    if isinstance(source, mx.array) and source.dtype == mx.bfloat16:
        source = source.astype(mx.float32)
    array = np.asarray(source)
    shape = list(array.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = "; bring its channels last with transpose(1, 2, 0)"
        elif len(shape) == 4:
            hint = "; pass a batch as a list of images"
        raise ValueError(
            f"Cannot read the array: its shape {shape} is not [H, W], [H, W, 1], [H, W, 3] or "
            f"[H, W, 4]{hint}."
        )
    if not 0 < shape[0] * shape[1] <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read the array: its shape {shape} makes {shape[0] * shape[1]:,} pixels, not "
            f"1 to {MAX_PIXELS:,}."
        )
    samples = _array_to_bytes(array)
    return Image.fromarray(samples[..., 0] if shape[2:] == [1] else samples)


def _array_to_bytes(array: np.ndarray) -> np.ndarray:
    import numpy as np

    kind = array.dtype.kind
    if array.dtype != np.uint8 and kind not in "bf":
        raise ValueError(
            f"Cannot read the array: its type {array.dtype} is not uint8 (0 to 255), float (0 to "
            "1) or bool."
        )
    if kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"Cannot read the array: its floats run from {low:g} to {high:g}, not from 0 to 1."
            )
        array = np.rint(array * np.float32(255))
    elif kind == "b":
        array = array * np.uint8(255)
    return np.ascontiguousarray(array, dtype=np.uint8)


# Decoding

_one_at_a_time = Lock()
_process_wide = RLock()  # PIL's list of formats, and the filters of warnings
_quiet_threads = 0
_quiet = warnings.catch_warnings()


def _decode(stream: BinaryIO, name: str, reduction: Reduction | None) -> _Picture:
    """The image in a seekable file that stands at its start."""
    from PIL import Image

    head = stream.read(12)
    if not head:
        raise ValueError(f"Cannot read {name}: it is empty.")
    try:
        with _quiet_pil(), _process_wide:
            image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise ValueError(f"Cannot read {name}: {_reason(error).partition(',')[0]}.") from None
    except Exception:  # PIL's readers raise whatever bad bytes lead them to
        what = "not an image in PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or another format PIL knows"
        if head[4:] in HEIC_MARKS:
            what = "a HEIC photo; save it as JPEG or PNG first"
        raise ValueError(f"Cannot read {name}: it is {what}.") from None
    if image.format == "EPS":  # to decode it, PIL would run Ghostscript
        raise ValueError(f"Cannot read {name}: it is PostScript; save it as PNG first.")
    return _to_rgb(image, name, reduction)


def _to_rgb(image: PILImage, name: str, reduction: Reduction | None = None) -> _Picture:
    """A PIL image of any mode, decoded or not, in RGB on white."""
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read {name}: it has {width} × {height} pixels, not 1 to {MAX_PIXELS:,}."
        )
    try:
        with _quiet_pil():
            shrink = _draft(image, reduction) if reduction is not None else 1
            key = _transparent_colour(image)
            image.load()
            rgb = _flatten(image, key)
            orientation = _orientation(image)
    except Exception as error:  # as in _decode
        raise ValueError(
            f"Cannot read {name}: its pixels cannot be decoded: {_reason(error)}."
        ) from None
    return _Picture(rgb, orientation, _upright((width, height), orientation), shrink)


def _draft(image: PILImage, reduction: Reduction) -> int:
    """Have a JPEG decoded smaller, and tell how many times."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    width, height = image.size
    ratio = reduction(_upright(image.size, _orientation(image))) / FAST_MARGIN
    drafted = image.draft("RGB", (max(1, int(width / ratio)), max(1, int(height / ratio))))
    return 1 if drafted is None else round(width / drafted[1][2])


@contextmanager
def _quiet_pil() -> Iterator[None]:
    """Silence PIL's warnings: an image is read, or an error says why not.

    The filters are the process's, so of several threads the first sets and the last restores them.
    """
    global _quiet, _quiet_threads
    with _process_wide:
        if _quiet_threads == 0:
            _quiet = warnings.catch_warnings()
            _quiet.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_threads += 1
    try:
        yield
    finally:
        with _process_wide:
            _quiet_threads -= 1
            if _quiet_threads == 0:
                _quiet.__exit__(None, None, None)


def _orientation(image: PILImage) -> int:
    """EXIF's, from 1 to 8; 1 is upright."""
    try:
        found = int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata on a sound image
        return 1
    return found if found in TURNS else 1


def _transparent_colour(image: PILImage) -> int | tuple[int, ...] | None:
    """The colour that means transparent (PNG's tRNS chunk), in the scale of the decoded samples.

    PIL gives it in the file's scale, but stretches grey samples of 2 or 4 bits to 8, and cuts RGB
    ones of 16 bits to 8. How the samples are packed is known only until they are decoded.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    packing = tiles[0][3] if tiles else None
    if image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        return tuple(value >> 8 for value in key) if packing == "RGB;16B" else key
    if image.mode in ("1", "L", "I;16", "I") and isinstance(key, int):
        return key * (85 if packing == "L;2" else 17 if packing == "L;4" else 1)
    return None


def _flatten(image: PILImage, key: int | tuple[int, ...] | None) -> PILImage:
    """The image, or a copy, in RGB, white where it is transparent or has the colour `key`."""
    import numpy as np
    from PIL import Image

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P"):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    if key is None and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image if image.mode == "RGB" else image.convert("RGB")
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    rgb = Image.fromarray(_samples_to_bytes(samples)).convert("RGB")
    if key is not None:
        same = samples == np.array(key)
        rgb.paste("white", mask=Image.fromarray(same.all(-1) if same.ndim == 3 else same))
    return rgb


def _samples_to_bytes(samples: np.ndarray) -> np.ndarray:
    """PIL's samples as uint8: of 16 bits, perhaps in an int32, the high byte counts; floats go to 1
    or to 255."""
    import numpy as np

    if samples.dtype == np.uint8:
        return samples
    low, high = samples.min(), samples.max()
    if samples.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN fails too
            raise ValueError(f"values from {low:g} to {high:g} are neither 0 to 1 nor 0 to 255")
        return np.rint(samples * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"values from {low} to {high} are not 0 to 65535")
    return (samples >> 8).astype(np.uint8)


# Resizing


class _Span(NamedTuple):
    """One axis of a resize.

    Attributes:
        start, stop: The pixels to read; those before 0 and beyond the image are black.
        low, high: The part of them, from `start`, that is resized; the filter sees the others too.
        size: How many pixels that part becomes.
        first: Where those lie in the whole.
    """

    start: int
    stop: int
    low: float
    high: float
    size: int
    first: int = 0


def _of_mode(
    side: int, mode: str | None, grid_pinpoints: str | Sequence[Sequence[int]] | None
) -> tuple[Resize, Reduction]:
    if mode == "pad":
        return partial(_resize_padded, side), lambda size: max(size) / side
    if mode in ("square", "none", "", None):
        return partial(_resize_cropped, side), lambda size: min(size) / side
    if mode != "anyres":
        raise ValueError(f'mode must be "pad", "square" or "anyres", not {mode!r}.')
    if grid_pinpoints is None:
        raise ValueError('Mode "anyres" needs grid_pinpoints, the sizes to choose from.')
    pinpoints = _parse_pinpoints(grid_pinpoints, side)

    def reduction(size: tuple[int, int]) -> float:
        across, down = _best_resolution(size, pinpoints)
        return min(max(size[0] / across, size[1] / down), min(size) / side)

    return partial(_tile, side, pinpoints), reduction


def _read_and_resize(
    source: ImageSource,
    threads: int,
    resize: Resize,
    reduction: Reduction | None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [N, S, S, 3], and the (width, height) of the upright image."""
    import numpy as np

    picture = _read(source, reduction=reduction)
    pixels = [np.asarray(image) for image in resize(picture, threads)]
    return np.stack(pixels), picture.full_size


def _ahead(
    work: Callable[[Any, int], tuple[np.ndarray, tuple[int, int]]], images: Sequence[Any]
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """`work` on each image, with its share of the threads, and on the next ones meanwhile."""
    from concurrent.futures import Future, ThreadPoolExecutor

    threads = min(os.cpu_count() or 1, MAX_THREADS)
    at_once = min(threads, len(images))
    if at_once <= 1:
        for image in images:
            yield work(image, threads)
        return
    pool = ThreadPoolExecutor(at_once)
    started: deque[Future[tuple[np.ndarray, tuple[int, int]]]] = deque()
    try:
        for image in images:
            started.append(pool.submit(work, image, threads // at_once))
            if len(started) > 2 * at_once:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _resize_padded(side: int, picture: _Picture, threads: int) -> list[PILImage]:
    """`expand_to_square` and a resize, without the square.

    PIL resizes each row of a square by itself and then, from bytes again, each column. Done in
    bands of either, it takes little memory, however long the image is, and runs in threads.
    """
    from PIL import Image

    width, height = picture.size
    longest = max(width, height)
    _check_resized(picture.size, side, max(side, longest))
    _check_resized(picture.size, longest, height, MAX_PADDED_PIXELS)
    columns = _padded_span(picture, 0, side)
    rows = _padded_span(picture, 1, side)
    narrow = Image.new("RGB", (columns.size, height))
    square = Image.new("RGB", (side, side))

    def resize_rows(start: int, stop: int) -> None:
        band = picture.crop(columns.start, start, columns.stop, stop)
        size, box = (columns.size, stop - start), (columns.low, 0, columns.high, stop - start)
        narrow.paste(band.resize(size, Image.Resampling.BICUBIC, box), (0, start))

    def resize_columns(start: int, stop: int) -> None:
        strip = _crop(narrow, start, rows.start, stop, rows.stop)
        size, box = (stop - start, rows.size), (0, rows.low, stop - start, rows.high)
        strip = strip.resize(size, Image.Resampling.BICUBIC, box)
        square.paste(strip, (columns.first + start, rows.first))

    if width * height < PIXELS_FOR_THREADS:
        threads = 1
    _in_bands(resize_rows, height, threads)
    _in_bands(resize_columns, columns.size, threads)
    return [square]


def _padded_span(picture: _Picture, axis: int, side: int) -> _Span:
    """What of the padded square, along one axis, is not black once it is resized to `side`.

    For each pixel PIL computes in doubles where it lies and what each pixel of the source weighs,
    from a box in single precision. Where the square is a binary fraction of `side`, as it always is
    of 256, 512 and 1024, all these numbers are exact from wherever one counts, and a part comes out
    as it does in the whole; else the whole is resized. The box of every 16th pixel has no more than
    24 binary digits, since `_check_resized` keeps the square times `side` below 2²⁸.
    """
    edge, full = picture.full_size[axis], max(picture.full_size)
    scale = full / (picture.shrink * side)
    # Places count from the first pixel of the image, so the square begins at -before.
    before = (full - edge) // 2 / picture.shrink - picture.box[axis]
    after = full / picture.shrink - before
    reach = 3 * max(scale, 1) + 1  # the filter's two pixels of the smaller scale, and rounding
    first = max(0, math.floor((before - reach) / scale)) // 16 * 16
    last = math.ceil((before + picture.size[axis] + reach) / scale)
    last = min(side, -(-last // 16) * 16)
    if picture.shrink == 1 and (side // math.gcd(full, side)).bit_count() > 1:
        first, last = 0, side
    low, high = (place * full / side / picture.shrink - before for place in (first, last))
    start = math.floor(max(low - reach, -before))
    stop = math.ceil(min(high + reach, after))
    return _Span(start, stop, low - start, high - start, last - first, first)


def _in_bands(work: Callable[[int, int], None], length: int, threads: int) -> None:
    """Call `work` with the ends of each band of lines from 0 to `length`."""
    from concurrent.futures import ThreadPoolExecutor

    step = min(LINES_AT_ONCE, math.ceil(length / (2 * threads)))
    bands = [(start, min(start + step, length)) for start in range(0, length, step)]
    if threads == 1:
        for band in bands:
            work(*band)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *band) for band in bands]:
            done.result()


def _resize_cropped(side: int, picture: _Picture, threads: int) -> list[PILImage]:
    """The short side to `side`, the long one in proportion, rounded down; then the centre."""
    from PIL import Image

    short = min(picture.full_size)
    width, height = (int(side * edge / short) for edge in picture.full_size)
    _check_resized(picture.full_size, side, max(width, height, *picture.full_size))
    left, top = (width - side) // 2, (height - side) // 2
    image = picture.upright().resize((width, height), Image.Resampling.BICUBIC, picture.box)
    return [image.crop((left, top, left + side, top + side))]


def _tile(
    side: int, pinpoints: list[tuple[int, int]], picture: _Picture, threads: int
) -> list[PILImage]:
    """The image squeezed to a square, then its tiles (LLaVA's `process_anyres_image`)."""
    from PIL import Image

    width, height = picture.full_size
    across, down = _best_resolution(picture.full_size, pinpoints)
    _check_resized(picture.full_size, max(side, across, down), max(width, height))
    if across / width < down / height:
        fitted = across, min(math.ceil(height * (across / width)), down)
    else:
        fitted = min(math.ceil(width * (down / height)), across), down
    image = picture.upright()
    canvas = Image.new("RGB", (across, down))
    corner = (across - fitted[0]) // 2, (down - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC, picture.box), corner)
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, down, side)
        for left in range(0, across, side)
    ]
    return [image.resize((side, side), Image.Resampling.BICUBIC, picture.box), *tiles]


def _best_resolution(size: tuple[int, int], resolutions: list[tuple[int, int]]) -> tuple[int, int]:
    """The resolution that keeps most of the pixels, of equals the one that wastes least, of equals
    the first (LLaVA's `select_best_resolution`)."""
    width, height = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def _parse_pinpoints(
    grid_pinpoints: str | Sequence[Sequence[int]], side: int
) -> list[tuple[int, int]]:
    found: Any = grid_pinpoints
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if (
        not isinstance(found, (list, tuple))
        or not found
        or not all(_is_resolution(one, side) for one in found)
    ):
        raise ValueError(
            f"grid_pinpoints must be a list of [width, height], multiples of {side} up to "
            f"{MAX_PIXELS:,} pixels, not {_brief(repr(grid_pinpoints))}."
        )
    return [(width, height) for width, height in found]


def _is_resolution(found: Any, side: int) -> bool:
    return (
        isinstance(found, (list, tuple))
        and len(found) == 2
        and all(isinstance(edge, int) and edge > 0 and edge % side == 0 for edge in found)
        and found[0] * found[1] <= MAX_PIXELS
    )


def _check_resized(size: tuple[int, int], width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise ValueError(
            f"Cannot resize an image of {size[0]} × {size[1]} pixels: it takes {width} × "
            f"{height} pixels on the way, and the limit is {limit:,}; crop it first."
        )


# Wording


def _reason(error: BaseException) -> str:
    """What an exception says, in brief and without its full stop."""
    cause = getattr(error, "reason", None)
    cause = cause if isinstance(cause, BaseException) else error
    said = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return _brief(str(said)).rstrip(".")


def _brief(text: str, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
