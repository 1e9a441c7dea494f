"""Measure the time to first token of the server's engine when a picture was asked about before.

Each round starts with nothing known: a first question about a picture, another one about the same
picture in another file format, and, after a restart, another one with what the cache kept in files.
"""

from __future__ import annotations

import argparse
import asyncio
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastvlm_mlx as fv
from fastvlm_mlx.serve.cache import RequestCache
from fastvlm_mlx.serve.engine import Engine, Request

from .second_question import IMAGE, QUESTIONS, processor_for
from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {"model": {}, "--rounds": {}, "--dtype": {}}
THIRD = "Is it day or night there?"
WHICH = ("first question", "another", "another after a restart")


def measure(args: argparse.Namespace) -> Result:
    """Seconds to the first token of each question, over as many rounds."""
    model = fv.load_model(args.model, dtype=args.dtype)
    processor = processor_for(args.model, model)

    def ask_all() -> list[float]:
        with TemporaryDirectory() as folder:
            first = (QUESTIONS[0], IMAGE.read_bytes()), (QUESTIONS[1], as_bmp(IMAGE))
            found = asyncio.run(ask(model, processor, folder, *first))
            return found + asyncio.run(ask(model, processor, folder, (THIRD, IMAGE.read_bytes())))

    found = in_turns({"all": ask_all}, args.rounds, "questions", warm_up=0)["all"]
    return {
        "kind": "requests",
        "model": {"name": args.model.resolve().name},
        "image_size": model.config.vision.image_size,
        "seconds": {name: [times[i] for times in found] for i, name in enumerate(WHICH)},
    }


async def ask(
    model: fv.FastVLM, processor: fv.Processor, folder: str, *asked: tuple[str, bytes]
) -> list[float]:
    """Start an engine, which warms up, and ask it one question after the other."""
    cache = RequestCache(model, cache_dir=folder)
    engine = Engine(model, processor, name="model", cache=cache)
    engine.start()
    while engine.alive and not engine.ready:
        await asyncio.sleep(0.01)
    try:
        return [await first_token(engine, *each) for each in asked]
    finally:
        await engine.close(0)
        cache.flush()


async def first_token(engine: Engine, question: str, image: bytes) -> float:
    """Seconds to the first token of an answer."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    ticket = engine.submit(Request([{"role": "user", "content": parts}], {"max_tokens": 2}))
    async for _ in ticket:
        pass
    assert ticket.timings is not None
    return ticket.timings.first_token


def as_bmp(image: Path) -> bytes:
    """The same pixels in another file."""
    from PIL import Image

    file = BytesIO()
    Image.open(image).convert("RGB").save(file, "BMP")
    return file.getvalue()
