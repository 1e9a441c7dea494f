from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import TURNED, saved, unit, whole
from PIL import Image

from fastvlm_mlx.image import decode, load, resize
from fastvlm_mlx.image.decode import MAX_PIXELS
from fastvlm_mlx.image.preprocess import preprocess
from fastvlm_mlx.image.resize import expand_to_square

RNG = np.random.default_rng(8)

quick = settings(max_examples=60, deadline=None)


# "pad"


@pytest.mark.parametrize(
    "size, corner",
    [((4, 4), (0, 0)), ((5, 2), (0, 1)), ((2, 5), (1, 0)), ((7, 6), (0, 0)), ((1, 4), (1, 0))],
)
def test_expand_to_square(size: tuple[int, int], corner: tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    square = np.asarray(expand_to_square(image, (9, 8, 7)))
    expected = np.tile(np.array([9, 8, 7], np.uint8), (max(size), max(size), 1))
    left, top = corner
    expected[top : top + size[1], left : left + size[0]] = np.asarray(image)
    np.testing.assert_array_equal(square, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 128, 320]))
def test_pad_in_bands_is_pad_at_once(width: int, height: int, side: int) -> None:
    image = whole(width, height)
    expected = expand_to_square(image).resize((side, side), Image.Resampling.BICUBIC)
    found = np.asarray(preprocess(image, side))
    np.testing.assert_array_equal(found[0], unit(np.asarray(expected)))


@pytest.mark.usefixtures("many_threads")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.sampled_from([64, 192, 256, 320, 512]),
    st.sampled_from(list(TURNED)),
)
def test_pad_in_threads_is_pad_at_once(
    width: int, height: int, side: int, orientation: int
) -> None:
    stored = whole(width, height)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.ascontiguousarray(TURNED[orientation](np.asarray(stored))))
    expected = expand_to_square(upright).resize((side, side), Image.Resampling.BICUBIC)
    found = preprocess(saved(stored, exif=exif, compress_level=0), side, dtype=mx.uint8)
    assert found.dtype == mx.uint8
    np.testing.assert_array_equal(np.asarray(found)[0], np.asarray(expected))


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(
    "size, side",
    [
        ((1200, 1600), 1024),
        ((1601, 1203), 1024),
        ((1081, 1923), 768),
        ((3, 4097), 1024),
        ((16_391, 7), 1024),  # too many digits for a box in single precision, but for the 16
        ((40_001, 9), 1024),
        ((7, 6_001), 512),
        ((640, 480), 1024),
    ],
)
def test_pad_of_large_images(size: tuple[int, int], side: int) -> None:
    image = whole(*size)
    longest = max(size)
    if longest > 5000:  # its square is too large: the same in two passes
        square = Image.new("RGB", (side, longest))
        row = Image.new("RGB", (longest, size[1]))
        row.paste(image, ((longest - size[0]) // 2, 0))
        row = row.resize((side, size[1]), Image.Resampling.BICUBIC)
        square.paste(row, (0, (longest - size[1]) // 2))
    else:
        square = expand_to_square(image)
    expected = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(preprocess(image, side, dtype=mx.uint8))[0], expected)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (40, 900)])
def test_only_a_little_black_is_resized(size: tuple[int, int]) -> None:
    picture = load.read_picture(whole(*size))
    for axis, edge in enumerate(size):
        span = resize._padded_span(picture, axis, 256)
        filled = 256 * edge / max(size)
        assert filled <= span.size <= min(256, filled + 48)
        assert span.stop - span.start <= edge + 48 * max(size) / 256


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000).map(lambda n: 64 * n),
    st.integers(1, MAX_PIXELS // 64),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_box_is_exact_in_single_precision(
    side: int, longest: int, ratio: float, tall: bool
) -> None:
    longest = max(1, min(longest, MAX_PIXELS // side))
    short = max(1, min(int(longest * ratio), MAX_PIXELS // longest))
    size = (short, longest) if tall else (longest, short)
    image: Any = SimpleNamespace(size=size)
    for axis, edge in enumerate(size):
        picture = decode.Picture(image, 1, size)
        span = resize._padded_span(picture, axis, side)
        before = (longest - edge) // 2
        assert Fraction(span.high - span.low) == Fraction(span.size * longest, side)
        assert Fraction(span.low + span.start + before) == Fraction(span.first * longest, side)
        for place in (span.low, span.high, span.high - span.low):
            assert np.float32(place) == place


def test_wide_images_need_no_square() -> None:
    strip = np.full((20, 100_000), 255, np.uint8)  # its square would have 10,000 million pixels
    result = np.asarray(preprocess(strip, 64))[0]
    assert result[31:33].any(axis=(1, 2)).any() and not result[:30].any() and not result[34:].any()


# "square"


@quick
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 128]))
def test_square_keeps_the_centre(width: int, height: int, side: int) -> None:
    image = whole(width, height)
    if width <= height:
        long = int(side * height / width)
        resized = np.asarray(image.resize((side, long), Image.Resampling.BICUBIC))
        expected = resized[(long - side) // 2 :][:side]
    else:
        long = int(side * width / height)
        resized = np.asarray(image.resize((long, side), Image.Resampling.BICUBIC))
        expected = resized[:, (long - side) // 2 :][:, :side]
    for mode in ("square", None, "", "none"):
        np.testing.assert_array_equal(np.asarray(preprocess(image, side, mode))[0], unit(expected))
