"""Checkpoints: whole or not there, whatever fails; a resumed run is the unbroken one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from train_runs import InMemory, batch, same, trainer, weights_of

from fastvlm_mlx.train.log import LOG, Log, read_log
from fastvlm_mlx.train.loop import Stopped
from fastvlm_mlx.train.state import Checkpoint, Checkpoints, Position, differing

RUN = {"epochs": 3, "save_every": 2, "dropout": 0.2, "accumulation": 2, "optimizer": "muon"}


def five() -> InMemory:
    return InMemory([batch(i) for i in range(5)])


def rows_of(out: Path) -> list[Any]:
    return [line["rows"] for line in read_log(out / "log.jsonl") if "rows" in line]


class Killed(BaseException):
    """As if the process had ended here."""


def kill_before(run: Any, step: int) -> None:
    original = run._take_step

    def take(window: Any) -> float:
        if run.position.step == step:
            raise Killed
        return original(window)

    run._take_step = take


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_resumed_run_is_the_unbroken_one_and_not_a_cold_one(tmp_path: Path, step: int) -> None:
    unbroken = trainer(tmp_path / "unbroken", five(), **RUN)
    unbroken.train()
    first = trainer(tmp_path / "broken", five(), **RUN)
    kill_before(first, step)
    with pytest.raises(Killed):
        first.train()
    second = trainer(tmp_path / "broken", five(), **RUN)
    second.train()
    assert same(weights_of(second), weights_of(unbroken))
    assert same(second.optimizer.tensors(), unbroken.optimizer.tensors())
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "unbroken")
    assert len(rows_of(tmp_path / "broken")) == 9
    if step >= 2:  # with weights but without the optimizer's state, it is another run
        cold = trainer(tmp_path / "cold", five(), **RUN)
        shutil.copytree(tmp_path / "broken" / "checkpoints", tmp_path / "cold" / "checkpoints")
        _forget_optimizer(tmp_path / "cold" / "checkpoints", cold)
        cold.train()
        assert not same(weights_of(cold), weights_of(unbroken))


@pytest.mark.parametrize("step", [3, 4, 9])  # the second has an evaluation, the last is the last
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_log(tmp_path: Path, step: int) -> None:
    evaluated = {"eval_every": 2, "validation": "0.5", "patience": 9}
    runs = []
    for name in ("unbroken", "stopped"):
        run = trainer(tmp_path / name, five(), held_out=InMemory([batch(9)]), **RUN, **evaluated)
        runs.append(run)
    runs[0].train()
    runs[1].any_asked = lambda _: runs[1].position.step == step
    with pytest.raises(Stopped):
        runs[1].train()
    assert runs[1].checkpoints.last() == runs[1].checkpoints.at(step)
    again = trainer(tmp_path / "stopped", five(), held_out=InMemory([batch(9)]), **RUN, **evaluated)
    again.train()
    logs = [lines_of(tmp_path / name) for name in ("unbroken", "stopped")]
    assert logs[0] == logs[1] and sum("validation_loss" in line for line in logs[0]) == 5
    assert again.position == runs[0].position


def lines_of(out: Path) -> list[dict[str, Any]]:
    """A log's lines without what depends on time."""
    timed = ("tokens_per_second", "images_per_second", "memory")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(out / LOG)]


def _forget_optimizer(folder: Path, run: Any) -> None:
    for later in sorted(folder.iterdir())[1:]:
        shutil.rmtree(later)
    (kept,) = folder.iterdir()
    checkpoint = run.checkpoints.load(kept, run.run)
    checkpoint.tensors["optimizer"] = run.optimizer.tensors()
    shutil.rmtree(kept)
    run.checkpoints.save(checkpoint)


class Fault(OSError):
    """The disk is full, or the system is about to lose power."""


FAULTY = ("fsync", "rename")


def count_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> list[str]:
    """Note every write, fsync and rename of a checkpoint, and fail at one of them."""
    calls: list[str] = []

    def note(name: str) -> None:
        calls.append(name)
        if fail_at == len(calls) - 1:
            raise Fault(28, "No space left on device")

    for name in FAULTY:
        original = getattr(os, name)

        def faulty(*arguments: Any, name: str = name, original: Any = original) -> Any:
            note(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, faulty)
    save, write = mx.save_safetensors, Path.open

    def save_part(stream: Any, tensors: Any) -> None:
        stream.write(b"half of it")
        note("write")
        stream.seek(0)
        save(stream, tensors)

    def open_file(path: Path, mode: str = "r", **named: Any) -> Any:
        if "w" in mode:
            note(f"open {path.name}")
        return write(path, mode, **named)

    monkeypatch.setattr(mx, "save_safetensors", save_part)
    monkeypatch.setattr(Path, "open", open_file)
    return calls


def checkpoint_of(step: int) -> Checkpoint:
    tensors = {"weights": {"w": mx.full(3, step)}, "optimizer": {"m": mx.full(2, -step)}}
    return Checkpoint(Position(step=step), {"settings": {"seed": 0}}, tensors)


