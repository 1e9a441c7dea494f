"""Images that tests read, and what they compare them with."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.image.load import load_image

DATA = Path(__file__).parent / "data" / "preprocess"
GRID = [(64, 128), (128, 64), (128, 128), (192, 64), (64, 192)]
NOISE = np.random.default_rng(7).integers(0, 256, (5, 7, 3), dtype=np.uint8)
# Many colours at every alpha
RGBA = np.stack([*np.meshgrid(np.arange(0, 256, 5), np.arange(256)), np.full((256, 52), 9)], -1)
COLOUR, ALPHA = RGBA[..., [0, 2, 0]].astype(np.uint8), RGBA[..., 1].astype(np.uint8)
RGBA = np.dstack([COLOUR, ALPHA])
SIXTEEN = np.array([[0, 255, 256, 0x1234, 0x80FF, 65535]], np.uint16)  # grey
# What each EXIF orientation makes of the stored pixels.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # the first row is the right edge
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def pixels(source: Any, **options: Any) -> np.ndarray:
    """uint8 [H, W, 3] of an image as `load_image` reads it."""
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """The file that PIL makes of an image."""
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, form, **options)
    return file.getvalue()


def png(depth: int, colour: int, width: int, rows: list[bytes], **chunks: bytes) -> bytes:
    """A PNG made by hand, for what PIL can't save."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    extra = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, order: str = "<", compressed: bool = False, most: int = 0) -> bytes:
    """A TIFF of 16-bit RGB [H, W, 3], which PIL does not write.

    Args:
        order: of the bytes, "<" or ">".
        most: MaxSampleValue, if the file has one.
    """
    data = samples.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    height, width, _ = samples.shape
    tags = {256: width, 257: height, 258: (16, 16, 16), 259: 8 if compressed else 1, 262: 2}
    tags |= {273: 8, 277: 3, 278: height, 279: len(data), 284: 1}
    tags |= {281: (most, most, most)} if most else {}
    data += b"\0" * (len(data) % 2)
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data) + 12)
    extra = b""
    for tag in (258, 281):  # 12 bytes each beyond what fits an entry
        if tag in tags:
            values = tags[tag]
            tags[tag] = 8 + len(data) + len(extra)
            extra += struct.pack(f"{order}3H", *values)
    extra = extra.ljust(12, b"\0")
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 3, 3, value)
        if tag in (258, 281)
        else struct.pack(f"{order}HHII", tag, 4, 1, value)
        for tag, value in sorted(tags.items())
    )
    count = struct.pack(f"{order}H", len(tags))
    return head + data + extra + count + entries + b"\0\0\0\0"


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A colour [H, W, 3] with alpha [H, W] on white."""
    alpha = alpha[..., None].astype(np.float64) / 255
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def unit(array: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    return array.astype(np.float32) / np.float32(255)


def grey(*values: int) -> np.ndarray:
    """One row of grey pixels in RGB."""
    return np.array(values, np.uint8)[None, :, None].repeat(3, 2)


def whole(width: int, height: int) -> Image.Image:
    """An image of noise, always the same for one size."""
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_one_sentence(error: BaseException) -> None:
    """An error that a person can read, without a trace of where it came from."""
    text = str(error)
    assert "\n" not in text and text.endswith(".") and 20 < len(text) < 400, text
    assert "<_io" not in text and " at 0x" not in text, text
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


PHOTO = (DATA / "photo.jpg").read_bytes()
BOMB = png(1, 0, 60_000, [b""]).replace(
    struct.pack(">II", 60_000, 1), struct.pack(">II", *[60_000] * 2)
)
# A few bytes that claim 60,000 × 60,000 pixels, with the right checksum.
BOMB = BOMB[:29] + struct.pack(">I", zlib.crc32(BOMB[12:29])) + BOMB[33:]
