"""Measure the time to first token of a second question about the same image.

The first question waits for the encoder and the prompt, the second for its own tokens alone.

    python benchmarks/second_question.py /tmp/fastvlm-0.5b
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import command_line, describe_machine, note, write_result

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.hub.resolve import NANO

QUESTIONS = ("Describe the image.", "What colours are in it?")
IMAGE = NANO / "images" / "penguins.png"


def measure(model: fv.FastVLM, processor: fv.Processor, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token of each question, over as many conversations."""
    found: dict[str, list[float]] = {"first": [], "second": []}
    for i in range(rounds + 1):
        note(f"conversation {i} of {rounds}" if i else "warming up")
        chat = fv.Chat(model, processor, max_tokens=8)
        times = [
            max(response.ttft for response in chat.ask(question, image=image, stream=True))
            for question, image in zip(QUESTIONS, (IMAGE, None), strict=True)
        ]
        if i:
            found["first"].append(times[0])
            found["second"].append(times[1])
    return found


def ratio(seconds: dict[str, list[float]]) -> float:
    """The second question's time over the first's: the median over conversations."""
    pairs = zip(seconds["second"], seconds["first"], strict=True)
    return statistics.median(second / first for second, first in pairs)


def processor_for(folder: Path, model: fv.FastVLM) -> fv.Processor:
    """The folder's own, or the bundled model's at the model's size if there is no tokenizer."""
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return load_processor(folder)
    return replace(load_processor(NANO), image_size=model.config.vision.image_size)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="second_question.py",
        description="Measure the time to first token of a second question about an image.",
    )
    parser.add_argument("model", type=Path, help="a FastVLM folder, in any layout that is known")
    parser.add_argument("--rounds", type=int, default=5, help="conversations; default: 5")
    parser.add_argument("--dtype", help="of the weights; default: the checkpoint's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    args = parser.parse_args()
    try:
        model = fv.load_model(args.model, dtype=args.dtype)
        seconds = measure(model, processor_for(args.model, model), args.rounds)
    except (OSError, ValueError) as error:
        print(f"second_question.py: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "command": command_line(parser, args),
        "kind": "second-question",
        "model": {"name": args.model.resolve().name},
        "image_size": model.config.vision.image_size,
        "machine": describe_machine(),
        "seconds": seconds,
    }
    write_result(args.json, result)
    print(f"second / first: {ratio(seconds):.3f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
