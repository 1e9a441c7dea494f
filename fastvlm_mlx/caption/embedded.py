"""Captions within the image files themselves, as their description in XMP or EXIF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checks import reason
from . import containers, exif, xmp
from .files import replace_bytes
from .items import CAPTION, Item
from .outputs import Fields, Row
from .sidecars import check_single

KINDS: dict[str, tuple[containers.Metadata, Any]] = {
    "xmp": (containers.XMP, xmp),
    "exif": (containers.EXIF, exif),
}


class Embedded:
    """The images; their pixels and all other metadata stay as they are.

    Args:
        kind: "xmp" or "exif".
        names: the columns that take captions.

    Raises:
        ValueError: there are several columns.
    """

    changes_images = True

    def __init__(self, kind: str, names: Sequence[str]):
        check_single("A picture", names)
        self._metadata, self._form = KINDS[kind]

    def existing(self, item: Item) -> Fields | None:
        if item.path is None or not item.path.exists():
            return None
        packet = containers.read_packet(item.path.read_bytes(), self._metadata)
        text = self._form.description_of(packet).strip() if packet.strip() else ""
        return {CAPTION: text} if text else None

    def write(self, row: Row) -> None:
        if (file := row.item.path) is None:
            raise ValueError("it is no file of its own that a caption could be written into")
        try:
            image = file.read_bytes()
            packet = containers.read_packet(image, self._metadata)
            packet = self._form.with_description(packet, row.fields[CAPTION])
            replace_bytes(file, containers.with_packet(image, packet, self._metadata))
        except (PermissionError, FileNotFoundError) as error:  # another file may do
            raise ValueError(f"it can't be written ({reason(error)})") from None

    def flush(self, *, now: bool = False) -> bool:
        return True

    def close(self) -> None:
        pass
