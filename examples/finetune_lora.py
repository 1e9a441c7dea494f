"""Teach the bundled model to read traffic lights: LoRA from 500 pictures, a few minutes on a CPU.

    python examples/finetune_lora.py lights

On Linux without a GPU, MLX's own products are slow; with OpenBLAS preloaded it takes four minutes.

A model that is trained on one task only forgets the others. So half of each batch is of what it can
do already, with the answers that it gave before training ("replay"): no old training data is
needed. The encoder is frozen: every picture is encoded once, and its features are kept on disk.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

import fastvlm_mlx as fv

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, Any]
Color = tuple[int, ...]

SIZE = 256
MOST_NOISE = 7.0  # standard deviation
RIDGE = 0.01
IMAGES = Path(__file__).parent / "images"
QUESTIONS = ["What does the traffic light show?", "Which light is on?"]
LAMPS = {"red": (225, 40, 35), "yellow": (245, 200, 40), "green": (40, 190, 90)}
LIGHTS = ["red", "red and yellow", "yellow", "green"]
# What the sheet of cut-outs shows, line by line; nano counts the first 20.
THINGS = (IMAGES / "things.txt").read_text(encoding="utf-8").splitlines()
COUNTED = 20
THING = 72  # side in pixels
THINGS_OF_A_LINE = 11
LETTERS = string.ascii_lowercase + string.digits
LETTER = 48, 64  # width and height
FONTS = 4
NAMES = ["What is this?", "What does the image show?", "What is in the image?"]
COUNTS = ["How many are there?", "How many objects are in the image?"]
NOTES = ["What is written here?", "Read the handwriting.", "Read the text."]
NOTES += ["What does the note say?"]
DESCRIBE = "Describe the image."


def color(rng: Random, low: int, high: int) -> Color:
    return tuple(rng.randint(low, high) for _ in "rgb")


def draw_lights(rng: Random) -> tuple[Image.Image, Row]:
    """A traffic light somewhere in the picture."""
    from PIL import Image, ImageDraw

    state = rng.choice(LIGHTS)
    image = Image.new("RGB", (SIZE, SIZE), color(rng, 90, 255))
    draw, radius = ImageDraw.Draw(image), rng.uniform(18, 34)
    height, width = 7.2 * radius, 2.8 * radius
    left = rng.uniform(4, SIZE - width - 4)
    top = rng.uniform(2, SIZE - height - 2)
    draw.rounded_rectangle((left, top, left + width, top + height), radius / 2, color(rng, 15, 60))
    for n, (name, lit) in enumerate(LAMPS.items()):
        x, y = left + width / 2, top + (1.3 + 2.3 * n) * radius
        dark = color(rng, 25, 70)
        fill = tuple(c + rng.randint(-15, 15) for c in lit) if name in state else dark
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    said = {"question": rng.choice(QUESTIONS), "answer": f"The light is {state}."}
    return image, said


@cache
def sheet(file: str) -> Image.Image:
    from PIL import Image

    return Image.open(IMAGES / file).copy()


def thing(number: int, side: int, turned: float) -> Image.Image:
    """A cut-out with transparency."""
    from PIL.Image import Resampling

    cubic = Resampling.BICUBIC
    line, column = divmod(number, THINGS_OF_A_LINE)
    left, top = THING * column, THING * line
    cut = sheet("things.webp").crop((left, top, left + THING, top + THING))
    return cut.rotate(turned, cubic, expand=True).resize((side, side), cubic)


def scattered(rng: Random, number: int, image: Image.Image, which: int) -> None:
    """Put so many of a thing into a picture, apart from each other."""
    lines = 1 if number == 1 else 2 if number <= 4 else 3
    cell = SIZE / lines
    largest = rng.uniform(0.55, 0.9) if lines > 1 else rng.uniform(0.25, 0.65)
    for place in rng.sample(range(lines**2), number):
        side = round(cell * largest * rng.uniform(0.9, 1.1))
        row, column = divmod(place, lines)
        left, top = (round(cell * n + rng.uniform(0, cell - side)) for n in (column, row))
        cut = thing(which, side, rng.uniform(-20, 20))
        image.paste(cut, (left, top), cut)


def draw_thing(rng: Random) -> tuple[Image.Image, Row]:
    """One thing, to be named."""
    from PIL import Image

    which = rng.randrange(len(THINGS))
    image = Image.new("RGB", (SIZE, SIZE), color(rng, 0, 255))
    scattered(rng, 1, image, which)
    question, name = rng.choice([*NAMES, DESCRIBE]), with_article(THINGS[which])
    answer = f"The image shows {name}." if question == DESCRIBE else f"{name[0].upper()}{name[1:]}."
    return image, {"question": question, "answer": answer}


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def draw_several(rng: Random) -> tuple[Image.Image, Row]:
    """One to nine of a kind, to be counted."""
    from PIL import Image

    which, number = rng.randrange(COUNTED), rng.randint(1, 9)
    image = Image.new("RGB", (SIZE, SIZE), color(rng, 0, 255))
    scattered(rng, number, image, which)
    name = THINGS[which]
    several = f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
    question = rng.choice([*COUNTS, DESCRIBE])
    if question == DESCRIBE:
        shown = with_article(name) if number == 1 else f"{number} {several}"
        return image, {"question": question, "answer": f"The image shows {shown}."}
    counted = f"is 1 {name}" if number == 1 else f"are {number} {several}"
    return image, {"question": question, "answer": f"There {counted}."}


def draw_note(rng: Random) -> tuple[Image.Image, Row]:
    """Two to six letters or digits, to be read."""
    from PIL import Image, ImageOps
    from PIL.Image import Resampling

    (wide, high), font = LETTER, rng.randrange(FONTS)
    letters = rng.choices(
        rng.choice([LETTERS[:26], LETTERS[:26], LETTERS[26:]]), k=rng.randint(2, 6)
    )
    note, left = Image.new("L", (6 * wide, high)), 0
    for letter in letters:
        at = wide * LETTERS.index(letter)
        ink = ImageOps.invert(sheet("letters.png").convert("L"))
        cut = ink.crop((at, high * font, at + wide, high * (font + 1)))
        start, _, end, _ = cut.getbbox() or (0, 0, wide, high)
        note.paste(cut.crop((start, 0, end, high)), (left, 0))
        left += end - start + 3
    note = note.crop(note.getbbox()).rotate(rng.uniform(-7, 7), Resampling.BICUBIC, expand=True)
    share = min(rng.uniform(0.9, 1.8), (SIZE - 8) / note.width)
    note = note.resize((round(share * note.width), round(share * note.height)), Resampling.LANCZOS)
    image = Image.new("RGB", (SIZE, SIZE), color(rng, 190, 255))
    place = rng.randint(0, SIZE - note.width), rng.randint(0, SIZE - note.height)
    image.paste(color(rng, 0, 100), place, note)
    question = rng.choice([*NOTES, DESCRIBE])
    what = "The image shows a note that" if question == DESCRIBE else "The note"
    return image, {"question": question, "answer": f'{what} says "{"".join(letters)}".'}


DRAWN: dict[str, Callable[[Random], tuple[Image.Image, Row]]] = {
    "lights": draw_lights,
    "names": draw_thing,
    "counts": draw_several,
    "notes": draw_note,
}
KNOWN = [task for task in DRAWN if task != "lights"]


def draw_rows(folder: Path, task: str, number: int, seed: int) -> list[Row]:
    """Draw pictures of a task; a row with image, question and answer for each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = Random(f"{task} {seed}"), []
    for n in range(number):
        image, said = DRAWN[task](rng)
        noise = np.random.default_rng(rng.randrange(2**32)).normal(size=(SIZE, SIZE, 3))
        noisy = np.asarray(image) + rng.uniform(0, MOST_NOISE) * noise
        path = (folder / f"{task}-{seed}-{n:03}.png").resolve()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        rows.append({"image": str(path), **said, "task": task})
    return rows


