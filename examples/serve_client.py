"""Ask `fastvlm serve` about an image, with OpenAI's client.

fastvlm serve --model apple/FastVLM-0.5B
python examples/serve_client.py photo.jpg "What is this?"
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description="Ask a server about an image.")
parser.add_argument("image", type=Path)
parser.add_argument("question")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--key", default="none", help="the server's, if it has one")
args = parser.parse_args()

data = base64.b64encode(args.image.read_bytes()).decode()
content = [
    {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}},
    {"type": "text", "text": args.question},
]
client = OpenAI(base_url=args.url, api_key=args.key)
stream = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": content}], stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print(f"\n  (first token after {1000 * chunk.model_extra['timings']['first_token']:.0f} ms)")
