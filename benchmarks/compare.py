"""Measure this library, mlx-vlm and transformers side by side, on the same weights.

Each library runs in a process of its own, with its own Python where needed, and they take turns
(A B C, C B A, A B C, …), so that whatever else the machine does falls on all alike. What is
compared is what a user waits for: the encoder, the time to the first token, the tokens per second
after it, loading, and memory; and first of all whether all say the same.

    python benchmarks/random_checkpoint.py 0.5b /tmp/fastvlm-0.5b
    python benchmarks/compare.py /tmp/fastvlm-0.5b --peer-python ~/mlx-vlm/bin/python

benchmarks/README.md says how to read the table and how to get steady figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from machine import command_line, describe_machine, note, write_result
from tables import FIGURES, Samples, describe_outputs, describe_setting, header, rows
from worker import COMPILED, DTYPES, EAGER, IMAGE, OURS, PEER

from fastvlm_mlx.checkpoint.layouts import transformers

BENCHMARKS = Path(__file__).resolve().parent
FEATURES_TOLERANCE = 1e-3


class Worker:
    """A library in a process of its own, which answers as `worker.py` says.

    Args:
        side: one of `worker.CLASSES`.
        python: of an environment that has that side's library.
        folder: a checkpoint in a layout that it reads.
        dtype: of the weights.
    """

    def __init__(self, side: str, python: str, folder: Path, dtype: str):
        self.side = side
        command = [python, str(BENCHMARKS / "worker.py"), side, str(folder), dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply; RuntimeError if the process is gone."""
        requests, replies = self._pipes()
        try:
            requests.write(json.dumps({"do": do, **request}) + "\n")
            requests.flush()
        except BrokenPipeError:
            pass
        line = replies.readline()
        if not line:
            raise RuntimeError(f"{self.side} ended while asked to {do}; its error stands above.")
        return json.loads(line)

    def close(self) -> None:
        requests, replies = self._pipes()
        requests.close()
        self.process.wait()
        replies.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin and self.process.stdout
        return self.process.stdin, self.process.stdout


Workers = dict[str, Worker]


def start_workers(pythons: dict[str, str], scratch: Path, dtype: str) -> Workers:
    """One worker a side, on the folders that `write_folders` made."""
    return {
        side: Worker(side, python, folder_of(side, scratch), dtype)
        for side, python in pythons.items()
    }


def folder_of(side: str, scratch: Path) -> Path:
    return scratch / ("transformers" if side in (EAGER, COMPILED) else "mlx")


def write_folders(model: Path, scratch: Path, dtype: str, sides: Iterable[str]) -> None:
    """Convert a checkpoint to the layouts that the sides read."""
    from fastvlm_mlx.checkpoint.files import save_checkpoint, write_json
    from fastvlm_mlx.checkpoint.read import read_checkpoint
    from fastvlm_mlx.convert import convert

    folder = convert(model, scratch / "mlx", dtype=dtype, progress=False)
    written = scratch / "transformers"
    if any(folder_of(side, scratch) == written for side in sides):
        # No tokenizer is needed, and so `convert` can't be asked: it looks there for <image>.
        config, tensors = read_checkpoint(folder)
        image_token = config.text.vocab_size - 1
        written.mkdir()
        write_json(written / "config.json", transformers.config_json(config, dtype, image_token))
        save_checkpoint(transformers.from_mlx(tensors), written)


