"""Fixtures that several test files share."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import fastvlm_mlx as fv


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


@pytest.fixture(scope="session")
def small(small_folder: Path) -> fv.FastVLM:
    """The model of `small_folder`."""
    return fv.load_model(small_folder)


@pytest.fixture(scope="session")
def nano() -> tuple[fv.FastVLM, fv.Processor]:
    """The bundled model and its processor."""
    return fv.load()
