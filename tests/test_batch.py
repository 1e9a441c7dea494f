from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Nano

from fastvlm_mlx import ops
from fastvlm_mlx.generation.batch import BatchError, batch_generate, stream_batch
from fastvlm_mlx.generation.generate import generate, stream_generate
from fastvlm_mlx.generation.requests import RequestError, encode_together
from fastvlm_mlx.generation.scheduler import Batch
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.batch_kv_cache import BatchKVCache
from fastvlm_mlx.model.kv_cache import KVCache

IMAGES = {path.stem: path for path in (NANO / "images").glob("*.png")}
# Quick: one visual token and no system prompt
SMALL: dict[str, Any] = {"image_size": 64, "max_tokens": 5, "conv_mode": "plain"}
REQUESTS: list[Any] = [
    ("Describe the image.", IMAGES["penguins"]),
    ("What does the note say? Read it.", IMAGES["number"]),
    ("Hello!", None),
    ("<image> and <image>: what are these?", [IMAGES["queen"], IMAGES["panda"]]),
    ("How many mushrooms are there?", IMAGES["mushrooms"]),
    ([{"role": "user", "content": "What is this?"}], IMAGES["panda"]),
]


def alone(nano: Nano, requests: list[Any], **options: Any) -> list[str]:
    """The answers of `generate`."""
    return [generate(*nano, prompt, image=image, **options) for prompt, image in requests]


@pytest.fixture(scope="module")
def answers(nano: Nano) -> list[str]:
    texts = alone(nano, REQUESTS, **SMALL)
    assert len(set(texts)) > 4 and all(texts)
    return texts


def drive(batch: Batch) -> dict[int, str]:
    """Step until all requests have ended; the texts by id."""
    texts: dict[int, str] = {}
    while batch:
        for id, response in batch.step():
            texts[id] = texts.get(id, "") + response.text
    return texts


# As `generate`


@pytest.mark.parametrize(("max_batch", "encode_batch"), [(1, 1), (4, 3), (16, None)])
def test_answers_are_those_alone(
    max_batch: int, encode_batch: int | None, nano: Nano, answers: list[str]
) -> None:
    texts = batch_generate(*nano, REQUESTS, max_batch=max_batch, encode_batch=encode_batch, **SMALL)
    assert texts == answers


def test_answers_in_the_forms_for_metal_are_those_alone(
    nano: Nano, answers: list[str], assume: Callable[[str], None]
) -> None:
    assume("metal")
    assert batch_generate(*nano, REQUESTS, max_batch=4, **SMALL) == answers


def test_answers_at_full_size(nano: Nano) -> None:
    requests = [("Describe the image.", IMAGES[name]) for name in ("penguins", "number", "queen")]
    texts = batch_generate(*nano, requests, max_batch=2)
    assert texts == alone(nano, requests)
    assert texts[0] == "The image shows 6 penguins."


def test_tokens_and_counts_are_those_alone(nano: Nano) -> None:
    expected = [
        [
            (
                response.token,
                response.text,
                response.prompt_tokens,
                response.generation_tokens,
                response.finish_reason,
            )
            for response in stream_generate(*nano, prompt, image=image, **SMALL)
        ]
        for prompt, image in REQUESTS
    ]
    found: list[Any] = [[] for _ in REQUESTS]
    for i, response in stream_batch(*nano, REQUESTS, max_batch=4, **SMALL):
        counts = (response.prompt_tokens, response.generation_tokens)
        found[i].append((response.token, response.text, *counts, response.finish_reason))
        assert 0 < response.preprocess_time < response.ttft
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3.0},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 9.0, "top_k": 50, "min_p": 0.001, "top_p": 0.99},
    ],
)
def test_sampled_answers_with_a_seed_are_those_alone(options: dict[str, Any], nano: Nano) -> None:
    options = {**options, **SMALL, "seed": 5}
    texts = batch_generate(*nano, REQUESTS[:3], max_batch=2, **options)
    assert texts == alone(nano, REQUESTS[:3], **options)
    assert texts != batch_generate(*nano, REQUESTS[:3], **{**options, "seed": 6})


def test_sampling_without_a_seed_follows_the_global_one(nano: Nano) -> None:
    def sampled(seed: int) -> list[str]:
        mx.random.seed(seed)
        return batch_generate(*nano, REQUESTS[:2] * 2, temperature=5.0, **SMALL)

    first = sampled(1)
    assert first == sampled(1) != sampled(2)
    assert first[:2] != first[2:]


def test_greedy_needs_no_randomness(nano: Nano) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(5)
    batch_generate(*nano, REQUESTS[:2], seed=3, **SMALL)
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected)


