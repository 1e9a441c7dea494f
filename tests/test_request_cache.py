"""What the server remembers across requests: it saves work, and never changes an answer."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import alone, request, text_of, until, with_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PANDA, PENGUINS, Nano
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.generation.prefix import Prefix, PrefixTree
from fastvlm_mlx.generation.scheduler import Batch
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.qwen2 import Qwen2
from fastvlm_mlx.serve.cache import RequestCache, ends_of_images, identity_of
from fastvlm_mlx.serve.disk import Disk
from fastvlm_mlx.serve.engine import Engine, Timings

COUNT, DESCRIBE = "How many penguins are there?", "Describe the image."


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many squares each call of the encoder took."""
    calls: list[int] = []
    encode = FastVLM.encode_image

    def encode_image(self: FastVLM, pixels: mx.array) -> mx.array:
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(FastVLM, "encode_image", encode_image)
    yield calls


async def ask(engine: Engine, *asked: Any, **options: Any) -> tuple[str, Timings]:
    ticket = engine.submit(request(*asked, **options))
    text = await text_of(ticket)
    assert ticket.timings is not None
    return text, ticket.timings


def ways_to_give(path: Any) -> list[Any]:
    """One picture as bytes, in another format, as a PIL image, a file and an array."""
    image = Image.open(path).convert("RGB")
    other = BytesIO()
    image.save(other, "BMP")
    return [
        path.read_bytes(),
        other.getvalue(),
        image,
        BytesIO(path.read_bytes()),
        np.asarray(image),
    ]


def test_a_picture_is_known_however_it_is_given(nano: Nano, encoded: list[int]) -> None:
    expected = alone(nano, request(COUNT, PENGUINS.read_bytes()))

    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        encoded.clear()
        for n, picture in enumerate(ways_to_give(PENGUINS)):
            text, timings = await ask(engine, COUNT, picture)
            assert text == expected and timings.cached_images == (n > 0)
        assert encoded == [1]
        stats = engine.stats
        assert stats.cached_images == 4 and stats.cached_tokens > 0
        assert 0 < stats.cache_bytes == engine.cache.nbytes  # type: ignore[union-attr]

    with_engine(nano, use, cache=RequestCache(nano[0]))


def test_another_question_about_a_picture_reads_only_itself(nano: Nano, encoded: list[int]) -> None:
    picture = PENGUINS.read_bytes()
    questions = [DESCRIBE, COUNT, "What animals are these?"]
    options = {"image_size": 128, "conv_mode": None}
    expected = [alone(nano, request(q, picture, **options)) for q in questions]

    async def use(engine: Engine) -> None:
        await until(lambda: engine.ready)
        encoded.clear()
        for n, question in enumerate(questions):
            ticket = engine.submit(request(question, picture, **options))
            pieces = [piece async for piece in ticket]
            assert "".join(piece.text for piece in pieces) == expected[n]
            if n:
                left = pieces[0].prompt_tokens - pieces[0].cached_tokens
                assert 0 < left < 30 and pieces[0].cached_images == 1
        assert encoded == [1]

    with_engine(nano, use, cache=RequestCache(nano[0]))


def test_pictures_sizes_and_orders_are_not_mistaken(nano: Nano) -> None:
    panda, penguins = PANDA.read_bytes(), PENGUINS.read_bytes()
    changed = np.array(Image.open(PANDA).convert("RGB"))
    changed[:64, :64] = 255 - changed[:64, :64]
    each: list[Any] = [
        ((DESCRIBE, panda), {}),
        ((DESCRIBE, penguins), {}),
        ((DESCRIBE, changed), {}),
        ((DESCRIBE, panda), {"image_size": 128}),
        ((DESCRIBE, panda, penguins), {}),
        ((DESCRIBE, penguins, panda), {}),
        ((DESCRIBE, panda, panda), {}),
        ((DESCRIBE,), {}),
        ((DESCRIBE, panda), {"conv_mode": None, "system": "Be brief."}),
    ]
    expected = [alone(nano, request(*asked, **options)) for asked, options in each]
    assert len(set(expected)) >= 5

    async def use(engine: Engine) -> None:
        for order in (each, each[::-1], each):
            found = [await ask(engine, *asked, **options) for asked, options in order]
            texts = [text for text, _ in found][:: -1 if order is not each else 1]
            assert texts == expected
        tickets = [engine.submit(request(*asked, **options)) for asked, options in each]
        assert [await text_of(ticket) for ticket in tickets] == expected

    with_engine(nano, use, cache=RequestCache(nano[0]))


