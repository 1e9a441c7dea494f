"""Measure LoRA training beside mlx-vlm's trainer, on the same rows and weights, in turns.

Each row is an image and text, of which the second half is learned; all linear layers of the decoder
have adapters of the same rank. In the first epoch both encode every image. From the second on, this
library has the features of the frozen encoder in its cache, and mlx-vlm encodes again.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import resolve

from .peers import Worker, pythons_of
from .tables import Result
from .turns import in_turns
from .worker import DTYPES, OURS, PEER

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--dtype": {"default": DTYPES[0]},
    "--peer-python": {},
    "--rounds": {"default": 3},
    "--image-size": {"default": 256},
    "--rows": {"type": int, "default": 8, "help": "of an epoch"},
    "--batch-size": {"type": int, "default": 4, "help": "of both"},
    "--text-tokens": {"type": int, "default": 48, "help": "of a row"},
}
FASTER, FASTER_LATER = 1.2, 3.0  # the goals for the first epoch, and for those after it
EPOCHS = {1: "first epoch", 2: "later epochs"}
Found = dict[int, dict[str, list[float]]]


def measure(args: argparse.Namespace) -> Result:
    """Seconds of a step of each library in the first and in later epochs, and their memory."""
    if args.rows % args.batch_size:
        raise ValueError("--rows must be a multiple of --batch-size.")
    asked = {
        "rows": args.rows,
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "text_tokens": args.text_tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = convert(
            resolve(args.model), Path(scratch, "mlx"), dtype=args.dtype, progress=False
        )
        pythons = pythons_of(args)
        memory = {
            side: peak_of(Worker(side, python, folder, args.dtype), asked)
            for side, python in pythons.items()
        }
        workers = {
            side: Worker(side, python, folder, args.dtype) for side, python in pythons.items()
        }
        found: Found = {}
        for epoch, name in EPOCHS.items():
            sides = {
                side: partial(worker.ask, "train", epoch=epoch, **asked)
                for side, worker in workers.items()
            }
            replies = in_turns(sides, args.rounds, name)
            found[epoch] = {s: [reply["seconds"] for reply in r] for s, r in replies.items()}
        for worker in workers.values():
            worker.close()
    return table(found, memory, args)


def peak_of(worker: Worker, asked: dict[str, int]) -> float:
    """Gigabytes of arrays at most in a fresh process that trains for one epoch."""
    worker.ask("train", epoch=1, **asked)
    peak = worker.ask("memory")["arrays"]
    worker.close()
    return float(peak) / 1e9


def table(found: Found, memory: dict[str, float], args: argparse.Namespace) -> Result:
    """The result, of what each round of each side gave."""
    ratios = {
        epoch: [theirs / ours for ours, theirs in zip(sides[OURS], sides[PEER], strict=True)]
        for epoch, sides in found.items()
    }
    return {
        "kind": "table",
        "title": f"LoRA training: a step {median(ratios[1]):.2f} times as fast as {PEER}'s in the "
        f"first epoch (goal: {FASTER}) and {median(ratios[2]):.2f} times in later ones (goal: "
        f"{FASTER_LATER}), with {memory[OURS] / memory[PEER]:.2f} of its memory",
        "results": [
            {
                "library": side,
                "epoch": EPOCHS[epoch],
                "seconds of a step": median(sides[side]),
                "least": min(sides[side]),
                "most": max(sides[side]),
                "rows per second": args.batch_size / median(sides[side]),
                "peak memory, GB": memory[side],
            }
            for epoch, sides in found.items()
            for side in sides
        ],
        "ratios": {EPOCHS[epoch]: values for epoch, values in ratios.items()},
    }