def test_a_fault_at_any_write_sync_or_rename_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, None)
        checkpoints = Checkpoints(tmp_path / "count", keep=1)
        checkpoints.save(checkpoint_of(1))
        calls.clear()
        checkpoints.save(checkpoint_of(2))
        kinds = list(calls)
    assert {"write", "fsync", "rename", "open state.json"} <= set(kinds)
    for number in range(len(kinds)):
        out = tmp_path / str(number)
        checkpoints = Checkpoints(out, keep=1)
        checkpoints.save(checkpoint_of(1))
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, number)
            with pytest.raises(OSError, match="No space left"):
                checkpoints.save(checkpoint_of(2))
        last = Checkpoints(out, keep=1).last()
        assert last is not None, kinds[number]
        found = checkpoints.load(last, {"settings": {"seed": 0}})
        step = found.position.step
        assert step in (1, 2)
        assert found.tensors["weights"]["w"].tolist() == [step] * 3
        checkpoints.save(checkpoint_of(3))  # there is room again
        assert checkpoints.last() == checkpoints.at(3)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no state", "half a state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(checkpoint_of(1))
    newest = checkpoints.save(checkpoint_of(2))
    weights, state = newest / "weights.safetensors", newest / "state.json"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-3])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:30])
    assert checkpoints.last() == checkpoints.at(1)


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 6):
        checkpoint = checkpoint_of(step)
        checkpoint.position.best_step = min(step, 2)
        checkpoints.save(checkpoint)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-00000002",
        "step-00000005",
    ]


def test_the_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, five(), epochs=1)
    run.train()
    other = trainer(tmp_path, five(), epochs=1, rank=3, learning_rate=0.5)
    with pytest.raises(ValueError, match="holds another run") as error:
        other.train()
    assert "rank was 16 and is 3" in str(error.value)
    assert "learning_rate was 0.01 and is 0.5" in str(error.value)
    assert run.checkpoints.last() is not None


def test_differences_are_named_however_deep() -> None:
    one = {"settings": {"a": 1, "b": 2}, "data": "x"}
    assert differing(one, one) == []
    assert differing(one, {"settings": {"a": 1, "b": 3}, "data": "y"}) == [
        "b was 2 and is 3",
        "data was x and is y",
    ]


def test_the_whole_configuration_stands_in_every_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, five(), epochs=2, keep=2)
    run.train()
    for folder in (tmp_path / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        assert state["run"]["settings"] == run.options.as_dict()


def test_a_full_disk_ends_a_run_with_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = trainer(tmp_path / "unbroken", five(), **RUN)
    unbroken.train()
    run = trainer(tmp_path / "full", five(), **RUN)
    save, calls = mx.save_safetensors, []

    def full(stream: Any, tensors: Any) -> None:
        calls.append(stream)
        if len(calls) > 4:
            raise RuntimeError("[save_safetensors] Failed to write: no space left")
        save(stream, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        with pytest.raises(OSError, match="can't be written") as error:
            run.train()
    assert "\n" not in str(error.value)
    assert run.checkpoints.last() == run.checkpoints.at(4)
    again = trainer(tmp_path / "full", five(), **RUN)
    again.train()
    assert same(weights_of(again), weights_of(unbroken))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_that_can_not_be_written_ends_a_run_with_one_sentence(tmp_path: Path) -> None:
    run = trainer(tmp_path, five(), **RUN)
    original = run._note

    def fill_the_disk(*given: Any) -> float:
        if run.position.step == 4:
            os.dup2(os.open("/dev/full", os.O_WRONLY), run._log._stream.fileno())
        return original(*given)

    run._note = fill_the_disk
    with pytest.raises(OSError, match=r"The log .*log.jsonl can't be written \(No space left"):
        run.train()
    assert run.checkpoints.last() == run.checkpoints.at(4)
    trainer(tmp_path, five(), **RUN).train()
    assert len(rows_of(tmp_path)) == 9


def test_the_log_of_a_killed_process_is_read_without_its_last_half_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert [line["step"] for line in read_log(file)] == [1, 2]


def test_a_log_holds_any_text_and_is_read_again(tmp_path: Path) -> None:
    texts = ["line\u2028separator\x85next", "half \ud83d of a pair", "\r\n\t"]
    for _ in range(2):  # written anew, too
        log = Log(tmp_path / LOG, step=1)
        log.write(step=2, rows=texts)
        log.sync()
        log.close()
    log = Log(tmp_path / LOG, step=2)
    log.close()
    assert read_log(tmp_path / LOG) == [{"step": 2, "rows": texts}]


def test_a_checkpoint_is_written_after_the_log_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for kind, name in ((Log, "sync"), (Checkpoints, "save")):
        original = getattr(kind, name)

        def noted(self: Any, *given: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(self, *given)

        monkeypatch.setattr(kind, name, noted)
    trainer(tmp_path, five(), epochs=2, save_every=5).train()
    assert order == ["sync", "save"] * 2
