"""Measure the time to first token of a second question about the same image.

The first question waits for the encoder and the prompt, the second only for its own tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.hub.resolve import NANO

from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {"model": {}, "--rounds": {}, "--dtype": {}}
QUESTIONS = ("Describe the image.", "What colours are in it?")
IMAGE = NANO / "images" / "penguins.png"


def measure(args: argparse.Namespace) -> Result:
    """Seconds to the first token of each question, over as many conversations as rounds."""
    model = fv.load_model(args.model, dtype=args.dtype)
    processor = processor_for(args.model, model)

    def converse() -> list[float]:
        chat = fv.Chat(model, processor, max_tokens=8)
        return [
            max(response.ttft for response in chat.ask(question, image=image, stream=True))
            for question, image in zip(QUESTIONS, (IMAGE, None), strict=True)
        ]

    found = in_turns({"both": converse}, args.rounds, "conversation")["both"]
    return {
        "kind": "second-question",
        "model": {"name": args.model.resolve().name},
        "image_size": model.config.vision.image_size,
        "seconds": {
            name: [times[i] for times in found] for i, name in enumerate(("first", "second"))
        },
    }


def processor_for(folder: Path, model: fv.FastVLM) -> fv.Processor:
    """The folder's own, or the bundled model's at the model's size if there is no tokenizer."""
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return load_processor(folder)
    return replace(load_processor(NANO), image_size=model.config.vision.image_size)
