"""Checkpoints of a run: each is whole or not there, and training goes on from it exactly."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..checks import brief, reason

FOLDER = "checkpoints"
STATE = "state.json"  # written last
NAME = re.compile(r"step-(\d+)")
KINDS = ("weights", "optimizer")
BLOCK = 2**20
Arrays = dict[str, mx.array]


@dataclass
class Position:
    """How far a run has come; all that is needed to go on beside tensors.

    Attributes:
        step: optimizer steps that are done.
        epoch: of the next batch.
        batch: its number in the epoch.
        tokens: supervised tokens seen.
        best: the lowest validation loss, and the step it was reached at.
        worse: evaluations since then.
        zeros: steps in a row with a loss of 0.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    zeros: int = 0


@dataclass
class Checkpoint:
    """What is saved: the position, the run it belongs to, and tensors by kind.

    Attributes:
        position: see `Position`.
        run: settings, model and data, by which another run is told apart.
        tensors: the trained weights and the optimizer's state.
    """

    position: Position
    run: dict[str, Any]
    tensors: dict[str, Arrays] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints in a run's folder.

    Args:
        out: the run's folder; it need not exist.
        keep: how many of the last stay; the best one stays besides.
    """

    def __init__(self, out: Path, keep: int):
        self.folder = out / FOLDER
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and drop those that are too many.

        Raises:
            OSError: it can't be written; those before it stay as they are.
        """
        target = self.folder / f"step-{checkpoint.position.step:08d}"
        if self._is_whole(target):
            return target
        partial = self.folder / f".{target.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            sums = {
                f"{kind}.safetensors": _write_tensors(partial / f"{kind}.safetensors", tensors)
                for kind, tensors in checkpoint.tensors.items()
            }
            state = {
                "position": asdict(checkpoint.position),
                "run": checkpoint.run,
                "sha256": sums,
            }
            _write(partial / STATE, json.dumps(state, indent=2, ensure_ascii=False).encode())
            _sync_folder(partial)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one
            os.rename(partial, target)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"The checkpoint {target} can't be written ({reason(error)}); the run goes on from "
                "the one before it once there is room."
            ) from None
        self._drop_surplus(checkpoint.position)
        return target

    def last(self) -> Path | None:
        """The newest whole checkpoint; what a fault left behind is passed over."""
        return next((folder for folder in reversed(self._all()) if self._is_whole(folder)), None)

    def load(self, folder: Path, run: Mapping[str, Any]) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            ValueError: it belongs to another run; the message says what differs.
        """
        self.check(folder, run)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = {kind: _read_tensors(folder / f"{kind}.safetensors") for kind in KINDS}
        return Checkpoint(Position(**state["position"]), state["run"], tensors)

    def check(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Raise a ValueError, as `load`, without reading tensors."""
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if differences := differing(state["run"], run):
            raise ValueError(
                f"{folder.parent.parent} holds another run ({'; '.join(differences)}): give "
                "another folder for --out, or the same settings to go on."
            )

    def at(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _is_whole(self, folder: Path) -> bool:
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return all(_digest(folder / name) == sha for name, sha in state["sha256"].items())
        except (OSError, ValueError, KeyError, AttributeError):
            return False

    def _drop_surplus(self, position: Position) -> None:
        kept = {self.at(position.step)}
        if position.best_step is not None:
            kept.add(self.at(position.best_step))
        older = [path for path in self._all() if path.name <= self.at(position.step).name]
        for folder in older[: max(0, len(older) - self.keep)]:
            if folder not in kept:
                # Renamed first, so that no half of it is taken for a checkpoint.
                dropped = folder.with_name(f".{folder.name}.dropped")
                shutil.rmtree(dropped, ignore_errors=True)
                os.rename(folder, dropped)
                shutil.rmtree(dropped, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' descriptions, a phrase each."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing(old, new)
        elif old != new:
            found.append(f"{name} was {brief(str(old), 60)} and is {brief(str(new), 60)}")
    return found


def _write_tensors(file: Path, tensors: Arrays) -> str:
    """Write tensors to a file and to the disk beneath; the file's SHA-256."""
    try:
        with file.open("wb") as stream:
            mx.save_safetensors(stream, tensors)
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:  # as MLX reports what went wrong below it
        raise OSError(str(error)) from None
    return _digest(file)


def _read_tensors(file: Path) -> Arrays:
    tensors = cast(Arrays, mx.load(str(file)))
    mx.eval(tensors)  # the file may be dropped later
    return tensors


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()
