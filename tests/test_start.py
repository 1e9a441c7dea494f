"""A Ctrl-C while the command is being imported, which takes the first third of a second."""

import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT

import pytest

ROOT = Path(__file__).parent.parent
# Python imports this before anything else; whoever runs the tests in the background ignores SIGINT.
CUSTOMIZE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == os.environ["WHEN"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
"""
SCRIPT = "print('begun', flush=True)\nfrom fastvlm_mlx.cli.main import main\nmain()\n"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A script as pip makes one, which Python runs with the hook."""
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE)
    script = tmp_path / "fastvlm"
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


def begin(command: list[str], folder: Path, when: str = "") -> "subprocess.Popen[str]":
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "WHEN": when}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment
    )


@pytest.mark.parametrize(
    "when",
    [
        *("mlx.core", "fastvlm_mlx.config", "fastvlm_mlx.model.vision", "fastvlm_mlx.live.watch"),
        *("fastvlm_mlx.cli", "typer", "fastvlm_mlx.cli.watch"),
    ],
)
def test_the_command_ends_quietly_wherever_it_is(
    when: str, command: list[str], tmp_path: Path
) -> None:
    for way in (command, [sys.executable, "-m", "fastvlm_mlx"]):
        process = begin([*way, "--version"], tmp_path, when)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, ""), way
        assert "fastvlm-mlx" not in out


def test_it_ends_quietly_after_any_time(command: list[str], tmp_path: Path) -> None:
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45):
        process = begin([*command, "generate", "--max-tokens", "9"], tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(delay)
        process.send_signal(SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, 0), delay  # 0 where the answer was already there
        assert "Traceback" not in err and "KeyboardInterrupt" not in err, delay


def test_a_program_that_imports_the_library_is_interrupted_as_ever(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE)
    program = tmp_path / "fastvlm.py"
    program.write_text("try:\n    import fastvlm_mlx\nexcept KeyboardInterrupt:\n    print('mine')")
    process = begin([sys.executable, str(program)], tmp_path, "fastvlm_mlx.model.fastvlm")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "mine\n")
