"""Measure what a schema costs: tokens per second with and without one, in turns.

Both sides decode the same number of tokens after the same random prompt; the answer is a list of
small objects that is too long to end. "grammar" is what llguidance takes for a token, to accept it
and to find what may follow. It works while the device computes the logits, so that what is left of
it is the ratio.

The vocabulary counts, since each of its tokens is allowed or not: `--vocabulary` reads Qwen's from
`resources/qwen.tiktoken` of the PyPI package dashscope. Otherwise one of random words is made, as
large as the model's.
"""

from __future__ import annotations

import argparse
import base64
import random
import string
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.generation.constrain import Constraint, make_constraint
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.text import Tokenizer

from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "--dtype": {},
    "--rounds": {},
    "--quantize": {"type": int, "help": "bits per weight"},
    "--vocabulary": {"type": Path, "help": "a .tiktoken file; by default random words"},
    "--max-tokens": {"type": int, "default": 64, "help": "of the answer, at least 2"},
}
MOST_COST = 0.05
PROMPT_TOKENS = 40  # a short one: the less attention there is, the more the mask costs
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = string.ascii_letters + string.digits + " .,-"
THING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green", "blue", "white", "black"]},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": THING, "minItems": 10_000}


class Run(NamedTuple):
    """One answer: decoded tokens per second after the first, and seconds of the grammar a token."""

    speed: float
    grammar: float


class Timed:
    """A constraint that notes how long its grammar works."""

    def __init__(self, constraint: Constraint):
        self._constraint = constraint
        self.mask = constraint.mask
        self.seconds = 0.0

    def accept(self, token: int) -> None:
        start = time.perf_counter()
        self._constraint.accept(token)
        self.mask = self._constraint.mask
        self.seconds += time.perf_counter() - start


def measure(args: argparse.Namespace) -> Result:
    """A row for each side."""
    if args.max_tokens < 2:
        raise ValueError("--max-tokens must be at least 2.")
    model = fv.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    vocab_size = model.config.text.vocab_size
    texts = read_tiktoken(args.vocabulary) if args.vocabulary else random_words(vocab_size)
    processor = fv.Processor(make_tokenizer(texts), model.config.vision.image_size)
    mx.random.seed(0)
    ids = mx.random.randint(0, len(texts), (1, PROMPT_TOKENS))
    embeddings = model.embed_inputs(ids)
    input_ids = cast(list[list[int]], ids.tolist())[0]
    run = partial(decode, model, input_ids, embeddings, args.max_tokens)
    schema = partial(make_constraint, processor, vocab_size, Options(schema=SCHEMA))
    sides = {"free": lambda: run(None), "schema": lambda: run(schema())}
    runs = in_turns(sides, args.rounds, "decoding")
    words = args.vocabulary.name if args.vocabulary else "random words"
    title = f"Answers that follow a schema: {args.model.resolve().name}, {len(texts)} {words}"
    results = [row(name, found, runs["free"]) for name, found in runs.items()]
    cost = 1 - results[1]["times_free"]
    goals = [("decoding that a schema costs", f"≤ {MOST_COST:.0%}", f"{cost:.1%}")]
    return {"kind": "table", "title": title, "results": results, "goals": goals}


def decode(
    model: fv.FastVLM,
    input_ids: list[int],
    embeddings: mx.array,
    limit: int,
    constraint: Constraint | None,
) -> Run:
    """Generate `limit` tokens; the prompt and the first token are not timed."""
    timed = None if constraint is None else Timed(constraint)
    asked = model, input_ids, embeddings, model.make_kv_cache(), Options(), limit
    stream = generate_tokens(*asked, constraint=cast(Any, timed))
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    speed = (limit - 1) / (time.perf_counter() - start)
    return Run(speed, timed.seconds / limit if timed else 0.0)


def row(name: str, runs: list[Run], free: list[Run]) -> dict[str, Any]:
    """The medians."""
    speeds = [run.speed for run in runs]
    return {
        "answer": name,
        "tokens_per_second": median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "times_free": median(a.speed / b.speed for a, b in zip(runs, free, strict=True)),
        "grammar_us_per_token": 1e6 * median(run.grammar for run in runs),
        "samples": speeds,
    }


def read_tiktoken(path: Path) -> list[bytes]:
    """The tokens of a vocabulary that tiktoken reads, by rank."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return [base64.b64decode(token) for token, _ in sorted(lines, key=lambda line: int(line[1]))]


def random_words(vocab_size: int) -> list[bytes]:
    """A vocabulary of bytes and random words, with room for the control tokens."""
    chance = random.Random(0)
    texts = {bytes([byte]): None for byte in range(256)}
    while len(texts) < vocab_size - len(CONTROLS):
        texts["".join(chance.choices(LETTERS, k=chance.randint(2, 9))).encode()] = None
    return list(texts)


def make_tokenizer(texts: Iterable[bytes]) -> Tokenizer:
    """A tokenizer with these tokens, and no merges: nothing here is encoded."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as BPETokenizer
    from tokenizers.models import BPE

    characters = byte_characters()
    vocab = {"".join(characters[b] for b in text): i for i, text in enumerate(texts)}
    bpe = BPETokenizer(BPE(vocab, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    return Tokenizer(bpe)


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | shifted