def test_each_request_has_its_own_options(nano: Nano) -> None:
    each: list[dict[str, Any]] = [
        {},
        {"temperature": 3.0, "seed": 1},
        {"temperature": 3.0, "seed": 1, "top_p": 0.95},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"stop": "."},
        {"max_tokens": 1},
        {"logits_processor": lambda tokens, logits: mx.where(tokens.sum() > 0, -logits, logits)},
    ]
    batch = Batch(*nano)
    prompt, image = REQUESTS[0]
    ids = [batch.insert(prompt, image, **{**SMALL, **options}) for options in each]
    texts = drive(batch)
    expected = [generate(*nano, prompt, image=image, **{**SMALL, **options}) for options in each]
    assert [texts[id] for id in ids] == expected
    assert len(set(expected)) >= 5


@pytest.mark.parametrize("prefill_step_size", [1, 7, 30])
def test_prefill_step_size(prefill_step_size: int, nano: Nano, answers: list[str]) -> None:
    texts = batch_generate(*nano, REQUESTS[:3], prefill_step_size=prefill_step_size, **SMALL)
    assert texts == answers[:3]


def test_conversation_arguments(nano: Nano) -> None:
    options = {**SMALL, "system": "Be brief.", "conv_mode": None}
    assert batch_generate(*nano, REQUESTS[:2], **options) == alone(nano, REQUESTS[:2], **options)


def test_answers_end_at_the_models_length(nano: Nano) -> None:
    model, processor = nano
    prompt, image = REQUESTS[0]
    response = next(stream_generate(*nano, prompt, image=image, **SMALL))
    short = replace(processor, max_length=response.prompt_tokens + 3)
    options = {**SMALL, "max_tokens": 9}
    responses = [response for _, response in stream_batch(model, short, REQUESTS[:1], **options)]
    assert [response.finish_reason for response in responses] == [None, None, "length"]


def test_what_prompts_begin_with_is_read_once(nano: Nano) -> None:
    options = {**SMALL, "conv_mode": None, "system": "Be brief."}
    requests = [("Hello!", None), ("Hello! What is this?", IMAGES["panda"]), ("Hello!", None)] * 2
    batch = Batch(*nano, encode_batch=3)
    ids = [batch.insert(prompt, image, **options) for prompt, image in requests]
    batch.step()
    held = batch._prefix
    text = nano[1].tokenizer.decode(held.ids, skip_special_tokens=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    batch.insert("Hello!", conv_mode="plain", **{"max_tokens": 1})
    batch.insert("Hello!", system="Be kind.", **{"max_tokens": 1})
    expected = dict(zip(ids, alone(nano, requests, **options), strict=True))
    texts = drive(batch)
    assert all(expected[id].endswith(texts[id]) for id in ids)
    assert batch._prefix is held


# Arguments and errors


def test_no_requests(nano: Nano) -> None:
    assert batch_generate(*nano, []) == []
    assert Batch(*nano).step() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_bits": 4}, "kv_bits does not go with a batch"),
        ({"max_kv_size": 64}, "max_kv_size does not go with a batch"),
        ({"prompt_lookup": 3}, "prompt_lookup does not go with a batch"),
        ({"num_beams": 2}, "num_beams does not go with a batch"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"max_batch": 0}, "max_batch must be a whole number from 1, found 0"),
        ({"encode_batch": True}, "encode_batch must be a whole number from 1"),
    ],
)
def test_bad_arguments_raise_on_the_call(
    arguments: dict[str, Any], message: str, nano: Nano
) -> None:
    with pytest.raises(ValueError, match=message):
        stream_batch(*nano, iter(REQUESTS), **arguments)


def test_bad_requests_leave_the_others_their_answers(nano: Nano, answers: list[str]) -> None:
    model, processor = nano
    requests = [
        REQUESTS[0],
        ("What is this?", "nowhere/cat.png"),
        ("<image> <image>", IMAGES["panda"]),
        REQUESTS[1],
        "What is this?",
        ("What is this?", b"no image"),
        ("long " * 80, None),
        REQUESTS[2],
    ]
    short = replace(processor, max_length=100)
    with pytest.raises(BatchError, match=r"Request 1: Cannot read 'nowhere/cat.png'") as raised:
        batch_generate(model, short, requests, encode_batch=2, **SMALL)
    error = raised.value
    assert error.texts == [answers[0], None, None, answers[1], None, None, None, answers[2]]
    assert list(error.errors) == [1, 2, 4, 5, 6]
    assert isinstance(error.errors[1], FileNotFoundError)
    for i, message in ((2, "2 <image> mark"), (4, "must be a pair"), (6, "prompt has .* tokens")):
        with pytest.raises(ValueError, match=message):
            raise error.errors[i]
    assert "Another 2 failed." in str(error)


def test_only_bad_requests(nano: Nano) -> None:
    with pytest.raises(BatchError) as raised:
        batch_generate(*nano, [("What is this?", b"no image")] * 40, encode_batch=1)
    assert raised.value.texts == [None] * 40


