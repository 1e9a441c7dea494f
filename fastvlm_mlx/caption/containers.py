"""XMP and EXIF within a JPEG, PNG or WebP file; everything else stays as it is, to the byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*")
JPEG_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
JPEG_EXIF = b"Exif\0\0"
PNG_XMP = b"XML:com.adobe.xmp\0"
APP0, APP1, APP15, SCAN = 0xE0, 0xE1, 0xEF, 0xDA
MOST_IN_JPEG = 65_533  # bytes of a segment without its length
ALPHA_FLAG = 0x10  # of WebP's extended header
UNKNOWN = "captions can be written into JPEG, PNG and WebP files; choose .xmp for files beside them"


class Metadata(NamedTuple):
    """A kind of metadata, and how each kind of file marks it.

    Attributes:
        name: as people know it.
        jpeg: what its segment begins with.
        last: the last of the segments that it stands behind.
        png, itxt: the name of its chunk, and what that begins with.
        webp, flag: the name of its chunk, and its bit in the header.
    """

    name: str
    jpeg: bytes
    last: int
    png: bytes
    itxt: bytes
    webp: bytes
    flag: int


XMP = Metadata("XMP", b"http://ns.adobe.com/xap/1.0/\0", APP1, b"iTXt", PNG_XMP, b"XMP ", 0x04)
EXIF = Metadata("EXIF", JPEG_EXIF, APP0, b"eXIf", b"", b"EXIF", 0x08)


def read_packet(image: bytes, kind: Metadata = XMP) -> bytes:
    """The metadata of an image; empty if it has none. ValueError for other kinds of files.

    A TIFF file is its own EXIF block.
    """
    file = _kind(image, kind)
    if file == "JPEG":
        found = [data for marker, data in _segments(image) if _is_app1(marker, data, kind)]
        return found[0][len(kind.jpeg) :] if found else b""
    if file == "PNG":
        chunks = [data for name, data in _chunks(image) if _is_chunk(name, data, kind)]
        if kind is EXIF or not chunks:
            return b"".join(chunks[:1])
        return _from_itxt(chunks[0])
    if file == "TIFF":
        return image
    found = [data for name, data in _riff(image) if name == kind.webp]
    return found[0].removeprefix(JPEG_EXIF) if found else b""  # which some programs put before it


def with_packet(image: bytes, packet: bytes, kind: Metadata = XMP) -> bytes:
    """The image with this metadata in the place of its own.

    Raises:
        ValueError: another kind of file, a damaged one, or too long a packet.
    """
    file = _kind(image, kind)
    if file == "JPEG":
        return _jpeg_with(image, packet, kind)
    if file == "TIFF":
        return packet
    return _png_with(image, packet, kind) if file == "PNG" else _webp_with(image, packet, kind)


def _kind(image: bytes, kind: Metadata) -> str:
    if image.startswith(JPEG_START):
        return "JPEG"
    if image.startswith(PNG_START):
        return "PNG"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "WebP"
    if kind is EXIF and image.startswith(TIFF_STARTS):
        return "TIFF"
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


def _is_app1(marker: int, data: bytes, kind: Metadata) -> bool:
    return marker == APP1 and data.startswith(kind.jpeg)


def _jpeg_with(image: bytes, packet: bytes, kind: Metadata) -> bytes:
    if len(kind.jpeg) + len(packet) + 2 > MOST_IN_JPEG:
        raise ValueError(f"its {kind.name} is longer than a JPEG can hold")
    parts = [(m, d) for m, d in _segments(image) if not _is_app1(m, d, kind)]
    if kind is XMP and any(m == APP1 and d.startswith(JPEG_EXTENDED) for m, d in parts):
        raise ValueError("its XMP is spread over several segments; choose .xmp")
    # Readers expect EXIF behind JFIF's header, and XMP behind both.
    place = next(i for i, (m, _) in enumerate(parts) if not APP0 <= m <= kind.last)
    parts.insert(place, (APP1, kind.jpeg + packet))
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


def _is_chunk(name: bytes, data: bytes, kind: Metadata) -> bool:
    return name == kind.png and data.startswith(kind.itxt)


def _from_itxt(data: bytes) -> bytes:
    compressed, rest = data[len(PNG_XMP)], data[len(PNG_XMP) + 2 :]
    text = rest.split(b"\0", 2)[2]  # behind the language and the translated keyword
    try:
        return zlib.decompress(text) if compressed else text
    except zlib.error as error:
        raise ValueError(f"its XMP is damaged: {error}") from None


def _png_with(image: bytes, packet: bytes, kind: Metadata) -> bytes:
    parts = [(n, d) for n, d in _chunks(image) if not _is_chunk(n, d, kind)]
    place = next((i for i, (n, _) in enumerate(parts) if n == b"IDAT"), len(parts) - 1)
    before = PNG_XMP + b"\0\0\0\0" if kind is XMP else b""
    parts.insert(place, (kind.png, before + packet))
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


def _webp_with(image: bytes, packet: bytes, kind: Metadata) -> bytes:
    parts = [(n, d) for n, d in _riff(image) if n != kind.webp]
    if not parts:
        raise ValueError("its chunks are damaged")
    extended = parts[0][0] == b"VP8X"
    header = parts.pop(0)[1] if extended else _extended_header(image)
    parts.insert(0, (b"VP8X", bytes([header[0] | kind.flag]) + header[1:]))
    parts.append((kind.webp, packet))
    parts.sort(key=lambda part: part[0] == XMP.webp)  # which comes last
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
