"""Ask several questions about one image; the image is encoded once.

python examples/chat.py photo.jpg "What is this?" "What colour is it?" --model apple/FastVLM-0.5B
"""

import argparse

import fastvlm_mlx as fv

parser = argparse.ArgumentParser(description="Ask several questions about one image.")
parser.add_argument("image", help="path or URL")
parser.add_argument("questions", nargs="+")
parser.add_argument("--model", help="folder or Hub id; the bundled model by default")
parser.add_argument("--image-size", type=int, help="a multiple of 64; smaller is faster")
args = parser.parse_args()

model, processor = fv.load(args.model)
chat = fv.Chat(model, processor, image_size=args.image_size)
image = args.image
for question in args.questions:
    print(f"> {question}")
    for response in chat.ask(question, image=image, stream=True):
        print(response.text, end="", flush=True)
    print(f"\n  (first token after {1000 * response.ttft:.0f} ms)")
    image = None  # from now on the conversation knows it
