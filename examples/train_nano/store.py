"""Pictures drawn once: pixels in one memory-mapped file, questions in JSONL beside it.

A second process draws while training reads. Drawing goes on where it stopped, and what is drawn
does not depend on where that was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .draw import MIX, draw, draw_strip
from .rows import Row
from .words import ALL

if TYPE_CHECKING:
    from .rows import Scene

FLUSHED_AFTER = 128  # scenes; so many are drawn again after a crash, at most
STRIP = (64, 256)


@dataclass(frozen=True)
class Settings:
    """What a store holds; a store is only continued with the same."""

    scenes: int
    size: int
    seed: int = 1
    strips: bool = False
    mix: dict[str, int] | None = None
    """How often each task is drawn; as `draw.MIX` by default."""

    @property
    def shape(self) -> tuple[int, int]:
        return STRIP if self.strips else (self.size, self.size)

    @property
    def pictures(self) -> int:
        """Room for so many pictures; scenes of two are twice as many."""
        return self.scenes * (2 if self.has_pairs else 1)

    @property
    def has_pairs(self) -> bool:
        return "pairs" in (self.mix or MIX)


@dataclass(frozen=True)
class Stored:
    """One scene of a store."""

    task: str
    pictures: tuple[int, ...]
    """The numbers of its pictures."""
    names: dict[str, int]
    """How many of each emoji are in them; nothing if there is text or there are shapes."""
    text: str
    rows: tuple[Row, ...]

    @classmethod
    def from_json(cls, line: str) -> Stored:
        values = json.loads(line)
        rows = tuple(
            Row(row["task"], tuple((q, answer) for q, answer in row["turns"]))
            for row in values.pop("rows")
        )
        return cls(**values | {"pictures": tuple(values["pictures"]), "rows": rows})


class Store:
    """Reads a store, which may still be growing."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "store.json").is_file():
            raise FileNotFoundError(f"There are no pictures in {folder}; begin with `draw`.")
        values = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        self.settings = Settings(**values)
        self.scenes: list[Stored] = []
        self._read = 0
        self.refresh()

    @cached_property
    def pixels(self) -> np.ndarray:
        """[pictures, height, width, 3], uint8."""
        shape = (self.settings.pictures, *self.settings.shape, 3)
        return np.memmap(self.folder / "pixels.u8", np.uint8, "r", shape=shape)

    def refresh(self) -> int:
        """Read the scenes that were drawn since; how many there are."""
        path = self.folder / "scenes.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.scenes.append(Stored.from_json(line.decode()))
                    self._read += len(line)
        return len(self.scenes)

    def __len__(self) -> int:
        return len(self.scenes)


def _stored(scene: Scene, rows: list[Row], first: int) -> dict[str, Any]:
    names: dict[str, int] = {}
    for thing in scene.things:
        if thing.name in ALL and not thing.shape:
            names[thing.name] = names.get(thing.name, 0) + 1
    numbers = list(range(first, first + len(scene.pictures)))
    text = scene.text if scene.task in ("handwriting", "print") else ""
    written = [{"task": row.task, "turns": row.turns} for row in rows]
    return {
        "task": scene.task,
        "pictures": numbers,
        "names": names,
        "text": text,
        "rows": written,
    }


def fill(folder: Path, settings: Settings) -> Iterator[int]:
    """Draw what is missing; yields the number of scenes that are there.

    Raises:
        ValueError: the folder holds a store of other settings.
    """
    open_store(folder, settings)
    store = Store(folder)
    with (folder / "scenes.jsonl").open("r+b") as lines:
        lines.truncate(store._read)  # a line that was cut off is drawn again
    shape = (settings.pictures, *settings.shape, 3)
    pixels = np.memmap(folder / "pixels.u8", np.uint8, "r+", shape=shape)
    done = len(store)
    first = store.scenes[-1].pictures[-1] + 1 if done else 0
    while done < settings.scenes:
        lines_, end = [], min(settings.scenes, done + FLUSHED_AFTER)
        for index in range(done, end):
            scene, rows = draw_one(settings, index)
            for number, picture in enumerate(scene.pictures, first):
                pixels[number] = np.asarray(picture)
            lines_.append(json.dumps(_stored(scene, rows, first), ensure_ascii=False) + "\n")
            first += len(scene.pictures)
        pixels.flush()
        _append(folder / "scenes.jsonl", "".join(lines_))
        done = end
        yield done


def fill_whole(folder: Path, settings: Settings) -> int:
    """Draw all that is missing; the number of scenes."""
    for _ in fill(folder, settings):
        pass
    return settings.scenes


def draw_one(settings: Settings, index: int) -> tuple[Scene, list[Row]]:
    if settings.strips:
        return draw_strip(settings.seed, index, STRIP)
    return draw(settings.seed, index, settings.size, mix=settings.mix or MIX)


def _append(path: Path, text: str) -> None:
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def open_store(folder: Path, settings: Settings) -> None:
    """Make an empty store, or see that the one that is there is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != asdict(settings):
            raise ValueError(f"{folder} holds pictures of other settings; take another folder.")
        return
    (folder / "scenes.jsonl").touch()
    height, width = settings.shape
    with (folder / "pixels.u8").open("wb") as file:
        file.truncate(settings.pictures * height * width * 3)  # takes no room until it is drawn
    path.write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")
