"""Give the images of a web page that have no alt text one, and print the page.

python examples/alt_text.py page.html --model apple/FastVLM-0.5B > better.html
"""

import argparse
import re
from html import escape, unescape
from pathlib import Path

import fastvlm_mlx as fv

parser = argparse.ArgumentParser(description="Give images alt text.")
parser.add_argument("page", type=Path)
parser.add_argument("--prompt", default="Describe the image in one short sentence.")
parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
args = parser.parse_args()

page = args.page.read_text(encoding="utf-8")
without_alt = re.compile(r'<img\b(?![^>]*\salt=)[^>]*\ssrc="([^"]+)"')
sources = map(unescape, without_alt.findall(page))
images = [src if "://" in src else args.page.parent / src for src in sources]

model, processor = fv.load(args.model)
asked = [(args.prompt, image) for image in images]
texts = map(escape, fv.batch_generate(model, processor, asked, max_tokens=64))
print(without_alt.sub(lambda tag: f'<img alt="{next(texts)}"{tag[0][4:]}', page), end="")