def test_requests_are_taken_as_they_are_needed(nano: Nano) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Any]:
        for i in range(40):
            taken.append(i)
            yield "Hello!", None

    options = {**SMALL, "max_tokens": 1, "max_batch": 2, "encode_batch": 2}
    responses = stream_batch(*nano, requests(), **options)
    assert not taken
    assert next(responses)[0] == 0
    assert 2 <= len(taken) <= 6
    assert [i for i, _ in responses] == taken[1:] == list(range(1, 40))


# Driven step by step


def test_requests_come_at_any_time(nano: Nano, answers: list[str]) -> None:
    batch = Batch(*nano, max_batch=2)
    coming = iter(REQUESTS)
    texts: dict[int, str] = {}
    index_of: dict[int, int] = {}
    for i, (prompt, image) in enumerate(coming):
        index_of[batch.insert(prompt, image, **SMALL)] = i
        for id, response in batch.step():
            texts[id] = texts.get(id, "") + response.text
    for id, text in drive(batch).items():
        texts[id] = texts.get(id, "") + text
    assert len(batch) == 0
    assert {index_of[id]: text for id, text in texts.items()} == dict(enumerate(answers))


def test_removed_requests_end_at_once(nano: Nano, answers: list[str]) -> None:
    batch = Batch(*nano, max_batch=2, encode_batch=2)
    ids = [batch.insert(prompt, image, **SMALL) for prompt, image in REQUESTS]
    assert {id for id, _ in batch.step()} == set(ids[:2])
    batch.remove(ids[0])  # running
    batch.remove(ids[5])  # waiting
    batch.remove(ids[3])
    batch.remove(99)
    assert len(batch) == 3
    texts = drive(batch)
    assert set(texts) == {ids[1], ids[2], ids[4]}
    assert texts[ids[2]] == answers[2] and texts[ids[4]] == answers[4]
    assert answers[1].endswith(texts[ids[1]])


def test_a_bad_request_harms_no_other(nano: Nano, answers: list[str]) -> None:
    batch = Batch(*nano)
    first = batch.insert(*REQUESTS[0], **SMALL)
    started = batch.step()
    bad = batch.insert("What is this?", b"no image", **SMALL)
    second = batch.insert(*REQUESTS[1], **SMALL)
    with pytest.raises(RequestError, match="Request 1: ") as raised:
        batch.step()
    assert raised.value.id == bad and isinstance(raised.value.error, ValueError)
    texts = drive(batch)
    assert started[0][1].text + texts[first] == answers[0]
    assert texts[second] == answers[1]


def test_images_of_several_sizes(nano: Nano) -> None:
    batch = Batch(*nano)
    sizes = (64, 128, 64)
    ids = [batch.insert("Hi", IMAGES["panda"], image_size=s, max_tokens=4) for s in sizes]
    texts = drive(batch)
    for id, size in zip(ids, sizes, strict=True):
        assert texts[id] == generate(
            *nano, "Hi", image=IMAGES["panda"], image_size=size, max_tokens=4
        )
    with pytest.raises(ValueError, match="multiple of 64"):
        batch.insert("Hi", IMAGES["panda"], image_size=100)


def test_an_array_that_is_not_yet_computed(nano: Nano) -> None:
    pixels = mx.random.uniform(shape=(40, 30, 3), key=mx.random.key(0))
    expected = generate(*nano, "Hi", image=np.array(pixels), **SMALL)
    assert batch_generate(*nano, [("Hi", 1 * pixels)], **SMALL) == [expected]


# The responses


def test_encode_together(nano: Nano) -> None:
    model, processor = nano
    pairs = [(IMAGES["panda"], 64), (IMAGES["queen"], 128), (IMAGES["number"], 64)] * 2
    images = [
        pair
        for path, size in pairs
        for pair in processor.preprocess_each([path], size, dtype=mx.uint8)
    ]
    together = encode_together(model, images, 2)
    for (path, size), features in zip(pairs, together, strict=True):
        expected = model.encode_image(processor.preprocess(path, size))[0]
        assert mx.allclose(features, expected, atol=1e-4).item()


