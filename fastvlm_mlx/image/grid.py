"""Which tiles "anyres" cuts from an image."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from ..checks import brief
from .decode import MAX_PIXELS


def anyres_grid(
    size: tuple[int, int], grid_pinpoints: str | Sequence[Sequence[int]], image_size: int
) -> tuple[int, int]:
    """How many tiles "anyres" cuts from an image (LLaVA's `get_anyres_image_grid_shape`).

    Args:
        size: (width, height) of the upright image.
        grid_pinpoints: Sizes [[width, height], …], multiples of `image_size`, or the same as the
            string a config.json holds.
        image_size: The side of a tile, in pixels.

    Returns:
        (tiles across, tiles down).

    Raises:
        ValueError: An argument is not as described.
    """
    if image_size <= 0:
        raise ValueError(f"image_size must be positive, not {image_size}.")
    if len(size) != 2 or min(size) <= 0:
        raise ValueError(f"The size of an image must be (width, height), not {size!r}.")
    width, height = _best_resolution(size, _parse_pinpoints(grid_pinpoints, image_size))
    return width // image_size, height // image_size


def _best_resolution(size: tuple[int, int], resolutions: list[tuple[int, int]]) -> tuple[int, int]:
    """The resolution that keeps most of the pixels, of equals the one that wastes least, of equals
    the first (LLaVA's `select_best_resolution`)."""
    width, height = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def _parse_pinpoints(
    grid_pinpoints: str | Sequence[Sequence[int]], side: int
) -> list[tuple[int, int]]:
    found: Any = grid_pinpoints
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if (
        not isinstance(found, (list, tuple))
        or not found
        or not all(_is_resolution(one, side) for one in found)
    ):
        raise ValueError(
            f"grid_pinpoints must be a list of [width, height], multiples of {side} up to "
            f"{MAX_PIXELS:,} pixels, not {brief(repr(grid_pinpoints))}."
        )
    return [(width, height) for width, height in found]


def _is_resolution(found: Any, side: int) -> bool:
    return (
        isinstance(found, (list, tuple))
        and len(found) == 2
        and all(isinstance(edge, int) and edge > 0 and edge % side == 0 for edge in found)
        and found[0] * found[1] <= MAX_PIXELS
    )
