"""The held-out sets: pictures with strings, places, combinations and fonts never trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .draw import PAIRS_MIX, draw
from .words import COUNTED, NAMED

if TYPE_CHECKING:
    from .rows import Row, Scene

SEED = 0
# The tasks that nano has always had, in the wordings that it has always known.
EMOJI = ["What is this?", "What does the image show?", "What is in the image?"]
EMOJI += ["Which emoji is this?", "Describe the image."]
COUNTING = ["How many are there?", "How many objects are in the image?", "Describe the image."]
READING = ["What is written here?", "Read the handwriting.", "Read the text."]
READING += ["What does the note say?", "Describe the image."]
WORDINGS = {"emoji": EMOJI, "handwriting": READING}
OLD_TASKS = ("emoji", "counting", "handwriting")
# Which scenes have questions of a task; any, if it is not here.
DRAWN = {"handwriting_fonts": "handwriting_fonts", "print_fonts": "print_fonts"}
DRAWN |= {name: name for name in ("emoji", "counting", "handwriting", "kinds", "print", "charts")}
DRAWN |= {"pairs": "pairs", "letters": "print"}
ASKED = {"handwriting_fonts": "handwriting", "print_fonts": "print"}
TASKS = [*OLD_TASKS, "follow_up", "yes_no", "not_there", "places", "colors", "shapes", "kinds"]
TASKS += ["print", "letters", "charts", "pairs", "handwriting_fonts", "print_fonts"]


def write_set(folder: Path, task: str, number: int, size: int, noise: bool = False) -> None:
    """Draw so many pictures for a task, with one row each in eval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (scene, row) in zip(range(number), rows_for(task, size, noise), strict=False):
        names = [f"{task}-{n:03}{'ab'[i] if i else ''}.png" for i in range(len(scene.pictures))]
        for name, picture in zip(names, scene.pictures, strict=True):
            picture.save(folder / name)
        lines.append(json.dumps(written(names, row, task), ensure_ascii=False) + "\n")
    (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def written(names: list[str], row: Row, task: str) -> dict[str, Any]:
    images = {"image": names[0]} if len(names) == 1 else {"images": names}
    (*before, (question, answer)) = row.turns
    turns = {"earlier": [list(turn) for turn in before]} if before else {}
    return {**images, **turns, "question": question, "answer": answer, "task": task}


def rows_for(task: str, size: int, noise: bool) -> Iterator[tuple[Scene, Row]]:
    """Scenes with one row of the task each, without end."""
    for index in count():
        scene, rows = draw(
            SEED, index, size, task=DRAWN.get(task), mix=PAIRS_MIX, evaluation=True, noise=noise
        )
        fitting = [row for row in rows if fits(task, scene, row)]
        if fitting:
            yield scene, fitting[index % len(fitting)]


def fits(task: str, scene: Scene, row: Row) -> bool:
    """Whether a row belongs to a task; to an old one, only as it has always been asked."""
    if row.task != ASKED.get(task, task):
        return False
    question = row.turns[0][0]
    if task == "counting":
        named = f"How many {COUNTED[scene.things[0].name].plural} are there?" if _old(scene) else ""
        return _old(scene) and question in (*COUNTING, named)
    if task == "emoji":
        return scene.things[0].name in NAMED and question in EMOJI
    return question in WORDINGS.get(task, [question])


def _old(scene: Scene) -> bool:
    return scene.things[0].name in COUNTED
