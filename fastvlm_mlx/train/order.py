"""Which examples go into which batch: the order of an epoch, from its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..checks import check_whole_number, shown
from .examples import Example

SORTED_BATCHES = 32  # among which rows are sorted by length
PACKED_ROWS = 1024  # among which a place is sought for the longest first
FINEST = 32  # lengths of batches are multiples of it, longer ones of more

Sequences = list[tuple[int, ...]]
"""The rows of a batch: the numbers of the examples in each, several with packing."""


@dataclass(frozen=True)
class Order:
    """How the examples of an epoch are divided; one process of N takes every N-th row.

    Attributes:
        batch_size: rows in a batch of one process.
        accumulation: batches that make one step together.
        seed: of the order; None for the examples' own order, as for evaluation.
        ranks: how many processes there are.
        pack: the length up to which several examples share a row; None for a row each.
    """

    batch_size: int
    accumulation: int = 1
    seed: int | None = 0
    ranks: int = 1
    pack: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "ranks"):
            check_whole_number(name, getattr(self, name))

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes in one step."""
        return self.batch_size * self.accumulation * self.ranks

    def steps(
        self, examples: Sequence[Example], epoch: int, rank: int = 0
    ) -> list[list[Sequences]]:
        """The batches of each step of an epoch for one process.

        All processes have equally many batches in every step; one may be empty in the last.

        Raises:
            ValueError: there are fewer rows than one batch of all processes has, or no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be from 0 to {self.ranks - 1}, not {shown(rank)}.")
        rows = self._rows(examples, epoch)
        least = self.batch_size * self.ranks
        if self.seed is not None and len(rows) < least:
            packed = " when packed" if self.pack else ""
            raise ValueError(
                f"There are {len(rows)} row(s) to train on{packed}, fewer than the {least} of a "
                "batch: use more rows or a smaller batch size."
            )
        size = self.rows_per_step
        return [
            self._divide(rows[start : start + size], rank) for start in range(0, len(rows), size)
        ]

    def _divide(self, rows: Sequences, rank: int) -> list[Sequences]:
        own, most = rows[rank :: self.ranks], -(-len(rows) // self.ranks)
        return [own[at : at + self.batch_size] for at in range(0, most, self.batch_size)]

    def _rows(self, examples: Sequence[Example], epoch: int) -> Sequences:
        numbers = list(range(len(examples)))
        if self.seed is not None:
            draws = [self._draw(epoch, example.id) for example in examples]
            numbers.sort(key=lambda n: draws[n])
        if self.pack is not None:
            rows = pack_rows(examples, numbers, self.pack)
        else:
            rows = [(n,) for n in numbers]
        return rows if self.seed is None else self._sort(rows, examples, epoch)

    def _sort(self, rows: Sequences, examples: Sequence[Example], epoch: int) -> Sequences:
        """Rows of like length together, the steps of them in any order."""
        size, found = self.rows_per_step, []
        for start in range(0, len(rows), SORTED_BATCHES * size):
            some = rows[start : start + SORTED_BATCHES * size]
            some.sort(key=lambda row: _cost(row, examples))
            steps = [some[at : at + size] for at in range(0, len(some), size)]
            last = [steps.pop()] if len(steps[-1]) < size else []
            steps.sort(key=lambda step: self._draw(epoch, f"step {examples[step[0][0]].id}"))
            found += [row for step in [*steps, *last] for row in step]
        return found

    def _draw(self, epoch: int, id: str) -> bytes:
        named = f"{self.seed} {epoch} {id}".encode(errors="surrogatepass")
        return blake2b(named, digest_size=8).digest()


def _cost(row: tuple[int, ...], examples: Sequence[Example]) -> tuple[int, int]:
    visual = sum(examples[n].num_visual for n in row)
    return visual, sum(len(examples[n]) for n in row)


def pack_rows(examples: Sequence[Example], numbers: Sequence[int], length: int) -> Sequences:
    """Examples in as few rows of `length` tokens as first-fit finds, the longest first; a longer
    example has a row of its own."""
    found: Sequences = []
    for start in range(0, len(numbers), PACKED_ROWS):
        rows: list[list[int]] = []
        room: list[int] = []
        for n in sorted(numbers[start : start + PACKED_ROWS], key=lambda n: -len(examples[n])):
            needed = len(examples[n])
            at = next((i for i, free in enumerate(room) if free >= needed), len(rows))
            if at == len(rows):
                rows.append([])
                room.append(length)
            rows[at].append(n)
            room[at] -= needed
        found += map(tuple, rows)
    return found


def bucket(length: int) -> int:
    """The next length that batches have: one of at most eight between a power of two and the
    next, and a multiple of `FINEST`."""
    step = max(FINEST, 1 << max(0, length - 1).bit_length() >> 4)
    return -(-length // step) * step
