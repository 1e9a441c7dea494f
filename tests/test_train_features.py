"""The cache of visual features: what it is found by, and what it survives."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import one_sentence
from models import PANDA, PENGUINS

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import cache_folder
from fastvlm_mlx.checkpoint.cache_folder import CacheFolder, from_entry
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.config import load_config
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.train.augment import Augment
from fastvlm_mlx.train.batches import Batches
from fastvlm_mlx.train.examples import Example, build_example
from fastvlm_mlx.train.features import FeatureCache, digest_weights
from fastvlm_mlx.train.images import ImageReader
from fastvlm_mlx.train.order import Order
from fastvlm_mlx.train.rows import Row

PROCESSOR, CONFIG = load_processor(NANO), load_config(NANO)
SIDE, PLACES, WIDTH = 128, 4, 8


def encode(pixels: mx.array) -> mx.array:
    """Features that tell images apart: [B, S, S, 3] → [B, PLACES, WIDTH]."""
    cells = pixels.astype(mx.float32).reshape(len(pixels), 2, SIDE // 2, 2, SIDE // 2, 3)
    means = cells.mean(axis=(2, 4)).reshape(len(pixels), PLACES, 3)
    return mx.concatenate([means, means[..., :1] * mx.arange(1, WIDTH - 2)], axis=-1)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Pictures of one colour each."""
    from PIL import Image

    files = [folder / f"{n}.png" for n in range(count)]
    for n, file in enumerate(files):
        Image.new("RGB", (40, 30), (n, 2 * n, 255 - n)).save(file)
    return files


