"""Measure loading a folder, this library beside mlx-vlm: each time in a fresh process, in turns.

The weights keep the folder's dtype. Files come from the page cache, which the warm-up fills.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from .peers import Worker, pythons_of
from .tables import Result
from .turns import in_turns
from .worker import OURS, PEER

OPTIONS: dict[str, dict[str, Any]] = {
    "folder": {"type": Path, "help": "in the MLX layout"},
    "--peer-python": {},
    "--rounds": {"default": 7},
}


def measure(args: argparse.Namespace) -> Result:
    """Seconds, and the peaks of arrays and of the process in GB."""
    dtype = json.loads((args.folder / "config.json").read_text())["torch_dtype"]
    sides = {
        side: partial(load_once, side, python, args.folder, dtype)
        for side, python in pythons_of(args).items()
    }
    found = in_turns(sides, args.rounds, "loading")
    pairs = zip(found[OURS], found[PEER], strict=True)
    ratio = median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
    return {
        "kind": "table",
        "title": f"Loading {args.folder.resolve().name}: {ratio:.2f} times the time of {PEER}",
        "results": [row(side, loads) for side, loads in found.items()],
    }


def load_once(side: str, python: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds and peak bytes of a fresh process that only loads."""
    worker = Worker(side, python, folder, dtype)
    found = {**worker.ask("load"), **worker.ask("memory")}
    worker.close()
    return found


def row(side: str, loads: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [found["seconds"] for found in loads]
    return {
        "library": side,
        "seconds": median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "arrays, GB": median(found["arrays"] / 1e9 for found in loads),
        "process, GB": median(found["resident"] / 1e9 for found in loads),
        "samples": seconds,
    }
