"""A FastVLM folder in any layout → a folder for PyTorch.

    python convert/to_pytorch.py my-finetune my-finetune-llava
    python convert/to_pytorch.py my-finetune my-finetune-hf --layout transformers

`llava` is what the original code loads (`load_pretrained_model` of its `llava` package), and
`transformers` what `FastVlmForConditionalGeneration.from_pretrained` loads. In both, convolutions
are channels first, weights are in full precision, and the encoder is in inference form: branches
that were merged stay merged, and layer scales and BatchNorms are there.

A quantized folder can't be converted back: convert the folder that it was made from.
"""

import argparse

import fastvlm_mlx as fv
from fastvlm_mlx.cli.printing import errors_as_sentences

parser = argparse.ArgumentParser(description="A FastVLM folder → a folder for PyTorch.")
parser.add_argument("source", help="folder or Hub id, in any layout, not quantized")
parser.add_argument("target", help="the folder to write")
parser.add_argument("--layout", choices=("llava", "transformers"), default="llava")
parser.add_argument("--dtype", help="float32, float16 or bfloat16; the checkpoint's own by default")
parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
args = parser.parse_args()

with errors_as_sentences():
    folder = fv.convert(
        args.source,
        args.target,
        dtype=args.dtype,
        layout=args.layout,
        overwrite=args.overwrite,
    )
    print(f"Wrote {folder}.")
