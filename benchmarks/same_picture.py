"""Measure the time to first token of the server when a picture was asked about before.

Each round starts with nothing known: a first question about a picture, then others about the same
picture through every interface, in another file format and by its path; and, after a restart of the
server in another process, one with what its cache kept in files. The client takes the time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import load_config
from fastvlm_mlx.convert import convert

from .asks import INTERFACES, Ask, Client, Interface, user
from .peers import give_tokenizer
from .second_question import IMAGE
from .servers import our_server
from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {"model": {}, "--rounds": {"default": 3}}
CHAT = INTERFACES["chat"]
FIRST, AFTER = "first question", "after a restart"
WORDS = "cold", "warm", "windy", "dark", "far", "deep", "old", "wet", "loud"


def measure(args: argparse.Namespace) -> Result:
    """Seconds to the first token of each question, over as many rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = convert(args.model, Path(scratch, "mlx"), dtype="float32", progress=False)
        give_tokenizer(folder)
        image_size = load_config(folder).vision.image_size
        ask_all = partial(ask_everything, folder, Path(scratch, "cache"))
        found = in_turns({"all": ask_all}, args.rounds, "questions", warm_up=0)["all"]
    return {
        "kind": "same-picture",
        "model": {"name": args.model.resolve().name},
        "image_size": image_size,
        "seconds": {name: [times[name] for times in found] for name in found[0]},
    }


def ask_everything(folder: Path, cache: Path) -> dict[str, float]:
    """The seconds of each way to ask, with an empty cache at first."""
    shutil.rmtree(cache, ignore_errors=True)
    flags = ("--cache-dir", str(cache), "--media-root", str(IMAGE.parent))
    image, log = IMAGE.read_bytes(), folder.with_suffix(".log")
    ways: dict[str, tuple[Interface, bytes | None]] = {FIRST: (CHAT, image)}
    ways |= {name: (way, image) for name, way in INTERFACES.items()}
    ways |= {"another file format": (CHAT, as_bmp(IMAGE)), "its path": (by_path(IMAGE), None)}
    found = {}
    with our_server(folder, log, *flags) as server:
        for word, (name, way) in zip(WORDS, ways.items(), strict=False):
            found[name] = first_token(server.url, *way, word)
    with our_server(folder, log, *flags) as server:
        found[AFTER] = first_token(server.url, CHAT, image, WORDS[-1])
    return found


def first_token(url: str, interface: Interface, image: bytes | None, word: str) -> float:
    """Seconds to the end of an answer of one token to a question of its own.

    Pieces of a longer one would come later than their tokens: a random model's are seldom whole
    characters, and wait for those that follow.
    """
    client = Client(url, "fastvlm")
    answer = client.ask(interface, Ask(f"Is it {word} there?", image, 1), stream=True)
    client.close()
    return answer.seconds


def as_bmp(image: Path) -> bytes:
    """The same pixels in another file."""
    from PIL import Image

    file = BytesIO()
    Image.open(image).convert("RGB").save(file, "BMP")
    return file.getvalue()


def by_path(image: Path) -> Interface:
    """Chat completions about a file below the media root."""

    def body(ask: Ask) -> dict[str, Any]:
        shown = {"type": "image_url", "image_url": {"url": image.as_uri()}}
        whole = CHAT.body(ask)
        return whole | {"messages": user([shown, *whole["messages"][0]["content"]])}

    return CHAT._replace(body=body)
