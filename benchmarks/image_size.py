"""Measure what smaller and larger images cost and bring: accuracy and encoding time by image size.

The questions are lines of {"image", "question", "answer", "task"}, as `fastvlm convert --report
--eval` takes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import fastvlm_mlx as fv
from fastvlm_mlx.evaluate.evaluate import evaluate
from fastvlm_mlx.evaluate.items import Item, read_items

from .tables import Result
from .turns import note

OPTIONS: dict[str, dict[str, Any]] = {
    "questions": {"type": Path, "help": "a .jsonl file"},
    "model": {"nargs": "?"},
    "--dtype": {},
    "--sizes": {
        "nargs": "+",
        "type": int,
        "default": [64, 128, 192, 256, 320, 384, 512],
        "help": "of images, in pixels",
    },
}
TIMED = 7  # images


def measure(args: argparse.Namespace) -> Result:
    """A row per image size."""
    model, processor = fv.load(args.model, dtype=args.dtype)
    rows = read_items(args.questions)
    results = []
    for image_size in args.sizes:
        note(f"{image_size} pixels")
        results.append(measure_size(model, processor, rows, image_size))
    return {"kind": "table", "title": "Image size", "results": results}


def measure_size(
    model: fv.FastVLM, processor: fv.Processor, rows: list[Item], image_size: int
) -> dict[str, float]:
    """Accuracy by task, and the median seconds of encoding one image by itself."""
    result = evaluate(model, processor, rows, image_size=image_size, max_tokens=64)
    timed = [
        next(iter(fv.stream_generate(model, processor, "?", image=image, image_size=image_size)))
        for image in [row.images[0] for row in rows[:TIMED]]
    ]
    return {
        "image_size": image_size,
        "visual_tokens": processor.num_visual_tokens(image_size),
        "encode_seconds": median(response.encode_time for response in timed),
        **{row.task: row.figures["exact"].value for row in result.rows[: len(result.tasks)]},
    }
