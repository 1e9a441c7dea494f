"""Captions are written exactly once, whatever ends a run, and however many processes share it."""

import gc
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from captions import command, finish, numbered, run
from PIL import Image

from fastvlm_mlx.caption import containers, files, manifest
from fastvlm_mlx.caption.embedded import KINDS
from fastvlm_mlx.caption.share import Share
from fastvlm_mlx.caption.tables import read_rows

FORMS = ["c.jsonl", "c.csv", "c.tar", "c-%02d.tar", ".txt", ".xmp"]
FORMS.append(pytest.param("c.parquet", marks=pytest.mark.needs("pyarrow")))
# Which steps a run dies at
EVERY = pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
# What a process that is gone leaves open, the system closes.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


class DeathError(BaseException):
    """The process is gone: nothing that comes after it changes a file."""


class Death:
    """Comes at the nth step that changes a file or the manifest, and lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int):
        self.steps = steps
        for owner, name in (
            (files.AppendedFile, "append"),
            (files.os, "replace"),
            (manifest.Manifest, "_execute"),
        ):
            monkeypatch.setattr(owner, name, self._dying(getattr(owner, name)))

    def _dying(self, function):
        def step(*arguments):
            self.steps -= 1
            if self.steps <= 0:
                raise DeathError
            return function(*arguments)

        return step


def dies(nano, steps: int, *arguments, **settings) -> bool:
    """Whether a run that is to die at this step did."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Death(monkeypatch, steps)
        try:
            run(nano, *arguments, **settings)
        except DeathError:
            return True
        finally:
            gc.collect()  # what the system would close
    return False


def contents(folder: Path, out: str) -> object:
    """All captions of an output, in their order, each with its image."""
    file = folder / out
    if out in KINDS:
        metadata, form = KINDS[out]
        images = folder.glob("p/*.png")
        packets = {f.name: containers.read_packet(f.read_bytes(), metadata) for f in images}
        return {name: form.description_of(packet) for name, packet in packets.items() if packet}
    if out.startswith("."):
        return {f.name: f.read_text() for f in sorted((folder / "p").iterdir()) if f.suffix == out}
    if file.suffix != ".tar":
        return list(read_rows(file)) if file.exists() else []
    found = []
    for shard in sorted(folder.glob(out.replace("%02d", "*"))):
        with tarfile.open(shard) as tar:
            found += [(info.name, tar.extractfile(info).read()) for info in tar]
    return found


def remove_captions(folder: Path) -> None:
    for file in {*folder.glob("c*"), *folder.glob("p/.*"), *folder.glob("p/*.[tx]*")}:
        file.unlink()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.01)


@EVERY
@pytest.mark.parametrize("out", FORMS)
def test_a_run_that_dies_at_any_step_goes_on(nano, tmp_path, monkeypatch, out, every):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "p", 3)
    run(nano, "p", out)
    wanted, steps = contents(tmp_path, out), 0
    while True:
        remove_captions(tmp_path)
        steps += every
        if not dies(nano, steps, "p", out, shard_size=2):
            break
        run(nano, "p", out, shard_size=2)
        assert contents(tmp_path, out) == wanted, steps
    assert steps > 10


@EVERY
@pytest.mark.parametrize("out", [".txt", ".xmp", "xmp", "exif", "c.jsonl", "c.csv"])
def test_a_run_that_dies_appends_a_caption_once(nano, tmp_path, monkeypatch, out, every):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "p", 2)
    run(nano, "p", out, prompts=["Read the text."])
    old = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    run(nano, "p", out, existing="append")
    wanted, steps = contents(tmp_path, out), 0
    while True:
        remove_captions(tmp_path)
        for file, data in old.items():
            file.write_bytes(data)
        steps += every
        if not dies(nano, steps, "p", out, existing="append"):
            break
        run(nano, "p", out, existing="append")
        assert contents(tmp_path, out) == wanted, steps
    assert steps > 10


IMAGES, KILLS = 1000, 20


