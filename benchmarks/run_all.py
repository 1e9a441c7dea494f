"""Take all measurements on this machine, and write RESULTS.md: one command.

On a GPU (CUDA or Metal) the 0.5B and the 7B model are measured in bfloat16, on a CPU the 0.5B and
the nano model in float32. A measurement that fails does not keep the others from being taken; the
command then exits with 1. Checkpoints are written into a temporary folder: with TMPDIR, choose a
disk with room for three times the largest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.ops import on_cpu

from .random_checkpoint import SIZES
from .registry import MEASUREMENTS
from .report import OPTIONS as REPORT_OPTIONS
from .turns import note

ON_BUNDLED = ("batch", "speculate")  # what is measured on the bundled model, with the defaults
STEPS = ("compare", "launches", "second_question", "same_picture", "growth", "memory", *ON_BUNDLED)
MODELS, DTYPE = (["0.5b", "nano"], "float32") if on_cpu() else (["0.5b", "7b"], "bfloat16")
OPTIONS: dict[str, dict[str, Any]] = {
    "--peer-python": {},
    "--transformers-python": {},
    "--compile": {},
    "--sizes": {"nargs": "+", "choices": SIZES, "default": MODELS, "help": "of the models"},
    "--dtype": {"default": DTYPE, "help": "of the models"},
    "--steps": {"nargs": "+", "choices": STEPS, "default": STEPS, "help": "measurements to take"},
    "--rounds": {},
    "--results": REPORT_OPTIONS["--results"] | {"help": "for samples; RESULTS.md goes beside it"},
}


def run(args: argparse.Namespace) -> int:
    """Take the measurements, each in a process of its own; 1 if one failed."""
    if args.compile and not args.transformers_python:
        raise ValueError("--compile needs --transformers-python.")
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for command in commands(args, Path(scratch)):
            note(f"--- {' '.join(command)}")
            if subprocess.run([sys.executable, "-m", "benchmarks", *command]).returncode:
                failed.append(" ".join(command[:2]))
    for name in failed:
        note(f"failed: {name}")
    return 1 if failed else 0


def commands(args: argparse.Namespace, scratch: Path) -> Iterator[list[str]]:
    """The commands to run, in order; a checkpoint is written before its use.

    The first size is measured in every way, the others are only compared.
    """
    for i, size in enumerate(args.sizes):
        folder = str(scratch / size)
        yield ["checkpoint", size, folder, "--dtype", args.dtype]
        for step in args.steps:
            if step not in ("memory", *ON_BUNDLED) and (i == 0 or step == "compare"):
                yield [step, folder, *step_options(step, args), *written(step, size, args)]
    if "memory" in args.steps:
        yield ["memory", "7b", *written("memory", "7b", args)]
    for step in ON_BUNDLED:
        if step in args.steps:
            yield [step, *written(step, "nano", args)]
    yield ["report", "--results", str(args.results), "--target", str(args.results.parent)]


def step_options(step: str, args: argparse.Namespace) -> list[str]:
    """The options of this command that a measurement takes too."""
    options = []
    for name in OPTIONS:
        value = getattr(args, name[2:].replace("-", "_"))
        if value and name in MEASUREMENTS[step].OPTIONS:
            options += [name] if value is True else [name, str(value)]
    return options


def written(step: str, size: str, args: argparse.Namespace) -> list[str]:
    """Where a measurement writes its result; OpenBLAS's kernels have a name there if forced."""
    device = "cpu" if on_cpu() else "metal" if mx.metal.is_available() else "cuda"
    kernels = os.environ.get("OPENBLAS_CORETYPE", "").lower()
    name = "-".join(part for part in (step, size, device, kernels) if part)
    return ["--json", str(args.results / f"{name}.json")]