def test_a_picture_that_several_wait_for_is_encoded_once(nano: Nano, encoded: list[int]) -> None:
    batch = Batch(*nano, cache=RequestCache(nano[0]))
    ids = [batch.insert(*each) for each in ((DESCRIBE, PANDA), (COUNT, PANDA), (COUNT, PENGUINS))]
    twice = batch.insert("<image> <image> Hi", [PANDA, PANDA], max_tokens=4)
    texts: dict[int, str] = dict.fromkeys([*ids, twice], "")
    while batch:
        for id, response in batch.step():
            texts[id] += response.text
    assert encoded == [2]
    assert texts[ids[0]] == fv.generate(*nano, DESCRIBE, image=PANDA)
    assert texts[ids[1]] == fv.generate(*nano, COUNT, image=PANDA)


def test_what_several_ask_about_one_picture_at_once_reads_it_once(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    run = Qwen2.hidden_states

    def hidden_states(self: Qwen2, ids: Any, cache: Any = None, embeddings: Any = None) -> mx.array:
        if embeddings is not None:
            read.append(embeddings.shape[:2])
        return run(self, ids, cache, embeddings)

    asked = [(DESCRIBE, PANDA), (COUNT, PANDA), (COUNT, PENGUINS), (DESCRIBE, PANDA)]
    asked += [("Hello!", None), ("Hello!", None)]
    options: dict[str, Any] = {"conv_mode": "plain", "max_tokens": 8}
    expected = [fv.generate(*nano, q, image=image, **options) for q, image in asked]
    batch = Batch(*nano, cache=RequestCache(nano[0]))
    ids = [batch.insert(q, image, **options) for q, image in asked]
    monkeypatch.setattr(Qwen2, "hidden_states", hidden_states)
    texts = dict.fromkeys(ids, "")
    while batch:
        for id, response in batch.step():
            texts[id] += response.text
    assert list(texts.values()) == expected
    (together, length), *later = read
    assert together == 4 and length > 4  # one for each picture, and those without
    assert sum(rows for rows, _ in later) == 2
    assert max(rest for _, rest in later) <= length - 16  # the visual tokens


def test_what_was_handed_out_is_never_changed(nano: Nano) -> None:
    """Two answers branch from one beginning, at once; one is given up; then all again."""
    picture = PENGUINS.read_bytes()
    branches = [
        request(q, picture, max_tokens=12) for q in (DESCRIBE, COUNT, "Hi", COUNT + " And?")
    ]
    expected = [alone(nano, each) for each in branches]
    cache = RequestCache(nano[0])

    async def use(engine: Engine) -> None:
        assert await text_of(engine.submit(branches[0])) == expected[0]
        (first,) = nodes(cache._tree)
        ids, held = first.ids, [np.array(a) for a in first.stored]
        given_up = engine.submit(branches[1])
        await anext(given_up)
        tickets = [engine.submit(each) for each in branches]
        given_up.cancel()
        assert [await text_of(ticket) for ticket in tickets] == expected
        again = [engine.submit(each) for each in branches]
        assert [await text_of(ticket) for ticket in again] == expected
        found, _ = cache._tree.find(ids)
        assert found.ids == ids and len(nodes(cache._tree)) > 4
        for before, now in zip(held, found.stored, strict=True):
            assert np.array_equal(before, np.array(now))

    with_engine(nano, use, cache=cache)


def nodes(tree: PrefixTree) -> list[Any]:
    found, left = [], list(tree.root.children.values())
    while left:
        found.append(left.pop())
        left += found[-1].children.values()
    return found


@pytest.mark.parametrize("max_bytes", [1, 300, 5_000, 40_000, 120_000, 2**30])
def test_the_budget_holds_on_every_path(nano: Nano, max_bytes: int) -> None:
    pictures = [PANDA.read_bytes(), PENGUINS.read_bytes()]
    asked = [(q, p) for q in (DESCRIBE, COUNT, "Hi") for p in pictures] + [("Hello!",)]
    expected = [alone(nano, request(*each)) for each in asked]
    cache = RequestCache(nano[0], max_bytes=max_bytes)
    most = 0

    async def use(engine: Engine) -> None:
        nonlocal most
        for _ in range(2):
            tickets = [engine.submit(request(*each)) for each in asked]
            for ticket, text in zip(tickets, expected, strict=True):
                found = ""
                async for piece in ticket:
                    found += piece.text
                    most = max(most, cache.nbytes)
                assert found == text

    with_engine(nano, use, cache=cache, max_batch=2)
    assert most <= max_bytes and cache.nbytes == counted(cache)
    assert (most > 0) == (max_bytes > 300)


def test_what_is_kept_holds_no_other_memory(nano: Nano) -> None:
    """Eight pictures are encoded together, and only one of them is kept."""
    cache = RequestCache(nano[0], max_bytes=20_000)

    def ask_about(pictures: range) -> None:
        batch = Batch(*nano, cache=cache)
        for n in pictures:
            batch.insert("Hi", Image.new("RGB", (256, 256), (n, 2 * n, 9)), max_tokens=1)
        while batch:
            batch.step()

    ask_about(range(8))
    gc.collect()
    cache.clear()
    before = mx.get_active_memory()
    ask_about(range(8, 16))
    gc.collect()
    assert 16_000 < cache.nbytes <= mx.get_active_memory() - before < 30_000


def counted(cache: fv.PromptCache) -> int:
    """The bytes that a cache holds, counted anew."""
    arrays = [a for node in nodes(cache._tree) for a in node.stored]
    arrays += [image.tokens for image in cache._images.values()]
    assert len(cache._used) == len(nodes(cache._tree)) + len(cache._images)
    return sum(a.nbytes for a in arrays)


def stored_for(ids: list[int]) -> list[mx.array]:
    """Keys and values in which every token is its own id, of two layers."""
    values = mx.array(ids, mx.float32).reshape(1, 1, 1, -1, 1)
    return [mx.broadcast_to(values + layer, (2, 1, 1, len(ids), 3)) for layer in (0, 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=12))
def test_a_tree_finds_the_longest_beginning_and_its_own_values(prompts: list[list[int]]) -> None:
    tree, known = PrefixTree(), [[]]
    for prompt in prompts:
        best = max(
            next(n for n in range(len(prompt), -1, -1) if k[:n] == prompt[:n]) for k in known
        )
        found, _ = tree.find(prompt)
        assert found.ids == prompt[:best]
        wanted = stored_for(prompt[:best]) if best else []
        assert len(found.stored) == len(wanted)
        assert all(mx.array_equal(a, b) for a, b in zip(found.stored, wanted, strict=True))
        tree.insert(prompt, stored_for([*prompt, 9]))
        known.append(prompt)
    beginnings = {tuple(k[:n]) for k in known for n in range(1, len(k) + 1)}
    assert sum(len(node.ids) for node in nodes(tree)) == len(beginnings)  # each is kept once


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=15),
    st.integers(1, 600),
)
def test_any_traffic_stays_within_the_budget(prompts: list[list[int]], max_bytes: int) -> None:
    cache = fv.PromptCache(None, max_bytes)  # type: ignore[arg-type]
    for n, prompt in enumerate(prompts):
        cache.find([*prompt, 5])
        if n % 2:
            cache.store_prefix(Prefix(prompt, stored_for(prompt)))
        cache.store_image(bytes([n % 4]) * 16, mx.zeros((1 + n, 3)))
        assert counted(cache) == cache.nbytes <= max_bytes


