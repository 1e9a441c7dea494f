"""Count the GPU kernels that this library and mlx-vlm launch, for an image and for a token.

Both build their graphs as they would on Metal, and the graphs are counted, not computed: no GPU is
needed, and the dtype and the machine make no difference.

    python benchmarks/launches.py /tmp/fastvlm-0.5b --peer-python ~/mlx-vlm/bin/python
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from compare import Worker, random_prompt, write_folders
from machine import command_line, note, write_result
from tables import markdown_table
from worker import OURS, PEER

from fastvlm_mlx.bench import graph

STAGES = ("encode", "decode")


def count(folder: Path, pythons: dict[str, str], image_size: int | None) -> dict[str, Any]:
    """Primitives and launches of each side; `folder` is in the layout that both read."""
    config = json.loads((folder / "config.json").read_text())
    size = image_size or config["vision_config"]["image_size"]
    prompt = random_prompt(32, config["vocab_size"])
    counts, versions = {}, {}
    for side, python in pythons.items():
        note(f"counting {side}")
        worker = Worker(side, python, folder, "float32")
        counts[side] = worker.ask("launches", image_size=size, prompt=prompt, graph=graph.__file__)
        versions[side] = worker.ask("about")
        worker.close()
    model = {key: config[key] for key in ("hidden_size", "num_hidden_layers")}
    return {
        "kind": "launches",
        "model": model,
        "image_size": size,
        "versions": versions,
        "counts": counts,
    }


def ratio(result: dict[str, Any], stage: str) -> float:
    """Launches of this library over those of mlx-vlm."""
    ours, theirs = (result["counts"][side][stage]["launches"] for side in (OURS, PEER))
    return ours / theirs


def markdown(result: dict[str, Any]) -> str:
    """The launches, and the primitives by name, as tables."""
    sides = list(result["counts"])
    launches = [
        (
            {"encode": "one image", "decode": "one token"}[stage],
            *(str(result["counts"][side][stage]["launches"]) for side in sides),
            f"{ratio(result, stage):.2f}",
        )
        for stage in STAGES
    ]
    primitives: Counter[str] = Counter()
    columns = []
    for stage in STAGES:
        for side in sides:
            columns.append(result["counts"][side][stage]["primitives"])
            primitives.update(columns[-1])
    names = [f"{stage}, {side}" for stage in STAGES for side in sides]
    kinds = [
        (name, *(str(column.get(name, 0)) for column in columns))
        for name, _ in primitives.most_common()
    ]
    return (
        f"{markdown_table(('kernel launches', *sides, 'ratio'), launches)}\n\n"
        "<details><summary>Primitives by name</summary>\n\n"
        f"{markdown_table(('primitive', *names), kinds)}\n\n</details>"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="launches.py", description="Count the GPU kernels of an image and of a token."
    )
    parser.add_argument("model", type=Path, help="a FastVLM folder, in any layout that is known")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help=f"Python of an environment with {PEER}; default: the one that runs this",
    )
    parser.add_argument("--image-size", type=int, help="in pixels; default: the model's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    args = parser.parse_args()
    pythons = {OURS: sys.executable, PEER: args.peer_python}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_folders(args.model, Path(scratch), "float32", pythons)
            result = count(Path(scratch) / "mlx", pythons, args.image_size)
            result["model"]["name"] = args.model.resolve().name
    except (OSError, ValueError, RuntimeError) as error:
        print(f"launches.py: {error}", file=sys.stderr)
        return 2
    write_result(args.json, {"command": command_line(parser, args), **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
