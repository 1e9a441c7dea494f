"""Measure captioning pictures, files to captions, beside mlx-vlm's batch_generate, in turns.

Each library reads the same JPEGs, all different, and answers the same question. This library also
writes the captions and keeps its manifest, as `fastvlm caption` does. Both run in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastvlm_mlx.convert import convert
from fastvlm_mlx.evaluate.questions import DEFAULT_QUESTION
from fastvlm_mlx.evaluate.samples import SAMPLES
from fastvlm_mlx.hub.resolve import resolve
from fastvlm_mlx.image.load import load_image

from .peers import Worker, give_tokenizer, pythons_of
from .tables import Result
from .turns import in_turns
from .worker import DTYPES, OURS, PEER

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--dtype": {"default": DTYPES[0]},
    "--peer-python": {},
    "--rounds": {"default": 3},
    "--pictures": {"type": int, "default": 32, "help": "made from the sample images"},
    "--side": {"type": int, "default": 1024, "help": "of the pictures, in pixels"},
    "--max-tokens": {"type": int, "default": 32, "help": "of a caption"},
}
GOAL = 1.5  # times as many pictures per second
MOST_IDLE = 0.05


def measure(args: argparse.Namespace) -> Result:
    """Seconds of each library, how often this one's model was idle, and how many captions agree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = convert(
            resolve(args.model), Path(scratch, "mlx"), dtype=args.dtype, progress=False
        )
        give_tokenizer(folder)
        pictures = make_pictures(Path(scratch, "pictures"), args.pictures, args.side)
        workers = {
            side: Worker(side, python, folder, args.dtype)
            for side, python in pythons_of(args).items()
        }
        asked = {"images": list(map(str, pictures)), "max_tokens": args.max_tokens}
        sides = {
            side: partial(worker.ask, "caption", prompt=DEFAULT_QUESTION, **asked)
            for side, worker in workers.items()
        }
        found = in_turns(sides, args.rounds, "captioning")
        for worker in workers.values():
            worker.close()
    return table(found, args)


def table(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> Result:
    """The result, of what each round of each side gave."""
    ratios = [
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(found[OURS], found[PEER], strict=True)
    ]
    pairs = zip(found[OURS][0]["texts"], found[PEER][0]["texts"], strict=True)
    same, idle = sum(a == b for a, b in pairs), median(r["idle"] for r in found[OURS])
    return {
        "kind": "table",
        "title": f"Captions of {args.pictures} pictures: {Path(args.model or 'nano').name}",
        "results": [
            {
                "library": side,
                "seconds": median(r["seconds"] for r in rounds),
                "least": min(r["seconds"] for r in rounds),
                "most": max(r["seconds"] for r in rounds),
                "pictures per second": args.pictures / median(r["seconds"] for r in rounds),
                "same captions": f"{same} of {args.pictures}",
            }
            for side, rounds in found.items()
        ],
        "goals": [
            (f"pictures per second, times those of {PEER}", f"≥ {GOAL}", f"{median(ratios):.2f}"),
            ("time in which the model is idle", f"≤ {MOST_IDLE:.0%}", f"{idle:.1%}"),
        ],
        "ratios": ratios,
    }


def make_pictures(folder: Path, count: int, side: int) -> list[Path]:
    """JPEGs of the sample images with grain, no two alike."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = []
    for number, sample in zip(range(count), cycle(SAMPLES), strict=False):
        pixels = np.asarray(load_image(sample).resize((side, side)), dtype=np.int16)
        grain = np.random.default_rng(number).integers(-6, 7, pixels.shape, dtype=np.int16)
        files.append(folder / f"{number:04d}.jpg")
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
            files[-1], quality=92
        )
    return files
