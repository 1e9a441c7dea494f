"""A FastVLM folder → a repository on the Hugging Face Hub, with its model card.

    hf auth login
    python convert/push_to_hub.py fastvlm-0.5b-4bit user/FastVLM-0.5B-4bit --private

The card is the folder's README.md; every conversion writes one that says where the weights come
from, how each part is quantized, how to load them, and under which licence they are. Edit it as you
like before you push. A folder that does not load is refused before anything is sent; what it leaves
unsaid about its licence comes as a note. An interrupted upload goes on when you run this again.
"""

import argparse

from fastvlm_mlx.checkpoint.upload import upload
from fastvlm_mlx.cli.printing import errors_as_sentences, warnings_as_notes

parser = argparse.ArgumentParser(description="A FastVLM folder → a repository on the Hub.")
parser.add_argument("folder", help="a folder that loads, such as the other scripts write")
parser.add_argument("repo", help="the repository to push to: user/name; made if there is none")
parser.add_argument("--private", action="store_true", help="make a new repository private")
parser.add_argument("--message", default="Upload a FastVLM model", help="of the commit")
args = parser.parse_args()

with errors_as_sentences(), warnings_as_notes():
    print(upload(args.folder, args.repo, private=args.private, message=args.message))
