"""WebDataset tars: each image with its caption as .txt and its record as .json."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checks import reason, shown
from ..image.load import IMAGE_SUFFIXES
from . import tables
from .files import AppendedFile
from .items import CAPTION, Item, found_by, ids_of
from .outputs import Fields, Row, fields_of

BLOCK = 512
END = bytes(2 * BLOCK)
OURS = re.compile(r"\d{9}_[^/]*")
PLACE = re.compile(r"%0?(\d*)d")
SHARD_SIZE = 10_000


class Shards:
    """Tars that grow by whole samples.

    Keys are the images' names with all dots but the last replaced, since readers take what stands
    before the first dot for the key, and numbered.

    Args:
        file: the tar, or a pattern such as captions-%06d.tar for several.
        names: the columns that take captions.
        shard_size: samples in each tar, if there are several.
        writing: False only to see what they hold.
    """

    changes_images = False

    def __init__(self, file: Path, names: Sequence[str], shard_size: int, *, writing: bool = True):
        self.file, self.names = file, names
        self._several = PLACE.search(file.name) is not None
        self._shard_size = shard_size
        self._existing: dict[str, Fields | None] = {}
        self._count = 0  # samples in all
        self._in_shard = 0  # and in the last tar
        self._shards: list[tuple[Path, int]] = []  # with where their samples end
        self._appended: AppendedFile | None = None
        for shard in self._find():
            self._read(shard, writing)

    def existing(self, item: Item) -> Fields | None:
        return found_by(item.ids, self._existing)

    def write(self, row: Row) -> None:
        data = self._sample(row)
        if self._appended is None or (self._several and self._in_shard >= self._shard_size):
            self.close()
            self._open()
        assert self._appended is not None
        self._appended.append(data)
        self._count += 1
        self._in_shard += 1

    def flush(self, *, now: bool = False) -> bool:
        return True

    def close(self) -> None:
        if self._appended is not None:
            self._appended.append(END)
            self._appended.close()
            self._appended = None

    def _open(self) -> None:
        """Go on with the last tar, or with the next one if it is full."""
        if self._shards and not (self._several and self._in_shard >= self._shard_size):
            shard, end = self._shards[-1]
            os.truncate(shard, end)
        else:
            shard = self.file
            if self._several:
                shard = shard.with_name(shard.name % len(self._shards))
            self._shards.append((shard, 0))
            self._in_shard = 0
        self._appended = AppendedFile(shard)

    @property
    def found(self) -> bool:
        """Whether there are samples."""
        return bool(self._existing)

    def _find(self) -> list[Path]:
        if not self._several:
            return [self.file] if self.file.exists() else []
        before, after = PLACE.split(self.file.name)[::2]
        pattern = f"{glob.escape(before)}[0-9]*{glob.escape(after)}"
        return sorted(self.file.parent.glob(pattern))

    def _read(self, shard: Path, writing: bool) -> None:
        """Learn what a tar holds; if half a sample stands at its end, it is cut off."""
        end = self._in_shard = 0
        for record, position in _records(shard):
            self._existing |= dict.fromkeys(ids_of(record), fields_of(record, self.names))
            end, self._in_shard = position, self._in_shard + 1
        self._count += self._in_shard
        self._shards.append((shard, end))
        if writing and shard.stat().st_size != end + len(END):
            os.truncate(shard, end)
            replaced = AppendedFile(shard)
            replaced.append(END)
            replaced.close()

    def _sample(self, row: Row) -> bytes:
        try:
            image = row.item.read_bytes()
        except OSError as error:
            raise ValueError(f"it can't be read any more ({reason(error)})") from None
        stem, _, suffix = Path(row.item.key).name.rpartition(".")
        kind = suffix.lower() if f".{suffix.lower()}" in IMAGE_SUFFIXES else "img"
        key = f"{self._count:09d}_" + re.sub(r"[^\w-]", "_", stem)[:80]
        parts = {kind: image}
        if CAPTION in row.fields:
            parts["txt"] = row.fields[CAPTION].encode("utf-8", "replace")
        parts["json"] = tables.to_line(row.record())  # last: a sample that has it is whole
        return b"".join(_member(f"{key}.{kind}", data) for kind, data in parts.items())


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def _records(shard: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The record of each whole sample, and where the sample ends.

    Raises:
        ValueError: the tar has samples that were not written here.
    """
    size = shard.stat().st_size
    with shard.open("rb") as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
        except tarfile.TarError:
            if size >= BLOCK and any(stream.read(BLOCK)):
                raise ValueError(f"{shown(str(shard))} is no tar; choose another file.") from None
            return
        while (info := _next(tar)) is not None:
            end = info.offset_data + info.size + -info.size % BLOCK
            if end > size:
                return
            if OURS.fullmatch(info.name) is None:
                raise ValueError(
                    f"{shown(str(shard))} has samples that this command did not write; choose "
                    "another file."
                )
            if info.name.endswith(".json"):
                stream.seek(info.offset_data)
                record = tables.parse_line(stream.read(info.size))
                assert record is not None  # it is ours
                yield record, end


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.TarError:  # half a header
        return None
