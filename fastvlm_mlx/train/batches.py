"""Examples → batches: padded to few lengths, with their images, which threads read ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx

from ..checks import reason
from ..image.preprocess import MAX_THREADS
from .examples import Example
from .images import ImageReader, Images, ReadImage
from .order import Order, Sequences, bucket

AHEAD = 2  # batches whose images are read before they are asked for


@dataclass(frozen=True)
class Batch:
    """Rows that are computed together. B: rows, T: tokens, V: visual tokens, N: images.

    Attributes:
        ids: of the examples, in reading order; padding has none.
        input_ids: int32 [B, T]; the places of visual tokens hold 0, and so does padding.
        targets: int32 [B, T], the next token of each.
        weights: float32 [B, T], 1 where the target is supervised and 0 elsewhere.
        places: int32 [V], positions b·T + t of the visual tokens, in reading order.
        lengths: how many tokens of each row are no padding.
        pixel_values: uint8 [N, S, S, 3], or with "anyres" a list of [n, S, S, 3] per image; None
            where there are no images, or features instead.
        features: visual features [N, n, C], or a list per image, from a cache.
        image_sizes: (width, height) of each original image.
        segments: int32 [B, T] with packing: the number of each token's example in its row, from 0;
            padding has one of its own.
    """

    ids: list[str]
    input_ids: mx.array
    targets: mx.array
    weights: mx.array
    places: mx.array
    lengths: list[int]
    pixel_values: Images = None
    features: Images = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    segments: mx.array | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are no padding."""
        return sum(self.lengths)


class Batches:
    """The batches of every epoch, the same whenever they are asked for.

    Args:
        examples: as `build_examples` keeps them.
        reader: of their images.
        order: which go together.
        rank: of this process.
    """

    def __init__(
        self, examples: Sequence[Example], reader: ImageReader, order: Order, rank: int = 0
    ):
        self.examples, self.reader, self.order, self.rank = examples, reader, order, rank
        self._plan: tuple[int, list[Sequences]] = -1, []

    def plan(self, epoch: int) -> list[Sequences]:
        """The rows of each batch of an epoch, as numbers of examples; ValueError as `Order`."""
        if self._plan[0] != epoch:
            steps = self.order.steps(self.examples, epoch, self.rank)
            self._plan = epoch, [batch for step in steps for batch in step]
        return self._plan[1]

    def count(self, epoch: int) -> int:
        """How many batches an epoch has."""
        return len(self.plan(epoch))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from one on.

        Raises:
            ValueError: an image that can't be read; the sentence names its row.
        """
        threads = min(os.cpu_count() or 1, MAX_THREADS)
        pool = ThreadPoolExecutor(threads, "fastvlm-images")
        waiting: deque[tuple[Sequences, list[Future[ReadImage]]]] = deque()
        try:
            for rows in self.plan(epoch)[start:]:
                waiting.append((rows, self._submit(pool, rows, epoch)))
                if len(waiting) > AHEAD:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
            if self.reader.features is not None:
                self.reader.features.flush()

    def _submit(
        self, pool: ThreadPoolExecutor, rows: Sequences, epoch: int
    ) -> list[Future[ReadImage]]:
        return [
            pool.submit(self._read, self.examples[n], number, epoch)
            for row in rows
            for n in row
            for number in range(len(self.examples[n].images))
        ]

    def _read(self, example: Example, number: int, epoch: int) -> ReadImage:
        try:
            source = example.images[number].source
            return self.reader.read(source, self.order.seed, epoch, example.id, number)
        except (ValueError, OSError) as error:
            raise ValueError(f"{example.where}: {reason(error)}.") from None

    def _collect(self, rows: Sequences, images: list[Future[ReadImage]]) -> Batch:
        found = [image.result() for image in images]
        packed = self.order.pack is not None
        examples = [[self.examples[n] for n in row] for row in rows]
        return collate(examples, self.reader, found, packed=packed)


def collate(
    rows: Sequence[Sequence[Example]],
    reader: ImageReader,
    images: Sequence[ReadImage],
    *,
    packed: bool = False,
) -> Batch:
    """A batch of rows with one example each, or with several; an empty one has a row of padding."""
    import numpy as np

    lengths = [sum(map(len, row)) for row in rows]
    shape = max(1, len(rows)), bucket(max(lengths, default=1))
    input_ids, targets = np.zeros((2, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    segments = np.full(shape, max((len(row) for row in rows), default=0), np.int32)
    places: list[np.ndarray] = [np.zeros(0, np.int32)]
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            ids, stop = np.array(example.input_ids, np.int32), start + len(example)
            for image in example.images:
                ids[image.start : image.start + image.tokens] = 0
                first = b * shape[1] + start + image.start
                places.append(np.arange(first, first + image.tokens, dtype=np.int32))
            targets[b, start : stop - 1] = ids[1:]
            for answer in example.answers:  # nothing foretells the first token of all
                weights[b, start + max(1, answer.start) - 1 : start + answer.stop - 1] = 1
            input_ids[b, start:stop] = ids
            segments[b, start:stop] = number
            start = stop
    pixel_values, features = reader.collect(images)
    return Batch(
        ids=[example.id for row in rows for example in row],
        input_ids=mx.array(input_ids),
        targets=mx.array(targets),
        weights=mx.array(weights),
        places=mx.array(np.concatenate(places)),
        lengths=lengths,
        pixel_values=pixel_values,
        features=features,
        image_sizes=tuple(image.size for image in images),
        segments=mx.array(segments) if packed else None,
    )
