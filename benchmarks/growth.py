"""Measure how cost grows: encoding with pixels, prefill with tokens, memory with generations.

The first two are measured on the model given, the third on the bundled one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.bench.machine import device_name
from fastvlm_mlx.evaluate.samples import SAMPLES as IMAGES
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options

from .tables import Result
from .turns import in_turns, note, seconds_of
from .worker import noise_image


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "--dtype": {},
    "--rounds": {"default": 3},
    "--image-sizes": {
        "type": _numbers,
        "default": (256, 512, 768, 1024, 1280, 1536),
        "help": "in pixels, with commas",
    },
    "--tokens": {
        "type": _numbers,
        "default": (64, 128, 256, 512, 1024),
        "help": "of prompts, with commas",
    },
    "--generations": {"type": int, "default": 1000, "help": "of the bundled model"},
}
SAMPLES = 100  # of memory, however many generations


def measure(args: argparse.Namespace) -> Result:
    """Seconds by image size and by prompt length, and bytes by generation."""
    note(f"{args.generations} generations")
    memory = memory_over_generations(args.generations)  # before a large model is loaded as well
    model = fv.load_model(args.model, dtype=args.dtype)
    encode = {str(size): partial(encode_seconds, model, size) for size in args.image_sizes}
    prefill = {str(length): partial(prefill_seconds, model, length) for length in args.tokens}
    return {
        "kind": "growth",
        "model": {"name": args.model.resolve().name},
        "device": device_name(),
        "encode": in_turns(encode, args.rounds, "encoding"),
        "prefill": in_turns(prefill, args.rounds, "prefill"),
        "memory": memory,
    }


def encode_seconds(model: fv.FastVLM, image_size: int) -> float:
    """Encoder and projector, for one image."""
    pixel_values = mx.array(noise_image(image_size))
    mx.eval(pixel_values)
    return seconds_of(lambda: mx.eval(model.encode_image(pixel_values)))


def prefill_seconds(model: fv.FastVLM, tokens: int) -> float:
    """From a prompt's embeddings to the first token."""
    embeddings = model.language_model.embed_tokens(mx.arange(tokens)[None])
    mx.eval(embeddings)
    answer = generate_tokens(
        model, [0] * tokens, embeddings, model.make_kv_cache(), Options(), limit=1
    )
    return seconds_of(lambda: next(answer))


def memory_over_generations(generations: int) -> dict[str, list[float]]:
    """Bytes of the process and of arrays, after every so many answers of the bundled model."""
    model, processor = fv.load()
    found: dict[str, list[float]] = {"generation": [], "process": [], "arrays": [], "cached": []}
    every = max(1, generations // SAMPLES)
    for i, image in enumerate(islice(cycle(IMAGES), generations), 1):
        fv.generate(model, processor, "What is this?", image=image, max_tokens=16)
        if i % every == 0:
            found["generation"].append(i)
            found["process"].append(resident_bytes())
            found["arrays"].append(mx.get_active_memory())
            found["cached"].append(mx.get_cache_memory())
    return found


def resident_bytes() -> int:
    """Physical memory that this process has now."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024
