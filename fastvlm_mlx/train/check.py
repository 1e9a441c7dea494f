"""What `fastvlm train --check` says of the data: what can't be used, what the model will see."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import brief, reason
from ..config import FastVLMConfig
from ..image.load import read_picture
from ..image.open import open_image
from ..image.preprocess import MAX_THREADS
from ..processor import Processor
from ..progress import progress_bar
from ..text.tokenizer import Tokenizer
from .examples import VALIDATION, Example, ExampleImage, Examples, collect_examples
from .row_files import BadRow
from .rows import MANY, Row, distinct_images, image_name, sort_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

MOST_LISTED = 20
EXAMPLES_SHOWN = 2
OPENED, CLOSED = "⟦", "⟧"  # around what is learned, where there are no colours
DOWNLOADED = ("http://", "https://")
LEARNED, MASKED, PLACED = "bold green", "dim", "cyan"


@dataclass(frozen=True)
class Check:
    """What is known of a data set before any weight is read.

    Attributes:
        rows: that were read, good or bad, those that are held out among them.
        examples: what the model will see of those to train on, and what it can't.
        held_out: as well, of those to validate with.
        obstacle: what else is in the way of training, in a sentence.
    """

    rows: int
    examples: Examples
    held_out: Examples = field(default_factory=Examples)
    obstacle: str | None = None

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of all examples."""
        return sum(example.num_supervised for example in self.examples.kept)

    @property
    def problem(self) -> str | None:
        """Why training can't begin, in a sentence; None if it can."""
        if bad := [*self.examples.bad, *self.held_out.bad]:
            return f"{len(bad)} of {self.rows} row(s) can't be used."
        if not self.num_supervised:
            return f"None of the {self.rows} row(s) has a token to learn."
        return self.obstacle

    def print(self, console: Console, tokenizer: Tokenizer) -> None:
        """Bad rows, two examples and the statistics."""
        found = self.examples
        _print_rows(console, "can't be used", found.bad)
        _print_rows(console, "are left out", found.skipped)
        _print_rows(console, "are used without their end", found.cut)
        _print_rows(console, "are left out", found.silent)
        _print_rows(console, "to validate with can't be used", self.held_out.bad)
        left_out = [*self.held_out.skipped, *self.held_out.silent]
        _print_rows(console, "to validate with are left out", left_out)
        for example in _typical(found.kept):
            name = f"\n[bold]{escaped(example.id)}[/bold] ({escaped(example.where)}):"
            console.print(name, highlight=False)
            console.print(shown_example(example, tokenizer), soft_wrap=True)
        if found.kept:
            console.print(f"\nWhat is learned stands in {OPENED} {CLOSED}; the rest is masked.\n")
        console.print(statistics(self))


def check_data(
    found: Iterable[Row | BadRow],
    processor: Processor,
    config: FastVLMConfig,
    *,
    held_out: Iterable[Row | BadRow] = (),
    **options: Any,
) -> Check:
    """Look at every row and at the header of every image file.

    Args:
        found: as `find_rows` gives them.
        processor, config, options: as for `collect_examples`.
        held_out: rows to validate with; longer ones are left out.
    """
    rows, others = list(found), list(held_out)
    examples = _check_rows(rows, processor, config, **options)
    validation = _check_rows(others, processor, config, **options | VALIDATION)
    return Check(len(rows) + len(others), examples, validation)


def _check_rows(
    found: Sequence[Row | BadRow], processor: Processor, config: FastVLMConfig, **options: Any
) -> Examples:
    good, bad = sort_rows(found)
    unreadable = find_unreadable(good)
    wrong = {row.where for row in unreadable}
    good = [row for row in good if row.where not in wrong]
    examples = collect_examples(good, processor, config, **options)
    place = {row.where: n for n, row in enumerate(found)}
    every = sorted([*bad, *unreadable, *examples.bad], key=lambda row: place[row.where])
    examples.bad[:] = every
    return examples


