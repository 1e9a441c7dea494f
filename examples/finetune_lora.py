"""Teach the bundled model to read clocks: LoRA from 500 pictures, a few minutes on two cores.

    python examples/finetune_lora.py clocks

The pictures of what it knows already (`--known`, rows as `python -m examples.train_nano sets`
writes them) are mixed in, so that it is not forgotten. The encoder is frozen: every picture is
encoded once, and its features are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

import fastvlm_mlx as fv

if TYPE_CHECKING:
    from PIL import Image

SIZE = 256
QUESTIONS = ["What time is it?", "What time does the clock show?"]
MINUTES = (0, 15, 30, 45)
TEST_CLOCKS = 200
RIDGE = 0.01


def draw_clock(rng: Random) -> tuple[Image.Image, str]:
    """A clock face that fills the picture, and its time."""
    from PIL import Image, ImageDraw

    hour, minute = rng.randrange(12), rng.choice(MINUTES)
    wide, ground = 2 * SIZE, tuple(rng.randint(60, 255) for _ in range(3))
    image = Image.new("RGB", (wide, wide), ground)
    draw, radius, ink = ImageDraw.Draw(image), 0.42 * wide, tuple(rng.randint(0, 90) for _ in "rgb")
    middle = wide / 2

    def line(turn: float, start: float, end: float, width: float) -> None:
        across, up = math.sin(2 * math.pi * turn) * radius, math.cos(2 * math.pi * turn) * radius
        ends = [(middle + r * across, middle - r * up) for r in (start, end)]
        draw.line(ends, fill=ink, width=round(width * radius))

    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    face = tuple(rng.randint(215, 255) for _ in "rgb")
    draw.ellipse(box, fill=face, outline=ink, width=round(0.06 * radius))
    for mark in range(12):
        line(mark / 12, 0.82, 0.9, 0.04)
    line((hour + minute / 60) / 12, 0.0, 0.5, 0.12)
    line(minute / 60, 0.0, 0.8, 0.06)
    return image.reduce(2), f"{hour or 12}:{minute:02}"


def write_clocks(folder: Path, number: int, seed: int) -> list[dict[str, Any]]:
    """Draw clocks; a row with image, question and answer for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = Random(seed), []
    for n in range(number):
        image, time = draw_clock(rng)
        path = (folder / f"{seed}-{n:03}.png").resolve()
        image.save(path)
        rows.append({"image": str(path), "question": rng.choice(QUESTIONS), "answer": time})
    return [row | {"answer": f"It is {row['answer']}."} for row in rows]


def read_known(file: Path) -> list[dict[str, Any]]:
    """Rows of what the model knows; the images stand beside the file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | {"image": str((file.parent / row["image"]).resolve())} for row in rows]


def accuracy(model: fv.FastVLM, processor: fv.Processor, rows: list[dict[str, Any]]) -> float:
    """The share of answers that are right to the letter."""
    requests = [(row["question"], row["image"]) for row in rows]
    found = fv.batch_generate(model, processor, requests, max_tokens=24)
    return sum(a == row["answer"] for a, row in zip(found, rows, strict=True)) / len(rows)


def probe(
    model: fv.FastVLM,
    processor: fv.Processor,
    rows: list[dict[str, Any]],
    test: list[dict[str, Any]],
) -> list[float]:
    """How much of hour and minute is in the frozen features: accuracies of a linear probe.

    What no probe finds, a decoder will hardly learn from a few hundred examples.
    """
    kept, new = (
        np.concatenate(
            [
                np.array(model.vision_tower(processor.preprocess(row["image"]))).reshape(1, -1)
                for row in each
            ]
        ).astype(np.float64)
        for each in (rows, test)
    )
    mean, deviation = kept.mean(axis=0), kept.std(axis=0) + 1e-3
    kept, new = (kept - mean) / deviation, (new - mean) / deviation
    weights = np.linalg.inv(kept @ kept.T + RIDGE * kept.shape[1] * np.eye(len(kept)))
    found = []
    for part in (0, 1):  # hour and minute
        labels, wanted = ([re.findall(r"\d+", r["answer"])[part] for r in x] for x in (rows, test))
        names = np.array(sorted(set(labels)))
        one_hot = (np.array(labels)[:, None] == names).astype(np.float64)
        said = names[(new @ kept.T @ weights @ one_hot).argmax(axis=1)]
        found.append(float((said == np.array(wanted)).mean()))
    return found


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Chat JSONL, as `fastvlm train` reads it."""
    lines = []
    for n, row in enumerate(rows):
        content = [
            {"type": "image", "image": row["image"]},
            {"type": "text", "text": row["question"]},
        ]
        user, assistant = ("user", content), ("assistant", row["answer"])
        messages = [{"role": role, "content": said} for role, said in (user, assistant)]
        lines.append(json.dumps({"id": str(n), "messages": messages}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    clocks = write_clocks(args.out / "clocks", args.examples, seed=1)
    test = write_clocks(args.out / "clocks", args.test, seed=2)
    known = [row for file in args.known for row in read_known(file)]
    replayed, kept = known[::2], known[1::2]
    rows = args.out / "rows.jsonl"
    write_rows(rows, clocks + replayed)
    before = fv.load()
    hours, minutes = probe(*before, clocks, test)
    print(f"linear probe of the frozen features: {hours:.1%} of hours, {minutes:.1%} of minutes")
    done = fv.finetune(
        None,
        rows,
        args.out / "run",
        steps=args.steps,
        batch_size=16,
        rank=args.rank,
        learning_rate=args.rate,
        keep=1,
    )
    after = fv.load(adapter=done.folder)
    for name, held_out in (("clocks", test), ("known", kept)):
        if held_out:
            scores = [accuracy(*model, held_out) for model in (before, after)]
            print(f"{name}: {scores[0]:.1%} before, {scores[1]:.1%} after ({len(held_out)} rows)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach the bundled model to read clocks.")
    parser.add_argument("out", type=Path, help="folder of pictures, rows and the adapter")
    parser.add_argument(
        "--known", type=Path, nargs="+", default=[], help="JSONL of what it knows; half is replayed"
    )
    parser.add_argument("--examples", type=int, default=500, help="clocks to learn from")
    parser.add_argument("--test", type=int, default=TEST_CLOCKS, help="clocks to be measured on")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
