"""What a model computes for sample images, and how near another one comes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..generation.generate import stream_generate
from ..generation.inputs import read_inputs
from ..generation.options import Options
from ..hub.resolve import NANO
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .questions import DEFAULT_QUESTION

SAMPLES = tuple(sorted((NANO / "images").glob("*.png")))
ANSWER_TOKENS = 32


@dataclass
class Outputs:
    """What a model computes for the sample images; see `sample_outputs`."""

    features: list[mx.array]
    logits: list[mx.array]
    tokens: list[list[int]]


def sample_outputs(model: FastVLM, processor: Processor, images: Sequence[Any]) -> Outputs:
    """Visual tokens, first logits and greedy answers on sample images."""
    outputs = Outputs([], [], [])
    for image in images:
        inputs = read_inputs(model, processor, DEFAULT_QUESTION, image, Options())
        logits = model.language_model(None, None, inputs.embeddings)[:, -1].astype(mx.float32)
        mx.eval(logits)
        responses = stream_generate(
            model, processor, DEFAULT_QUESTION, image=image, max_tokens=ANSWER_TOKENS
        )
        outputs.features.append(inputs.visual_tokens[0].astype(mx.float32))
        outputs.logits.append(logits)
        outputs.tokens.append([response.token for response in responses])
    return outputs


def relative_error(found: Sequence[mx.array], exact: Sequence[mx.array]) -> float:
    """Root mean square of the difference, over the standard deviation of the exact values."""
    difference = mx.concatenate([(f - e).flatten() for f, e in zip(found, exact, strict=True)])
    spread = mx.std(mx.concatenate([e.flatten() for e in exact]))
    return float(mx.sqrt(mx.mean(difference * difference)) / spread)


def token_agreement(found: Sequence[list[int]], exact: Sequence[list[int]]) -> float:
    """Share of the exact tokens that are found in the same place."""
    same = sum(
        a == b
        for tokens, wanted in zip(found, exact, strict=True)
        for a, b in zip(tokens, wanted, strict=False)
    )
    return same / sum(len(wanted) for wanted in exact)
