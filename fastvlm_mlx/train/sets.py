"""The rows of a run as it needs them: to train on, to evaluate on, and to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..config import FastVLMConfig
from ..processor import Processor
from .batches import Batches
from .examples import Example, Examples, build_examples
from .images import ImageReader
from .order import Order
from .rows import Row, read_rows
from .settings import TrainOptions
from .split import split_rows


@dataclass(frozen=True)
class Sets:
    """What a run trains on and what it holds out.

    Attributes:
        training: rows as the model sees them.
        held_out: as well; none without validation.
        questions: the rows that are held out.
    """

    training: Examples
    held_out: list[Example]
    questions: list[Row]

    def summary(self) -> dict[str, Any]:
        """Counts, for a card and a person."""
        kept = self.training.kept
        tokens, supervised = sum(map(len, kept)), sum(e.num_supervised for e in kept)
        return {
            "rows": len(kept),
            "images": sum(len(example.images) for example in kept),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": round(supervised / max(1, tokens), 4),
            "longest": max(map(len, kept), default=0),
            "skipped": len(self.training.skipped),
            "cut": len(self.training.cut),
            "silent": len(self.training.silent),
            "validation_rows": len(self.held_out),
        }

    def digest(self) -> str:
        """What tells these rows from others."""
        found = blake2b(digest_size=8)
        for example in (*self.training.kept, *self.held_out):
            found.update(example.id.encode(errors="surrogatepass"))
            found.update(example.input_ids.tobytes())
        return found.hexdigest()


def read_sets(
    data: str | Path,
    processor: Processor,
    config: FastVLMConfig,
    options: TrainOptions,
    **reading: Any,
) -> Sets:
    """Read the rows of a run.

    Args:
        data: as `rows.read_rows` takes it.
        processor, config: the model's.
        options: which of the rows are held out, and how long they may be.
        reading: of `rows.read_rows`.

    Raises:
        BadRows, FileNotFoundError, ImportError, ValueError: as `rows.read_rows`, `split.split_rows`
            and `examples.build_examples`.
    """
    rows, held_out = divide(read_rows(data, **reading), options, **reading)
    seeing = {"image_size": options.image_size}
    training = build_examples(
        rows,
        processor,
        config,
        max_length=options.max_length,
        too_long=options.too_long,
        **seeing,
    )
    kept: list[Example] = []
    if held_out:
        found = build_examples(held_out, processor, config, too_long="skip", **seeing)
        kept = found.kept
    return Sets(training, kept, held_out)


def divide(
    rows: Sequence[Row], options: TrainOptions, **reading: Any
) -> tuple[Sequence[Row], list[Row]]:
    """Rows to train on, and those held out: a share of them, or those of a file."""
    if options.validation is None:
        return rows, []
    try:
        share = float(options.validation)
    except ValueError:
        return rows, read_rows(options.validation, **reading)
    return split_rows(rows, share, options.seed)


def batches_of(
    examples: Sequence[Example],
    reader: ImageReader,
    options: TrainOptions,
    *,
    rank: int = 0,
    ranks: int = 1,
    pack_length: int | None = None,
) -> Batches:
    """The batches to train on, in an order of the seed's."""
    order = Order(options.batch_size, options.accumulation, options.seed, ranks, pack_length)
    return Batches(examples, reader, order, rank)


def held_out_batches(
    examples: Sequence[Example],
    reader: ImageReader,
    options: TrainOptions,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Batches | None:
    """The batches to evaluate on, in the order of the rows."""
    if not examples:
        return None
    return Batches(examples, reader, Order(options.batch_size, seed=None, ranks=ranks), rank)
