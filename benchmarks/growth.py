"""Measure how cost grows: encoding with pixels, prefill with tokens, memory with generations.

    python benchmarks/growth.py /tmp/fastvlm-0.5b --json growth.json

The first two are measured on the model given, the third on the bundled one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from machine import command_line, describe_machine, note, write_result
from mlx_sides import device_name
from worker import noise_image

import fastvlm_mlx as fv
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.hub.resolve import NANO

IMAGE_SIZES = (256, 512, 768, 1024, 1280, 1536)
PROMPT_LENGTHS = (64, 128, 256, 512, 1024)
SAMPLES = 100  # of memory, however many generations

Series = dict[str, list[float]]


def in_turns(points: Sequence[int], rounds: int, measure: Callable[[int], float]) -> Series:
    """Samples by point; every round takes all points, forth and back, after one untimed."""
    found: Series = {str(point): [] for point in points}
    for i in range(rounds + 1):
        for point in points if i % 2 else reversed(points):
            seconds = measure(point)
            note(f"{point}: {seconds:.3f} s" if i else f"{point}: warm")
            if i:
                found[str(point)].append(seconds)
    return found


def encode_seconds(model: fv.FastVLM, image_size: int) -> float:
    """Of encoder and projector, for one image."""
    pixel_values = mx.array(noise_image(image_size))
    mx.eval(pixel_values)
    start = time.perf_counter()
    mx.eval(model.encode_image(pixel_values))
    return time.perf_counter() - start


def prefill_seconds(model: fv.FastVLM, tokens: int) -> float:
    """From a prompt's embeddings to the first token."""
    embeddings = model.language_model.embed_tokens(mx.arange(tokens)[None])
    mx.eval(embeddings)
    start = time.perf_counter()
    next(generate_tokens(model, [0] * tokens, embeddings, model.make_kv_cache(), Options(), 1))
    return time.perf_counter() - start


def memory_over_generations(generations: int) -> dict[str, list[float]]:
    """Bytes after every so many answers of the bundled model: of the process, and of arrays."""
    model, processor = fv.load()
    found: dict[str, list[float]] = {"generation": [], "process": [], "arrays": [], "cached": []}
    every = max(1, generations // SAMPLES)
    images = cycle(sorted((NANO / "images").iterdir()))
    for i, image in enumerate(islice(images, generations), 1):
        fv.generate(model, processor, "What is this?", image=image, max_tokens=16)
        if i % every == 0:
            found["generation"].append(i)
            found["process"].append(resident_bytes())
            found["arrays"].append(mx.get_active_memory())
            found["cached"].append(mx.get_cache_memory())
    return found


def resident_bytes() -> int:
    """Physical memory that this process has."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def unit_costs(series: Series, unit: Callable[[int], float]) -> list[float]:
    """The median of each point over how much it is of what should set the cost."""
    return [statistics.median(values) / unit(int(point)) for point, values in series.items()]


def departure(costs: Sequence[float]) -> float:
    """How far from proportional: the largest departure of a unit's cost from the median one."""
    middle = statistics.median(costs)
    return max(abs(cost / middle - 1) for cost in costs)


def drift(values: Sequence[float]) -> float:
    """How much the most of the last tenth is above the most of the second; the first warms up.

    The most, since an allocator gives what is free back to the system at one moment or another.
    """
    tenth = max(1, len(values) // 10)
    early, late = values[tenth : 2 * tenth] or values[:1], values[-tenth:]
    return max(late) / max(early) - 1


def pixels(image_size: int) -> float:
    return image_size**2


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Departures from proportional growth, and the drift of memory, as fractions."""
    return {
        "encode": departure(unit_costs(result["encode"], pixels)),
        "prefill": departure(unit_costs(result["prefill"], float)),
        "process": drift(result["memory"]["process"]),
        "arrays": drift(result["memory"]["arrays"]),
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="growth.py", description="Measure how cost grows with pixels, tokens and answers."
    )
    parser.add_argument("model", type=Path, help="a FastVLM folder, in any layout that is known")
    parser.add_argument("--dtype", help="of the weights; default: the checkpoint's own")
    parser.add_argument(
        "--image-sizes", type=_numbers, default=IMAGE_SIZES, help="in pixels, with commas"
    )
    parser.add_argument(
        "--tokens", type=_numbers, default=PROMPT_LENGTHS, help="of prompts, with commas"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; default: 3")
    parser.add_argument("--generations", type=int, default=1000, help="default: 1000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    args = parser.parse_args()
    try:
        note(f"{args.generations} generations")
        memory = memory_over_generations(args.generations)  # before a large model is there as well
        model = fv.load_model(args.model, dtype=args.dtype)
        encode = in_turns(args.image_sizes, args.rounds, lambda n: encode_seconds(model, n))
        prefill = in_turns(args.tokens, args.rounds, lambda n: prefill_seconds(model, n))
    except (OSError, ValueError) as error:
        print(f"growth.py: {error}", file=sys.stderr)
        return 2
    result = {
        "command": command_line(parser, args),
        "kind": "growth",
        "model": {"name": args.model.resolve().name},
        "device": device_name(),
        "machine": describe_machine(),
        "encode": encode,
        "prefill": prefill,
        "memory": memory,
    }
    write_result(args.json, result)
    for name, value in summary(result).items():
        print(f"{name}: {value:+.1%}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
