"""Count the GPU kernels that this library and mlx-vlm launch, for an image and for a token, and the
bytes that this library moves for an image.

Both build their graphs as they would on Metal, and the graphs are counted, not computed: no GPU is
needed, and the dtype and the machine make no difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.bench import graph
from fastvlm_mlx.bench.traffic import bytes_moved
from fastvlm_mlx.bench.work import stage_needs

from .peers import Worker, pythons_of, random_prompt, write_folders
from .tables import Result
from .turns import note

OPTIONS: dict[str, dict[str, Any]] = {"model": {}, "--peer-python": {}, "--image-size": {}}


def measure(args: argparse.Namespace) -> Result:
    """Primitives and launches of each side."""
    pythons = pythons_of(args)
    counts, versions = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        write_folders(args.model, Path(scratch), "float32", pythons)
        folder = Path(scratch) / "mlx"
        config = json.loads((folder / "config.json").read_text())
        size = args.image_size or config["vision_config"]["image_size"]
        prompt = random_prompt(32, config["vocab_size"])
        for side, python in pythons.items():
            note(f"counting {side}")
            worker = Worker(side, python, folder, "float32")
            counts[side] = worker.ask(
                "launches", image_size=size, prompt=prompt, graph=graph.__file__
            )
            versions[side] = worker.ask("about")
            worker.close()
        note("counting bytes")
        traffic = image_traffic(folder, size)
    model = {key: config[key] for key in ("hidden_size", "num_hidden_layers")}
    return {
        "kind": "launches",
        "model": {"name": args.model.resolve().name, **model},
        "image_size": size,
        "versions": versions,
        "counts": counts,
        "bytes": traffic,
    }


def image_traffic(folder: Path, image_size: int) -> dict[str, int]:
    """Bytes that encoding an image moves in float16, and the least that it needs."""
    with graph.as_on_gpu():
        model = fv.load_model(folder, dtype="float16")
    image = mx.zeros((1, image_size, image_size, 3), mx.uint8)
    mx.eval(model.parameters(), image)
    floor = stage_needs(model, (1, image_size), (image_size, image_size), 1, 1)["encode"].bytes
    return {"moved": bytes_moved(model.encode_image, image), "floor": floor}
