"""What we convert must load in mlx-vlm, and both libraries must say the same.

mlx-vlm may live in an environment of its own, whose Python is named in FASTVLM_PEER_PYTHON:

    FASTVLM_PEER_PYTHON=~/mlx-vlm/bin/python pytest -m interop tests/test_interop.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastvlm_mlx.convert import convert

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEER_PYTHON = os.environ.get("FASTVLM_PEER_PYTHON", "")
TOKENS = 12

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PEER_PYTHON,
        reason="set FASTVLM_PEER_PYTHON to the Python of an environment with mlx-vlm",
    ),
]


def import_benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


compare = import_benchmark("compare")
random_checkpoint = import_benchmark("random_checkpoint")


@pytest.fixture
def make_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a small random checkpoint, with some fields of its config.json changed."""

    def make(**fields: Any) -> Path:
        # mlx-vlm knows the released encoder alone; the decoder may be tiny.
        monkeypatch.setitem(
            random_checkpoint.SIZES, "changed", random_checkpoint.SIZES["small"] | fields
        )
        return random_checkpoint.write_checkpoint(
            "changed", tmp_path / "checkpoint", dtype="float32"
        )

    return make


def compare_outputs(folder: Path, image_size: int = 128) -> dict[str, Any]:
    """How the answers of both libraries compare on a converted folder."""
    prompt = compare.random_prompt(16, 500)
    pythons = {compare.OURS: sys.executable, compare.PEER: PEER_PYTHON}
    workers = {
        side: compare.Worker(side, python, folder, "float32") for side, python in pythons.items()
    }
    with closing(workers[compare.OURS]), closing(workers[compare.PEER]):
        for worker in workers.values():
            worker.ask("load")
        return compare.compare_outputs(
            workers, {"image_size": image_size, "prompt": prompt, "max_tokens": TOKENS}
        )


def check(outputs: dict[str, Any]) -> None:
    assert outputs["features_difference"] < compare.FEATURES_TOLERANCE
    assert outputs["first_difference"] is None, outputs
    assert outputs["distinct_tokens"] > TOKENS // 2  # not the same token over and over


def test_says_the_same(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert(make_checkpoint(), tmp_path / "converted", progress=False)
    check(compare_outputs(folder, image_size=256))


def test_says_the_same_with_an_untied_head(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=False)
    check(compare_outputs(convert(checkpoint, tmp_path / "converted", progress=False)))


@pytest.mark.parametrize(
    "quantize", [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}], ids=str
)
def test_says_the_same_quantized(
    make_checkpoint: Callable[..., Path], tmp_path: Path, quantize: dict[str, int]
) -> None:
    # 160 columns are no multiple of 64: a layer that stays as it was must load as well.
    checkpoint = make_checkpoint(intermediate_size=160)
    folder = convert(checkpoint, tmp_path / "converted", quantize=quantize, progress=False)
    check(compare_outputs(folder))