def test_the_least_recently_used_goes_first(nano: Nano) -> None:
    cache = RequestCache(nano[0], max_bytes=4 * 48)
    for prompt in ([1], [2], [3], [4]):
        cache.store_prefix(Prefix(prompt, stored_for(prompt)))
    assert cache.nbytes == 4 * 48
    assert cache.find([1, 9]).ids == [1]
    cache.store_prefix(Prefix([5], stored_for([5])))
    assert [cache.find([n, 9]).ids for n in (1, 2, 3, 4, 5)] == [[1], [], [3], [4], [5]]


# In files


def cache_in(nano: Nano, folder: Path, **settings: Any) -> RequestCache:
    return RequestCache(nano[0], cache_dir=folder, **settings)


def answer_after_restart(
    nano: Nano, cache: RequestCache, *asked: Any, **options: Any
) -> tuple[str, Timings]:
    found = with_engine(nano, lambda engine: ask(engine, *asked, **options), cache=cache)
    assert cache.disk is not None
    cache.disk.flush()
    return found


@pytest.mark.parametrize("options", [{}, {"image_size": 128, "conv_mode": None}], ids=["", "more"])
def test_a_picture_is_known_after_a_restart(
    nano: Nano, tmp_path: Path, options: dict[str, Any]
) -> None:
    picture = PENGUINS.read_bytes()
    for n, question in enumerate((DESCRIBE, COUNT, COUNT)):
        expected = alone(nano, request(question, picture, **options))
        cache = cache_in(nano, tmp_path / "new" / "cache")
        text, timings = answer_after_restart(nano, cache, question, picture, **options)
        assert text == expected and timings.cached_images == (n > 0)
        assert (timings.cached_tokens > 0) == (n > 0)
        if n:
            assert timings.encode == 0
    assert len(list((tmp_path / "new" / "cache").glob("*.array"))) == 2


