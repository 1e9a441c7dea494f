"""Describe every image of a folder; the same command goes on where it was interrupted.

python examples/caption_folder.py photos captions.jsonl --model apple/FastVLM-0.5B
"""

import argparse

import fastvlm_mlx as fv

parser = argparse.ArgumentParser(description="Describe every image of a folder.")
parser.add_argument("folder")
parser.add_argument("output", help=".jsonl, .csv, .parquet or .tar, or .txt for files beside them")
parser.add_argument("--prompt", default="Describe the image.")
parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
args = parser.parse_args()

model, processor = fv.load(args.model)
job = fv.CaptionJob(prompts=[args.prompt], existing="skip")
summary = fv.caption_images(
    model, processor, args.folder, args.output, job, max_tokens=128, progress=True
)
print(f"{summary.written} captioned, {summary.kept} had captions, {len(summary.failed)} failed")
