"""Several processes train as one with as many times the batch; one that is lost ends the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from sources import with_tokenizer
from training import write_rows

from fastvlm_mlx.train.log import read_log
from fastvlm_mlx.train.ranks import GONE, LOST

OPTIONS = ["--no-compiled", "--learning-rate", "1e-3", "--clip", "0.5", "--image-size", "64"]
OPTIONS += ["--validation", "0.2", "--save-every", "1", "--epochs", "2", "--decoder", "full"]
ENDED_WITHIN = 10  # seconds
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def files(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, rows, and a folder for runs."""
    root = tmp_path_factory.mktemp("ranks")
    model, data = with_tokenizer(small_folder, root / "model"), root / "rows.json"
    write_rows(data, 28, 7)
    return model, data, root


@pytest.fixture
def start(files: tuple[Path, Path, Path]) -> Iterator[Callable[..., list[Process]]]:
    """Begins a run in so many processes; none of them is left in the end."""
    model, data, root = files
    started: list[Process] = []

    def begin(out: str, ranks: int, batch_size: int, *more: str) -> list[Process]:
        command = [sys.executable, "-m", "fastvlm_mlx", "train", "--model", str(model), "-q"]
        command += ["--data", str(data), "--out", str(root / out), *OPTIONS, *more]
        command += ["--batch-size", str(batch_size)]
        hosts = root / f"{out}.hosts"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        ring = {"MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
        for rank in range(ranks):
            own = ring | ({"MLX_RANK": str(rank)} if ranks > 1 else {})
            started.append(
                subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | own)
            )
        return started[-ranks:]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def finish(processes: list[Process]) -> None:
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


def curve_of(out: Path) -> list[float]:
    lines = read_log(out / "log.jsonl")
    return [line.get("loss", line.get("validation_loss")) for line in lines]


def wait_for_lines(out: Path, count: int, processes: list[Process]) -> None:
    log = out / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_curve_of_one_process_with_as_many_times_the_batch(
    files: tuple[Path, Path, Path], start: Callable[..., list[Process]], ranks: int
) -> None:
    root = files[2]
    if not (root / "one" / "model").exists():
        finish(start("one", 1, 4))
    finish(start(f"several {ranks}", ranks, 4 // ranks))
    one, several = curve_of(root / "one"), curve_of(root / f"several {ranks}")
    assert len(one) == len(several) > 12
    assert max(abs(a - b) for a, b in zip(one, several, strict=True)) < 1e-5


@pytest.mark.parametrize("how", ["KILL", pytest.param("STOP", marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_others_with_one_sentence_and_the_rerun_goes_on(
    files: tuple[Path, Path, Path], start: Callable[..., list[Process]], how: str
) -> None:
    out = f"lost {how}"
    first, second = start(out, 2, 2)
    wait_for_lines(files[2] / out, 3, [first, second])
    second.send_signal(getattr(signal, f"SIG{how}"))
    begin = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - begin < ENDED_WITHIN
    # MLX's ring may have said in its own words, in lines of its own, that the other has hung up.
    ours = "".join(line for line in said.splitlines(True) if not line.startswith("[ring] "))
    assert (first.returncode, ours) == (LOST, f"Error: {GONE}\n")
    if how == "STOP":  # it finds out as soon as it goes on
        second.send_signal(signal.SIGCONT)
        second.communicate(timeout=ENDED_WITHIN)
        assert second.returncode == LOST
    before = max(line["step"] for line in read_log(files[2] / out / "log.jsonl"))
    finish(start(out, 2, 2))
    if (files[2] / "several 2" / "model").exists():
        assert same_model(files[2] / out, files[2] / "several 2")
    after = max(line["step"] for line in read_log(files[2] / out / "log.jsonl"))
    assert before < after


def same_model(one: Path, other: Path) -> bool:
    tensors: list[dict[str, Any]] = []
    for out in (one, other):
        (file,) = (out / "model").glob("*.safetensors")
        tensors.append(mx.load(str(file)))
    return all(mx.array_equal(tensors[0][n], tensors[1][n]).item() for n in tensors[1])


@pytest.mark.slow
def test_each_process_says_that_a_loss_is_no_number(
    start: Callable[..., list[Process]],
) -> None:
    for process in start("infinite", 2, 2, "--learning-rate", "1e30"):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "is no finite number" in said and GONE not in said and said.count("\n") == 1
