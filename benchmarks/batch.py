"""Measure answering many requests together against one after the other.

Both answer the same requests, in turns. Reading images and tokenizing are part of it, loading the
model is not. Answers end where the model ends them, which for the bundled model is after one
sentence; with --full-length each has --max-tokens.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import fastvlm_mlx as fv
from fastvlm_mlx.evaluate.questions import DEFAULT_QUESTION
from fastvlm_mlx.evaluate.samples import SAMPLES as IMAGES
from fastvlm_mlx.generation.batch import Request, stream_batch

from .tables import Result
from .turns import in_turns, seconds_of

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--dtype": {},
    "--rounds": {},
    "--image-size": {},
    "--quantize": {"type": int, "help": "bits"},
    "--requests": {"type": int, "default": 16, "help": "about the sample images"},
    "--max-tokens": {"type": int, "default": 64, "help": "of an answer"},
    "--full-length": {"action": "store_true", "help": "no answer ends before --max-tokens"},
    "--max-batch": {"type": int, "default": 16, "help": "answers that are decoded together"},
    "--encode-batch": {"type": int, "help": "images that are encoded together"},
}
ALONE, TOGETHER = "one by one", "together"
Tokens = list[list[int]]


def measure(args: argparse.Namespace) -> Result:
    """Seconds of both ways, and how many answers are the same."""
    model, processor = fv.load(args.model, dtype=args.dtype, quantize=args.quantize)
    if args.full_length:
        processor = without_ends(processor)
    images = [image for image, _ in zip(cycle(IMAGES), range(args.requests), strict=False)]
    requests: list[Request] = [(DEFAULT_QUESTION, image) for image in images]
    common = {"image_size": args.image_size, "max_tokens": args.max_tokens}
    sizes = {"max_batch": args.max_batch, "encode_batch": args.encode_batch}
    sides = {
        ALONE: partial(alone, model, processor, requests, common),
        TOGETHER: partial(together, model, processor, requests, {**common, **sizes}),
    }
    found = {name: run() for name, run in sides.items()}  # the warm-up, too
    timed = {name: partial(seconds_of, run) for name, run in sides.items()}
    seconds = in_turns(timed, args.rounds, "answering", warm_up=0)
    ratios = [a / b for a, b in zip(seconds[ALONE], seconds[TOGETHER], strict=True)]
    return {
        "kind": "batch",
        "model": args.model.name if args.model else "the bundled model",
        "requests": len(requests),
        "tokens": sum(map(len, found[TOGETHER])),
        "same answers": sum(a == b for a, b in zip(*found.values(), strict=True)),
        "seconds (median)": {name: median(times) for name, times in seconds.items()},
        "times faster (median)": median(ratios),
        "times faster (least and most)": (min(ratios), max(ratios)),
        "seconds": seconds,
    }


def without_ends(processor: fv.Processor) -> fv.Processor:
    """The processor, with no token that ends an answer."""
    tokenizer = copy.copy(processor.tokenizer)
    tokenizer.eos_token_ids = set()
    return replace(processor, tokenizer=tokenizer)


def alone(
    model: fv.FastVLM, processor: fv.Processor, requests: list[Any], options: dict[str, Any]
) -> Tokens:
    """The tokens of each answer, one request after the other."""
    return [
        [
            response.token
            for response in fv.stream_generate(model, processor, prompt, image=image, **options)
        ]
        for prompt, image in requests
    ]


def together(
    model: fv.FastVLM, processor: fv.Processor, requests: list[Request], options: dict[str, Any]
) -> Tokens:
    """The tokens of each answer, all requests at once."""
    tokens: Tokens = [[] for _ in requests]
    for i, response in stream_batch(model, processor, requests, **options):
        tokens[i].append(response.token)
    return tokens