def test_several_pictures_are_known_after_a_restart(nano: Nano, tmp_path: Path) -> None:
    pictures = PENGUINS.read_bytes(), PANDA.read_bytes()
    for n, shown in enumerate((pictures[:1], pictures, pictures[::-1], pictures)):
        expected = alone(nano, request(DESCRIBE, *shown))
        text, timings = answer_after_restart(nano, cache_in(nano, tmp_path), DESCRIBE, *shown)
        assert text == expected and timings.cached_images == [0, 1, 2, 2][n]


def test_another_model_or_precision_takes_nothing(nano: Nano, tmp_path: Path) -> None:
    model, processor = nano
    disk = cache_in(nano, tmp_path)
    answer_after_restart(nano, disk, COUNT, PENGUINS.read_bytes())
    half = fv.load_model(NANO, dtype="float16")
    changed = fv.load_model(NANO)
    bias = changed.mm_projector.layers[0].bias
    changed.mm_projector.layers[0].bias = mx.where(mx.arange(bias.size) == 3, bias + 1e-3, bias)
    names = {identity_of(each) for each in (model, half, changed)}
    assert len(names) == 3 and identity_of(fv.load()[0]) in names
    for other in (half, changed):
        cache = RequestCache(other, cache_dir=tmp_path)
        pair = other, processor
        expected = alone(pair, request(COUNT, PENGUINS.read_bytes()))
        text, timings = answer_after_restart(pair, cache, COUNT, PENGUINS.read_bytes())
        assert timings.cached_images == 0 and text == expected


def damage(data: bytes) -> dict[str, bytes]:
    """What may become of a file."""
    header, end, values = data.partition(b"\n")
    return {
        "empty": b"",
        "cut in its header": data[:20],
        "cut in its data": data[:-7],
        "without data": header + end,
        "another value": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "an endless header": header + b" " + values,
        "a header that is none": b"x" * len(header) + end + values,
        "another shape": data.replace(b"[3, 4]", b"[2, 6]", 1),
        "text": b"Hello! " * 50,
        "zeros": bytes(len(data)),
    }


@pytest.mark.parametrize("kind", damage(bytes(8)))
def test_a_damaged_file_is_ignored_and_removed(tmp_path: Path, kind: str) -> None:
    name, array = "0123456789abcdef" * 2, mx.arange(12.0).reshape(3, 4).astype(mx.bfloat16)
    disk = Disk(tmp_path)
    disk.write(name, array)
    disk.flush()
    (file,) = tmp_path.glob("*.array")
    found = Disk(tmp_path).read(name)
    assert found is not None and found.dtype == array.dtype and mx.array_equal(found, array)
    file.write_bytes(damage(file.read_bytes())[kind])
    disk = Disk(tmp_path)
    assert disk.read(name) is None and name not in disk
    assert not file.exists() and disk.nbytes == 0


