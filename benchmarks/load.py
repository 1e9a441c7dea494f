"""Measure loading a folder, this library beside mlx-vlm: each time in a fresh process, in turns.

    python benchmarks/random_checkpoint.py 0.5b /tmp/fastvlm-0.5b --dtype bfloat16
    fastvlm convert /tmp/fastvlm-0.5b /tmp/fastvlm-0.5b-mlx
    python benchmarks/load.py /tmp/fastvlm-0.5b-mlx --peer-python ~/mlx-vlm/bin/python

The weights keep the folder's dtype. Files come from the page cache: the first round fills it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import write_result
from worker import OURS, PEER

LOAD = {
    OURS: "from fastvlm_mlx import load_model; model = load_model(folder, dtype=dtype)",
    PEER: "from mlx_vlm.utils import load_model; model = load_model(folder)",
}
SCRIPT = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import mlx.core as mx
from worker import peak_resident_bytes
folder, dtype = Path({folder!r}), {dtype!r}
{before}
start = time.perf_counter()
{call}
seconds = time.perf_counter() - start
print(json.dumps([seconds, mx.get_peak_memory() / 1e9, peak_resident_bytes() / 1e9]))
"""


def load_once(side: str, python: str, folder: Path, dtype: str) -> list[float]:
    """Seconds, and the peaks of arrays and of the process in GB."""
    before, call = LOAD[side].split("; ")
    script = SCRIPT.format(
        here=str(Path(__file__).parent), folder=str(folder), dtype=dtype, before=before, call=call
    )
    printed = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    found: list[float] = json.loads(printed.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder in the MLX layout")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    dtype = json.loads((args.folder / "config.json").read_text())["torch_dtype"]
    samples: dict[str, list[list[float]]] = {OURS: [], PEER: []}
    order = [(OURS, sys.executable), (PEER, args.peer_python)]
    for i in range(args.rounds + 1):
        for side, python in order:
            found = load_once(side, python, args.folder, dtype)
            if i:
                samples[side].append(found)
        order.reverse()
    rows: list[dict[str, Any]] = [
        {
            "library": side,
            "seconds": statistics.median(row[0] for row in runs),
            "least": min(row[0] for row in runs),
            "most": max(row[0] for row in runs),
            "arrays, GB": statistics.median(row[1] for row in runs),
            "process, GB": statistics.median(row[2] for row in runs),
        }
        for side, runs in samples.items()
    ]
    ratio = statistics.median(a[0] / b[0] for a, b in zip(*samples.values(), strict=True))
    for row in rows:
        print(row)
    print(f"{OURS} takes {ratio:.2f} times the time of {PEER} (median of {args.rounds} pairs)")
    if args.json:
        title = f"Loading {args.folder.name}: {ratio:.2f} times the time of {PEER}"
        result = {"kind": "table", "title": title, "results": rows}
        write_result(args.json, result)


if __name__ == "__main__":
    main()
