"""All measurements by name, and the options that several of them take."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import (
    batch,
    caption,
    compare,
    constrained,
    encoder_training,
    growth,
    image_size,
    launches,
    load,
    memory,
    packing,
    preprocess,
    same_picture,
    second_question,
    serve,
    speculate,
    train,
)
from .worker import DTYPES, EAGER, PEER

# Each has a docstring, OPTIONS for the command line, and `measure`: arguments → a result.
MEASUREMENTS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        compare,
        launches,
        second_question,
        same_picture,
        growth,
        memory,
        load,
        batch,
        caption,
        image_size,
        preprocess,
        speculate,
        constrained,
        serve,
        encoder_training,
        train,
        packing,
    )
}


def whole_number(text: str) -> int:
    """A number from 1; ArgumentTypeError for another text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, found {text}")
    return int(text)


# An option of a measurement that stands here takes these settings for those that it does not give.
SHARED: dict[str, dict[str, Any]] = {
    "model": {"type": Path, "help": "a FastVLM folder in any known layout"},
    "--dtype": {"choices": DTYPES, "help": "of the weights, if not the checkpoint's own"},
    "--rounds": {"type": whole_number, "default": 5, "help": "of each measurement"},
    "--image-size": {"type": whole_number, "help": "in pixels, if not the model's own"},
    "--json": {"type": Path, "metavar": "FILE", "help": "write every sample there"},
    "--peer-python": {
        "default": sys.executable,
        "metavar": "PATH",
        "help": f"Python of an environment with {PEER}",
    },
    "--transformers-python": {
        "metavar": "PATH",
        "help": "Python of an environment with torch, torchvision, timm and transformers, to "
        "measure that too",
    },
    "--compile": {"action": "store_true", "help": f"measure {EAGER} with torch.compile too"},
}


def add_options(parser: argparse.ArgumentParser, options: dict[str, dict[str, Any]]) -> None:
    """Declare options; their help names the default, if there is one."""
    for name, own in options.items():
        settings = SHARED.get(name, {}) | own
        if name == "model" and "nargs" in own:
            settings["help"] += " or a Hub id; by default the bundled model"
        if settings.get("default") not in (None, []):
            settings["help"] = f"{settings.get('help', '')}; default: %(default)s".lstrip("; ")
        parser.add_argument(name, **settings)


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that gives a result, with names in capitals for paths."""
    coretype = os.environ.get("OPENBLAS_CORETYPE")
    words = [f"OPENBLAS_CORETYPE={coretype}"] if coretype else []
    words += ["python", "-m", *parser.prog.split()]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value == action.default or action.dest in ("help", "json"):
            continue
        is_path = action.type is Path or action.dest.endswith("python")
        words += action.option_strings[:1]
        if is_path:
            words.append(str(action.metavar or action.dest).upper())
        elif isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return " ".join(words)
