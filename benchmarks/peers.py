"""Each library in a process of its own, with its own Python, and the folders that they read."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastvlm_mlx.checkpoint.files import save_checkpoint, write_json
from fastvlm_mlx.checkpoint.layouts import transformers
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import NANO

from .worker import COMPILED, EAGER, IMAGE, OURS, PEER

WORKER = Path(__file__).resolve().with_name("worker.py")


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
        command = [python, str(WORKER), side, str(folder), dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply; RuntimeError if the process has ended."""
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
        """End the process."""
        requests, replies = self._pipes()
        requests.close()
        self.process.wait()
        replies.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin and self.process.stdout
        return self.process.stdin, self.process.stdout


def pythons_of(args: argparse.Namespace) -> dict[str, str]:
    """The Python of each side that takes part, this library's first."""
    pythons = {OURS: sys.executable, PEER: args.peer_python}
    transformers_python = getattr(args, "transformers_python", None)
    if transformers_python:
        pythons[EAGER] = transformers_python
    if getattr(args, "compile", False):
        if not transformers_python:
            raise ValueError("--compile needs --transformers-python.")
        pythons[COMPILED] = transformers_python
    return pythons


def write_folders(model: Path, scratch: Path, dtype: str, sides: Iterable[str]) -> None:
    """Convert a checkpoint to the layouts that the sides read."""
    folder = convert(model, scratch / "mlx", dtype=dtype, progress=False)
    written = scratch / "transformers"
    if any(folder_of(side, scratch) == written for side in sides):
        # There may be no tokenizer, in which `convert` would look for <image>.
        config, tensors = read_checkpoint(folder)
        image_token = config.text.vocab_size - 1
        written.mkdir()
        write_json(written / "config.json", transformers.config_json(config, dtype, image_token))
        save_checkpoint(transformers.from_mlx(tensors), written)


def give_tokenizer(folder: Path) -> None:
    """Give a converted checkpoint that has no tokenizer the bundled model's."""
    if not (folder / "tokenizer.json").is_file():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(NANO / name, folder / name)


def folder_of(side: str, scratch: Path) -> Path:
    """The folder that a side reads, of those that `write_folders` writes."""
    return scratch / ("transformers" if side in (EAGER, COMPILED) else "mlx")


def random_prompt(text_tokens: int, vocab_size: int) -> list[int]:
    """Token ids with one image among them."""
    ids: list[int] = np.random.default_rng(1).integers(0, vocab_size, text_tokens).tolist()
    half = text_tokens // 2
    return [*ids[:half], IMAGE, *ids[half:]]