@pytest.mark.slow
@pytest.mark.parametrize("out", [*FORMS, "xmp"])
def test_twenty_kills_over_a_thousand_images(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "p", IMAGES)
    pixels = pixels_of(tmp_path / "p")
    shutil.copytree("p", "whole/p")
    monkeypatch.chdir("whole")
    assert finish("p", "--out", out).returncode == 0
    wanted, killed = contents(tmp_path / "whole", out), 0
    assert len(wanted) == IMAGES * (3 if "tar" in out else 1)
    monkeypatch.chdir(tmp_path)
    for pause in random.Random(out).choices(range(1200), k=KILLS):
        killed += kill_after(out, pause / 1000)
        check_what_is_there(contents(tmp_path, out), wanted)
    ended = finish("p", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert killed >= KILLS * 3 / 4
    assert contents(tmp_path, out) == wanted
    assert pixels_of(tmp_path / "p") == pixels


def pixels_of(folder: Path) -> list[bytes]:
    """What each image of a folder shows."""
    return [Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))]


def kill_after(out: str, seconds: float) -> bool:
    """Start a run, and kill it so long after it wrote first; whether it had not ended."""
    beside = f"p/.fastvlm-captions{'-' if out in KINDS else ''}{out}"
    log = Path(f"{beside if out in KINDS or out[0] == '.' else out}.manifest-wal")

    def written() -> int:
        return log.stat().st_mtime_ns if log.exists() else 0

    before = written()
    process = subprocess.Popen(
        command("p", "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: written() != before, process)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def check_what_is_there(found: object, wanted: object) -> None:
    """No image twice and no half line, whatever is missing."""
    if isinstance(found, dict):
        assert found.items() <= wanted.items()
        return
    found, wanted = ([repr(each) for each in rows] for rows in (found, wanted))
    assert len(set(found)) == len(found) and set(found) <= set(wanted)


# Several processes


def launched(count: int, *arguments: str | Path) -> list[str]:
    launch = [sys.executable, "-m", "mlx._distributed_utils.launch", "-n", str(count)]
    launcher = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
    return [sys.executable, "-c", launcher, *launch[3:], "--", *command(*arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("out", ["c.jsonl", "c.csv", "c.tar"])
def test_two_processes_write_the_file_of_one(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "p", 70)
    (tmp_path / "p" / "0033.png").write_bytes(b"junk")
    assert finish("p", "--out", f"one-{out}").returncode == 1
    found = subprocess.run(
        launched(2, "p", "--out", out), capture_output=True, text=True, timeout=300
    )
    assert "Captioned 69 images" in found.stdout + found.stderr, found
    assert (tmp_path / out).read_bytes() == (tmp_path / f"one-{out}").read_bytes()


@pytest.mark.slow
def test_the_work_of_a_process_that_died_is_done_by_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "p", 100)
    assert finish("p", "--out", "one.jsonl").returncode == 0
    dying = command("p", "--out", "two.jsonl")
    code = (
        "import os, runpy, sys, threading\n"
        "from fastvlm_mlx.caption import answers\n"
        "plain, calls = answers.Answering._answered, []\n"
        "def counting(*a):\n"
        "    calls.append(1)\n"
        "    if os.environ['MLX_RANK'] == '1' and len(calls) > 5: os._exit(0)\n"
        "    return plain(*a)\n"
        "answers.Answering._answered = counting\n"
        "sys.argv = ['fastvlm', *sys.argv[1:]]\n"
        "from fastvlm_mlx.cli.main import main\n"
        "main()\n"
    )
    (tmp_path / "dying.py").write_text(code)
    launch = launched(2, "p")[: -len(command("p"))]
    found = subprocess.run(
        [*launch, sys.executable, str(tmp_path / "dying.py"), *dying[3:]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Captioned 100 images" in found.stdout + found.stderr, found
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_second_run_for_the_same_output_is_refused(nano, tmp_path):
    folder, out = numbered(tmp_path / "p", 1), tmp_path / "c.jsonl"
    first = Share(tmp_path / "c.jsonl.manifest")
    with pytest.raises(OSError, match="Another process writes captions"):
        run(nano, folder, out)
    assert not out.exists()
    first.close()
    run(nano, folder, out)
    assert not list(tmp_path.glob("*lock*"))