def examples_of(files: list[Path]) -> list[Example]:
    return [
        build_example(
            Row(
                file.name,
                [
                    {"role": "user", "content": "<image>\nWho?"},
                    {"role": "assistant", "content": file.name},
                ],
                [file],
                file.name,
            ),
            PROCESSOR,
            CONFIG,
            image_size=SIDE,
        )
        for file in files
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return write_pictures(folder, 12)


def cache_in(folder: Path, weights: str = "w", **options: Any) -> FeatureCache:
    return FeatureCache(folder, encode, weights, **options)


def epoch(
    files: list[Path], cache: FeatureCache, number: int = 0, size: int = SIDE
) -> dict[str, mx.array]:
    """The features of each row of one epoch."""
    reader = ImageReader(PROCESSOR, size, features=cache)
    found = {}
    for batch in Batches(examples_of(files), reader, Order(min(3, len(files)))).batches(number):
        assert batch.pixel_values is None
        found |= dict(zip(batch.ids, batch.features, strict=True))
    return found


def entries(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("*.array"))


def test_the_second_epoch_calls_no_encoder_and_gives_the_same(
    files: list[Path], tmp_path: Path
) -> None:
    cache = cache_in(tmp_path / "cache")
    first = epoch(files, cache)
    assert cache.encoded == len(files) == len(entries(cache))
    assert cache.nbytes == sum(file.stat().st_size for file in entries(cache))
    second = epoch(files, cache, 1)
    assert cache.encoded == len(files) and cache.found == len(files)
    for file in files:
        wanted = encode(mx.array(PROCESSOR.preprocess(file, SIDE, dtype=mx.uint8)))[0]
        for found in (first, second):
            assert mx.abs(found[file.name] - wanted).max().item() <= 1e-6


def test_another_run_finds_what_one_left(files: list[Path], tmp_path: Path) -> None:
    epoch(files[:7], cache_in(tmp_path / "cache"))
    cache = cache_in(tmp_path / "cache")
    epoch(files, cache)
    assert (cache.encoded, cache.found) == (5, 7)


def test_nano_s_features_are_those_of_its_encoder(
    nano: tuple[fv.FastVLM, fv.Processor], tmp_path: Path
) -> None:
    model, processor = nano
    tower = model.vision_tower
    cache = FeatureCache(tmp_path, tower, digest_weights(tower), mode=processor.mode)
    reader = ImageReader(processor, features=cache)
    wanted = tower(processor.preprocess([PANDA, PENGUINS]))
    for _ in range(2):
        images = [reader.read(PANDA), reader.read(PENGUINS), reader.read(PANDA)]
        none, features = reader.collect(images)
        cache.flush()
        assert none is None and features.shape == (3, 16, 512)
        scale = mx.abs(wanted).max().item()
        assert mx.abs(features[:2] - wanted).max().item() <= 1e-6 * max(1, scale)
        assert mx.array_equal(features[0], features[2]).item()
    assert cache.encoded == 2


def test_one_image_of_many_rows_is_encoded_once(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_and_write(folder: CacheFolder, name: str, data: bytes) -> bool:
        time.sleep(0.3)  # meanwhile it is known from memory only
        return write(folder, name, data)

    write = CacheFolder.write
    monkeypatch.setattr(CacheFolder, "write", wait_and_write)
    cache = cache_in(tmp_path / "cache")
    reader = ImageReader(PROCESSOR, SIDE, features=cache)
    (one,) = examples_of(files[:1])
    rows = [replace(one, id=f"{n}") for n in range(20)]
    assert len(list(Batches(rows, reader, Order(2)).batches(0))) == 10
    assert cache.encoded == 1


def test_what_an_entry_depends_on_misses(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def encoded(file: Path = files[0], size: int = SIDE, **options: Any) -> int:
        cache = cache_in(folder, **options)
        reader = ImageReader(PROCESSOR, size, features=cache)
        image = reader.read(file)
        if image.features is None:
            cache.write(image.key, encode(mx.zeros((1, SIDE, SIDE, 3))))
            cache.flush()
        return image.features is None

    assert encoded() and not encoded()
    assert encoded(weights="others") and encoded(size=192) and encoded(mode="square")
    assert not encoded()
    files[0].write_bytes(files[1].read_bytes())  # same path, other bytes
    assert encoded() and not encoded()


def test_a_file_that_changes_between_epochs_is_read_again(
    files: list[Path], tmp_path: Path
) -> None:
    cache = cache_in(tmp_path / "cache")
    reader = ImageReader(PROCESSOR, SIDE, features=cache)
    batches = Batches(examples_of(files[:3]), reader, Order(3, seed=None))
    (first,) = batches.batches(0)
    files[1].write_bytes(files[7].read_bytes())
    (second,) = batches.batches(1)
    assert cache.encoded == 4
    assert mx.array_equal(first.features[0], second.features[0]).item()
    assert not mx.array_equal(first.features[1], second.features[1]).item()


def test_a_digest_tells_weights_and_types_apart(small_folder: Path) -> None:
    tower = fv.load_model(small_folder, dtype="float32").vision_tower
    again = fv.load_model(small_folder, dtype="float32").vision_tower
    assert digest_weights(tower) == digest_weights(again)
    half = fv.load_model(small_folder, dtype="float16").vision_tower
    whole = digest_weights(tower)
    name, layer = next((n, m) for n, m in again.named_modules() if "weight" in m)
    layer.weight = layer.weight * (1 + 1e-6)
    assert len({whole, digest_weights(half), digest_weights(again)}) == 3, name


def test_a_digest_tells_names_shapes_and_dtypes_of_equal_bytes_apart() -> None:
    values = mx.arange(6, dtype=mx.int32)
    arrays = [values, values.reshape(2, 3), values.reshape(3, 2), values.view(mx.float32)]
    modules = [nn.Module() for _ in range(len(arrays) + 1)]
    for module, array in zip(modules, arrays, strict=False):
        module.weight = array
    modules[-1].bias = values
    assert len({digest_weights(module) for module in modules}) == len(modules)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_entries_keep_their_dtype_to_the_bit(tmp_path: Path, dtype: mx.Dtype) -> None:
    features = mx.random.normal((2, PLACES, WIDTH), key=mx.random.key(0)).astype(dtype)
    cache = cache_in(tmp_path)
    cache.write("0" * 32, features)
    cache.flush()
    found = from_entry(cache.read("0" * 32) or b"")
    assert found.dtype == dtype and mx.array_equal(found, features).item()


def damaged(data: bytes) -> list[bytes]:
    middle = len(data) // 2
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    return [b"", data[:5], data[:middle], data[:-1], data + b"x", flipped, b"x" * len(data)]


@pytest.mark.parametrize("kind", range(7))
def test_a_damaged_entry_is_encoded_again(files: list[Path], tmp_path: Path, kind: int) -> None:
    wanted = epoch(files[:3], cache_in(tmp_path / "cache"))
    spoiled = entries(cache_in(tmp_path / "cache"))[1]
    spoiled.write_bytes(damaged(spoiled.read_bytes())[kind])
    cache = cache_in(tmp_path / "cache")
    found = epoch(files[:3], cache)
    assert cache.encoded == 1
    assert all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)
    cache = cache_in(tmp_path / "cache")
    epoch(files[:3], cache)
    assert cache.encoded == 0  # it was mended


def test_entries_of_one_another_s_names_are_damaged(files: list[Path], tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache")
    epoch(files[:2], cache)
    one, other = entries(cache)
    one.write_bytes(other.read_bytes())
    cache = cache_in(tmp_path / "cache")
    epoch(files[:2], cache)
    assert cache.encoded == 1


FILL = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_train_features as t

def slow(pixels):
    print("encoding", len(pixels), flush=True)
    time.sleep(0.05)
    return encode(pixels)

encode, t.encode = t.encode, slow
t.epoch([Path(f) for f in sys.argv[3:]], t.cache_in(Path(sys.argv[2])))
"""


def test_killed_while_filling_only_the_missing_are_encoded(
    files: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    names = [str(file) for file in files]
    run = subprocess.Popen(
        [sys.executable, "-c", FILL, str(Path(__file__).parent), str(folder), *names],
        stdout=subprocess.PIPE,
    )
    assert run.stdout is not None
    for _ in range(3):
        assert run.stdout.readline().startswith(b"encoding")
    deadline = time.monotonic() + 20
    while not list(folder.glob("*.array")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    cache = cache_in(folder)
    kept = len(entries(cache))
    assert 0 < kept < len(files)
    found = epoch(files, cache)
    assert cache.encoded == len(files) - kept
    assert len(found) == len(files)


def test_what_was_left_unfinished_is_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{c * 32}.array.1.tmp" for c in "ab")
    foreign = tmp_path / "notes.txt"
    for file in (old, new, foreign):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    cache_in(tmp_path)
    assert not old.exists() and new.exists() and foreign.exists()


def test_the_bound_holds_and_an_epoch_does_not_empty_itself(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    epoch(files[:1], cache_in(folder))
    size = cache_in(folder).nbytes
    cache = cache_in(folder, max_bytes=5 * size + size // 2)
    with caplog.at_level(logging.WARNING):
        first = epoch(files, cache)
    assert len(entries(cache)) == 5 and cache.nbytes == 5 * size
    assert [r.message for r in caplog.records if "No more visual features" in r.message]
    assert len(caplog.records) == 1
    before = cache.encoded
    second = epoch(files, cache, 1)
    assert cache.encoded - before == 7  # the five that are kept serve every epoch
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)


def test_what_earlier_runs_left_makes_room(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    epoch(files[:6], cache_in(folder, "old weights"))
    size = cache_in(folder).nbytes // 6
    cache = cache_in(folder, max_bytes=8 * size)
    epoch(files[:6], cache)
    assert len(entries(cache)) == 8
    again = cache_in(folder, max_bytes=8 * size)
    epoch(files[:6], again)
    assert again.encoded == 0


def test_a_full_disk_is_said_once_and_stops_nothing(
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = cache_in(tmp_path / "cache")
    monkeypatch.setattr(cache_folder.os, "replace", fail)
    with caplog.at_level(logging.WARNING):
        found = epoch(files, cache)
    assert len(found) == len(files) and not entries(cache)
    (record,) = caplog.records
    assert "No space left on device" in record.message


def test_what_can_not_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Features can't be kept in") as error:
        cache_in(tmp_path / "file")
    one_sentence(error)
    with pytest.raises(ValueError, match="max_bytes must be"):
        cache_in(tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match="leave out either augment") as refused:
        ImageReader(PROCESSOR, augment=Augment(), features=cache_in(tmp_path))
    one_sentence(refused)


def test_tiles_of_an_image_are_one_entry(files: list[Path], tmp_path: Path) -> None:
    pinpoints = [[2 * SIDE, SIDE], [SIDE, 2 * SIDE]]
    processor = fv.Processor(PROCESSOR.tokenizer, SIDE, "anyres", pinpoints)
    cache = cache_in(tmp_path / "cache", mode="anyres")
    reader = ImageReader(processor, features=cache)
    for _ in range(2):
        _, features = reader.collect([reader.read(files[0]), reader.read(files[1])])
        cache.flush()
        assert [f.shape for f in features] == [(3, PLACES, WIDTH)] * 2
    assert cache.encoded == 6 and len(entries(cache)) == 2
    pixels = np.asarray(processor.preprocess(files[1], dtype=mx.uint8))
    assert mx.array_equal(features[1], encode(mx.array(pixels))).item()
