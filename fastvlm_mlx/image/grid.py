"""An image's size → the tiles that "anyres" cuts from it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from ..checks import brief, shown
from .decode import MAX_PIXELS


def anyres_grid(
    size: tuple[int, int], grid_pinpoints: str | Sequence[Sequence[int]], image_size: int
) -> tuple[int, int]:
    """How many tiles "anyres" cuts from an image (LLaVA's `get_anyres_image_grid_shape`).

    Args:
        size: (width, height) of the upright image.
        grid_pinpoints: sizes [[width, height], …], multiples of `image_size`, or the string of them
            that a config.json holds.
        image_size: the side of a tile, in pixels.

    Returns:
        (tiles across, tiles down).

    Raises:
        ValueError: an argument is not as described.
    """
    if image_size <= 0:
        raise ValueError(f"image_size must be positive, not {image_size}.")
    if len(size) != 2 or min(size) <= 0:
        raise ValueError(f"The size of an image must be (width, height), not {shown(size)}.")
    width, height = best_size(size, parse_pinpoints(grid_pinpoints, image_size))
    return width // image_size, height // image_size


def best_size(size: tuple[int, int], choices: list[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) that suits an image best (LLaVA's `select_best_resolution`).

    It keeps most of the image's pixels; of several that do, it wastes fewest of its own; of several
    again, it comes first.
    """
    width, height = size

    def merit(choice: tuple[int, int]) -> tuple[int, int]:
        scale = min(choice[0] / width, choice[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - choice[0] * choice[1]

    return max(choices, key=merit)


def parse_pinpoints(
    grid_pinpoints: str | Sequence[Sequence[int]], side: int
) -> list[tuple[int, int]]:
    """The sizes in `grid_pinpoints`; ValueError unless all are multiples of `side`."""
    found: Any = grid_pinpoints
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if (
        not isinstance(found, (list, tuple))
        or not found
        or not all(_is_size(one, side) for one in found)
    ):
        raise ValueError(
            f"grid_pinpoints must be a list of [width, height], multiples of {side} up to "
            f"{MAX_PIXELS:,} pixels, not {brief(repr(grid_pinpoints))}."
        )
    return [(width, height) for width, height in found]


def _is_size(found: Any, side: int) -> bool:
    return (
        isinstance(found, (list, tuple))
        and len(found) == 2
        and all(isinstance(edge, int) and edge > 0 and edge % side == 0 for edge in found)
        and found[0] * found[1] <= MAX_PIXELS
    )
