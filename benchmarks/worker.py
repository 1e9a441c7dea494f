"""One library in a process of its own, with its own Python: the other end of `peers.Worker`.

It answers requests, a JSON object per line on stdin, with one per line on stdout. Only numpy and
the library that it drives need to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

OURS, PEER, EAGER, COMPILED = "fastvlm-mlx", "mlx-vlm", "transformers", "transformers compiled"
CLASSES = {
    OURS: ("mlx_sides", "Ours"),
    PEER: ("mlx_sides", "MlxVlm"),
    EAGER: ("torch_side", "Transformers"),
    COMPILED: ("torch_side", "Compiled"),
}
IMAGE = -200
DTYPES = ("float32", "float16", "bfloat16")


class Side(Protocol):
    """A library, driven as its own `generate` drives it; `Array` is of its framework."""

    def about(self) -> dict[str, str]:
        """Versions, and the device that computes."""

    def load(self, folder: Path, dtype: str) -> None:
        """Read a model, ready to run, in place of the one before."""

    def to_device(self, pixel_values: np.ndarray) -> Any:
        """Pixel values [1, S, S, 3] in [0, 1] → what the other methods take."""

    def features(self, pixel_values: Any) -> np.ndarray:
        """Visual features, before the projector: float32 [1, n, C]."""

    def encode(self, pixel_values: Any) -> None:
        """Compute the visual tokens; returns once they are there."""

    def generate(self, pixel_values: Any, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Greedy tokens; `prompt` has one `IMAGE`."""

    def logits(self, pixel_values: Any, prompt: Sequence[int]) -> np.ndarray:
        """Logits of the token after the prompt: float32 [vocab_size]."""

    def peak_array_bytes(self) -> int | None:
        """Most bytes that arrays have taken; None where the framework keeps no count."""


def serve(side: str, folder: Path, dtype: str) -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    module, name = CLASSES[side]
    library: Side = getattr(importlib.import_module(module), name)()
    for line in sys.stdin:
        reply = answer(library, folder, dtype, **json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(library: Side, folder: Path, dtype: str, do: str, **request: Any) -> dict[str, Any]:
    """Do what one request asks; ValueError if there is no such request."""
    if do == "about":
        return library.about()
    if do == "memory":
        return {"resident": peak_resident_bytes(), "arrays": library.peak_array_bytes()}
    if do == "load":
        return {"seconds": seconds_of(library.load, folder, dtype)}
    if do == "caption":
        return library.caption(folder, dtype, **request)  # type: ignore[attr-defined]
    if do == "train":
        return library.train(folder, dtype, **request)  # type: ignore[attr-defined]
    if do == "launches":
        return library.launches(folder, dtype, **request)  # type: ignore[attr-defined]
    pixel_values = library.to_device(noise_image(request.pop("image_size")))
    if do == "encode":
        return {"seconds": seconds_of(library.encode, pixel_values)}
    if do == "generate":
        return timed_generation(library, pixel_values, **request)
    if do == "features":
        np.save(request["file"], library.features(pixel_values))
        return {}
    if do == "margin":
        logits = library.logits(pixel_values, request["prompt"])
        first, second = request["tokens"]
        return {"margin": float(logits[first] - logits[second]), "std": float(logits.std())}
    raise ValueError(f"No such request: {do}.")


def seconds_of(function: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def timed_generation(
    library: Side, pixel_values: Any, prompt: Sequence[int], max_tokens: int
) -> dict[str, Any]:
    """Greedy tokens, the time to the first and the rate of those after it."""
    start = time.perf_counter()
    tokens, times = [], []
    for token in library.generate(pixel_values, prompt, max_tokens):
        tokens.append(token)
        times.append(time.perf_counter())
    return {
        "tokens": tokens,
        "ttft": times[0] - start,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
    }


def noise_image(image_size: int) -> np.ndarray:
    """Pixel values [1, S, S, 3] in [0, 1], the same in every process."""
    return np.random.default_rng(0).random((1, image_size, image_size, 3), dtype=np.float32)


def peak_resident_bytes() -> int:
    """Most bytes of physical memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # there ru_maxrss includes the parent's peak before this process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the requests of peers.Worker.")
    parser.add_argument("side", choices=CLASSES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype", choices=DTYPES)
    args = parser.parse_args()
    # Behind the libraries: one of the files here is called as one that they import (requests).
    sys.path.append(sys.path.pop(0))
    serve(args.side, args.folder, args.dtype)


if __name__ == "__main__":
    main()
