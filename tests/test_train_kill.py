"""`fastvlm train`, killed at random moments, goes on to the unbroken run's weights, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from sources import with_tokenizer
from training import write_rows

from fastvlm_mlx.train.log import read_log

STEPS = 12
OPTIONS = ["--epochs", "3", "--save-every", "1", "--batch-size", "2", "--accumulation", "2"]
OPTIONS += ["--dropout", "0.1", "--vision", "full", "--no-compiled", "--learning-rate", "1e-3"]
OPTIONS += ["--validation", "0.1", "--eval-every", "5", "--keep", "1", "--image-size", "64"]
FEW, MANY = 2, 20


@pytest.fixture(scope="module")
def start(small_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Begins the command in a process of its own, with a run's folder for the result."""
    root = tmp_path_factory.mktemp("killed")
    model, data = with_tokenizer(small_folder, root / "model"), root / "rows.json"
    write_rows(data, 18, 5)

    def begin(out: str, hash_seed: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fastvlm_mlx", "train", "--model", str(model)]
        command += ["--data", str(data), "--out", str(root / out), "-q", *OPTIONS]
        surroundings = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=surroundings)

    return begin, root


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def lines_of(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_somewhere(process: subprocess.Popen[str], out: Path, draw: random.Random) -> bool:
    """Kill a process some lines of its log on; whether it had not ended before."""
    wanted = lines_of(out) + draw.randint(0, 3)
    while process.poll() is None and lines_of(out) < wanted:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.15))
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def result_of(out: Path) -> dict[str, mx.array]:
    (file,) = (out / "model").glob("*.safetensors")
    return mx.load(str(file))


def rows_of(out: Path) -> list[list[str]]:
    return [line["rows"] for line in read_log(out / "log.jsonl") if "rows" in line]


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_weights_of_the_unbroken_one(start, kills: int) -> None:
    begin, root = start
    if not (root / "unbroken").exists():
        finish(begin("unbroken"))
    out, draw, killed, seed = root / f"killed {kills}", random.Random(0), 0, 1
    while killed < kills:
        if (out / "model").exists():  # it ended too soon: kill another one
            out = root / f"{out.name} again"
        killed += kill_somewhere(begin(out.name, seed), out, draw)
        seed += 1
    finish(begin(out.name, seed))
    assert rows_of(out) == rows_of(root / "unbroken")
    assert len(rows_of(out)) == STEPS
    expected, found = result_of(root / "unbroken"), result_of(out)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_ctrl_c_saves_the_step_in_progress_and_says_how_to_go_on(start) -> None:
    begin, root = start
    process = begin("stopped")
    while lines_of(root / "stopped") < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Stopped and saved; the same command goes on from here.\n"
    steps = len(rows_of(root / "stopped"))
    newest = sorted((root / "stopped" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{steps:08d}"
