"""Measure speculative decoding: tokens per second plain, with prompt look-up, with a draft model.

All take turns in every round, on the same prompt, and are greedy, so that all must say the same,
which is checked. The model is not stopped where its answer ends: past it, small models repeat
themselves, which is the best case for look-up. Only what comes after the first token is timed;
that the draft model encodes the image and reads the prompt falls into it.

    python benchmarks/speculate.py
    python benchmarks/speculate.py --model 7b --draft-model 0.5b --image page.png --prompt "Read."

How often drafts are right depends on model and text, and random weights say nothing about it. What
they can show is the speed that drafts of a given quality would bring: `--agreement` takes the
model's own answer as draft, with as many tokens made wrong as a share below 1 asks for, at no cost
of drafting. A folder without a tokenizer (`random_checkpoint.py` writes such) is measured so.

    python benchmarks/speculate.py --model /tmp/fastvlm-0.5b --agreement 0 0.5 0.8 1
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
from machine import write_result

import fastvlm_mlx as fv
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.drafters import Drafter
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.generation.speculate import make_drafter, speculate_tokens
from fastvlm_mlx.hub.resolve import NANO

TOKENIZERS = ("tokenizer.json", "vocab.json")
VISUAL_TOKENS, TEXT_TOKENS = 256, 40  # of a prompt that stands in where there is no tokenizer
PROMPT = "What is this? What is this? What is this?"


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


class Setup(NamedTuple):
    """A model, its prompt, and how to make a drafter for it."""

    model: fv.FastVLM
    input_ids: list[int]
    embeddings: mx.array
    make_drafter: Callable[..., Drafter] | None


class Run(NamedTuple):
    """One answer: decoded tokens a second after the first, and how the drafts did."""

    tokens: list[int]
    speed: float
    drafted: int
    accepted: int


def main() -> None:
    args = parse_args()
    setup = load_setup(args)
    plain = run(setup, args.max_tokens, None)
    sides = make_sides(setup, args, plain.tokens)
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(args.warmup + args.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found = run(setup, args.max_tokens, sides[name]())
            if number >= args.warmup:
                runs[name].append(found)
    results = [summarise(name, runs, plain.tokens) for name in sides]
    print_table(results)
    if args.json:
        write_result(args.json, {"device": device(), "results": results})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(NANO), help="folder or Hub id; the bundled model by default")
    add("--draft-model", help="folder or Hub id of a smaller model with the same vocabulary")
    add("--num-draft-tokens", type=int, default=3, help="tokens a draft model proposes at a time")
    add("--prompt-lookup", type=int, default=10, help="most tokens look-up proposes at a time")
    add("--agreement", type=float, nargs="+", default=[], help="shares of right drafts, 0 to 1")
    add("--image", default=str(NANO / "images" / "panda.png"))
    add("--prompt", default=PROMPT)
    add("--max-tokens", type=int, default=128)
    add("--rounds", type=int, default=5, help="measured rounds, of every side in turn")
    add("--warmup", type=int, default=1, help="rounds before, not measured")
    add("--dtype", choices=("float32", "float16", "bfloat16"))
    add("--quantize", type=int, help="bits a weight of the model, not of the draft model")
    add("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args()
    if args.max_tokens < 2 or args.rounds < 1 or args.warmup < 0:
        parser.error("--max-tokens must be at least 2, --rounds at least 1, --warmup at least 0.")
    return args


def load_setup(args: argparse.Namespace) -> Setup:
    folder = Path(args.model)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        return random_prompt(args)
    model, processor = fv.load(args.model, dtype=args.dtype, quantize=args.quantize)
    inputs = read_inputs(model, processor, args.prompt, args.image, Options())

    def drafter(**chosen: Any) -> Drafter:
        made = make_drafter(processor, args.prompt, inputs, Options(**chosen))
        assert made is not None
        return made

    return Setup(model, inputs.input_ids, inputs.embeddings, drafter)


def random_prompt(args: argparse.Namespace) -> Setup:
    """A prompt of random tokens, for a model that has no tokenizer."""
    if args.draft_model or not args.agreement:
        raise SystemExit(f"{args.model} has no tokenizer: only --agreement can be measured.")
    model = fv.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    mx.random.seed(0)
    text = model.config.text
    ids = mx.random.randint(0, text.vocab_size, (1, VISUAL_TOKENS + TEXT_TOKENS))
    return Setup(model, cast(list[list[int]], ids.tolist())[0], model.embed_inputs(ids), None)


def make_sides(
    setup: Setup, args: argparse.Namespace, answer: list[int]
) -> dict[str, Callable[[], Drafter | None]]:
    """What is compared: a name, and what makes the drafter for a run."""
    sides: dict[str, Callable[[], Drafter | None]] = {"plain": lambda: None}
    make = setup.make_drafter
    if make is not None:
        sides[f"look-up, {args.prompt_lookup}"] = lambda: make(prompt_lookup=args.prompt_lookup)
    if make is not None and args.draft_model:
        drafting = fv.load(args.draft_model, dtype=args.dtype)
        count = args.num_draft_tokens
        sides[f"draft model, {count}"] = lambda: make(draft_model=drafting, num_draft_tokens=count)
    vocab_size, count = setup.model.config.text.vocab_size, args.num_draft_tokens
    for share in args.agreement:
        sides[f"{share:.0%} right, {count}"] = lambda share=share: Agreeing(  # type: ignore[misc]
            answer, share, count, vocab_size
        )
    return sides


def run(setup: Setup, limit: int, drafter: Drafter | None) -> Run:
    """Generate `limit` tokens; the prompt and the first token are not timed."""
    model, input_ids, embeddings, _ = setup
    inputs = model, input_ids, embeddings, model.make_kv_cache(), Options(), limit
    stream = generate_tokens(*inputs) if drafter is None else speculate_tokens(*inputs, drafter)
    tokens = [next(stream)]
    start = time.perf_counter()
    tokens += stream
    speed = (limit - 1) / (time.perf_counter() - start)
    return Run(tokens, speed, drafter.drafted if drafter else 0, drafter.accepted if drafter else 0)


def summarise(name: str, runs: dict[str, list[Run]], expected: list[int]) -> dict[str, Any]:
    own, plain = runs[name], runs["plain"]
    drafted, accepted, steps = own[0].drafted, own[0].accepted, len(expected) - 1 - own[0].accepted
    return {
        "name": name,
        "tokens_per_second": [found.speed for found in own],
        "median": statistics.median(found.speed for found in own),
        "times_plain": statistics.median(
            a.speed / b.speed for a, b in zip(own, plain, strict=True)
        ),
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_step": (len(expected) - 1) / steps,
        "same_tokens": sum(a == b for a, b in zip(own[0].tokens, expected, strict=True)),
        "tokens": len(expected),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"{device()}: decoding, greedy, medians [least, most]\n")
    print("| drafts | tokens/s | times plain | accepted / drafted | tokens a step | same tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    for found in results:
        speeds = found["tokens_per_second"]
        share = f" ({found['accepted'] / found['drafted']:.0%})" if found["drafted"] else ""
        print(
            f"| {found['name']} | {found['median']:.1f} [{min(speeds):.1f}, {max(speeds):.1f}] "
            f"| {found['times_plain']:.2f} | {found['accepted']} / {found['drafted']}{share} "
            f"| {found['tokens_per_step']:.2f} | {found['same_tokens']} of {found['tokens']} |"
        )


def device() -> str:
    info = mx.device_info() if mx.default_device() == mx.gpu else {}
    return str(info.get("device_name", mx.default_device()))


if __name__ == "__main__":
    main()
