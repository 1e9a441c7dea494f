"""What the server remembers across requests: it saves work, and never changes an answer."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
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
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.serve.cache import RequestCache
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
    assert len(set(expected)) > 5

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


def counted(cache: RequestCache) -> int:
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
    cache = RequestCache.__new__(RequestCache)
    fv.PromptCache.__init__(cache, None, max_bytes)  # type: ignore[arg-type]
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
