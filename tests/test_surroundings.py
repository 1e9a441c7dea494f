"""Tests and command do the same whatever a person has set for other programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.hub.resolve import NANO

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
HUB = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NOWHERE, "HF_HOME": "/dev/null/hub", "HF_TOKEN": "no"}
PROXIES = {"HTTP_PROXY": NOWHERE, "https_proxy": NOWHERE, "ALL_PROXY": "socks5://127.0.0.1:9"}
TERMINAL = {"TERM": "dumb", "COLUMNS": "20", "LINES": "3", "FORCE_COLOR": "1", "PAGER": "false"}
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
    "test_surroundings.py::test_a_name_that_the_terminal_can_not_show",
)


@pytest.mark.parametrize(
    "language, folder", [(ASCII, "two words"), (TURKISH, "zwei Wörter")], ids=["ascii", "turkish"]
)
def test_the_tests_pass_everywhere(language: dict[str, str], folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    surroundings = {"TMPDIR": str(tmp_path / folder), **HOSTILE, **language}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | surroundings,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(TESTS)} passed" in done.stdout


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
