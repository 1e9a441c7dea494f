"""Measure what smaller and larger images cost and bring: accuracy and time by image size.

    python benchmarks/image_size.py questions.jsonl --model FOLDER

The questions are lines of {"image", "question", "answer", "task"}, as for
`fastvlm convert --report --eval`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from machine import write_result

import fastvlm_mlx as fv
from fastvlm_mlx.evaluate.questions import read_questions
from fastvlm_mlx.generation.batch import stream_batch


def measure(
    model: fv.FastVLM, processor: fv.Processor, rows: list[dict[str, str]], image_size: int
) -> dict[str, float]:
    """Accuracy by task, and the median time to encode an image, alone, in seconds."""
    texts = [""] * len(rows)
    requests = [(row["question"], row["image"]) for row in rows]
    for i, response in stream_batch(
        model, processor, requests, image_size=image_size, max_tokens=64
    ):
        texts[i] += response.text
    right: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        right[row["task"]].append(text.strip() == row["answer"].strip())
    times = [
        next(iter(fv.stream_generate(model, processor, "?", image=image, image_size=image_size)))
        for _, image in requests[:7]
    ]
    return {
        "image_size": image_size,
        "visual_tokens": processor.num_visual_tokens(image_size),
        "encode_seconds": statistics.median(response.encode_time for response in times),
        **{task: sum(answers) / len(answers) for task, answers in right.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("questions", type=Path, help="a .jsonl file")
    parser.add_argument("--model", help="folder or Hub id; default: the bundled model")
    parser.add_argument("--dtype", help="of the weights; default: as `fastvlm generate`")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 192, 256, 320, 384, 512])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    model, processor = fv.load(args.model, dtype=args.dtype)
    rows = read_questions(args.questions)
    results = []
    for image_size in args.sizes:
        results.append(measure(model, processor, rows, image_size))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        result = {"kind": "table", "title": "Image size", "results": results}
        write_result(args.json, result)


if __name__ == "__main__":
    main()
