"""Say what the webcam sees, again and again, until Ctrl-C.

python examples/webcam.py "What is the person holding?" --model apple/FastVLM-0.5B
"""

import argparse
import sys

import fastvlm_mlx as fv

parser = argparse.ArgumentParser(description="Say what the webcam sees.")
parser.add_argument("prompt", nargs="?", default="Describe the image in one short sentence.")
parser.add_argument("--model", default="apple/FastVLM-0.5B", help="folder or Hub id")
parser.add_argument("--source", default="0", help="camera number, rtsp:// URL, file or folder")
parser.add_argument("--image-size", type=int, default=512, help="smaller is faster")
args = parser.parse_args()

source = int(args.source) if args.source.isdecimal() else args.source
try:
    options = {"model": args.model, "image_size": args.image_size, "max_tokens": 32}
    for answer in fv.watch(source, args.prompt, **options):
        print(f"{answer.text}  ({1000 * answer.ttft:.0f} ms)", flush=True)
except (ValueError, OSError, ImportError) as error:
    sys.exit(f"Error: {error}")
except KeyboardInterrupt:
    pass
