"""A sheet of held-out pictures with what was asked and what the model answered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from .evaluate import answers

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM, Processor

SIDE, MARGIN, LINE = 176, 12, 16  # of a picture, around it, and of a line of text, in pixels
LINES, LETTERS = 6, 27  # of text under a picture, and in a line
GROUND, PLAIN, ANSWERED, WRONG = "#ffffff", "#444444", "#0b6b3a", "#b3261e"


def one_of_each(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """A row of each task, whatever the answer will be: of the first task the first row, of the
    second the second, and so on, since tasks share pictures."""
    of_task = [[row for row in rows if row["task"] == task] for task in tasks]
    return [found[n % len(found)] for n, found in enumerate(of_task)]


def sheet(
    model: FastVLM, processor: Processor, rows: Sequence[dict[str, Any]], columns: int
) -> Image.Image:
    """Pictures in rows, each above its conversation; wrong answers are red, with the right one."""
    found = answers(model, processor, rows)
    tile = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + LINES * LINE
    page = Image.new("RGB", (columns * tile[0], -(-len(rows) // columns) * tile[1]), GROUND)
    for n, (row, answer) in enumerate(zip(rows, found, strict=True)):
        corner = n % columns * tile[0] + MARGIN, n // columns * tile[1] + MARGIN
        page.paste(beside(row["images"]), corner)
        write(page, (corner[0], corner[1] + SIDE + 4), row, answer)
    return page


def beside(names: Sequence[str]) -> Image.Image:
    """One picture, or two beside each other, in a square."""
    square = Image.new("RGB", (SIDE, SIDE), GROUND)
    side = SIDE // len(names)
    for n, name in enumerate(names):
        with Image.open(name) as picture:
            square.paste(picture.convert("RGB").resize((side, side)), (n * side, 0))
    return square


def write(page: Image.Image, corner: tuple[int, int], row: dict[str, Any], answer: str) -> None:
    said = [(text, PLAIN) for turn in row.get("earlier", []) for text in turn]
    right = answer == row["answer"]
    said += [(row["question"], PLAIN), (answer, ANSWERED if right else WRONG)]
    said += [] if right else [(f"(right: {row['answer']})", PLAIN)]
    lines = [(line, color) for text, color in said for line in textwrap.wrap(text, LETTERS)]
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for n, (line, color) in enumerate(lines[:LINES]):
        draw.text((corner[0], corner[1] + n * LINE), line, fill=color, font=font)
