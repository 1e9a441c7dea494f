"""Measure this library, mlx-vlm and transformers side by side, on the same weights.

First of all, whether all give the same features and tokens; then what a user waits for: the
encoder, the time to the first token, the tokens per second after it, loading, and memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .peers import Worker, folder_of, pythons_of, random_prompt, write_folders
from .tables import FIGURES, Result, Samples
from .turns import in_turns, note
from .worker import OURS

FEATURES_TOLERANCE = 1e-3  # of their standard deviation, in float32
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "--peer-python": {},
    "--transformers-python": {},
    "--compile": {},
    "--rounds": {},
    "--dtype": {"default": "float32"},
    "--image-size": {},
    "--tokens": {"type": int, "default": 64, "help": "to generate, at least 2"},
    "--text-tokens": {"type": int, "default": 32, "help": "in the prompt beside the image"},
}
Workers = dict[str, Worker]


def measure(args: argparse.Namespace) -> Result:
    """All samples, and the comparison of outputs."""
    if args.tokens < 2 or args.text_tokens < 1:
        raise ValueError("--tokens must be at least 2, and --text-tokens at least 1.")
    pythons = pythons_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        note("converting")
        write_folders(args.model, Path(scratch), args.dtype, pythons)
        return compare(pythons, Path(scratch), args)


def compare(pythons: dict[str, str], scratch: Path, args: argparse.Namespace) -> Result:
    """As `measure`, on the folders in `scratch`."""
    config = json.loads((scratch / "mlx/config.json").read_text())
    image_size = args.image_size or config["vision_config"]["image_size"]
    prompt = random_prompt(args.text_tokens, config["vocab_size"] - 1)
    generate = {"image_size": image_size, "prompt": prompt, "max_tokens": args.tokens}
    samples: Samples = {key: {side: [] for side in pythons} for key in FIGURES}

    def start(side: str) -> Worker:
        return Worker(side, pythons[side], folder_of(side, scratch), args.dtype)

    for side in pythons:
        note(f"memory of {side}")
        for key, peak in peaks_of_one_answer(start(side), generate).items():
            samples[key][side] += [] if peak is None else [peak / 1e9]
    workers = {side: start(side) for side in pythons}
    loads = {side: partial(worker.ask, "load") for side, worker in workers.items()}
    for side, replies in in_turns(loads, args.rounds, "loading", warm_up=0).items():
        samples["load"][side] = [reply["seconds"] for reply in replies]
    outputs = {}
    for side in list(pythons)[1:]:
        note(f"comparing outputs with {side}")
        outputs[side] = compare_outputs({OURS: workers[OURS], side: workers[side]}, generate)
    # The warm-up leaves out whatever is compiled or chosen on the first call.
    answers = {side: partial(answer, worker, generate) for side, worker in workers.items()}
    for side, found in in_turns(answers, args.rounds, "encoding and generating").items():
        for key in ("encode", "ttft", "decode"):
            samples[key][side] = [timings[key] for timings in found]
    about = {side: worker.ask("about") for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    model = {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {
        "kind": "compare",
        "model": {"name": args.model.resolve().name, **model},
        "settings": {
            "dtype": args.dtype,
            "quantization": config.get("quantization"),
            "image_size": image_size,
            "text_tokens": args.text_tokens,
            "tokens": args.tokens,
            "rounds": args.rounds,
        },
        "versions": about,
        "outputs": outputs,
        "samples": samples,
        "failure": disagreement(outputs) if args.dtype == "float32" else None,
    }


def peaks_of_one_answer(worker: Worker, generate: dict[str, Any]) -> dict[str, int | None]:
    """Bytes at most, of the process and of arrays, of a fresh process that answers once."""
    worker.ask("load")
    worker.ask("generate", **generate)
    peaks = worker.ask("memory")
    worker.close()
    return peaks


def answer(worker: Worker, generate: dict[str, Any]) -> dict[str, float]:
    """One sample each of the figures that are timed together."""
    encoded = worker.ask("encode", image_size=generate["image_size"])
    generated = worker.ask("generate", **generate)
    return {
        "encode": encoded["seconds"],
        "ttft": generated["ttft"],
        "decode": generated["tokens_per_second"],
    }


def compare_outputs(workers: Workers, generate: dict[str, Any]) -> dict[str, Any]:
    """How far the features of this library and one peer differ, and where the tokens first do.

    Args:
        workers: two, this library's first, loaded.
        generate: the request, with image_size, prompt and max_tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        features = []
        for i, worker in enumerate(workers.values()):
            file = f"{scratch}/{i}.npy"
            worker.ask("features", image_size=generate["image_size"], file=file)
            features.append(np.load(file))
    ours, theirs = features
    answers = [worker.ask("generate", **generate)["tokens"] for worker in workers.values()]
    pairs = list(zip(*answers, strict=True))
    step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    outputs: dict[str, Any] = {
        "features_difference": float(np.abs(ours - theirs).max() / theirs.std()),
        "tokens": len(pairs),
        "distinct_tokens": len(set(answers[0])),
        "first_difference": step,
    }
    if step is not None:
        prompt = generate["prompt"] + answers[0][:step]
        request = {"image_size": generate["image_size"], "prompt": prompt, "tokens": pairs[step]}
        outputs["margin"] = {
            side: worker.ask("margin", **request) for side, worker in workers.items()
        }
    return outputs


def disagreement(outputs: dict[str, Any]) -> str | None:
    """A sentence if the visual features differ by more than rounding does."""
    far = [s for s, found in outputs.items() if found["features_difference"] > FEATURES_TOLERANCE]
    return f"The visual features differ from those of {' and '.join(far)}." if far else None