def test_a_file_under_another_name_is_not_believed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.write("0" * 32, mx.ones(3))
    disk.flush()
    (tmp_path / f"{'0' * 32}.array").rename(tmp_path / f"{'1' * 32}.array")
    assert Disk(tmp_path).read("1" * 32) is None


def test_damaged_files_change_no_answer(nano: Nano, tmp_path: Path) -> None:
    picture = PENGUINS.read_bytes()
    expected = alone(nano, request(COUNT, picture))
    answer_after_restart(nano, cache_in(nano, tmp_path), COUNT, picture)
    for file in tmp_path.glob("*.array"):
        file.write_bytes(file.read_bytes()[:-100])
    text, timings = answer_after_restart(nano, cache_in(nano, tmp_path), COUNT, picture)
    assert text == expected and timings.cached_images == timings.cached_tokens == 0
    text, timings = answer_after_restart(nano, cache_in(nano, tmp_path), COUNT, picture)
    assert text == expected and timings.cached_images == 1


def test_arrays_of_other_shapes_are_not_taken(nano: Nano, tmp_path: Path) -> None:
    cache = cache_in(nano, tmp_path)
    assert cache.disk is not None
    ids = [1, -7, -7, 5]
    for name in (cache._name("image", b"k" * 16), cache._name("prefix", repr(ids[:3]).encode())):
        cache.disk.write(name, mx.ones((2, 3)))
    cache.disk.flush()
    assert cache.find_image(b"k" * 16) is None and cache.find(ids).ids == []
    assert list(tmp_path.glob("*.array")) == []


def test_files_stay_within_their_bound(tmp_path: Path) -> None:
    names = [f"{n:032x}" for n in range(6)]
    disk = Disk(tmp_path)
    for name in names[:4]:
        disk.write(name, mx.ones(1000))
        disk.flush()
    size = disk.nbytes // 4
    for n, name in enumerate(names[:4]):
        os.utime(tmp_path / f"{name}.array", (n, n))
    disk = Disk(tmp_path, max_bytes=3 * size)
    assert [name in disk for name in names[:4]] == [False, True, True, True]
    assert disk.read(names[1]) is not None
    disk.write(names[4], mx.ones(1000))
    disk.write(names[5], mx.ones(10_000))  # too large
    disk.flush()
    assert [name in disk for name in names] == [False, True, False, True, True, False]
    held = sum(file.stat().st_size for file in tmp_path.glob("*.array"))
    assert held == disk.nbytes <= disk.max_bytes


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    other = [tmp_path / "holiday.array", tmp_path / "notes.txt", tmp_path / ("a" * 32)]
    for file in other:
        file.write_text("mine", encoding="utf-8")
    unfinished = tmp_path / f"{'a' * 32}.array.7.tmp"
    for age, left in ((0, True), (7200, False)):
        unfinished.write_bytes(b"half")
        os.utime(unfinished, (unfinished.stat().st_mtime - age,) * 2)
        disk = Disk(tmp_path, max_bytes=1)
        assert unfinished.exists() == left
    assert disk.nbytes == 0 and all(file.exists() for file in other)


def test_a_file_that_another_process_deleted_is_missing(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.write("0" * 32, mx.ones(3))
    disk.flush()
    for file in tmp_path.glob("*.array"):
        file.unlink()
    assert disk.read("0" * 32) is None and disk.nbytes == 0


def test_a_folder_that_cannot_be_written_is_said_once(
    nano: Nano, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    cache = cache_in(nano, tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    expected = alone(nano, request(COUNT, PENGUINS.read_bytes()))
    assert answer_after_restart(nano, cache, COUNT, PENGUINS.read_bytes())[0] == expected
    assert [r.message for r in caplog.records if "cache" in r.message] == [
        "The cache's folder can't be written: No space left on device."
    ]
    assert list(tmp_path.glob("*.array")) == []


def test_a_folder_that_cannot_be_made_is_refused(nano: Nano, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"The cache can't be kept in .*file"):
        cache_in(nano, tmp_path / "file" / "cache")


def test_ends_of_images() -> None:
    assert ends_of_images([1, 2]) == ends_of_images([]) == []
    assert ends_of_images([1, -5, -5, 2, -5, -7, -7]) == [3, 5, 7]
