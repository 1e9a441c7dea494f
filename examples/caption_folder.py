"""Describe every image of a folder, one JSON line per image, and resume an earlier run.

python examples/caption_folder.py photos captions.jsonl --model apple/FastVLM-0.5B
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import fastvlm_mlx as fv
from fastvlm_mlx.image.load import image_files

parser = argparse.ArgumentParser(description="Describe every image of a folder.")
parser.add_argument("folder", type=Path)
parser.add_argument("output", type=Path, help="a .jsonl file; new lines are appended")
parser.add_argument("--prompt", default="Describe the image.")
parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--image-size", type=int, help="a multiple of 64; smaller is faster")
args = parser.parse_args()

images = image_files(args.folder, recursive=True)
lines = args.output.read_text("utf-8").splitlines() if args.output.exists() else []
done = {json.loads(line)["image"] for line in lines}
waiting = [image for image in images if str(image) not in done]
model, processor = fv.load(args.model)
options = {"image_size": args.image_size, "max_tokens": args.max_tokens}
with args.output.open("a", encoding="utf-8") as output:
    for image in tqdm(waiting, unit="image"):
        try:
            caption = fv.generate(model, processor, args.prompt, image=image, **options)
        except (ValueError, OSError) as error:
            tqdm.write(f"Left out: {error}")
            continue
        output.write(json.dumps({"image": str(image), "caption": caption}) + "\n")
        output.flush()
