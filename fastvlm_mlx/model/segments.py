"""Sequences packed in rows: where each of their tokens stands, so that none sees another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import ops


class Segments(NamedTuple):
    """What brings sequences from the rows in which they are packed to a row each, and back.

    All layers but attention take the packed rows. B: rows, T: their tokens, N: sequences, L: tokens
    of the longest.

    Attributes:
        tokens: int32 [N, L], the place b T + t of each token of a sequence; -1 for padding.
        places: int32 [B, T], where each token stands among them, n L + l; -1 for padding.
    """

    tokens: mx.array
    places: mx.array

    @classmethod
    def of(
        cls,
        numbers: mx.array,
        lengths: Sequence[int] | None = None,
        *,
        count: Callable[[int], int] = int,
        length: Callable[[int], int] = int,
    ) -> Segments:
        """From numbers that tell sequences apart.

        Args:
            numbers: int32 [B, T]; a sequence is a run of one number in a row.
            lengths: of the rows; what stands behind is padding. By default they are full.
            count: what N is rounded up to, so that there are few shapes.
            length: what L is rounded up to.
        """
        import numpy as np

        found = np.array(numbers)
        full = [found.shape[1]] * len(found) if lengths is None else lengths
        is_token = np.arange(found.shape[1]) < np.array(full)[:, None]
        starts = np.ones(found.shape, bool)
        starts[:, 1:] = found[:, 1:] != found[:, :-1]
        starts &= is_token
        (at,) = np.nonzero(is_token.ravel())
        sequence = starts.ravel().cumsum()[at] - 1
        (first,) = np.nonzero(starts.ravel())
        within = at - first[sequence]
        shape = count(max(1, len(first))), length(int(within.max(initial=0)) + 1)
        tokens, places = np.full(shape, -1, np.int32), np.full(found.size, -1, np.int32)
        tokens[sequence, within] = at
        places[at] = sequence * shape[1] + within
        return cls(mx.array(tokens), mx.array(places.reshape(found.shape)))

    def apart(self, x: mx.array) -> mx.array:
        """[B, T, ...] → [N, L, ...]; padding has what some token has."""
        return ops.rearranged(x, self.tokens, self.places)

    def together(self, x: mx.array) -> mx.array:
        """[N, L, ...] → [B, T, ...]; padding has what some token has."""
        return ops.rearranged(x, self.places, self.tokens)
