"""Captions within the image files themselves, as their XMP description."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import reason
from . import containers, xmp
from .files import replace_bytes
from .items import CAPTION, Item
from .outputs import Fields, Row
from .sidecars import check_single


class Embedded:
    """The images; their pixels and all other metadata stay as they are.

    Args:
        names: the columns that take captions.

    Raises:
        ValueError: there are several columns.
    """

    changes_images = True

    def __init__(self, names: Sequence[str]):
        check_single("A picture", names)

    def existing(self, item: Item) -> Fields | None:
        if item.path is None or not item.path.exists():
            return None
        packet = containers.read_packet(item.path.read_bytes())
        text = xmp.description_of(packet).strip() if packet.strip() else ""
        return {CAPTION: text} if text else None

    def write(self, row: Row) -> None:
        if (file := row.item.path) is None:
            raise ValueError("it is no file of its own that a caption could be written into")
        try:
            image = file.read_bytes()
            packet = xmp.with_description(containers.read_packet(image), row.fields[CAPTION])
            replace_bytes(file, containers.with_packet(image, packet))
        except (PermissionError, FileNotFoundError) as error:  # another file may do
            raise ValueError(f"it can't be written ({reason(error)})") from None

    def flush(self, *, now: bool = False) -> bool:
        return True

    def close(self) -> None:
        pass