def answers(model: fv.FastVLM, processor: fv.Processor, rows: Sequence[Row]) -> list[str]:
    requests = [(row["question"], row["image"]) for row in rows]
    return fv.batch_generate(model, processor, requests, max_tokens=24)


def accuracies(rows: Sequence[Row], said: Sequence[str]) -> dict[str, float]:
    """For each task, the share of answers that are right to the letter."""
    right: dict[str, list[bool]] = {}
    for row, answer in zip(rows, said, strict=True):
        right.setdefault(row["task"], []).append(answer == row["answer"])
    return {task: sum(each) / len(each) for task, each in right.items()}


def probe(
    model: fv.FastVLM, processor: fv.Processor, rows: Sequence[Row], test: Sequence[Row]
) -> float:
    """How much of the answers is in the frozen features: the accuracy of a linear probe.

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
    labels, wanted = (np.array([row["answer"] for row in each]) for each in (rows, test))
    names = np.unique(labels)
    one_hot = (labels[:, None] == names).astype(np.float64)
    said = names[(new @ kept.T @ weights @ one_hot).argmax(axis=1)]
    return float((said == wanted).mean())


def write_rows(file: Path, rows: Sequence[Row]) -> None:
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


def report(rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> str:
    """A line for each task: accuracy before and after."""
    first, then = accuracies(rows, before), accuracies(rows, after)
    number = Counter(row["task"] for row in rows)
    return "\n".join(
        f"{task}: {first[task]:.1%} before, {then[task]:.1%} after ({number[task]} pictures)"
        for task in first
    )


def main(args: argparse.Namespace) -> None:
    started, pictures = time.perf_counter(), args.out / "pictures"
    lights = draw_rows(pictures, "lights", args.examples, seed=1)
    known = [row for task in KNOWN for row in draw_rows(pictures, task, args.replay, seed=1)]
    test = [row for task in DRAWN for row in draw_rows(pictures, task, args.test, seed=2)]
    model, processor = fv.load(args.model)
    found = probe(model, processor, lights, test[: args.test])
    print(f"linear probe of the frozen features: {found:.1%} of the lights", flush=True)
    before = answers(model, processor, test + known)
    own = [row | {"answer": said} for row, said in zip(known, before[len(test) :], strict=True)]
    write_rows(args.out / "rows.jsonl", lights + own)
    done = fv.finetune(
        args.model,
        args.out / "rows.jsonl",
        args.out / "run",
        steps=args.steps,
        batch_size=args.batch,
        rank=args.rank,
        learning_rate=args.rate,
        keep=1,
    )
    after = answers(*fv.load(args.model, adapter=done.folder), test)
    said = [
        json.dumps(row | {"before": first, "after": then}) + "\n"
        for row, first, then in zip(test, before, after, strict=False)
    ]
    (args.out / "answers.jsonl").write_text("".join(said), encoding="utf-8")
    print(report(test, before[: len(test)], after))
    print(f"{time.perf_counter() - started:.0f} seconds; the adapter is in {done.folder}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach the bundled model to read traffic lights.")
    parser.add_argument("out", type=Path, help="folder of pictures, rows and the adapter")
    parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
    parser.add_argument("--examples", type=int, default=500, help="lights to learn from")
    parser.add_argument(
        "--replay", type=int, default=150, help="pictures of each task that it knows"
    )
    parser.add_argument(
        "--test", type=int, default=100, help="pictures of each task to be measured on"
    )
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
