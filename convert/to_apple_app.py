"""A FastVLM folder in any layout → the folder that Apple's demo app for iOS and macOS loads.

    python convert/to_apple_app.py apple/FastVLM-1.5B fastvlm-1.5b-app --quantize 8

The app runs the vision encoder with Core ML and the rest with MLX, so the folder holds the encoder
as `fastvithd.mlpackage` and the projector and the decoder as safetensors, in float16 or quantized.
Put its files in `app/FastVLM/model` of the app's sources. Of the released folders the 0.5B model is
in float16, the 1.5B model in 8 bits and the 7B model in 4 bits.

Writing the package needs coremltools: pip install 'fastvlm-mlx[coreml]'.
"""

import argparse

import fastvlm_mlx as fv
from fastvlm_mlx.cli.printing import errors_as_sentences

parser = argparse.ArgumentParser(description="A FastVLM folder → a folder for Apple's demo app.")
parser.add_argument("source", help="folder or Hub id, in any layout, not quantized")
parser.add_argument("target", help="the folder to write")
parser.add_argument("--quantize", type=int, help="bits per weight; float16 by default")
parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
args = parser.parse_args()

with errors_as_sentences():
    folder = fv.convert(
        args.source,
        args.target,
        quantize=args.quantize,
        layout="apple-export",
        overwrite=args.overwrite,
    )
    print(f"Wrote {folder}. Copy its files to app/FastVLM/model of the app's sources.")
