import base64
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL
import pytest
from images import (
    BOMB,
    DATA,
    GRID,
    NOISE,
    PHOTO,
    TURNED,
    assert_one_sentence,
    saved,
    unit,
    whole,
)
from PIL import Image

from fastvlm_mlx.image import load, resize
from fastvlm_mlx.image import preprocess as preprocessing
from fastvlm_mlx.image.preprocess import preprocess, preprocess_each

FILES = [entry["file"] for entry in json.loads((DATA / "images.json").read_text())["images"]]
EXPECTED = np.load(DATA / "expected.npz")
EXPECTED_MODES = np.load(DATA / "expected_modes.npz")  # from transformers and the original code


# Known pixels


@pytest.mark.parametrize("file", FILES)
def test_pixels_equal_the_reference(file: str) -> None:
    result = preprocess(DATA / file, 256)
    assert result.shape == (1, 256, 256, 3) and result.dtype == mx.float32
    np.testing.assert_array_equal(np.asarray(result)[0], unit(EXPECTED[file]))


@pytest.mark.parametrize("key", EXPECTED_MODES.files)
def test_other_modes_equal_the_reference(key: str) -> None:
    mode, file, side = key.split("-")
    result = np.asarray(preprocess(DATA / file, int(side), mode, GRID))
    if file == "tall.png" and int(PIL.__version__.split(".")[0]) < 13:
        # As measured: Pillow 13, which the expected values come from, gives a few others.
        off = np.abs(result - unit(EXPECTED_MODES[key]))
        assert off.max() <= 4.5 / 255 and np.mean(off > 0) < 0.03
    else:
        np.testing.assert_array_equal(result, unit(EXPECTED_MODES[key]))


# Arguments


def test_batch() -> None:
    sources: list[Any] = [DATA / "wide.png", NOISE, (DATA / "photo.jpg").read_bytes()]
    for mode in ("pad", "square"):
        batch = preprocess(sources, 64, mode)
        assert batch.shape == (3, 64, 64, 3)
        for one, source in zip(batch, sources, strict=True):
            assert mx.array_equal(one[None], preprocess(source, 64, mode))
        assert mx.array_equal(batch, preprocess(tuple(sources), 64, mode))


def test_bytes_and_floats() -> None:
    found = preprocess(DATA / "photo.jpg", 128, dtype=mx.uint8)
    assert found.shape == (1, 128, 128, 3) and found.dtype == mx.uint8
    assert mx.array_equal(preprocess(DATA / "photo.jpg", 128), mx.array(unit(np.asarray(found))))
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, 0).repeat(4, 1)
    every_byte = preprocess(ramp, 64)
    assert every_byte.dtype == mx.float32
    np.testing.assert_array_equal(np.asarray(every_byte)[0, ..., 0], unit(ramp))


def test_default_size() -> None:
    result = preprocess(NOISE)
    assert result.shape == (1, 1024, 1024, 3)
    found = np.asarray(result)
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((NOISE, 0), "multiple of 64"),
        ((NOISE, -64), "multiple of 64"),
        ((NOISE, 100), "multiple of 64"),
        ((NOISE, 64.0), "multiple of 64"),
        ((NOISE, "64"), "multiple of 64"),
        ((NOISE, 64, "stretch"), "'stretch'"),
        ((NOISE, 64, "anyres"), "grid_pinpoints"),
        (([NOISE], 64, "anyres", GRID), "one image at a time"),
        (([], 64), "empty"),
        ((np.zeros((2, 5, 5, 3), np.uint8), 64), "as a list"),
        ((NOISE, 64_000), "64000 × 64000"),
        ((np.zeros((1, 3_000_000), np.uint8), 64), "3000000 × 1"),
        ((np.zeros((1, 50_000), np.uint8), 64, "square"), "crop it"),
        ((np.zeros((3_000_000, 1), np.uint8), 64, "anyres", GRID), "1 × 3000000"),
        ((np.zeros((40_000, 1), np.uint8), 64), "1 × 40000"),
    ],
)
def test_bad_arguments(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        preprocess(*arguments)
    assert said in str(caught.value)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [mx.float16, mx.int32, "uint8", np.uint8, None])
def test_bad_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match="float32 or uint8") as caught:
        preprocess(NOISE, 64, dtype=dtype)
    assert_one_sentence(caught.value)


def test_bad_arguments_are_found_before_the_first_image() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        preprocess_each(["no/such/file"], 65)
    assert list(preprocess_each([])) == []


# Many images


class Late(io.BytesIO):
    """A file that tells how many are being read, and takes its time."""

    reading = 0
    most = 0
    begun = 0
    lock = threading.Lock()

    def read(self, size: int | None = -1) -> bytes:
        with Late.lock:
            Late.begun += 1
            Late.reading += 1
            Late.most = max(Late.most, Late.reading)
        time.sleep(0.02)
        with Late.lock:
            Late.reading -= 1
        return super().read(size)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    for name in ("reading", "most", "begun"):
        monkeypatch.setattr(Late, name, 0)
    return Late


@pytest.mark.usefixtures("many_threads")
def test_each_in_order_and_at_once(late: type[Late]) -> None:
    sizes = [(50 + n, 100 - 3 * n) for n in range(23)]
    sources = [late(saved(whole(*size))) for size in sizes]
    for n, (pixel_values, size) in enumerate(preprocess_each(sources, 64)):
        assert size == sizes[n]
        assert mx.array_equal(pixel_values, preprocess(whole(*size), 64))
        assert late.begun <= n + 1 + 2 * 5  # not all of a long list at once
    assert n == 22 and 2 <= late.most <= 5