def find_unreadable(rows: Sequence[Row]) -> list[BadRow]:
    """The rows with an image that is none, by its header; nothing is downloaded."""
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    sources = distinct_images(rows)
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(len(sources), "Images", unit="image", shown=len(sources) >= MANY) as bar,
    ):
        problems = {}
        for name, problem in zip(sources, pool.map(_problem, sources.values()), strict=True):
            problems[name] = problem
            bar.update()
    found = ((row, map(problems.get, map(image_name, row.images))) for row in rows)
    first = ((row, next(filter(None, said), None)) for row, said in found)
    return [BadRow(row.where, problem) for row, problem in first if problem is not None]


def _problem(image: Any) -> str | None:
    try:
        _open(image)
    except (ValueError, OSError) as error:
        return reason(error)
    return None


def _open(image: Any) -> None:
    if isinstance(image, Path):
        with image.open("rb") as file:
            open_image(file, brief(str(image)))
    elif isinstance(image, bytes) or hasattr(image, "read"):
        open_image(BytesIO(image if isinstance(image, bytes) else image.read()), "its image")
    elif isinstance(image, str) and not image.lower().startswith(DOWNLOADED):
        read_picture(image)


# What is printed


def _print_rows(console: Console, what: str, rows: Sequence[BadRow]) -> None:
    if not rows:
        return
    console.print(f"{len(rows)} row(s) {what}:")
    for row in rows[:MOST_LISTED]:
        console.print(f"  {row}", markup=False, highlight=False, soft_wrap=True)
    if len(rows) > MOST_LISTED:
        console.print(f"  … and {len(rows) - MOST_LISTED} more")


def _typical(examples: Sequence[Example]) -> list[Example]:
    """The first example with an image and the first without; the first two if all are alike."""
    first = [next((e for e in examples if bool(e.images) == has), None) for has in (True, False)]
    both = [example for example in first if example is not None]
    return both if len(both) == EXAMPLES_SHOWN else list(examples[:EXAMPLES_SHOWN])


def escaped(text: str) -> str:
    """A text in which rich sees no markup, in brief."""
    from rich.markup import escape

    return escape(brief(text))


def shown_example(example: Example, tokenizer: Tokenizer) -> Text:
    """An example's text as the model reads it, with what is learned marked."""
    from rich.text import Text

    text = Text()
    for piece, style in _pieces(example, tokenizer):
        text.append(f"{OPENED}{piece}{CLOSED}" if style == LEARNED else piece, style)
    return text


def _pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Texts of an example with their styles."""
    images = {image.start: image for image in example.images}
    edges = {0, len(example)}
    edges |= {edge for answer in example.answers for edge in answer}
    edges |= {edge for i in example.images for edge in (i.start, i.start + i.tokens)}
    learned = {answer.start for answer in example.answers}
    ordered = sorted(edges)
    for start, stop in pairwise(ordered):
        if start in images:
            yield _place(images[start]), PLACED
        else:
            text = tokenizer.decode(example.input_ids[start:stop], skip_special_tokens=False)
            yield printable(text), LEARNED if start in learned else MASKED


def _place(image: ExampleImage) -> str:
    source = image.source
    name = f" {brief(str(source), 60)}" if isinstance(source, (str, Path)) else ""
    return f"[image{name}: {image.tokens} visual tokens]"


def printable(text: str) -> str:
    """A text whose characters do nothing to a terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def statistics(check: Check) -> Any:
    """A table of what the examples hold."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, number, said in _numbers(check):
        table.add_row(name, f"{number:,}", escaped(said))
    return table


def _numbers(check: Check) -> Iterator[tuple[str, int, str]]:
    kept = check.examples.kept
    yield "rows", len(kept), f"of {check.rows:,}"
    if check.held_out.kept:
        yield "  held out", len(check.held_out.kept), "to validate with"
    yield "images", sum(len(e.images) for e in kept), ""
    total, visual = sum(map(len, kept)), sum(e.num_visual for e in kept)
    yield "tokens", total, ""
    yield "  of text", total - visual, ""
    yield "  visual", visual, ""
    share = check.num_supervised / max(1, total - visual)
    yield "  supervised", check.num_supervised, f"{share:.1%} of the text"
    if kept:
        lengths = sorted(map(len, kept))
        longest: Callable[[Example], int] = len
        yield "half of the rows up to", lengths[(len(kept) - 1) // 2], "tokens"
        yield "longest row", lengths[-1], f"tokens ({max(kept, key=longest).where})"
