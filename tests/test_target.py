"""The folder that a conversion writes: what is replaced, what never, and what a kill leaves."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import one_sentence

from fastvlm_mlx.checkpoint import target as targets
from fastvlm_mlx.checkpoint.target import atomic_folder, check_apart, check_target

CONFIG = json.dumps({"model_type": "llava_qwen2"})


def write_model(folder: Path, weights: str) -> None:
    """The least that makes a folder a converted model; its weights tell which."""
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").write_text(weights)


def write_into(target: Path, *, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite) as temporary:
        assert temporary != target and temporary.is_dir()
        write_model(temporary, "new")


def weights_in(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A converted model that must not be lost."""
    target = tmp_path / "target"
    target.mkdir()
    write_model(target, "old")
    return target


# Where nothing is


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "some" / "where" / "target"
    write_into(target)
    assert weights_in(target) == "new" and names_in(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_empty_folder_is_taken(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / ".DS_Store").touch()
    (target / "._config.json").touch()
    write_into(target, overwrite=overwrite)
    assert names_in(target) == ["config.json", "model.safetensors"]
    assert names_in(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"):
        write_into(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(NotADirectoryError, match=r"target can't be written: .*file is a file"):
        write_into(tmp_path / "file" / "some" / "target", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "old" and names_in(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match="you may not write to") as error:
        check_target(tmp_path / "some" / "target", overwrite=True)
    assert str(tmp_path) in one_sentence(error)


def test_a_mount_point_is_not_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == old)
    with pytest.raises(OSError, match="mount point"):
        check_target(old, overwrite=True)


# Where a model is


@pytest.fixture(params=["in one step", "in two steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How folders are exchanged: as the system can, or as where it can't."""
    if request.param == "in two steps":
        monkeypatch.setattr(targets, "_swap", lambda one, other: False)
    return request.param


FILES = ["README.md", "LICENSE", "tokenizer.json", "merges.txt", "model.safetensors.index.json"]
FILES += ["model-00001-of-00002.safetensors", ".DS_Store", "._model.safetensors"]


def test_a_model_is_replaced_when_asked(old: Path, steps: str) -> None:
    for name in FILES:
        (old / name).touch()
    (old / "fastvithd.mlpackage" / "Data").mkdir(parents=True)
    write_into(old, overwrite=True)
    assert names_in(old) == ["config.json", "model.safetensors"] and weights_in(old) == "new"
    assert names_in(old.parent) == ["target"]


def test_the_folder_one_is_in_is_replaced(
    old: Path, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)
    write_into(Path(), overwrite=True)
    assert weights_in(old) == weights_in(Path()) == "new"
    assert Path.cwd() == old and names_in(old.parent) == ["target"]


def test_on_a_mac_folders_are_swapped_by_its_own_call(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamex_np(one: bytes, other: bytes, flags: int) -> int:
        calls.append((one, other, flags))
        return -1

    calls: list[tuple[bytes, bytes, int]] = []
    monkeypatch.setattr(targets.sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(renamex_np=renamex_np))
    write_into(old, overwrite=True)  # in two steps, since it fails
    ((new, replaced, flags),) = calls
    assert (replaced, flags) == (os.fsencode(old), 2)  # RENAME_SWAP of <stdio.h>
    assert new.startswith(os.fsencode(old.parent / ".target.")) and weights_in(old) == "new"


def test_a_model_is_not_replaced_unasked(old: Path) -> None:
    with pytest.raises(FileExistsError, match="--overwrite") as error:
        write_into(old)
    assert str(old) in one_sentence(error)
    assert weights_in(old) == "old" and names_in(old.parent) == ["target"]


def test_a_link_to_a_folder_is_replaced_without_harm(tmp_path: Path, old: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old, target_is_directory=True)
    write_into(link, overwrite=True)
    assert weights_in(link) == "new" and link.is_symlink()
    assert names_in(tmp_path) == ["link", "target"]


# Where something else is


def a_file(folder: Path) -> str:
    (folder / "thesis.tex").write_text("mine")
    return "thesis.tex"


def several_files(folder: Path) -> str:
    for name in ("zebra.txt", "b.py"):
        (folder / name).write_text("mine")
    return "b.py"


def a_repository(folder: Path) -> str:
    (folder / ".git").mkdir()
    return ".git"


def a_folder_with_the_name_of_a_file(folder: Path) -> str:
    (folder / "LICENSE").mkdir()
    return "LICENSE"


def weights_of_torch(folder: Path) -> str:
    (folder / "pytorch_model.bin").write_text("mine")
    return "pytorch_model.bin"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no whole model"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "no whole model"


def another_model(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return "not a FastVLM's"


def a_broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "not a FastVLM's"


SPOILERS = [a_file, several_files, a_repository, a_folder_with_the_name_of_a_file]
SPOILERS += [weights_of_torch, no_weights, no_config, another_model, a_broken_config]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_anything_else_is_never_replaced(
    old: Path, spoil: Callable[[Path], str], overwrite: bool
) -> None:
    said, before = spoil(old), contents(old)
    with pytest.raises(FileExistsError) as error:
        write_into(old, overwrite=overwrite)
    sentence = one_sentence(error)
    assert str(old) in sentence and said in sentence and "choose another target" in sentence
    assert contents(old) == before and names_in(old.parent) == ["target"]


def test_a_file_that_appears_meanwhile_is_not_lost(old: Path) -> None:
    with (
        pytest.raises(FileExistsError, match=r"holds notes\.txt"),
        atomic_folder(old, overwrite=True) as temporary,
    ):
        write_model(temporary, "new")
        (old / "notes.txt").write_text("mine")
    assert weights_in(old) == "old" and (old / "notes.txt").read_text() == "mine"
    assert names_in(old.parent) == ["target"]


def test_a_source_that_would_be_replaced(tmp_path: Path, old: Path) -> None:
    with pytest.raises(ValueError, match="both the source and the target"):
        check_apart(old, str(old))
    with pytest.raises(ValueError, match="holds the source"):
        check_apart(tmp_path, old)
    check_apart(old / "inside", old)
    check_apart(tmp_path, "user/name")  # on the Hub


# What goes wrong


@pytest.mark.parametrize("failure", [OSError("full"), ValueError("wrong"), KeyboardInterrupt()])
def test_after_a_failure_all_is_as_before(
    tmp_path: Path, old: Path, failure: BaseException
) -> None:
    for target in (tmp_path / "another", old):
        with (
            pytest.raises(type(failure)),
            atomic_folder(target, overwrite=True) as temporary,
        ):
            write_model(temporary, "new")
            raise failure
    assert names_in(tmp_path) == ["target"] and weights_in(old) == "old"


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_the_old_folder_survives_a_failure_at_the_last_step(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    monkeypatch.setattr(targets, "_swap", lambda one, other: False)
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if Path(target) == old and weights_in(self) == "new":
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(type(failure)):
        write_into(old, overwrite=True)
    assert names_in(tmp_path) == ["target"] and weights_in(old) == "old"


def can_swap(folder: Path) -> bool:
    one, other = folder / "one", folder / "other"
    one.mkdir()
    other.mkdir()
    swapped = targets._swap(one, other)
    one.rmdir()
    other.rmdir()
    return swapped


def test_there_is_always_a_whole_folder(tmp_path: Path, old: Path) -> None:
    if not can_swap(tmp_path):
        pytest.skip("this file system can't swap folders")
    ended, missing = threading.Event(), []

    def watch() -> None:
        while not ended.is_set():
            missing.extend([] if (old / "config.json").is_file() else [True])

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        write_into(old, overwrite=True)
    ended.set()
    watcher.join()
    assert not missing and names_in(tmp_path) == ["target"]


# What a process that was killed leaves

WRITING = """
import sys, time
from pathlib import Path
from fastvlm_mlx.checkpoint.target import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite=True) as temporary:
    (temporary / "half").touch()
    print("writes", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(old: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing the target."""
    command = [sys.executable, "-c", WRITING, str(old)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "writes\n"
        yield process
        process.kill()


def test_leftovers_of_a_process_that_was_killed_are_removed(
    tmp_path: Path, old: Path, writer: subprocess.Popen[str]
) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    others = [".another.abcdefgh.converting", ".target.git", ".target.abcdefgh.part"]
    for name in others:
        (tmp_path / name).mkdir()
    assert len(names_in(tmp_path)) == 5
    write_into(old, overwrite=True)
    assert names_in(tmp_path) == sorted([*others, "target"])


def test_what_another_process_is_writing_stays(
    tmp_path: Path, old: Path, writer: subprocess.Popen[str]
) -> None:
    (others,) = set(names_in(tmp_path)) - {"target"}
    write_into(old, overwrite=True)
    assert writer.poll() is None
    assert names_in(tmp_path / others) == ["half"] and weights_in(old) == "new"


def test_a_kill_between_two_steps_loses_nothing(tmp_path: Path, old: Path) -> None:
    old.rename(tmp_path / ".target.abcdefgh.replaced")
    (tmp_path / ".target.abcdefgh.converting").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_into(old)
    assert names_in(tmp_path) == ["target"] and weights_in(old) == "old"


def test_a_kill_after_both_steps_leaves_only_the_new_one(tmp_path: Path, old: Path) -> None:
    replaced = tmp_path / ".target.abcdefgh.replaced"
    replaced.mkdir()
    write_into(old, overwrite=True)
    assert names_in(tmp_path) == ["target"] and weights_in(old) == "new"
