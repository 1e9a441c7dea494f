"""Adapters that PEFT reads and writes must mean the same there and here.

    FASTVLM_TRANSFORMERS_PYTHON=~/torch/bin/python pytest -m interop tests/test_adapter_interop.py

That environment needs peft beside what `test_interop.py` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sources import full_nano
from test_interop import (
    TOKENS,
    TRANSFORMERS,
    Arrays,
    check,
    needs_transformers,
    random_inputs,
    run_ours,
    run_peer,
)
from training import trained

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.load import load_for_training
from fastvlm_mlx.checkpoint.read import read_adapted
from fastvlm_mlx.train.adapters import apply_adapter, write

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def same_tensors(found: dict[str, mx.array], theirs: Arrays) -> list[str]:
    """The names of tensors that were compared; all must be the same within 1e-6 of the largest."""
    ours = {name: np.array(t.astype(mx.float32)) for name, t in llava.from_mlx(found).items()}
    names = sorted(theirs.keys() & ours.keys())
    for name in names:
        scale = max(1.0, np.abs(theirs[name]).max())
        assert np.abs(ours[name] - theirs[name]).max() < 1e-6 * scale, name
    return names


@needs_transformers
@pytest.mark.parametrize(
    "modes",
    [
        {"decoder": "lora", "projector": "full"},
        {"decoder": "dora", "projector": "lora"},
        {"vision": "lora", "decoder": "lora"},
        {"vision": "dora"},
        {"decoder": "lora", "vision": "full", "projector": "full"},
    ],
    ids=str,
)
def test_peft_and_llava_read_what_we_write(
    small_folder: Path, tmp_path: Path, modes: dict[str, str]
) -> None:
    folder = write(trained(small_folder, **modes), tmp_path / "adapter", small_folder)
    theirs = run_peer(TRANSFORMERS, "peft-merge", small_folder, tmp_path, adapter=str(folder))
    _, weights, _ = read_adapted(small_folder, folder)
    assert len(same_tensors(weights, theirs)) > 100


SETTINGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {"up_proj": 3, "^model.layers.0.mlp.down_proj": 5},
    },
    {"r": 4, "lora_alpha": 16, "use_dora": True, "rank_pattern": {"o_proj": 3}},
    {"r": 4, "lora_alpha": 16, "modules_to_save": ["mm_projector"]},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["embed_tokens"]},
    {"r": 4, "target_modules": r".*\.[01]\.self_attn\.[qk]_proj", "use_dora": True},
]


@needs_transformers
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_peft_writes(small_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    given = json.dumps({"target_modules": targets} | settings)
    adapter = tmp_path / "adapter"
    theirs = run_peer(
        TRANSFORMERS, "peft-train", small_folder, tmp_path, adapter=str(adapter), settings=given
    )
    _, weights, _ = read_adapted(adapter)
    assert len(same_tensors(weights, theirs)) > 100
    # And on, through a model in training and our files
    model = load_for_training(small_folder, dtype="float32")
    model.freeze()
    apply_adapter(model, adapter, small_folder)
    if "modules_to_save" in settings:
        model.mm_projector.unfreeze()
    again = write(model, tmp_path / "again", small_folder)
    _, weights, _ = read_adapted(small_folder, again)
    assert len(same_tensors(weights, theirs)) > 100


@pytest.fixture
def of_transformers(tmp_path: Path) -> Path:
    """The bundled model in float, as transformers has it."""
    plain = full_nano(tmp_path / "nano")
    target = tmp_path / "base"
    return fv.convert(plain, target, layout="transformers", dtype="float32", progress=False)


@needs_transformers
@pytest.mark.parametrize(
    "modes", [{"decoder": "dora", "projector": "full"}, {"vision": "lora"}], ids=str
)
def test_peft_on_the_model_of_transformers(
    of_transformers: Path, tmp_path: Path, modes: dict[str, str]
) -> None:
    base = of_transformers
    folder = write(trained(base, **modes), tmp_path / "adapter", base)
    pixel_values, ids = random_inputs(256, 250)
    fused = fv.fuse(base, folder, tmp_path / "fused", progress=False).folder
    token = json.loads((base / "config.json").read_text())["image_token_index"]
    theirs = run_peer(
        TRANSFORMERS,
        "peft",
        base,
        tmp_path,
        adapter=str(folder),
        pixel_values=pixel_values,
        input_ids=[token if i < 0 else i for i in ids],
        tokens=TOKENS,
    )
    check(run_ours(fused, pixel_values, ids), theirs)


@needs_transformers
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},  # those of the encoder, too
        {"target_modules": r".*(mlp\.fc[12]|token_mixer\.proj|linear_1)", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "norm"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
    ids=str,
)
def test_what_peft_writes_for_the_model_of_transformers(
    of_transformers: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    pixel_values, ids = random_inputs(256, 250)
    token = json.loads((of_transformers / "config.json").read_text())["image_token_index"]
    adapter = tmp_path / "adapter"
    theirs = run_peer(
        TRANSFORMERS,
        "peft-train-transformers",
        of_transformers,
        tmp_path,
        adapter=str(adapter),
        settings=json.dumps({"r": 4, "lora_alpha": 8} | settings),
        pixel_values=pixel_values,
        input_ids=[token if i < 0 else i for i in ids],
        tokens=TOKENS,
    )
    check(run_ours(adapter, pixel_values, ids), theirs)
