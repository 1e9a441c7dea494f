"""Fixtures that several test files share."""

import contextlib
import locale
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import command
import hub_server
import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.hub import registry
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.image import preprocess, resize

if TYPE_CHECKING:
    from serving import Puppet, Served

# What a person has set for other programs: the Hub, proxies, certificates, the terminal, Python.
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "MLX_", "SSL_CERT_", "PYTHONIOENCODING")
FOREIGN += ("FASTVLM_MODEL", "FASTVLM_API_KEY", "COLUMNS", "LINES")
FOREIGN += ("PYTHONWARNINGS", "PYTHONOPTIMIZE")
# Each makes typer or rich write colours where there is no terminal, or none where there is one.
FOREIGN += ("FORCE_COLOR", "NO_COLOR", "CLICOLOR", "PY_COLORS", "TTY_", "GITHUB_ACTIONS")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--assume",
        choices=("cpu", "metal", "cuda"),
        help="Build all graphs as for this device; the CPU computes them.",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Give the tests, and the processes that they start, the same surroundings everywhere.

    This comes before any test file is imported, and with it huggingface_hub, which reads its
    settings only then. What tests need beyond it they set themselves.
    """
    compute_exactly(session.config)
    for name in os.environ.copy():
        if name.upper().startswith(FOREIGN) or name.upper().endswith("_PROXY"):
            del os.environ[name]
    caches = tempfile.TemporaryDirectory()
    session.config.add_cleanup(caches.cleanup)
    os.environ |= {"HF_HOME": caches.name, "FASTVLM_CACHE": caches.name}
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}  # nor one from the system's settings
    os.environ |= {"PYTHONUTF8": "1"}
    os.environ |= {"MLX_ENABLE_TF32": "0"}  # read at the first product
    for name in ("C.UTF-8", "en_US.UTF-8"):  # what files and pipes have by default in this process
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            break


def compute_exactly(config: pytest.Config) -> None:
    """Compute on the CPU, whose float32 is exact, whatever else the machine has.

    Processes that tests start compute on the device that they find, as a person's do: what is asked
    of them is text, which no rounding changes. Tests marked `gpu` choose the GPU themselves.
    """
    mx.set_default_device(mx.cpu)
    if (device := config.getoption("--assume")) is not None:
        assumed = ExitStack()
        assumed.enter_context(ops.assume(device))
        config.add_cleanup(assumed.close)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU or a library that is not there."""
    if item.get_closest_marker("gpu") and not mx.is_available(mx.gpu):
        pytest.skip("needs a GPU")
    for mark in item.iter_markers("needs"):
        if find_spec(mark.args[0]) is None:
            pytest.skip(f"needs {mark.args[0]}")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the files that tests read."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def small_folder(data: Path) -> Path:
    """A small random model in the original PyTorch layout: float32, no tokenizer."""
    return data / "random-small" / "llava"


@pytest.fixture(scope="session")
def training_folder(data: Path, small_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same model in training form; only what differs is stored."""
    folder = tmp_path_factory.mktemp("training")
    branches = mx.load(str(data / "random-small" / "branches.safetensors"))
    inference = mx.load(str(small_folder / "model.safetensors"))
    merged = (".reparam_conv.", ".lkb_reparam.")
    kept = {k: v for k, v in inference.items() if not any(part in k for part in merged)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept | branches)
    shutil.copyfile(small_folder / "config.json", folder / "config.json")
    return folder


@pytest.fixture
def small_copy(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of `small_folder`, to be spoiled."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


@pytest.fixture
def small_tensors(small_folder: Path) -> dict[str, mx.array]:
    """The tensors of `small_folder` as its file has them."""
    return mx.load(str(small_folder / "model.safetensors"))


@pytest.fixture(scope="session")
def small(small_folder: Path) -> fv.FastVLM:
    """The model of `small_folder`, in float32."""
    return fv.load_model(small_folder, dtype="float32")


@pytest.fixture(scope="session")
def nano() -> tuple[fv.FastVLM, fv.Processor]:
    """The bundled model in float32, and its processor."""
    return fv.load(dtype="float32")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A Hub on this machine in the place of the real one; it has the bundled model."""
    with hub_server.serve() as server:
        files = {p.name: p.read_bytes() for p in NANO.iterdir() if p.is_file()}
        server.files[hub_server.REPO] = files
        hub_server.use(server, tmp_path / "home", monkeypatch)
        monkeypatch.setattr(registry, "CDN", server.cdn)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two megabytes in every file."""
    hub_server.fill_disk(monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> command.Run:
    """The command in this process."""
    return command.runner(monkeypatch, capfd)


@pytest.fixture
def assume() -> Iterator[Callable[[str], None]]:
    """Lets the rest of a test build its graphs as for a device: "cpu", "metal" or "cuda"."""
    with ExitStack() as stack:
        yield lambda device: stack.enter_context(ops.assume(device))


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with many cores, for images of any size."""
    monkeypatch.setattr(preprocess.os, "cpu_count", lambda: 5)
    monkeypatch.setattr(resize, "PIXELS_FOR_THREADS", 0)


@pytest.fixture(scope="module")
def served(nano: tuple[fv.FastVLM, fv.Processor]) -> Iterator["Served"]:
    """A server that answers with nano."""
    from serving import serving, started

    with started(nano) as engine, serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def played(nano: tuple[fv.FastVLM, fv.Processor]) -> Iterator["Served"]:
    """A server whose engine is a puppet, which `puppet` gives something to say."""
    from serving import Puppet, serving

    with serving(Puppet(*nano), keep_alive=0.1) as server:
        yield server


@pytest.fixture
def puppet(played: "Served") -> "Puppet":
    """The engine of `played`, which says one sentence in three pieces."""
    from serving import says

    played.engine.begin(says("Six", " penguins", "."))
    return played.engine
