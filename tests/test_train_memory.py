"""The memory that --check tells beforehand is what the run takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import PANDA, PENGUINS
from sources import full_nano

from fastvlm_mlx.train.log import read_log

WITHIN = 0.1
RUNS = {
    "LoRA with kept features": [],
    "another size": ["--image-size", "384"],
    "LoRA everywhere": ["--vision", "lora"],
    "checkpointed and accumulated": [
        *("--decoder", "full", "--gradient-checkpointing", "--accumulation", "2")
    ],
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if n == 0 else [pytest.mark.slow]) for n, c in enumerate(RUNS)],
)
def test_the_estimate_is_the_peak(case: str, tmp_path: Path) -> None:
    model, data, out = full_nano(tmp_path / "model"), tmp_path / "rows.json", tmp_path / "run"
    rows = [
        {
            "image": str((PANDA, PENGUINS)[n % 2]),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "It is an animal. " * 4},
            ],
        }
        for n in range(16)
    ]
    data.write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, "-m", "fastvlm_mlx", "train", "--model", str(model)]
    command += ["--data", str(data), "--out", str(out), "--batch-size", "8", "--no-compiled", "-q"]
    command += RUNS[case]
    surroundings = os.environ | {"FASTVLM_CACHE": str(tmp_path / "cache")}
    said = [
        subprocess.run([*command, *more], capture_output=True, text=True, env=surroundings)
        for more in (["--check"], [])
    ]
    assert [each.returncode for each in said] == [0, 0], said
    found = re.search(r"about ([\d.]+) (MB|GB) at most", said[0].stdout)
    assert found is not None
    estimate = float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]
    peak = max(line["memory"] for line in read_log(out / "log.jsonl"))
    assert abs(estimate / peak - 1) < WITHIN