def compare(pythons: dict[str, str], scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures and the comparison of outputs, on the folders in `scratch`."""
    config = json.loads((scratch / "mlx/config.json").read_text())
    image_size = args.image_size or config["vision_config"]["image_size"]
    prompt = random_prompt(args.text_tokens, config["vocab_size"] - 1)
    generate = {"image_size": image_size, "prompt": prompt, "max_tokens": args.tokens}
    samples: Samples = {key: {side: [] for side in pythons} for key in FIGURES}

    for side, python in pythons.items():
        note(f"memory of {side}")
        worker = Worker(side, python, folder_of(side, scratch), args.dtype)
        worker.ask("load")
        worker.ask("generate", **generate)
        for key, peak in worker.ask("memory").items():
            samples[key][side] += [] if peak is None else [peak / 1e9]
        worker.close()
    workers = start_workers(pythons, scratch, args.dtype)
    for side, worker in in_turns(workers, args.rounds, "loading"):
        samples["load"][side].append(worker.ask("load")["seconds"])
    outputs = {}
    for side in list(pythons)[1:]:
        note(f"comparing outputs with {side}")
        outputs[side] = compare_outputs({OURS: workers[OURS], side: workers[side]}, generate)
    for worker in workers.values():  # what is compiled or chosen on the first call is not timed
        worker.ask("encode", image_size=image_size)
        worker.ask("generate", **generate)
    for side, worker in in_turns(workers, args.rounds, "encoding and generating"):
        encoded = worker.ask("encode", image_size=image_size)
        samples["encode"][side].append(encoded["seconds"])
        generated = worker.ask("generate", **generate)
        samples["ttft"][side].append(generated["ttft"])
        samples["decode"][side].append(generated["tokens_per_second"])
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
        "machine": describe_machine(),
        "versions": about,
        "outputs": outputs,
        "samples": samples,
    }


def in_turns(workers: Workers, rounds: int, what: str) -> Iterator[tuple[str, Worker]]:
    """Each worker once a round; who went last goes first in the next."""
    order = list(workers.items())
    for i in range(rounds):
        note(f"{what}: round {i + 1} of {rounds}")
        yield from order
        order.reverse()


def random_prompt(text_tokens: int, vocab_size: int) -> list[int]:
    """Token ids with one image among them."""
    ids: list[int] = np.random.default_rng(1).integers(0, vocab_size, text_tokens).tolist()
    half = text_tokens // 2
    return [*ids[:half], IMAGE, *ids[half:]]


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


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first, *sides = zip(header(), *rows(result), strict=True)
    table = Table(first[0], show_lines=True)
    for side in first[1:]:
        table.add_column(side, justify="right", overflow="fold")
    for what, *cells in sides:
        table.add_row(what, *(cell.replace(" (", "\n(").replace("; ", "\n") for cell in cells))
    console = Console()
    console.print(*describe_setting(result), sep="\n")
    console.print(table)
    console.print(*describe_outputs(result["outputs"]), sep="\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=f"Measure {OURS}, {PEER} and {EAGER} side by side on the same weights.",
        epilog="The model is first converted into a temporary folder (choose another place for it "
        "with TMPDIR), in the layouts and the dtype that all read. All libraries inherit the "
        "environment: set LD_PRELOAD or thread counts there. Exits with 1 if the vision features "
        f"differ by more than {FEATURES_TOLERANCE} of their standard deviation in float32.",
    )
    parser.add_argument("model", type=Path, help="a FastVLM folder, in any layout that is known")
    add_sides(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; default: 5")
    parser.add_argument("--tokens", type=int, default=64, help="to generate; default: 64")
    parser.add_argument(
        "--text-tokens", type=int, default=32, help="in the prompt beside the image; default: 32"
    )
    parser.add_argument("--image-size", type=int, help="in pixels; default: the model's own")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    return parser


def add_sides(parser: argparse.ArgumentParser) -> None:
    """The options that say who is measured beside this library."""
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help=f"Python of an environment with {PEER}; default: the one that runs this",
    )
    parser.add_argument(
        "--transformers-python",
        metavar="PATH",
        help="Python of an environment with torch, torchvision, timm and transformers, to measure "
        "that too",
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure transformers with torch.compile too"
    )


def pythons_of(args: argparse.Namespace) -> dict[str, str]:
    """The Python of each side that takes part, this library's first."""
    pythons = {OURS: sys.executable, PEER: args.peer_python}
    if args.transformers_python:
        pythons[EAGER] = args.transformers_python
        if args.compile:
            pythons[COMPILED] = args.transformers_python
    return pythons


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 2 or args.text_tokens < 1:
        parser.error("--rounds and --text-tokens must be at least 1, and --tokens at least 2.")
    if args.compile and not args.transformers_python:
        parser.error("--compile needs --transformers-python.")
    pythons = pythons_of(args)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            note("converting")
            write_folders(args.model, Path(scratch), args.dtype, pythons)
            result = compare(pythons, Path(scratch), args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print_table(result)
    if args.json:
        write_result(args.json, {"command": command_line(parser, args), **result})
    differences = [found["features_difference"] for found in result["outputs"].values()]
    agree = max(differences) <= FEATURES_TOLERANCE
    return 0 if agree or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
