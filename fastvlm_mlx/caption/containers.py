"""The XMP packet within a JPEG, PNG or WebP file; everything else stays as it is, to the byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
JPEG_XMP, JPEG_EXTENDED = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
PNG_XMP = b"XML:com.adobe.xmp\0"
APP0, APP1, APP15, SCAN = 0xE0, 0xE1, 0xEF, 0xDA
MOST_IN_JPEG = 65_533  # bytes of a segment without its length
XMP_FLAG, ALPHA_FLAG = 0x04, 0x10  # of WebP's extended header
UNKNOWN = "captions can be written into JPEG, PNG and WebP files; choose .xmp for files beside them"


def read_packet(image: bytes) -> bytes:
    """The XMP packet of an image; empty if it has none. ValueError for other kinds of files."""
    kind = _kind(image)
    if kind == "JPEG":
        found = [data for marker, data in _segments(image) if _is_xmp(marker, data)]
        return found[0][len(JPEG_XMP) :] if found else b""
    if kind == "PNG":
        texts = [data for name, data in _chunks(image) if _is_itxt(name, data)]
        return _from_itxt(texts[0]) if texts else b""
    return next((data for name, data in _riff(image) if name == b"XMP "), b"")


def with_packet(image: bytes, packet: bytes) -> bytes:
    """The image with this XMP packet in the place of its own.

    Raises:
        ValueError: another kind of file, a damaged one, or too long a packet.
    """
    kind = _kind(image)
    if kind == "JPEG":
        return _jpeg_with(image, packet)
    return _png_with(image, packet) if kind == "PNG" else _webp_with(image, packet)


def _kind(image: bytes) -> str:
    if image.startswith(JPEG_START):
        return "JPEG"
    if image.startswith(PNG_START):
        return "PNG"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "WebP"
    raise ValueError(UNKNOWN)


# JPEG: marked segments up to the scan, whose length is not written anywhere


def _segments(image: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, data) of each segment before the scan; at last (SCAN, all the rest)."""
    at = len(JPEG_START)
    while at + 4 <= len(image) and image[at] == 0xFF:
        marker = image[at + 1]
        if marker == 0xFF:  # one more may fill
            at += 1
            continue
        if marker == SCAN:
            yield SCAN, image[at:]
            return
        (length,) = struct.unpack(">H", image[at + 2 : at + 4])
        yield marker, image[at + 4 : at + 2 + length]
        at += 2 + length
    raise ValueError("its segments are damaged")


def _is_xmp(marker: int, data: bytes) -> bool:
    return marker == APP1 and data.startswith(JPEG_XMP)


def _jpeg_with(image: bytes, packet: bytes) -> bytes:
    if len(JPEG_XMP) + len(packet) + 2 > MOST_IN_JPEG:
        raise ValueError("its XMP is longer than a JPEG can hold")
    parts = [(m, d) for m, d in _segments(image) if not _is_xmp(m, d)]
    if any(m == APP1 and d.startswith(JPEG_EXTENDED) for m, d in parts):
        raise ValueError("its XMP is spread over several segments; choose .xmp")
    # Readers expect it behind JFIF's header and EXIF.
    place = next(i for i, (m, _) in enumerate(parts) if not APP0 <= m <= APP1)
    parts.insert(place, (APP1, JPEG_XMP + packet))
    return JPEG_START + b"".join(
        d if m == SCAN else struct.pack(">BBH", 0xFF, m, len(d) + 2) + d for m, d in parts
    )


# PNG: chunks


def _chunks(image: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, name = len(PNG_START), b""
    while name != b"IEND":
        if at + 12 > len(image):
            raise ValueError("its chunks are damaged")
        length, name = struct.unpack(">I4s", image[at : at + 8])
        yield name, image[at + 8 : at + 8 + length]
        at += 12 + length


def _is_itxt(name: bytes, data: bytes) -> bool:
    return name == b"iTXt" and data.startswith(PNG_XMP)


def _from_itxt(data: bytes) -> bytes:
    compressed, rest = data[len(PNG_XMP)], data[len(PNG_XMP) + 2 :]
    text = rest.split(b"\0", 2)[2]  # behind the language and the translated keyword
    try:
        return zlib.decompress(text) if compressed else text
    except zlib.error as error:
        raise ValueError(f"its XMP is damaged: {error}") from None


def _png_with(image: bytes, packet: bytes) -> bytes:
    parts = [(n, d) for n, d in _chunks(image) if not _is_itxt(n, d)]
    place = next((i for i, (n, _) in enumerate(parts) if n == b"IDAT"), len(parts) - 1)
    parts.insert(place, (b"iTXt", PNG_XMP + b"\0\0\0\0" + packet))
    return PNG_START + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts
    )


# WebP: chunks of RIFF, each of an even length


def _riff(image: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, end = 12, min(len(image), 8 + struct.unpack("<I", image[4:8])[0])
    while at + 8 <= end:
        name, length = struct.unpack("<4sI", image[at : at + 8])
        yield name, image[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _webp_with(image: bytes, packet: bytes) -> bytes:
    parts = [(n, d) for n, d in _riff(image) if n != b"XMP "]
    if not parts:
        raise ValueError("its chunks are damaged")
    extended = parts[0][0] == b"VP8X"
    header = parts.pop(0)[1] if extended else _extended_header(image)
    parts = [(b"VP8X", bytes([header[0] | XMP_FLAG]) + header[1:]), *parts, (b"XMP ", packet)]
    body = b"WEBP" + b"".join(
        n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for n, d in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _extended_header(image: bytes) -> bytes:
    """What a file needs in front that has but one frame and no metadata."""
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(image)) as opened:
        (width, height), alpha = opened.size, "A" in opened.mode
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes([ALPHA_FLAG * alpha, 0, 0, 0]) + sizes
