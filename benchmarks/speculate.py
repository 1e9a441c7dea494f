"""Measure speculative decoding: tokens per second plain, with prompt look-up, with a draft model.

All take turns on the same prompt and are greedy, so all must give the same tokens: "same tokens"
says how many are. The model is not stopped where its answer ends: past it, small models repeat
themselves, which is the best case for look-up. Only what comes after the first token is timed; it
includes the draft model's encoding of the image and its prefill.

How often drafts are right depends on model and text, and random weights say nothing about it. What
they can show is the speed that drafts of a given quality would bring: `--agreement` drafts the
model's own answer, with a share of the tokens made wrong, at no cost of drafting. A folder without
a tokenizer, as `checkpoint` writes it, can be measured only in this way.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.drafters import Drafter
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.generation.speculate import make_drafter, speculate_tokens
from fastvlm_mlx.hub.resolve import NANO

from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--dtype": {},
    "--rounds": {},
    "--quantize": {"type": int, "help": "bits per weight of the model, not of the draft model"},
    "--draft-model": {"type": Path, "help": "a smaller model with the same vocabulary"},
    "--num-draft-tokens": {"type": int, "default": 3, "help": "of a draft model at a time"},
    "--prompt-lookup": {"type": int, "default": 10, "help": "most tokens of look-up at a time"},
    "--agreement": {
        "nargs": "+",
        "type": float,
        "default": [],
        "help": "shares of right drafts, 0 to 1",
    },
    "--image": {"type": Path, "default": NANO / "images" / "panda.png"},
    "--prompt": {"default": "What is this? What is this? What is this?"},
    "--max-tokens": {"type": int, "default": 128, "help": "of the answer, at least 2"},
}
VISUAL_TOKENS, TEXT_TOKENS = 256, 40  # of a random prompt, where there is no tokenizer
MakeDrafter = Callable[[], Drafter | None]


class Agreeing(Drafter):
    """Proposes a known answer, in which a share of the tokens is made wrong.

    Args:
        answer: what the model says.
        agreement: probability that a token is right, from 0 to 1.
        num_draft_tokens: tokens to propose.
        vocab_size: of the model.
    """

    def __init__(
        self, answer: Sequence[int], agreement: float, num_draft_tokens: int, vocab_size: int
    ):
        super().__init__(num_draft_tokens)
        chance = random.Random(0)
        self._tokens = [
            token if chance.random() < agreement else (token + 1) % vocab_size for token in answer
        ]

    def propose(self, answer: list[int], count: int) -> mx.array:
        return mx.array(self._tokens[len(answer) :][:count], mx.uint32)


class Run(NamedTuple):
    """One answer: decoded tokens per second after the first, and how the drafts did."""

    tokens: list[int]
    speed: float
    drafted: int
    accepted: int


def measure(args: argparse.Namespace) -> Result:
    """A row per way of drafting."""
    if args.max_tokens < 2:
        raise ValueError("--max-tokens must be at least 2.")
    folder = args.model or NANO
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if folder.is_dir() and not has_tokenizer:
        model, input_ids, embeddings = random_prompt(folder, args)
        drafters: dict[str, MakeDrafter] = {}
    else:
        model, processor = fv.load(args.model, dtype=args.dtype, quantize=args.quantize)
        inputs = read_inputs(model, processor, args.prompt, args.image, Options())
        input_ids, embeddings = inputs.input_ids, inputs.embeddings
        drafters = {
            name: partial(make_drafter, processor, args.prompt, inputs, options)
            for name, options in draft_options(args).items()
        }
    run = partial(decode, model, input_ids, embeddings, args.max_tokens)
    expected = run(lambda: None).tokens
    count, vocab_size = args.num_draft_tokens, model.config.text.vocab_size
    for share in args.agreement:
        drafters[f"{share:.0%} right, {count}"] = partial(
            Agreeing, expected, share, count, vocab_size
        )
    sides: dict[str, MakeDrafter] = {"plain": lambda: None, **drafters}
    runs = in_turns(
        {name: partial(run, make) for name, make in sides.items()}, args.rounds, "decoding"
    )
    return {
        "kind": "table",
        "title": f"Speculative decoding: {folder.resolve().name}",
        "results": [row(name, found, runs["plain"], expected) for name, found in runs.items()],
    }


def draft_options(args: argparse.Namespace) -> dict[str, Options]:
    """The library's own ways of drafting, by name."""
    found = {f"look-up, {args.prompt_lookup}": Options(prompt_lookup=args.prompt_lookup)}
    if args.draft_model:
        draft_model, count = fv.load(args.draft_model, dtype=args.dtype), args.num_draft_tokens
        options = Options(draft_model=draft_model, num_draft_tokens=count)
        found[f"draft model, {count}"] = options
    return found


def random_prompt(folder: Path, args: argparse.Namespace) -> tuple[fv.FastVLM, list[int], mx.array]:
    """A model that has no tokenizer, with a prompt of random tokens."""
    if args.draft_model or not args.agreement:
        raise ValueError(f"{folder} has no tokenizer: only --agreement can be measured.")
    model = fv.load_model(folder, dtype=args.dtype, quantize=args.quantize)
    mx.random.seed(0)
    ids = mx.random.randint(0, model.config.text.vocab_size, (1, VISUAL_TOKENS + TEXT_TOKENS))
    return model, cast(list[list[int]], ids.tolist())[0], model.embed_inputs(ids)


def decode(
    model: fv.FastVLM, input_ids: list[int], embeddings: mx.array, limit: int, make: MakeDrafter
) -> Run:
    """Generate `limit` tokens; the prompt and the first token are not timed."""
    drafter = make()
    inputs = model, input_ids, embeddings, model.make_kv_cache(), Options(), limit
    stream = generate_tokens(*inputs) if drafter is None else speculate_tokens(*inputs, drafter)
    tokens = [next(stream)]
    start = time.perf_counter()
    tokens += stream
    speed = (limit - 1) / (time.perf_counter() - start)
    return Run(tokens, speed, drafter.drafted if drafter else 0, drafter.accepted if drafter else 0)


def row(name: str, runs: list[Run], plain: list[Run], expected: list[int]) -> dict[str, Any]:
    """The medians, and how good the drafts were."""
    tokens, _, drafted, accepted = runs[0]
    speeds = [run.speed for run in runs]
    decoded = len(expected) - 1
    return {
        "drafts": name,
        "tokens_per_second": median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "times_plain": median(a.speed / b.speed for a, b in zip(runs, plain, strict=True)),
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_step": decoded / (decoded - accepted),
        "same_tokens": sum(a == b for a, b in zip(tokens, expected, strict=True)),
        "tokens": len(expected),
        "samples": speeds,
    }