def test_one_core_reads_one_at_a_time(late: type[Late], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing.os, "cpu_count", lambda: None)
    sizes = [size for _, size in preprocess_each([late(saved(NOISE)) for _ in range(3)], 64)]
    assert sizes == [(7, 5)] * 3 and late.most == 1


@pytest.mark.usefixtures("many_threads")
def test_no_thread_outlives_its_images(late: type[Late]) -> None:
    before = threading.active_count()
    each = preprocess_each([late(saved(NOISE)) for _ in range(50)], 64)
    next(each)
    assert threading.active_count() > before
    del each
    assert threading.active_count() == before


@pytest.mark.usefixtures("many_threads")
def test_every_kind_of_source_in_threads() -> None:
    opened = Image.open(DATA / "photo.jpg")
    sources: list[Any] = [opened, opened, mx.array(NOISE) + 0, opened, NOISE, "no/such/file", None]
    each = preprocess_each(sources, 64)
    for expected in (DATA / "photo.jpg", DATA / "photo.jpg", NOISE, DATA / "photo.jpg", NOISE):
        assert mx.array_equal(next(each)[0], preprocess(expected, 64))
    with pytest.raises(FileNotFoundError, match="no/such/file") as caught:
        next(each)
    assert_one_sentence(caught.value)


@pytest.mark.usefixtures("many_threads")
def test_the_first_bad_image_is_reported() -> None:
    late_and_bad = Late(b"no image, but it takes time to see")
    with pytest.raises(ValueError, match="the file object: it is not an image"):
        preprocess([NOISE, late_and_bad, "no/such/file", b""], 64)


# JPEG reduced while decoding


def photo(width: int, height: int) -> Image.Image:
    """A real one, enlarged: without the detail that no photo of that many pixels has."""
    with Image.open(DATA / "photo.jpg") as image:
        return image.resize((width, height), Image.Resampling.BICUBIC)


FAST_MODES: list[tuple[str, Any]] = [("pad", None), ("square", None), ("anyres", GRID)]


@pytest.mark.parametrize("mode, grid", FAST_MODES)
@pytest.mark.parametrize("orientation", TURNED)
def test_fast_is_close(mode: str, grid: Any, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(1603, 1197), "JPEG", quality=92, exif=exif)  # of no whole blocks
    ((exact, size),) = preprocess_each([data], 64, mode, grid, dtype=mx.uint8)
    ((fast, fast_size),) = preprocess_each([data], 64, mode, grid, fast=True, dtype=mx.uint8)
    assert fast_size == size == ((1603, 1197) if orientation < 5 else (1197, 1603))
    assert fast.shape == exact.shape
    error = np.abs(np.asarray(fast).astype(int) - np.asarray(exact))
    # Beside the padding, the last row is a whole one, though it stands for a part of one.
    assert 0 < np.percentile(error, 95) <= 4 and error.max() <= 24 and error.mean() < 0.5


@pytest.mark.parametrize(
    "longest, decoded", [(191, 191), (192, 96), (383, 192), (384, 96), (768, 96), (9999, 1250)]
)
def test_fast_decodes_no_smaller_than_it_may(longest: int, decoded: int) -> None:
    for size in ((longest, 60), (60, longest)):
        data = saved(Image.new("RGB", size, (9, 99, 200)), "JPEG")
        _, purpose = resize.choose_resize(64, "pad", None)
        picture = load.read_picture(data, purpose=purpose)
        assert max(picture.size) == decoded and picture.full_size == size


@pytest.mark.parametrize("mode, grid", FAST_MODES)
def test_fast_is_exact_where_it_has_no_effect(mode: str, grid: Any, tmp_path: Path) -> None:
    image = photo(700, 500)
    opened = Image.open(io.BytesIO(saved(image, "JPEG")))
    sources: list[Any] = [saved(image, "PNG"), saved(image, "WEBP"), np.asarray(image), opened]
    for source in sources:
        exact = preprocess(source, 64, mode, grid)
        assert mx.array_equal(preprocess(source, 64, mode, grid, fast=True), exact)
    assert opened.size == (700, 500)


def test_fast_from_everywhere(tmp_path: Path) -> None:
    data = saved(photo(700, 500), "JPEG")
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    expected = preprocess(data, 64, fast=True)
    assert not mx.array_equal(expected, preprocess(data, 64))
    encoded = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    sources: list[Any] = [path, str(path), path.as_uri(), io.BytesIO(data), encoded]
    for source in sources:
        assert mx.array_equal(preprocess(source, 64, fast=True), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_fast_in_other_colours(mode: str) -> None:
    data = saved(photo(700, 500).convert(mode), "JPEG", quality=95)
    exact, fast = (np.asarray(preprocess(data, 64, fast=f)) for f in (False, True))
    assert 0 < np.abs(exact - fast).max() < 12 / 255


def test_fast_finds_the_same_faults() -> None:
    for data in (PHOTO[: len(PHOTO) // 2], BOMB):
        with pytest.raises(ValueError) as caught:
            preprocess(data, 64, fast=True)
        assert_one_sentence(caught.value)
