"""The first step: a path, URL, bytes, PIL image or array becomes pixels.

`load_image` reads any of them as an upright RGB image on white, `preprocess` brings that to the
size and form the vision encoder takes.
"""

from __future__ import annotations

import ast
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, TextIOBase
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

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
ROWS_AT_ONCE = 256
HEIC_MARKS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")

# What PIL calls the turn that each EXIF orientation asks for
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def load_image(
    source: ImageSource, *, timeout: float = 10.0, max_bytes: int = 100 * 2**20
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
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image")
    if isinstance(source, (np.ndarray, mx.array)):
        return _to_rgb(_from_array(source), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(BytesIO(source), "image bytes")
    if isinstance(source, str):
        return _load_named(source, timeout, max_bytes)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _open(path, _brief(repr(path)))
    if hasattr(source, "read"):
        return _decode(_read_all(source), "the file object")
    raise ValueError(
        f"Cannot read {_brief(repr(source))}: an image is a path, URL, bytes, binary file object, "
        f"PIL image or array, not {type(source).__name__}."
    )


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
) -> mx.array:
    """Bring an image to the size and form the vision encoder takes.

    Args:
        image: Anything `load_image` reads or, but for mode "anyres", a list or tuple of such.
        image_size: The side S, in pixels: a multiple of 64.
        mode: The checkpoint's `image_aspect_ratio`. "pad" pads to a square with black; "square" (or
            None, "", "none") resizes the short side to S and keeps the centre, as transformers'
            `CLIPImageProcessor` does; "anyres" (LLaVA 1.6) gives the image squeezed to S × S, then
            the tiles of the best fitting of `grid_pinpoints`, row by row.
        grid_pinpoints: For "anyres": the sizes to choose from, as in `anyres_grid`.

    Returns:
        float32 [N, S, S, 3] in [0, 1], RGB: one for each image, or with "anyres" 1 + tiles.

    Raises:
        ValueError: A bad size, mode or grid, or an image too long to resize.
        ValueError, OSError: Whatever `load_image` finds.
    """
    if not isinstance(image_size, int) or image_size <= 0 or image_size % 64:
        raise ValueError(f"image_size must be a positive multiple of 64, not {image_size!r}.")
    if mode == "anyres":
        if isinstance(image, (list, tuple)):
            raise ValueError('Mode "anyres" takes one image at a time, not a list of images.')
        if grid_pinpoints is None:
            raise ValueError('Mode "anyres" needs grid_pinpoints, the sizes to choose from.')
        pinpoints = _parse_pinpoints(grid_pinpoints, image_size)
        return _stack(_tile(load_image(image), image_size, pinpoints))
    if mode == "pad":
        resize = _resize_padded
    elif mode in ("square", "none", "", None):
        resize = _resize_cropped
    else:
        raise ValueError(f'mode must be "pad", "square" or "anyres", not {mode!r}.')
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("The list of images is empty: preprocess needs at least one.")
    return _stack([resize(load_image(one), image_size) for one in images])


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


# Sources


def _load_named(source: str, timeout: float, max_bytes: int) -> PILImage:
    """The image at a path or URL."""
    if source[:5].lower() == "data:":
        name = _brief(source, 40)
        return _decode(BytesIO(_from_data_url(source, name)), name)
    name = _brief(repr(source))
    scheme, is_url, rest = source.partition("://")
    if not is_url or not scheme.isalnum():
        return _open(source, name)
    if scheme.lower() in ("http", "https"):
        return _decode(BytesIO(_download(source, name, timeout, max_bytes)), name)
    if scheme.lower() == "file":
        return _open(_from_file_url(rest, name), name)
    raise ValueError(f"Cannot read {name}: the URL of an image is http, https, file or data.")


def _open(path: str, name: str) -> PILImage:
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
        return _decode(stream if stream.seekable() else BytesIO(stream.read()), name)


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


def _decode(stream: BinaryIO, name: str) -> PILImage:
    """The image in a seekable file that stands at its start."""
    from PIL import Image

    head = stream.read(12)
    if not head:
        raise ValueError(f"Cannot read {name}: it is empty.")
    try:
        with _quiet_pil():
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
    return _to_rgb(image, name)


def _to_rgb(image: PILImage, name: str) -> PILImage:
    """A PIL image of any mode, decoded or not, as `load_image` gives it."""
    from PIL import Image

    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"Cannot read {name}: it has {width} × {height} pixels, not 1 to {MAX_PIXELS:,}."
        )
    try:
        with _quiet_pil():
            key = _transparent_colour(image)
            image.load()
            rgb = _flatten(image, key)
            turn = TURNS.get(_orientation(image))
    except Exception as error:  # as in _decode
        raise ValueError(
            f"Cannot read {name}: its pixels cannot be decoded: {_reason(error)}."
        ) from None
    if turn is not None:
        rgb = rgb.transpose(Image.Transpose[turn])
    rgb.info.clear()  # with its old orientation, the image would be turned again when read again
    return rgb


