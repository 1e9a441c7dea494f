"""Rows → those to train on and those to validate with, no image in both."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..checks import is_number, shown
from .rows import Row

HEAD = 2**16  # bytes at the start of a file that, with its size, tell images apart


def split_rows(rows: Sequence[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to validate with, each in their order.

    Rows that share an image, by what its file holds, stay together, and so do equal rows without
    images. Which go where depends on these and the seed only.

    Args:
        rows: the whole data set.
        fraction: of the rows that validate, at least one.
        seed: for another choice.

    Raises:
        ValueError: the fraction is not between 0 and 1, or the rows can't be divided.
    """
    if not is_number(fraction) or not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be between 0 and 1, not {shown(fraction)}.")
    wanted = max(1, round(fraction * len(rows)))
    chosen: set[int] = set()
    for group in sorted(_groups(rows), key=lambda group: _draw(seed, group[0])):
        if len(chosen) + len(group[1]) <= wanted:
            chosen.update(group[1])
    if not chosen or len(chosen) == len(rows):
        raise ValueError(
            f"{len(rows)} row(s) can't be divided so that {shown(fraction)} of them validate and "
            "no image is on both sides: give a validation file, or another fraction."
        )
    train = [row for n, row in enumerate(rows) if n not in chosen]
    return train, [row for n, row in enumerate(rows) if n in chosen]


def shared_images(rows: Iterable[Row], others: Iterable[Row]) -> int:
    """How many images of `rows` are among those of `others`, by what their files hold."""
    keys, other_keys = (
        {key for row in some for key in _image_keys(row)} for some in (rows, others)
    )
    return len(keys & other_keys)


def _draw(seed: int, key: bytes) -> bytes:
    return blake2b(key, digest_size=16, salt=str(seed).encode()[:16]).digest()


def _groups(rows: Sequence[Row]) -> list[tuple[bytes, list[int]]]:
    """The rows that must stay together, by a key of theirs: those that images connect."""
    leader: dict[bytes, bytes] = {}

    def find(key: bytes) -> bytes:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    keys = [_image_keys(row) or [_digest(_text_of(row))] for row in rows]
    for first, *others in keys:
        for key in others:
            low, high = sorted((find(first), find(key)))
            leader[high] = low
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for n, (first, *_) in enumerate(keys):
        groups[find(first)].append(n)
    return list(groups.items())


def _text_of(row: Row) -> bytes:
    return json.dumps(row.messages, sort_keys=True).encode()


def _image_keys(row: Row) -> list[bytes]:
    return [image_key(image) for image in row.images]


def image_key(image: Any) -> bytes:
    """A digest of an image's file: of its size and start, which only copies of it share."""
    if isinstance(image, Path):
        with image.open("rb") as file:
            return _digest(file.read(HEAD), os.fstat(file.fileno()).st_size)
    if hasattr(image, "read"):
        image = image.read()
    if isinstance(image, str):
        image = image.encode(errors="surrogatepass")
    return _digest(image[:HEAD], len(image))


def _digest(data: bytes, size: int = 0) -> bytes:
    return blake2b(data, digest_size=16, person=size.to_bytes(16, "little")).digest()
