"""Describe every image of a folder, one JSON line per image, and resume an earlier run.

python examples/caption_folder.py photos captions.jsonl --model apple/FastVLM-0.5B
"""

import argparse
import json
import os
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

import fastvlm_mlx as fv
from fastvlm_mlx.image.load import image_files


def captioned(output: BinaryIO) -> set[str]:
    """The images that have whole lines; half a line, of a run that was killed, is taken away."""
    lines = output.read().splitlines(keepends=True)
    done = {image for line in lines if (image := image_of(line)) is not None}
    if lines and not lines[-1].endswith(b"\n"):
        if image_of(lines[-1]) is None:
            output.truncate(output.tell() - len(lines[-1]))
        else:  # only the end of the line is missing
            output.write(b"\n")
    return done


def image_of(line: bytes) -> str | None:
    """The image that a line is about; None if the line is not whole."""
    try:
        return json.loads(line)["image"]
    except (ValueError, KeyError, TypeError):
        return None


parser = argparse.ArgumentParser(description="Describe every image of a folder.")
parser.add_argument("folder", type=Path)
parser.add_argument("output", type=Path, help="a .jsonl file; new lines are appended")
parser.add_argument("--prompt", default="Describe the image.")
parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--image-size", type=int, help="a multiple of 64; smaller is faster")
args = parser.parse_args()

images = image_files(args.folder, recursive=True)
# Unbuffered, so that each line is appended whole in one step
with args.output.open("a+b", buffering=0) as output:
    output.seek(0)
    done = captioned(output)
    waiting = [image for image in images if str(image) not in done]
    model, processor = fv.load(args.model)
    options = {"image_size": args.image_size, "max_tokens": args.max_tokens}
    for image in tqdm(waiting, unit="image"):
        try:
            caption = fv.generate(model, processor, args.prompt, image=image, **options)
        except (ValueError, OSError) as error:
            tqdm.write(f"Left out: {error}")
            continue
        output.write(json.dumps({"image": str(image), "caption": caption}).encode() + b"\n")
        os.fsync(output.fileno())
