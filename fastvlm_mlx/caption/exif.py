"""The description in an EXIF block or TIFF file (ImageDescription), in ASCII."""

from __future__ import annotations

import struct
from typing import NamedTuple

DESCRIPTION, ASCII = 0x010E, 2  # a tag, and the type of its value
EMPTY = b"II*\0" + struct.pack("<IHI", 8, 0, 0)  # a directory without entries
DAMAGED = "its EXIF is damaged"


class Directory(NamedTuple):
    """The first directory of a block.

    Attributes:
        order: of bytes, as `struct` writes it.
        entries: as they stand there, by their tags.
        following: where the next directory is.
    """

    order: str
    entries: dict[int, bytes]
    following: bytes


def description_of(block: bytes) -> str:
    """The description in a block; empty if it has none. ValueError if it is damaged."""
    order, entries, _ = _directory(block or EMPTY)
    if (entry := entries.get(DESCRIPTION)) is None:
        return ""
    _, kind, length, at = struct.unpack(order + "HHII", entry)
    text = entry[8 : 8 + length] if length <= 4 else block[at : at + length]
    if kind != ASCII or len(text) < length:
        raise ValueError(DAMAGED)
    return text.split(b"\0")[0].decode("utf-8", "replace")  # as some programs write it


def with_description(block: bytes, text: str) -> bytes:
    """A block with this description; all else stays in its place, to the byte.

    The first directory is written anew behind everything, since what the block holds may be found
    by its distance from the start.

    Raises:
        ValueError: the block is damaged, or the text has letters that are not ASCII.
    """
    if not text.isascii():
        raise ValueError(
            "its caption has letters that EXIF, which is ASCII, can't hold; choose xmp"
        )
    block = block or EMPTY
    order, entries, following = _directory(block)
    value = text.replace("\0", "").encode("ascii") + b"\0"
    block += b"\0" * (len(block) % 2)
    short = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", len(block))
    entry = struct.pack(order + "HHI", DESCRIPTION, ASCII, len(value)) + short
    stored = value + b"\0" * (len(value) % 2) if len(value) > 4 else b""
    found = {**entries, DESCRIPTION: entry}
    directory = struct.pack(order + "H", len(found)) + b"".join(found[tag] for tag in sorted(found))
    place = struct.pack(order + "I", len(block) + len(stored))
    return block[:4] + place + block[8:] + stored + directory + following


def _directory(block: bytes) -> Directory:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 8:
        raise ValueError(DAMAGED)
    try:
        (at,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, at)
        end = at + 2 + 12 * count
        entries = [block[i : i + 12] for i in range(at + 2, end, 12)]
        following = block[end : end + 4].ljust(4, b"\0")
        return Directory(
            order, {struct.unpack(order + "H10x", e)[0]: e for e in entries}, following
        )
    except struct.error:
        raise ValueError(DAMAGED) from None
