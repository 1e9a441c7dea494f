import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import GRID, NOISE, assert_one_sentence, unit, whole
from PIL import Image

from fastvlm_mlx.image.grid import anyres_grid
from fastvlm_mlx.image.preprocess import preprocess

quick = settings(max_examples=60, deadline=None)


def best_of(width: int, height: int, grid: list[tuple[int, int]]) -> tuple[int, int]:
    """Every choice weighed against every other."""
    kept = {}
    for across, down in grid:
        scale = min(across / width, down / height)
        kept[across, down] = min(int(width * scale) * int(height * scale), width * height)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        if kept[one] != kept[other]:
            return kept[one] > kept[other]
        return math.prod(one) - kept[one] < math.prod(other) - kept[other]

    return next(one for one in grid if not any(beats(other, one) for other in grid))


@quick
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
    st.booleans(),
)
def test_anyres(width: int, height: int, tiles: list[tuple[int, int]], as_text: bool) -> None:
    grid = [(64 * across, 64 * down) for across, down in tiles]
    given_grid = str([list(size) for size in grid]) if as_text else grid
    best = best_of(width, height, grid)
    across, down = anyres_grid((width, height), given_grid, 64)
    assert (64 * across, 64 * down) == best
    image = whole(width, height)
    found = np.asarray(preprocess(image, 64, "anyres", given_grid))
    assert found.shape == (1 + across * down, 64, 64, 3)
    squeezed = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[0], unit(squeezed))

    tiled = found[1:].reshape(down, across, 64, 64, 3).swapaxes(1, 2)
    tiled = tiled.reshape(64 * down, 64 * across, 3)
    if best[0] / width < best[1] / height:
        fitted = best[0], min(math.ceil(height * (best[0] / width)), best[1])
    else:
        fitted = min(math.ceil(width * (best[1] / height)), best[0]), best[1]
    left, top = (best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2
    resized = np.asarray(image.resize(fitted, Image.Resampling.BICUBIC))
    right, bottom = best[0] - fitted[0] - left, best[1] - fitted[1] - top
    padded = np.pad(resized, ((top, bottom), (left, right), (0, 0)))
    np.testing.assert_array_equal(tiled, unit(padded))


@pytest.mark.parametrize(
    "size, expected",
    [
        ((336, 672), (1, 2)),
        ((672, 336), (2, 1)),
        ((2000, 2000), (2, 2)),
        ((3000, 500), (3, 1)),
        ((500, 3000), (1, 3)),
        ((100, 100), (1, 2)),  # nothing to gain from the larger ones: the first of the small
        ((1, 100_000), (1, 2)),
    ],
)
def test_anyres_grid_of_llava(size: tuple[int, int], expected: tuple[int, int]) -> None:
    grid = "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"
    assert anyres_grid(size, grid, 336) == expected


@pytest.mark.parametrize(
    "grid",
    [
        "",
        "[",
        "[]",
        "7",
        "__import__('os').getcwd()",
        "(" * 5000,
        "[(64, 64), (64)]",
        [],
        [(64,)],
        [(64, 0)],
        [(-64, 64)],
        [(64.0, 64)],
        [("64", "64")],
        [(100, 64)],
        [(64 * 10**6, 64 * 10**6)],
        {"64": 64},
        64,
    ],
)
def test_bad_grids(grid: Any) -> None:
    for call in (
        lambda: anyres_grid((10, 10), grid, 64),
        lambda: preprocess(NOISE, 64, "anyres", grid),
    ):
        with pytest.raises(ValueError, match="grid_pinpoints") as caught:
            call()
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (1, 2, 3)])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="width, height"):
        anyres_grid(size, GRID, 64)
    with pytest.raises(ValueError, match="positive"):
        anyres_grid((5, 5), GRID, 0)
