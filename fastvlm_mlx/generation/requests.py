"""A request on its way through a batch: read, encoded, and a row in the decoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import mlx.core as mx

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages
from .constrain import Constraint
from .inputs import answer_limit, tokenize
from .options import Options
from .response import Response, stream_responses
from .sampling import filter_logits, is_greedy, make_logits_processor

# Pixel values of an image, uint8 [n, S, S, 3], and its original (width, height)
Picture: TypeAlias = tuple[mx.array, tuple[int, int]]


@dataclass(eq=False)
class PendingRequest:
    """A request on its way to the decoder."""

    id: int
    prompt: Messages
    images: list[ImageSource]
    options: Options
    start: float
    preprocessed: float = 0.0
    encoded: float = 0.0
    visual_tokens: list[mx.array] = field(default_factory=list)
    input_ids: list[int] = field(default_factory=list)
    constraint: Constraint | None = None

    def tokenize(self, model: FastVLM, processor: Processor, pictures: Sequence[Picture]) -> None:
        """Find `input_ids`, now that the images are read; errors as `inputs.tokenize`."""
        counts = [model.num_visual_tokens(*picture) for picture in pictures]
        self.input_ids = tokenize(model, processor, self.prompt, counts, self.options)


class Row:
    """A sequence in the decoder."""

    def __init__(self, request: PendingRequest, processor: Processor):
        self.id = request.id
        self.options = options = request.options
        self.limit = answer_limit(request.input_ids, options, processor)
        self.process = make_logits_processor(options)
        self.constraint = request.constraint
        self.seen = mx.array([i for i in request.input_ids if i >= 0])
        self.key = None if options.seed is None else mx.random.key(options.seed)
        self.generated = 0
        self.done = False
        self._tokens: deque[int] = deque()
        self._responses = stream_responses(
            iter(self._tokens.popleft, None),
            processor,
            len(request.input_ids),
            options.stop,
            self.limit,
            (request.start, request.preprocessed, request.encoded),
            self.constraint,
        )

    def read(self, token: int) -> Response:
        """What one more token brings."""
        self._tokens.append(token)
        response = next(self._responses)
        self.generated = response.generation_tokens
        self.done = response.finish_reason is not None
        return response


def encode_together(model: FastVLM, images: Sequence[Picture], encode_batch: int) -> list[mx.array]:
    """As `inputs.compute_visual_tokens`, but squares of one size are encoded several at a time.

    Args:
        model: see `batch_generate`.
        images: pixel values uint8 [n, S, S, 3] and original (width, height) of each.
        encode_batch: squares at a time.

    Returns:
        The visual tokens [n, hidden_size] of each image, computed.
    """
    visual_tokens: list[mx.array] = [mx.array([])] * len(images)
    for side in {pixels.shape[1] for pixels, _ in images}:
        alike = [i for i, (pixels, _) in enumerate(images) if pixels.shape[1] == side]
        squares = mx.concatenate([images[i][0] for i in alike])
        encoded = []
        for start in range(0, len(squares), encode_batch):
            encoded.append(model.encode_image(squares[start : start + encode_batch]))
            mx.eval(encoded)
        ends = list(accumulate(len(images[i][0]) for i in alike))
        for i, tiles in zip(alike, mx.split(mx.concatenate(encoded), ends[:-1]), strict=True):
            visual_tokens[i] = model.merge_tiles(tiles, images[i][1])
    mx.eval(visual_tokens)
    return visual_tokens


def sample_rows(rows: Sequence[Row], logits: mx.array) -> mx.array:
    """[B, vocab_size] → tokens [B], those with equal options together."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        o = row.options
        kind = None if is_greedy(o) else (o.temperature, o.top_p, o.top_k, o.min_p)
        groups.setdefault(kind, []).append(i)
    if len(groups) == 1:
        return _sample_alike(rows, logits).astype(mx.uint32)
    tokens = mx.zeros(len(rows), dtype=mx.uint32)
    for members in groups.values():
        index = mx.array(members)
        tokens[index] = _sample_alike([rows[i] for i in members], logits[index])
    return tokens


def _sample_alike(rows: Sequence[Row], logits: mx.array) -> mx.array:
    options = rows[0].options
    if is_greedy(options):
        return mx.argmax(logits, axis=-1)
    logits = filter_logits(logits, options)
    if all(row.key is None for row in rows):
        return mx.random.categorical(logits)
    tokens = []
    for i, row in enumerate(rows):
        key = None
        if row.key is not None:
            row.key, key = mx.random.split(row.key)
        tokens.append(mx.random.categorical(logits[i : i + 1], key=key))
    return mx.concatenate(tokens)
