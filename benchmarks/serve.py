"""Measure the server under load, beside one client and beside mlx-vlm's server.

Clients ask through all interfaces, streamed and not, about pictures and without; each answer is
compared with the one that `generate` gives by itself. First one client and many take turns, then
many ask for a long time while the server's memory is noted, then many ask this server and mlx-vlm's
in turns through the interfaces that both have. Both compute in float32 on a CPU.

Pictures come back, as in conversations: this server then knows them, unless `--no-cache`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import fastvlm_mlx as fv
from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import resolve
from fastvlm_mlx.serve.engine import MAX_QUEUE

from .asks import INTERFACES, OPENAI_AND_ANTHROPIC, Ask, Load, put_load
from .caption import make_pictures
from .servers import Server, our_server, peer_server
from .tables import MOST_DRIFT, Result, drift, ratio
from .turns import in_turns, note
from .worker import OURS, PEER

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--peer-python": {"default": None, "help": "of an environment with mlx-vlm; without, none"},
    "--rounds": {"default": 3},
    "--clients": {"type": int, "default": 32, "help": "that ask at the same time"},
    "--seconds": {"type": float, "default": 300.0, "help": "of the long load"},
    "--turn": {"type": float, "default": 30.0, "help": "seconds of each turn"},
    "--pictures": {"type": int, "default": 64, "help": "made from the sample images"},
    "--side": {"type": int, "default": 256, "help": "of the pictures, in pixels"},
    "--max-tokens": {"type": int, "default": 48, "help": "of an answer"},
    "--no-cache": {"action": "store_true", "help": "have this server keep nothing of requests"},
}
QUESTIONS = ("Describe the image.", "How many penguins are there?", "What does the note say?")
TEXTS = ("Hello!", "Who are you?", "Write a poem.", *(f"What is {n} + {n}?" for n in range(29)))
LEAST_TIMES = 2.5  # as many answers per second as for one client
EVERY = 1.0  # seconds between two looks at the server's memory


def measure(args: argparse.Namespace) -> Result:
    """A row for each load, the goals, and every sample."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folder = convert(resolve(args.model), Path(scratch, "mlx"), dtype="float32", progress=False)
        expected = answers(folder, args, Path(scratch, "pictures"))
        flags = ["--max-queue", str(max(MAX_QUEUE, args.clients))]
        flags += ["--max-cache", "0"] if args.no_cache else []
        server = running.enter_context(our_server(folder, Path(scratch, "ours.log"), *flags))
        put = partial(put_load, server.url, "fastvlm", expected, INTERFACES)
        sides = {
            "1 client": partial(put, clients=1, seconds=args.turn),
            f"{args.clients} clients": partial(put, clients=args.clients, seconds=args.turn),
        }
        turns = in_turns(sides, args.rounds, "one client and many")
        note(f"{args.clients} clients for {args.seconds:g} s")
        with memory_of(server) as held:
            long = put(clients=args.clients, seconds=args.seconds)
        both: dict[str, list[Load]] = {}
        if args.peer_python:
            both = beside_peer(args, folder, server, expected, Path(scratch, "peer.log"))
    return result(args, turns, long, held, both)


def answers(folder: Path, args: argparse.Namespace, pictures: Path) -> dict[Ask, str]:
    """The questions, and what `generate` answers to each by itself."""
    files = make_pictures(pictures, args.pictures, args.side)
    asks = [Ask(q, file.read_bytes(), args.max_tokens) for file in files for q in QUESTIONS]
    asks += [Ask(text, None, args.max_tokens) for text in TEXTS]
    model, processor = fv.load(folder, dtype="float32")
    note(f"{len(asks)} questions, one by one")
    return {
        ask: fv.generate(
            model,
            processor,
            ask.question,
            image=ask.image,
            max_tokens=ask.max_tokens,
            temperature=0.0,
        )
        for ask in asks
    }


@contextmanager
def memory_of(server: Server) -> Iterator[list[int]]:
    """The bytes of a server, noted as long as the block runs."""
    held, ended = [server.resident()], Event()

    def look() -> None:
        while not ended.wait(EVERY):
            held.append(server.resident())

    thread = Thread(target=look)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()


