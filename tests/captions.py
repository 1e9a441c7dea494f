"""Small images, and the quickest way to caption them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.caption.job import CaptionJob
from fastvlm_mlx.caption.run import Summary, caption_images

QUICK = {"image_size": 64, "max_tokens": 6}
FLAGS = ("--image-size", "64", "--max-tokens", "6", "--dtype", "float32")
Loaded = tuple[fv.FastVLM, fv.Processor]


def picture(seed: int, side: int = 16) -> Image.Image:
    """A picture like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures(folder: Path, *names: str, first: int = 0) -> Path:
    """A folder of different pictures."""
    folder.mkdir(exist_ok=True, parents=True)
    for seed, name in enumerate(names, first):
        picture(seed).save(folder / name)
    return folder


def numbered(folder: Path, count: int) -> Path:
    """A folder of so many different pictures."""
    return pictures(folder, *(f"{i:04d}.png" for i in range(count)))


def run(nano: Loaded, source: Any, out: Path | str, **settings: Any) -> Summary:
    """`caption_images`, quickly; settings of `CaptionJob` and others together."""
    own = {
        name: settings.pop(name)
        for name in list(settings)
        if name in CaptionJob.__dataclass_fields__
    }
    return caption_images(*nano, source, out, CaptionJob(**own), **(QUICK | settings))


def alone(nano: Loaded, prompt: str, image: Path, **options: Any) -> str:
    """What `generate` says, as captions have it."""
    return fv.generate(*nano, prompt, image=image, **(QUICK | options)).strip()


def command(*arguments: str | Path) -> list[str]:
    """`fastvlm caption` in a process of its own."""
    return [sys.executable, "-m", "fastvlm_mlx", "caption", *map(str, arguments), *FLAGS]


def finish(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900)