@contextmanager
def _quiet_pil() -> Iterator[None]:
    """Silence PIL's warnings: an image is read, or an error says why not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _orientation(image: PILImage) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata on a sound image
        return 1


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
    """A copy in RGB, white where it is transparent or has the colour `key`."""
    import numpy as np
    from PIL import Image

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P"):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    if key is None and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
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


def _resize_padded(image: PILImage, side: int) -> PILImage:
    """`expand_to_square(image)` resized, without the square.

    PIL resizes each row by itself and then the columns, so padding and resizing a band of rows at a
    time gives the same pixels, and the square of a long image may be too large for the memory.
    """
    from PIL import Image

    width, height = image.size
    longest = max(width, height)
    _check_resized(image, side, max(side, longest))
    _check_resized(image, longest, height, MAX_PADDED_PIXELS)
    narrow = Image.new("RGB", (side, longest))
    for top in range(0, height, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, height - top)
        band = Image.new("RGB", (longest, rows))
        band.paste(image, ((longest - width) // 2, -top))
        band = band.resize((side, rows), Image.Resampling.BICUBIC)
        narrow.paste(band, (0, (longest - height) // 2 + top))
    return narrow.resize((side, side), Image.Resampling.BICUBIC)


def _resize_cropped(image: PILImage, side: int) -> PILImage:
    """The short side to `side`, the long one in proportion, rounded down; then the centre."""
    from PIL import Image

    short = min(image.size)
    width, height = (int(side * edge / short) for edge in image.size)
    _check_resized(image, side, max(width, height, *image.size))
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + side, top + side))


def _tile(image: PILImage, side: int, pinpoints: list[tuple[int, int]]) -> list[PILImage]:
    """The image squeezed to a square, then its tiles (LLaVA's `process_anyres_image`)."""
    from PIL import Image

    width, height = image.size
    across, down = _best_resolution(image.size, pinpoints)
    _check_resized(image, max(side, across, down), max(width, height))
    if across / width < down / height:
        fitted = across, min(math.ceil(height * (across / width)), down)
    else:
        fitted = min(math.ceil(width * (down / height)), across), down
    canvas = Image.new("RGB", (across, down))
    corner = (across - fitted[0]) // 2, (down - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, down, side)
        for left in range(0, across, side)
    ]
    return [image.resize((side, side), Image.Resampling.BICUBIC), *tiles]


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


def _check_resized(image: PILImage, width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise ValueError(
            f"Cannot resize an image of {image.width} × {image.height} pixels: it takes {width} × "
            f"{height} pixels on the way, and the limit is {limit:,}; crop it first."
        )


def _stack(images: list[PILImage]) -> mx.array:
    import numpy as np

    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32)
    pixels /= 255
    return mx.array(pixels)


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
