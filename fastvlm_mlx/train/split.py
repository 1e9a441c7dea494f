"""Rows → those to train on and those to validate with, no image in both."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..checks import is_number, shown
from ..image.preprocess import MAX_THREADS
from ..progress import progress_bar
from .rows import MANY, Row, distinct_images, image_name


def split_rows(rows: Sequence[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to validate with, each in their order.

    Rows that share an image, by what its file holds, stay together, and so do equal rows without
    images. Which go where depends on these and the seed only.

    Args:
        rows: the whole data set.
        fraction: of the rows that validate; at least those of one image.
        seed: for another choice.

    Raises:
        ValueError: the fraction is not between 0 and 1, or the rows can't be divided.
    """
    if not is_number(fraction) or not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be between 0 and 1, not {shown(fraction)}.")
    groups = sorted(_groups(rows), key=lambda group: _draw(seed, group[0]))
    wanted = max(1, round(fraction * len(rows)))
    smallest = min(map(len, (numbers for _, numbers in groups)), default=0)
    chosen: set[int] = set()
    for _, numbers in groups:
        if len(chosen) + len(numbers) <= max(wanted, smallest):
            chosen.update(numbers)
    if not 0 < len(chosen) < len(rows):
        raise ValueError(
            f"{len(rows)} row(s) can't be divided so that {shown(fraction)} of them validate and "
            "no image is on both sides: give a validation file, or another fraction."
        )
    train = [row for n, row in enumerate(rows) if n not in chosen]
    return train, [row for n, row in enumerate(rows) if n in chosen]


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

    images = _image_keys(rows)
    keys = [found or [_digest(_text_of(row))] for row, found in zip(rows, images, strict=True)]
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


def _image_keys(rows: Sequence[Row]) -> list[list[bytes]]:
    """A digest of the file of each image of each row; a file is read once."""
    sources = distinct_images(rows)
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool,
        progress_bar(len(sources), "Images", unit="image", shown=len(sources) >= MANY) as bar,
    ):
        keys = {}
        for name, key in zip(sources, pool.map(_image_key, sources.values()), strict=True):
            keys[name] = key
            bar.update()
    return [[keys[image_name(image)] for image in row.images] for row in rows]


def _image_key(image: Any) -> bytes:
    if isinstance(image, Path):
        return _digest(image.read_bytes())
    if isinstance(image, str):
        return _digest(image.encode(errors="surrogatepass"))
    return _digest(image.read() if hasattr(image, "read") else image)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
