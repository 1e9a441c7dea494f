"""A PyTorch checkpoint of FastVLM → an MLX folder, which mlx-vlm and mlx-swift read as well.

    python convert/from_pytorch.py apple/FastVLM-0.5B fastvlm-0.5b
    python convert/from_pytorch.py checkpoints/my-finetune my-finetune-4bit --quantize 4

The source is a folder or a Hub id. The names of its tensors tell its layout: that of the original
code (LLaVA), in training or in inference form; that of transformers; or a folder of LLaVA training
that holds only adapters or a projector and names its base model. On the way

- tensors get the names of the MLX layout, and convolutions become channels last,
- the parallel branches of the training form become one convolution each,
- adapters are added to the weights of their base model,
- layers are quantized, if you ask for it,

and config.json, tokenizer, image settings and a model card are written beside the weights. Details
are in the README.md of this folder; `fastvlm convert --help` lists more flags.
"""

import argparse

import fastvlm_mlx as fv
from fastvlm_mlx.cli.printing import errors_as_sentences

parser = argparse.ArgumentParser(description="A PyTorch checkpoint → an MLX folder.")
parser.add_argument("source", help="folder or Hub id")
parser.add_argument("target", help="the folder to write")
parser.add_argument("--dtype", help="float32, float16 or bfloat16; the checkpoint's own by default")
parser.add_argument("--quantize", help="bits per weight, or a preset such as mixed-4-6 or mxfp4")
parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
args = parser.parse_args()

with errors_as_sentences():
    folder = fv.convert(
        args.source,
        args.target,
        dtype=args.dtype,
        quantize=args.quantize,
        overwrite=args.overwrite,
    )
    print(f"Wrote {folder}. Try: fastvlm generate --model {folder} --image photo.jpg")
