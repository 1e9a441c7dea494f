"""Answer one question about one image, with the flags of the original predict.py.

    python examples/predict.py --model-path apple/FastVLM-0.5B --image-file photo.jpg \\
        --prompt "Describe the image."

Without --model-path, the bundled nano model answers.
"""

import argparse
import sys

import fastvlm_mlx as fv


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer one question about one image.")
    parser.add_argument("--model-path", help="folder or Hub id; the bundled model by default")
    parser.add_argument("--image-file", required=True, help="path or URL of an image")
    parser.add_argument("--prompt", default="Describe the image.", help="the question")
    parser.add_argument("--conv-mode", default="qwen_2", help="conversation template")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens whose probabilities add up to this",
    )
    parser.add_argument(
        "--num_beams", type=int, default=1, help="above 1, search with beams and do not sample"
    )
    return parser.parse_args()


def predict(args: argparse.Namespace) -> str:
    model, processor = fv.load(args.model_path)
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    return fv.generate(
        model,
        processor,
        args.prompt,
        image=args.image_file,
        conv_mode=args.conv_mode,
        num_beams=args.num_beams,
        **(sampling if args.num_beams == 1 else {}),
    )


if __name__ == "__main__":
    try:
        print(predict(parse_args()).strip())
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
