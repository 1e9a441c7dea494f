"""Measure answering many requests together against one after the other.

Both answer the same requests, in turns (A B, B A, …), so that whatever else the machine does falls
on both alike. Reading images and tokenizing are part of it, loading the model is not.

    python benchmarks/batch.py
    python benchmarks/batch.py apple/FastVLM-0.5B --requests 64 --max-tokens 128 --full-length

By default answers end where the model ends them, which for the bundled model is after a sentence;
with --full-length each has --max-tokens. On Linux's CPU preload OpenBLAS: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from machine import command_line, describe_machine, write_result
from tables import markdown_table

import fastvlm_mlx as fv
from fastvlm_mlx.generation.batch import Request, stream_batch
from fastvlm_mlx.generation.generate import stream_generate
from fastvlm_mlx.hub.resolve import NANO

Tokens = list[list[int]]
ALONE, TOGETHER = "one by one", "together"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    model, processor = fv.load(options.model, dtype=options.dtype, quantize=options.quantize)
    if options.full_length:
        processor = without_ends(processor)
    images = sorted(p for p in options.images.iterdir() if p.suffix in (".png", ".jpg", ".jpeg"))
    requests = [(options.prompt, images[i % len(images)]) for i in range(options.requests)]
    common = {"image_size": options.image_size, "max_tokens": options.max_tokens}
    sizes = {"max_batch": options.max_batch, "encode_batch": options.encode_batch}
    sides = {
        ALONE: lambda: alone(model, processor, requests, common),
        TOGETHER: lambda: together(model, processor, requests, {**common, **sizes}),
    }
    found = {name: run() for name, run in sides.items()}  # also the warm-up
    seconds = measure(sides, options.rounds)
    result = summary(found, seconds)
    print(table(result))
    if options.json:
        written = {
            "command": command_line(parser, options),
            "kind": "batch",
            "model": options.model.name if options.model else "the bundled model",
            "machine": describe_machine(),
            **result,
            "seconds": seconds,
        }
        write_result(options.json, written)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="batch.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder or Hub id (default: the bundled model)"
    )
    parser.add_argument("--dtype", help="float32, float16 or bfloat16, if not the model's own")
    parser.add_argument("--quantize", type=int, help="bits")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--images", type=Path, default=NANO / "images", help="a folder")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--full-length", action="store_true", help="no answer ends before that")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--encode-batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def without_ends(processor: fv.Processor) -> fv.Processor:
    """The processor, with no token that ends an answer."""
    tokenizer = copy.copy(processor.tokenizer)
    tokenizer.eos_token_ids = set()
    return replace(processor, tokenizer=tokenizer)


def alone(
    model: fv.FastVLM, processor: fv.Processor, requests: list[Any], options: dict[str, Any]
) -> Tokens:
    return [
        [
            response.token
            for response in stream_generate(model, processor, prompt, image=image, **options)
        ]
        for prompt, image in requests
    ]


def together(
    model: fv.FastVLM, processor: fv.Processor, requests: list[Request], options: dict[str, Any]
) -> Tokens:
    tokens: Tokens = [[] for _ in requests]
    for i, response in stream_batch(model, processor, requests, **options):
        tokens[i].append(response.token)
    return tokens


def measure(sides: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run; the side that went second goes first in the next round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def summary(found: dict[str, Tokens], seconds: dict[str, list[float]]) -> dict[str, Any]:
    count = sum(map(len, found[TOGETHER]))
    pairs = zip(seconds[ALONE], seconds[TOGETHER], strict=True)
    ratios = [a / b for a, b in pairs]
    same = sum(a == b for a, b in zip(found[ALONE], found[TOGETHER], strict=True))
    return {
        "device": str(mx.default_device()),
        "requests": len(found[ALONE]),
        "tokens": count,
        "same answers": same,
        "seconds (median)": {name: statistics.median(times) for name, times in seconds.items()},
        "times faster (median)": statistics.median(ratios),
        "times faster (least and most)": (min(ratios), max(ratios)),
    }


def table(result: dict[str, Any]) -> str:
    requests, tokens = result["requests"], result["tokens"]
    least, most = result["times faster (least and most)"]
    rows = [
        [name, f"{seconds:.3f}", f"{requests / seconds:.1f}", f"{tokens / seconds:.1f}"]
        for name, seconds in result["seconds (median)"].items()
    ]
    lines = [
        f"{requests} requests, {tokens} tokens on {result['device']}; "
        f"{result['same answers']} answers are the same token for token.",
        "",
        markdown_table(["", "seconds", "requests/s", "tokens/s"], rows),
    ]
    faster = result["times faster (median)"]
    return "\n".join(
        [*lines, "", f"{faster:.2f} times faster together ({least:.2f} to {most:.2f})"]
    )


if __name__ == "__main__":
    main()
