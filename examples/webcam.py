"""Say what the webcam sees, again and again, until Ctrl-C. Needs opencv-python.

python examples/webcam.py --model apple/FastVLM-0.5B --prompt "What is the person holding?"
"""

import argparse
import sys

import fastvlm_mlx as fv

parser = argparse.ArgumentParser(description="Say what the webcam sees.")
parser.add_argument("--model", default="apple/FastVLM-0.5B", help="folder or Hub id")
parser.add_argument("--prompt", default="Describe the image in one short sentence.")
parser.add_argument("--camera", type=int, default=0)
parser.add_argument("--image-size", type=int, default=512, help="smaller is faster")
parser.add_argument("--max-tokens", type=int, default=32)
args = parser.parse_args()

try:
    import cv2
except ImportError:
    sys.exit("Reading the webcam needs OpenCV: pip install opencv-python")

camera = cv2.VideoCapture(args.camera)
if not camera.isOpened():
    sys.exit(f"Camera {args.camera} can't be opened.")
model, processor = fv.load(args.model)
try:
    while True:
        seen, frame = camera.read()
        if not seen:
            sys.exit(f"Camera {args.camera} gives no more frames.")
        responses = fv.stream_generate(
            model,
            processor,
            args.prompt,
            image=frame[..., ::-1],  # OpenCV's channels are blue, green, red
            image_size=args.image_size,
            max_tokens=args.max_tokens,
        )
        for response in responses:
            print(response.text, end="", flush=True)
        print(f"  ({1000 * response.ttft:.0f} ms)")
except KeyboardInterrupt:
    pass
finally:
    camera.release()