def beside_peer(
    args: argparse.Namespace, folder: Path, ours: Server, expected: Mapping[Ask, str], log: Path
) -> dict[str, list[Load]]:
    """The loads of this server and mlx-vlm's, in turns, through what both have.

    All ask the same about their pictures: mlx-vlm 0.7.10 answers with an error where prompts of
    unlike lengths meet in a batch.
    """
    shared = {ask: text for ask, text in expected.items() if ask.question == QUESTIONS[0]}
    with peer_server(args.peer_python, folder, log) as theirs:
        urls = {OURS: (ours.url, "fastvlm"), PEER: (theirs.url, str(folder))}
        sides = {
            side: partial(
                put_load,
                url,
                model,
                shared,
                OPENAI_AND_ANTHROPIC,
                clients=args.clients,
                seconds=args.turn,
            )
            for side, (url, model) in urls.items()
        }
        return in_turns(sides, args.rounds, "both servers")


def result(
    args: argparse.Namespace,
    turns: Mapping[str, list[Load]],
    long: Load,
    held: list[int],
    both: Mapping[str, list[Load]],
) -> Result:
    """The result, of what each turn of each side found."""
    alone, many = turns.values()
    times = ratio([load.per_second for load in many], [load.per_second for load in alone])
    loads = {**turns, f"{args.clients} clients for {args.seconds:g} s": [long]}
    loads |= {f"{side}, {args.clients} clients": found for side, found in both.items()}
    ours = [load for found in (alone, many, [long], both.get(OURS, [])) for load in found]
    failed = [text for load in ours for text in (*load.errors, *load.wrong)]
    goals = [
        (
            f"answers per second of {args.clients} clients, of one's",
            f"≥ {LEAST_TIMES}",
            shown(times),
        ),
        (
            f"memory of the server, growth over {args.seconds:g} s",
            f"≤ {MOST_DRIFT:.0%}",
            f"{drift(held):+.1%}",
        ),
        ("wrong or missing answers", "0", str(len(failed))),
        *(beside(both[OURS], both[PEER]) if both else ()),
    ]
    return {
        "kind": "table",
        "title": f"The server under load: {Path(args.model or 'nano').name}"
        + (", without a cache" if args.no_cache else ""),
        "notes": [
            f"{args.pictures} pictures, which come back; rows of several turns have their medians.",
            f"{PEER} is asked one question about all pictures, and this server beside it too: "
            "its own fails where prompts of unlike lengths meet.",
            f"The server has {held[0] / 1e6:.0f} MB before the long load, and then up to "
            f"{max(held) / 1e6:.0f} MB.",
        ],
        "results": [row(name, found) for name, found in loads.items()],
        "goals": goals,
        "memory": held,
        "failed": failed[:20],
        "failure": f"{len(failed)} answers are wrong or missing: {failed[0]}" if failed else None,
    }


def beside(ours: list[Load], theirs: list[Load]) -> Iterable[tuple[str, str, str]]:
    """How many times better this server is than mlx-vlm's."""
    yield (
        f"answers per second, times those of {PEER}",
        "> 1",
        shown(ratio([load.per_second for load in ours], [load.per_second for load in theirs])),
    )
    yield (
        f"time to first token that 95 % keep within: {PEER}'s, of this server's",
        "> 1",
        shown(
            ratio([each.first_at(0.95) for each in theirs], [each.first_at(0.95) for each in ours])
        ),
    )


def row(name: str, loads: list[Load]) -> dict[str, Any]:
    """A load's figures: the medians of its turns."""
    return {
        "load": name,
        "answers per second": median(load.per_second for load in loads),
        "first token, median, s": median(load.first_at(0.5) for load in loads),
        "first token, 95 % within, s": median(load.first_at(0.95) for load in loads),
        "answers": sum(load.answers for load in loads),
        "unlike `generate`'s": sum(len(load.wrong) for load in loads),
        "errors": sum(len(load.errors) for load in loads),
        "samples": [load.per_second for load in loads],
    }


def shown(found: float) -> str:
    return str(found) if isinstance(found, int) else f"{found:.3g}"