def test_tiles_stay_with_their_image() -> None:
    class Tiled:
        """A model whose visual tokens are the mean of each square."""

        def encode_image(self, pixel_values: mx.array) -> mx.array:
            return pixel_values.mean(axis=(1, 2, 3)).reshape(-1, 1, 1)

        def merge_tiles(self, features: mx.array, image_size: tuple[int, int]) -> mx.array:
            return mx.concatenate([features[:, 0], mx.array([[image_size[0]]])])

    def image(start: int, count: int) -> tuple[mx.array, tuple[int, int]]:
        values = mx.arange(start, start + count, dtype=mx.uint8)[:, None, None, None]
        return mx.broadcast_to(values, (count, 64, 64, 3)), (100 + start, 1)

    found = encode_together(Tiled(), [image(0, 3), image(3, 1), image(4, 5)], 2)  # type: ignore
    assert [features[:, 0].round().tolist() for features in found] == [
        [0, 1, 2, 100],
        [3, 103],
        [4, 5, 6, 7, 8, 104],
    ]


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_decoder_with_a_batch_cache(nano: Nano, assume: Callable[[str], None], device: str) -> None:
    assume(device)
    decoder = nano[0].language_model
    lengths = (3, 9, 1, 6)
    prompts = [mx.random.randint(0, 700, (1, n), key=mx.random.key(n)) for n in lengths]
    added = mx.random.randint(0, 700, (4, 3), key=mx.random.key(0))
    cache = BatchKVCache(len(decoder.layers))
    for prompt, length in zip(prompts, lengths, strict=True):
        own = [KVCache() for _ in decoder.layers]
        decoder.hidden_states(mx.pad(prompt, [(0, 0), (0, 2)]), own)
        cache.add(own, [length])
    for step in range(3):
        together = decoder.hidden_states(added[:, step : step + 1], cache.layers)
        cache.advance()
        for i, prompt in enumerate(prompts):
            whole = mx.concatenate([prompt, added[i : i + 1, : step + 1]], axis=1)
            expected = decoder.hidden_states(whole)[0, -1]
            assert mx.allclose(together[i, 0], expected, atol=1e-4).item()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_of_the_cache(data: st.DataObject) -> None:
    """Rows are added, written and dropped; lists of what each holds are the model."""
    cache = BatchKVCache(1)
    held: list[list[int]] = []
    count = 1
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["add", "step", "keep"]))
        if action == "add":
            lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
            rows = [list(range(count + 10 * i, count + 10 * i + n)) for i, n in enumerate(lengths)]
            padded = [row + [-1] * (max(lengths) - len(row)) for row in rows]
            own = KVCache()
            keys = mx.array(padded, dtype=mx.float32)[:, None, :, None]
            own.update_and_fetch(keys, -keys)
            cache.add([own], lengths)
            held += rows
            count += 100
        elif action == "step" and held:
            written = mx.arange(count, count + len(held), dtype=mx.float32)[:, None, None, None]
            mask = cache.layers[0].make_mask(1)
            keys, values = cache.layers[0].update_and_fetch(written, -written)
            cache.advance()
            held = [[*row, count + i] for i, row in enumerate(held)]
            count += 100
            assert mx.array_equal(keys, -values)
            for i, row in enumerate(held):
                assert keys[i, 0, : len(row), 0].tolist() == row
                seen = keys.shape[2] if mask is None else mask[i].sum().item()
                assert seen == len(row)
        elif action == "keep":
            kept = data.draw(st.lists(st.booleans(), min_size=len(held), max_size=len(held)))
            order = cache.keep(kept)
            assert sorted(order) == [i for i, keep in enumerate(kept) if keep]
            held = [held[i] for i in order]
        assert cache.lengths == cache.offsets.tolist() == [len(row) for row in held]


def test_a_step_writes_in_place() -> None:
    before = mx.get_active_memory()
    cache = BatchKVCache(1)
    own = KVCache()
    own.update_and_fetch(mx.ones((8, 2, 1000, 64)), mx.ones((8, 2, 1000, 64)))
    cache.add([own], [1000, 900] * 4)
    del own
    token = mx.ones((8, 2, 1, 64))
    for step in range(3):
        if step == 1:
            mx.reset_peak_memory()
        keys, values = cache.layers[0].update_and_fetch(token, token)
        mx.eval(keys.sum(), values.sum())
        del keys, values
        cache.advance()
    size = cache.layers[0].stored.nbytes
    assert size == 2 * 4 * 8 * 2 * 1024 * 64
    assert mx.get_peak_memory() < before + 1.3 * size


def test_a_mask_is_written_out_once_for_all_layers(assume: Callable[[str], None]) -> None:
    """Metal's attention copies one that it would have to broadcast, in every layer."""
    mask = mx.array([[True, False, True], [True, True, True]])[:, None, None]
    assume("cpu")
    assert ops.spread_mask(mask, 4) is mask
    assume("metal")
    assert ops.spread_mask(None, 4) is None and ops.spread_mask("causal", 4) == "causal"
    found = ops.spread_mask(mask, 4)
    assert isinstance(found, mx.array) and found.shape == (2, 4, 1, 3)
    assert all(mx.array_equal(found[:, head], mask[:, 0]) for head in range(4))
    assert memoryview(found).c_contiguous


def test_dropped_rows_free_their_memory(nano: Nano) -> None:
    batch = Batch(*nano)
    batch.insert("Hello!", **SMALL)
    drive(batch)
    batch.step()
    assert sum(layer.stored.nbytes for layer in batch._cache.layers) == 0
