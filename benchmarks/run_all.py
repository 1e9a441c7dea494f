"""Take all measurements of this folder on this machine, and write RESULTS.md: one command.

    python benchmarks/run_all.py --peer-python ~/mlx-vlm/bin/python \\
        --transformers-python ~/torch/bin/python

On a GPU (CUDA or Metal) it measures the 0.5B and the 7B model in bfloat16, on a CPU the 0.5B and
the nano model in float32. A measurement that fails does not keep the others from being taken.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from compare import add_sides
from machine import note
from random_checkpoint import SIZES
from worker import DTYPES

BENCHMARKS = Path(__file__).resolve().parent
ON_BUNDLED = ("batch", "speculate")  # what is measured on the bundled model, and told nothing more
STEPS = ("compare", "launches", "second_question", "growth", "memory", *ON_BUNDLED)
GPU_DEFAULTS = (["0.5b", "7b"], "bfloat16")
CPU_DEFAULTS = (["0.5b", "nano"], "float32")

Command = list[str]


def place() -> str:
    """What computes: cpu, metal or cuda."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def commands(args: argparse.Namespace, scratch: Path) -> Iterator[Command]:
    """The scripts to run, in order, with their arguments; a checkpoint is written before its use.

    The first size is what all is measured on, the others are compared alone.
    """
    for i, size in enumerate(args.sizes):
        folder = str(scratch / size)
        yield ["random_checkpoint.py", size, folder, "--dtype", args.dtype]
        for step in args.steps:
            if step not in ("memory", *ON_BUNDLED) and (i == 0 or step == "compare"):
                options = step_options(step, args)
                yield [f"{step}.py", folder, *options, "--json", result_file(step, size, args)]
    if "memory" in args.steps:
        yield ["memory.py", "7b", "--json", result_file("memory", "7b", args)]
    for step in ON_BUNDLED:
        if step in args.steps:
            yield [f"{step}.py", "--json", result_file(step, "nano", args)]
    yield ["report.py", "--results", str(args.results), "--target", str(args.results.parent)]


def step_options(step: str, args: argparse.Namespace) -> list[str]:
    """What a script is told beside the model and the file to write."""
    if step == "launches":
        return ["--peer-python", args.peer_python]
    options = ["--dtype", args.dtype, "--rounds", str(args.rounds)]
    if step == "compare":
        options += ["--peer-python", args.peer_python]
        if args.transformers_python:
            options += ["--transformers-python", args.transformers_python]
            options += ["--compile"] * args.compile
    return options


def result_file(step: str, size: str, args: argparse.Namespace) -> str:
    return str(args.results / f"{step}-{size}-{place()}.json")


def main() -> int:
    sizes, dtype = CPU_DEFAULTS if place() == "cpu" else GPU_DEFAULTS
    parser = argparse.ArgumentParser(
        prog="run_all.py",
        description="Take all measurements on this machine, and write RESULTS.md.",
        epilog="Checkpoints are written into a temporary folder: choose a disk with room for "
        "three times the largest with TMPDIR. Exits with 1 if a measurement failed.",
    )
    add_sides(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes, help="of the models")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"default: {dtype} here")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; default: 5")
    parser.add_argument(
        "--results",
        type=Path,
        default=BENCHMARKS / "results",
        metavar="FOLDER",
        help="for the samples; RESULTS.md goes beside it. Default: results beside this script",
    )
    args = parser.parse_args()
    if args.compile and not args.transformers_python:
        parser.error("--compile needs --transformers-python.")
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for script, *options in commands(args, Path(scratch)):
            note(f"--- {script} {' '.join(options)}")
            command = [sys.executable, str(BENCHMARKS / script), *options]
            if subprocess.run(command).returncode:
                failed.append(f"{script} {options[0]}")
    for name in failed:
        note(f"failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
