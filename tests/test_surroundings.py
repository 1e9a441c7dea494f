"""Tests and command do the same whatever a person has set for other programs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastvlm_mlx.hub.resolve import NANO

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
HUB = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NOWHERE, "HF_HOME": "/dev/null/hub", "HF_TOKEN": "no"}
PROXIES = {"HTTP_PROXY": NOWHERE, "https_proxy": NOWHERE, "ALL_PROXY": "socks5://127.0.0.1:9"}
TERMINAL = {"COLUMNS": "20", "LINES": "3", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "1", "PAGER": "-"}
HOSTILE = HUB | PROXIES | TERMINAL
HOSTILE |= {"NO_PROXY": "", "FASTVLM_CACHE": "/dev/null/cache", "HOME": "/dev/null/home"}
HOSTILE |= {"SSL_CERT_FILE": "/dev/null/certificates", "TZ": "America/St_Johns"}
HOSTILE |= {"PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
TURKISH = {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONUTF8": "1"}

# Nothing here computes: MLX keeps the CPU kernels that it compiles in TMPDIR.
TESTS = (
    "test_download.py::test_a_folder_instead_of_the_cache",
    "test_upload.py::test_a_folder_comes_back_as_it_was",
    "test_prompt.py::test_settings_are_optional",
    "test_cli.py::test_help_names_and_explains_every_option",
    "test_surroundings.py::test_a_name_that_the_terminal_can_not_show",
)


@pytest.mark.parametrize(
    "language, folder", [(ASCII, "two words"), (TURKISH, "zwei Wörter")], ids=["ascii", "turkish"]
)
def test_the_tests_pass_everywhere(language: dict[str, str], folder: str) -> None:
    # Not in `tmp_path`: it may hold letters that an ASCII process can't hand to MLX.
    prefix = os.fsdecode(folder.encode())
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp") as temporary:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=Path(__file__).parent,
            env=os.environ | HOSTILE | language | {"TMPDIR": temporary},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " skipped" not in done.stdout


def test_a_name_that_the_terminal_can_not_show(tmp_path: Path) -> None:
    """It is escaped, as Python does on stderr."""
    target = tmp_path / os.fsdecode("été 日本".encode())
    command = [sys.executable, "-c", "from fastvlm_mlx.cli.main import main; main()", "convert"]
    done = subprocess.run(
        [*command, NANO, target],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "été \\u65e5\\u672c".encode("latin-1") in done.stdout
    assert (target / "model.safetensors").is_file()
