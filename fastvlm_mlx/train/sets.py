"""The rows of a run as it needs them: to train on, to evaluate on, and to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..checks import shown
from ..config import FastVLMConfig
from ..processor import Processor
from .batches import Batches
from .check import find_unreadable
from .examples import VALIDATION, Example, Examples, build_examples, collect_examples
from .images import ImageReader
from .order import Order
from .row_files import BadRow
from .rows import BadRows, Row, find_rows, read_rows, sort_rows
from .settings import TrainOptions
from .split import split_rows

HELD_OUT_SPLIT = "validation"  # of a data set on the Hub


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
    found, others = divide(read_rows(data, **reading), options, **reading)
    (rows, _), (held_out, bad) = sort_rows(found), sort_rows(others)
    if bad := [*bad, *find_unreadable([*rows, *held_out])]:
        raise BadRows(bad)
    seeing: dict[str, Any] = {"image_size": options.image_size}
    lengths: dict[str, Any] = {"max_length": options.max_length, "too_long": options.too_long}
    training = build_examples(rows, processor, config, **seeing, **lengths)
    validation = collect_examples(held_out, processor, config, **seeing, **VALIDATION)
    if validation.bad:
        raise BadRows(validation.bad)
    if held_out and not validation.kept:
        raise ValueError(
            f"None of the {len(held_out)} row(s) to validate with has an answer within the model's "
            f"{processor.max_length} tokens."
        )
    return Sets(training, validation.kept, held_out)


def divide(
    found: Sequence[Row | BadRow], options: TrainOptions, **reading: Any
) -> tuple[Sequence[Row | BadRow], Sequence[Row | BadRow]]:
    """Rows to train on, and those held out: a share of them, or those of a file or data set.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `rows.find_rows` and `split.split_rows`.
    """
    if options.validation is None:
        return found, []
    try:
        share = float(options.validation)
    except ValueError:
        return found, _read_held_out(options.validation, reading)
    good, bad = sort_rows(found)
    training, held_out = split_rows(good, share, options.seed)
    return [*training, *bad], held_out


def _read_held_out(source: str, reading: dict[str, Any]) -> list[Row | BadRow]:
    is_file = Path(source).expanduser().exists()
    own = {"subset": None, "split": None} if is_file else {"split": HELD_OUT_SPLIT}
    found = list(find_rows(source, **reading | own))
    if not found:
        raise ValueError(f"{shown(source)} holds no rows to validate with.")
    return found


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
