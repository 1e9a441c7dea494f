"""How many answers are right to the letter, by task, with intervals; and the report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastvlm_mlx as fv

from .sets import TASKS

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM, Processor

Z = 1.96  # 95 %
MAX_TOKENS = 48


def read_set(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or of all in a folder; images are paths."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            names = row["images"] if "images" in row else [row["image"]]
            rows.append(row | {"images": [str(file.parent / name) for name in names]})
    return rows


def answers(
    model: FastVLM, processor: Processor, rows: Sequence[dict[str, Any]], **options: Any
) -> list[str]:
    """The model's answer to the last question of each row, after its own to those before."""
    talks: list[list[dict[str, str]]] = [[] for _ in rows]
    depth = max(len(row.get("earlier", [])) for row in rows)
    for turn in range(depth + 1):
        asked = [n for n, row in enumerate(rows) if len(row.get("earlier", [])) >= turn]
        for n in asked:
            earlier = rows[n].get("earlier", [])
            question = earlier[turn][0] if turn < len(earlier) else rows[n]["question"]
            talks[n].append({"role": "user", "content": question})
        requests = [(talks[n], rows[n]["images"]) for n in asked]
        found = fv.batch_generate(model, processor, requests, max_tokens=MAX_TOKENS, **options)
        for n, text in zip(asked, found, strict=True):
            talks[n].append({"role": "assistant", "content": text})
    return [talk[-1]["content"] for talk in talks]


def evaluate(
    model: FastVLM, processor: Processor, rows: Sequence[dict[str, Any]], **options: Any
) -> dict[str, Any]:
    """Right answers and rows per task, and what was wrong."""
    begun = time.perf_counter()
    found = answers(model, processor, rows, **options)
    tasks: dict[str, list[int]] = {}
    wrong = []
    for row, answer in zip(rows, found, strict=True):
        right, total = tasks.get(row["task"], [0, 0])
        tasks[row["task"]] = [right + (answer == row["answer"]), total + 1]
        if answer != row["answer"]:
            wrong.append({**row, "answered": answer})
    return {"tasks": tasks, "wrong": wrong, "seconds": time.perf_counter() - begun}


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    share, z = right / total, Z * Z / total
    half = Z * math.sqrt(share * (1 - share) / total + z / (4 * total))
    return (share + z / 2 - half) / (1 + z), (share + z / 2 + half) / (1 + z)


def in_words(right: int, total: int) -> str:
    low, high = interval(right, total)
    return f"{100 * right / total:.1f} % ({100 * low:.0f}–{100 * high:.0f})"


def table(results: dict[str, dict[str, list[int]]]) -> str:
    """Markdown: a row per task, a column per model."""
    names = list(results)
    tasks = [task for task in TASKS if any(task in results[name] for name in names)]
    tasks += sorted({task for found in results.values() for task in found} - set(tasks))
    lines = [f"| held-out set | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for task in tasks:
        cells = [in_words(*results[n][task]) if task in results[n] else "—" for n in names]
        lines.append(f"| {task.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(files: Iterable[Path], curve: Path | None = None) -> str:
    """report.md from the results of several models, named as their files are."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    text = "# nano, measured\n\nAnswers that are right to the letter, with 95 % intervals.\n\n"
    text += table({name: found["tasks"] for name, found in results.items()})
    if curve is not None:
        text += f"\n![Learning curve]({curve.name})\n"
    for name, found in results.items():
        text += f"\n## Mistakes of {name}\n\n" + mistakes(found["wrong"])
    return text


def mistakes(wrong: Sequence[dict[str, Any]], most: int = 2) -> str:
    """The first few wrong answers of each task."""
    lines, seen = [], dict.fromkeys([row["task"] for row in wrong], 0)
    for row in wrong:
        seen[row["task"]] += 1
        if seen[row["task"]] <= most:
            said = f"{row['answered']} (right: {row['answer']})"
            lines.append(f"- {row['task'].replace('_', ' ')}: {row['question']} {said}")
    return "\n".join(lines) + "\n"
