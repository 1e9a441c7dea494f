import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache
from models import PANDA, PENGUINS, Nano
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.generation.batch import stream_batch
from fastvlm_mlx.generation.beam import beam_search
from fastvlm_mlx.generation.decode import make_kv_cache
from fastvlm_mlx.generation.generate import generate, stream_generate
from fastvlm_mlx.generation.inputs import check_length, list_images
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.generation.response import Response, StopTexts, stream_responses
from fastvlm_mlx.generation.sampling import keep_top_p, make_sampler
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.processor import Processor
from fastvlm_mlx.text.prompt import build_prompt

ASK = "Describe the image."
ANSWER = "The image shows 6 penguins."
SMALL = {"image": PENGUINS, "image_size": 64}  # one visual token: quick, and not always right
quick = settings(max_examples=60, deadline=None)


def prompt_of(nano: Nano, image_size: int = 64) -> tuple[list[int], mx.array]:
    """Token ids and embeddings of the question about the penguins."""
    model, processor = nano
    features = model.encode_images([processor.preprocess(PENGUINS, image_size)])
    ids = build_prompt(processor.tokenizer, ASK, num_visual_tokens=[len(features[0])])
    return ids, model.embed_inputs(mx.array([ids]), visual_tokens=features)


@pytest.fixture(scope="module")
def tokens(nano: Nano) -> list[int]:
    """The greedy answer to the question about the small penguins."""
    tokens = [response.token for response in stream_generate(*nano, ASK, **SMALL)]
    assert len(tokens) > 5 and tokens[-1] == 742
    return tokens


@pytest.fixture(scope="module")
def small_answer(nano: Nano, tokens: list[int]) -> str:
    return nano[1].tokenizer.decode(tokens)


def tokens_of(nano: Nano, text: str) -> list[int]:
    return nano[1].tokenizer.encode(text)


def parts_of(nano: Nano, tokens: list[int], stop: Sequence[str] = (), limit: int = 999) -> list:
    """What a stream of tokens becomes, without the model."""
    return list(stream_responses(iter(tokens), nano[1], 5, stop, limit, (0.0, 0.0, 0.0)))


def text_of(responses: list[Response]) -> str:
    return "".join(response.text for response in responses)


# Greedy


def test_greedy_equals_a_loop_without_cache(nano: Nano) -> None:
    model, processor = nano
    _, embeddings = prompt_of(nano, 256)
    tokens: list[int] = []
    while not processor.tokenizer.eos_token_ids & set(tokens):
        logits = model.language_model(None, input_embeddings=embeddings)
        tokens.append(int(mx.argmax(logits[0, -1])))
        added = model.language_model.embed_tokens(mx.array([tokens[-1:]]))
        embeddings = mx.concatenate([embeddings, added], axis=1)
    responses = list(stream_generate(*nano, ASK, image=PENGUINS))
    assert [response.token for response in responses] == tokens
    assert text_of(responses) == processor.tokenizer.decode(tokens) == ANSWER
    assert generate(*nano, ASK, image=PENGUINS) == ANSWER


def test_mlx_lm_generates_the_same(nano: Nano, tokens: list[int]) -> None:
    ids, embeddings = prompt_of(nano)
    steps = generate_step(
        mx.array(ids), nano[0], max_tokens=len(tokens), input_embeddings=embeddings[0]
    )
    assert [int(token) for token, _ in steps] == tokens


@pytest.mark.parametrize("prefill_step_size", [1, 3, 7, 2048])
def test_prefill_step_size(prefill_step_size: int, nano: Nano, small_answer: str) -> None:
    answer = generate(*nano, ASK, **SMALL, prefill_step_size=prefill_step_size)
    assert answer == small_answer


def test_greedy_needs_no_randomness(nano: Nano) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(5)
    generate(*nano, ASK, **SMALL, max_tokens=3)
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected)


# The KV cache


def test_kinds_of_cache(nano: Nano) -> None:
    model = nano[0]
    for options, kind in (
        ({}, KVCache),
        ({"kv_bits": 8}, mlx_lm_cache.QuantizedKVCache),
        ({"max_kv_size": 16}, mlx_lm_cache.RotatingKVCache),
    ):
        cache = make_kv_cache(model, Options(**options))
        assert [type(layer) for layer in cache] == [kind] * len(model.layers)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantized_cache_is_close(bits: int, nano: Nano, small_answer: str) -> None:
    model = nano[0]
    _, embeddings = prompt_of(nano)
    cache = make_kv_cache(model, Options(kv_bits=bits))
    whole = model.language_model(None, input_embeddings=embeddings)[0, -1]
    quantized = model.language_model(None, cache, embeddings)[0, -1]
    error = mx.abs(whole - quantized).mean().item()
    assert 0 < error < {4: 0.5, 6: 0.1, 8: 0.03}[bits]
    assert bits < 8 or generate(*nano, ASK, **SMALL, kv_bits=bits) == small_answer


def test_kv_bits_on_cuda(nano: Nano, assume: Callable[[str], None]) -> None:
    assume("cuda")
    with pytest.raises(ValueError, match="kv_bits does not work with MLX on CUDA; use max_kv_size"):
        make_kv_cache(nano[0], Options(kv_bits=8))


def test_kv_bits_needs_fitting_heads() -> None:
    config = {
        "model_type": "llava_qwen2",
        "mm_projector_type": "linear",
        "vision_config": {"layers": [1] * 5, "embed_dims": [32] * 5, "image_size": 64},
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 32,
    }
    model = FastVLM(fv.FastVLMConfig.from_dict(config))
    with pytest.raises(ValueError, match=r"kv_bits needs heads in multiples of 32.* are 48"):
        make_kv_cache(model, Options(kv_bits=4))


def test_rotating_cache(nano: Nano, small_answer: str) -> None:
    assert generate(*nano, ASK, **SMALL, max_kv_size=64) == small_answer
    ids, embeddings = prompt_of(nano)
    steps = generate_step(
        mx.array(ids), nano[0], max_tokens=8, max_kv_size=16, input_embeddings=embeddings[0]
    )
    expected = [int(token) for token, _ in steps]
    # mlx_lm processes the last token of the prompt by itself.
    alone = {"prefill_step_size": len(ids) - 1, "max_tokens": 8}
    responses = stream_generate(*nano, ASK, **SMALL, max_kv_size=16, **alone)
    found = [response.token for response in responses]
    assert found == expected[: len(found)]


# Sampling

logits_of_all = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, 1.2])
DRAWS = 8_000


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


probabilities = softmax(logits_of_all)
rank = np.argsort(np.argsort(-logits_of_all))
likelier = np.array([probabilities[probabilities > p].sum() for p in probabilities])


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, logits_of_all > -np.inf),
        ({"top_k": 1}, rank < 1),
        ({"top_k": 3}, rank < 3),
        ({"top_k": 8}, rank < 8),
        ({"top_k": 100}, rank < 8),
        ({"top_p": 0.3}, likelier < 0.3),
        ({"top_p": 0.7}, likelier < 0.7),
        ({"top_p": 0.999}, likelier < 0.999),
        ({"min_p": 0.2}, probabilities >= 0.2 * probabilities.max()),
        ({"min_p": 1.0}, rank < 1),
        ({"top_p": 0.9, "top_k": 2}, rank < 2),
        (
            {"top_p": 0.8, "min_p": 0.3},
            (likelier < 0.8) & (probabilities >= 0.3 * probabilities.max()),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_distribution(options: dict, kept: np.ndarray, temperature: float) -> None:
    """Filters look at the probabilities before the temperature, as in mlx_lm."""
    mx.random.seed(0)
    sampler = make_sampler(Options(temperature=temperature, **options))
    tokens = np.array(
        sampler(mx.broadcast_to(mx.array(logits_of_all), (DRAWS, len(logits_of_all))))
    )
    assert tokens.shape == (DRAWS,)
    frequencies = np.bincount(tokens, minlength=len(logits_of_all)) / DRAWS
    expected = softmax(np.where(kept, logits_of_all / temperature, -np.inf))
    assert set(tokens) <= set(np.flatnonzero(kept))
    np.testing.assert_allclose(frequencies, expected, atol=0.025)


logits_of_rows = st.lists(
    st.lists(st.floats(-20, 20, width=16), min_size=5, max_size=5), min_size=1, max_size=3
)


@quick
@given(
    rows=logits_of_rows,
    top_p=st.floats(0.01, 0.99),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)
def test_keep_top_p(rows: list[list[float]], top_p: float, dtype: mx.Dtype) -> None:
    logits = mx.array(rows).astype(dtype)
    kept = np.array(keep_top_p(logits, top_p).astype(mx.float32))
    values = np.array(logits.astype(mx.float32), np.float64)
    for found, row in zip(kept, values, strict=True):
        ordered = -np.sort(-row)
        probabilities = softmax(ordered)
        before = np.cumsum(probabilities) - probabilities
        assume(np.abs(before - top_p).min() > 1e-4)
        count = int((before < top_p).sum())
        # Which of several equal tokens is kept makes no difference.
        np.testing.assert_array_equal(-np.sort(-found[found > -np.inf]), ordered[:count])
        assert (np.isneginf(found) | (found == row)).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_keep_top_p_in_a_large_vocabulary(dtype: mx.Dtype) -> None:
    """Sums of many small probabilities need more than half precision."""
    logits = mx.array(np.random.default_rng(0).normal(size=(1, 50_000)) * 3).astype(dtype)
    probabilities = -np.sort(-softmax(np.array(logits.astype(mx.float32), np.float64)[0]))
    expected = int((np.cumsum(probabilities) - probabilities < 0.9).sum())
    kept = int((keep_top_p(logits, 0.9) > -mx.inf).sum())
    assert kept == pytest.approx(expected, rel=0.05)


def test_seed_repeats(nano: Nano) -> None:
    def answer(seed: int) -> str:
        return generate(*nano, ASK, temperature=2.0, top_p=0.99, seed=seed, max_tokens=8)

    answers = [answer(seed) for seed in range(5)]
    assert [answer(seed) for seed in range(5)] == answers
    assert len(set(answers)) > 2


def test_seed_is_not_needed(nano: Nano) -> None:
    mx.random.seed(1)
    answers = {generate(*nano, ASK, temperature=2.0, max_tokens=6, min_p=0.001) for _ in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-40, 5e-324])
def test_low_temperature_is_greedy(temperature: float) -> None:
    logits = mx.array(np.random.default_rng(0).normal(size=(50, 300)) * 20)
    greedy = mx.argmax(logits, axis=-1)
    for options in ({}, {"top_p": 0.9}, {"top_k": 5}):
        sampler = make_sampler(Options(temperature=temperature, **options))
        for dtype in (mx.float32, mx.float16):
            expected = greedy if dtype == mx.float32 else mx.argmax(logits.astype(dtype), axis=-1)
            found = logits.astype(dtype)[mx.arange(50), sampler(logits.astype(dtype))]
            # Half precision has equals.
            assert mx.array_equal(found, logits.astype(dtype)[mx.arange(50), expected])


# Logits processors


def test_repetition_penalty_equals_a_loop(nano: Nano, tokens: list[int]) -> None:
    model, processor = nano
    penalty, limit = 3.0, 8
    ids, embeddings = prompt_of(nano)
    seen, expected = [i for i in ids if i >= 0], []
    while len(expected) < limit and not processor.tokenizer.eos_token_ids & set(expected):
        logits = np.array(model.language_model(None, input_embeddings=embeddings)[0, -1])
        recent = list(set(seen[-20:]))
        chosen = logits[recent]
        logits[recent] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
        expected.append(int(logits.argmax()))
        seen.append(expected[-1])
        added = model.language_model.embed_tokens(mx.array([expected[-1:]]))
        embeddings = mx.concatenate([embeddings, added], axis=1)

    def found(penalty: float) -> list[int]:
        options = {**SMALL, "max_tokens": limit, "repetition_penalty": penalty}
        return [response.token for response in stream_generate(*nano, ASK, **options)]

    assert found(penalty) == expected != tokens[:limit]
    assert found(1.0) == tokens[:limit]


@pytest.mark.parametrize("penalties", [(1.5, 0.0), (0.0, 2.0), (0.7, 1.3), (-1.0, 0.5)], ids=str)
def test_penalties_of_what_was_said_equal_a_loop(nano: Nano, penalties: Any) -> None:
    """As OpenAI's: of the answer's tokens alone, by their number, and once if there are any."""
    model, processor = nano
    (frequency, presence), limit = penalties, 24
    ends = sorted(processor.tokenizer.eos_token_ids)
    _, embeddings = prompt_of(nano)
    expected: list[int] = []

    def go_on(tokens: mx.array, logits: mx.array) -> mx.array:
        """An answer that may not end says the same again and again."""
        return mx.put_along_axis(logits, mx.array([ends]), mx.array(-mx.inf), axis=-1)

    while len(expected) < limit:
        logits = np.array(model.language_model(None, input_embeddings=embeddings)[0, -1])
        for token in set(expected):
            logits[token] -= frequency * expected.count(token) + presence
        logits[ends] = -np.inf
        expected.append(int(logits.argmax()))
        added = model.language_model.embed_tokens(mx.array([expected[-1:]]))
        embeddings = mx.concatenate([embeddings, added], axis=1)
    options = {"frequency_penalty": frequency, "presence_penalty": presence, "image_size": 64}
    options |= {"max_tokens": limit, "logits_processor": go_on}
    ways: list[Any] = [{}, {"prompt_lookup": 3}, {"draft_model": nano}]
    for way in ways:
        found = [
            response.token for response in stream_generate(*nano, ASK, PENGUINS, **options, **way)
        ]
        assert found == expected, way
    text = generate(*nano, ASK, PENGUINS, **options)
    assert fv.batch_generate(*nano, [(ASK, PENGUINS)] * 3, **options) == [text] * 3
    if frequency >= 0:  # a negative one asks for more of what this answer says again and again
        assert text != generate(*nano, ASK, **SMALL, max_tokens=limit, logits_processor=go_on)


def test_logits_processor_sees_tokens_and_decides(nano: Nano) -> None:
    calls: list[tuple[list[int], tuple[int, ...]]] = []
    wanted = tokens_of(nano, "A panda and a cat")

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append((tokens.tolist(), logits.shape))
        mask = mx.arange(logits.shape[-1]) == wanted[len(calls) - 1]
        return mx.where(mask, logits, -mx.inf)

    text = generate(*nano, ASK, **SMALL, max_tokens=len(wanted), logits_processor=process)
    assert text == "A panda and a cat"
    prompt = [i for i in prompt_of(nano)[0] if i >= 0]
    vocab_size = nano[0].config.text.vocab_size
    assert calls == [((prompt + wanted[:n]), (1, vocab_size)) for n in range(len(wanted))]


def test_penalty_comes_before_the_processor(nano: Nano) -> None:
    seen: list[mx.array] = []

    def keep(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(logits)
        return logits

    for penalty in (None, 1.5):
        options = {**SMALL, "max_tokens": 1, "repetition_penalty": penalty}
        generate(*nano, ASK, **options, logits_processor=keep)
    assert not mx.array_equal(*seen)


# Stop texts


@pytest.mark.parametrize(
    "stop, expected",
    [
        ("6", "The image shows "),
        ([" shows 6 pen"], "The image"),
        (["The"], ""),
        ([ANSWER], ""),
        ([ANSWER + " "], ANSWER),
        (["penguins.!"], ANSWER),
        (["."], ANSWER[:-1]),
        (["penguins", "6"], "The image shows "),
        (["shows 7", "shows 6"], "The image "),
        (["images", "image show a", "image shows"], "The "),
        (["walrus"], ANSWER),
        ([], ANSWER),
    ],
    ids=str,
)
def test_stop_texts_end_an_answer(stop: Any, expected: str, nano: Nano) -> None:
    tokens = [*tokens_of(nano, ANSWER), 742, *tokens_of(nano, "never read")]
    chosen = Options(stop=stop).stop
    responses = parts_of(nano, tokens, chosen)
    assert text_of(responses) == expected
    assert [response.finish_reason for response in responses] == [None] * (len(responses) - 1) + [
        "stop"
    ]
    assert len(responses) < len(tokens)


def test_stop_with_the_model(nano: Nano, small_answer: str) -> None:
    stop = small_answer[6:14]
    responses = list(stream_generate(*nano, ASK, **SMALL, stop=[stop]))
    assert text_of(responses) == small_answer.partition(stop)[0]
    assert responses[-1].finish_reason == "stop"
    assert generate(*nano, ASK, **SMALL, stop=small_answer[-1]) == small_answer[:-1]


def test_any_stop_text_of_an_answer(nano: Nano) -> None:
    tokens = [*tokens_of(nano, ANSWER), 742]
    for start in range(len(ANSWER)):
        for end in range(start + 1, len(ANSWER) + 1):
            stop = ANSWER[start:end]
            assert text_of(parts_of(nano, tokens, [stop])) == ANSWER[: ANSWER.find(stop)]


few = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def chunked(text: str, cuts: list[int]) -> Iterator[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    for start, end in zip([0, *ends], ends, strict=False):
        yield text[start:end]


@quick
@given(text=few, stop=stops, cuts=st.lists(st.integers(0, 30)))
def test_stop_texts_in_any_chunks(text: str, stop: list[str], cuts: list[int]) -> None:
    stopper, given_out, read = StopTexts(stop), "", ""
    for chunk in chunked(text, cuts):
        given_out += stopper.add(chunk)
        read += chunk
        found = [at for at in map(read.find, stop) if at >= 0]
        assert stopper.stopped == bool(found)
        if found:
            break
        # Nothing is held back but what may begin a stop text.
        held = read[len(given_out) :]
        assert given_out + held == read
        assert not held or any(s.startswith(held) for s in stop)
    given_out += stopper.finish()
    assert given_out == (read[: min(found)] if stopper.stopped else text)


@quick
@given(text=few, stop=st.text("abc", min_size=1, max_size=5), cuts=st.lists(st.integers(0, 30)))
def test_one_stop_text_does_not_depend_on_chunks(text: str, stop: str, cuts: list[int]) -> None:
    stopper = StopTexts([stop])
    given_out = ""
    for chunk in chunked(text, cuts):
        given_out += stopper.add(chunk)
        if stopper.stopped:
            break
    assert given_out + stopper.finish() == text.partition(stop)[0]


# The end, and text in pieces


def test_max_tokens(nano: Nano, tokens: list[int]) -> None:
    for limit in (1, 2, len(tokens) - 1, len(tokens), len(tokens) + 1):
        responses = list(stream_generate(*nano, ASK, **SMALL, max_tokens=limit))
        assert [response.token for response in responses] == tokens[:limit]
        assert text_of(responses) == nano[1].tokenizer.decode(tokens[:limit])
        reasons = [response.finish_reason for response in responses]
        last = "length" if limit < len(tokens) else "stop"
        assert reasons == [None] * (len(responses) - 1) + [last]


def test_every_end_token_ends(nano: Nano) -> None:
    for end in nano[1].tokenizer.eos_token_ids:
        responses = parts_of(nano, [32, end, 33])
        assert [(response.token, response.finish_reason) for response in responses] == [
            (32, None),
            (end, "stop"),
        ]
        assert text_of(responses) == nano[1].tokenizer.decode([32])


tokenizer = load_processor(NANO).tokenizer


@quick
@given(text=st.text("aé漢👩\u200d👧 ", min_size=1, max_size=12), cut=st.integers(0, 20))
def test_characters_come_whole(text: str, cut: int) -> None:
    tokens = tokenizer.encode(text)
    tokens = tokens[: max(len(tokens) - cut, 1)]
    processor = Processor(tokenizer, image_size=64)
    responses = list(stream_responses(iter(tokens), processor, 5, (), len(tokens), (0.0, 0.0, 0.0)))
    assert [response.token for response in responses] == tokens
    assert responses[-1].finish_reason == "length"
    assert all("\ufffd" not in response.text for response in responses[:-1])
    # What was held back comes at last, even half a character.
    utf8 = b"".join(map(tokenizer.token_bytes, tokens))
    assert text_of(responses) == utf8.decode("utf-8", "replace")


def test_held_back_text_comes_with_the_last_token(nano: Nano) -> None:
    tokens = tokens_of(nano, "A penguin")
    responses = parts_of(nano, tokens, ["penguins and more"], limit=len(tokens))
    assert text_of(responses) == "A penguin" and responses[-1].finish_reason == "length"


def test_a_stop_text_at_the_limit(nano: Nano) -> None:
    tokens = tokens_of(nano, "A penguin.")
    responses = parts_of(nano, tokens, ["."], limit=len(tokens))
    assert text_of(responses) == "A penguin" and responses[-1].finish_reason == "stop"


def test_counts_and_timings(nano: Nano) -> None:
    started = time.perf_counter()
    responses = list(stream_generate(*nano, ASK, image=PENGUINS))
    elapsed = time.perf_counter() - started
    assert [response.generation_tokens for response in responses] == list(range(1, 9))
    assert {response.prompt_tokens for response in responses} == {len(prompt_of(nano, 256)[0])}
    first, last = responses[0], responses[-1]
    for response in responses:
        assert (
            response.preprocess_time > 0 and response.encode_time > 0 and response.prefill_time > 0
        )
        total = response.preprocess_time + response.encode_time + response.prefill_time
        assert response.ttft == pytest.approx(total) == pytest.approx(first.ttft)
        assert 0 < response.peak_memory < 100
    assert first.ttft < elapsed
    assert 7 / last.generation_tps < elapsed


def test_tokens_per_second_count_from_the_first(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([10.0, 10.5, 11.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    tokens = iter([32, 33, 34, 35])
    responses = list(stream_responses(tokens, nano[1], 5, (), 4, (7.0, 8.0, 8.5)))
    assert [response.generation_tps for response in responses] == [0, 2, 2, 1.5]
    assert {
        (response.ttft, response.preprocess_time, response.encode_time) for response in responses
    } == {(3.0, 1.0, 0.5)}


def test_text_only_takes_no_time_for_images(nano: Nano) -> None:
    (response,) = stream_generate(*nano, "What is this?", max_tokens=1)
    assert response.encode_time < 0.01
    assert response.prompt_tokens == len(
        build_prompt(nano[1].tokenizer, "What is this?", num_visual_tokens=[])
    )


# Bad options

NAN, INF = float("nan"), float("inf")
BAD = {
    "max_tokens": [0, -1, 1.5, "a", None, True, NAN, []],
    "temperature": [-1, -1e-9, NAN, INF, "a", None, [1.0]],
    "top_p": [0, -0.5, 1.01, 2, NAN, "a", None],
    "top_k": [-1, 1.5, "a", None, True],
    "min_p": [-0.1, 1.5, NAN, "a", None],
    "repetition_penalty": [0, -1, NAN, INF, "a"],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, "a", None],
    "presence_penalty": [-2.1, 2.1, NAN, INF, "a", None],
    "seed": [-1, 1.5, "a", 2**64, True],
    "stop": ["", ["a", ""], [1], 5, None, [None]],
    "max_kv_size": [0, 7, -1, 8.5, "a", NAN],
    "kv_bits": [0, 1, 5, 7, 16, 4.0, "a", [4]],
    "prefill_step_size": [0, -1, 1.5, "a", None],
    "logits_processor": [5, "a"],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name in BAD for value in BAD[name]], ids=repr
)
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        Options(**{name: value})
    message = str(caught.value)
    shown = repr(("",)) if value == "" and name == "stop" else repr(value)
    assert message.startswith(f"{name} must be ") and message.endswith(f"found {shown}.")
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-6},
        {"top_k": 0},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.1},
        {"repetition_penalty": 1},
        {"frequency_penalty": -2},
        {"presence_penalty": 2},
        {"seed": 0},
        {"seed": 2**63},
        {"stop": ()},
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"max_kv_size": 8},
        {"kv_bits": 2},
        {"prefill_step_size": 1},
    ],
    ids=str,
)
def test_good_options(options: dict, nano: Nano) -> None:
    sampled = {"max_tokens": 2, "temperature": 1.0, **options}
    assert isinstance(generate(*nano, ASK, **sampled), str)


def test_two_kinds_of_cache_are_too_many() -> None:
    with pytest.raises(ValueError, match="kv_bits or max_kv_size, not both"):
        Options(kv_bits=4, max_kv_size=64)


@pytest.mark.parametrize(
    "kind, arguments",
    [
        (ValueError, {"max_tokens": 0}),
        (ValueError, {"image_size": 100}),
        (ValueError, {"prompt": "<image> <image>"}),
        (ValueError, {"conv_mode": "nothing"}),
        (ValueError, {"image": b"no image"}),
        (FileNotFoundError, {"image": "nothing.png"}),
        (ValueError, {"prompt": []}),
        (ValueError, {"prompt": [{"role": "user"}]}),
        (ValueError, {"prompt": 5}),
        (ValueError, {"prompt": None}),
    ],
    ids=str,
)
def test_bad_arguments_raise_on_the_call(kind: type, arguments: dict, nano: Nano) -> None:
    with pytest.raises(kind):
        stream_generate(*nano, **{"prompt": ASK, "image": PENGUINS, **arguments})


# Prompts


def test_prompt_at_the_limit(nano: Nano) -> None:
    model, processor = nano
    length = len(prompt_of(nano)[0])
    for room in (1, 3):
        tight = replace(processor, max_length=length + room)
        responses = list(stream_generate(model, tight, ASK, **SMALL))
        assert len(responses) == room and responses[-1].finish_reason == "length"
    for limit in (length, length - 1, 1):
        with pytest.raises(ValueError, match=rf"has {length} tokens.* limit is {limit} "):
            stream_generate(model, replace(processor, max_length=limit), ASK, **SMALL)


def test_check_length() -> None:
    check_length([0] * 9, 10)
    with pytest.raises(ValueError, match="10 tokens"):
        check_length([0] * 10, 10)


@pytest.mark.parametrize(
    "prompt, count",
    [("<image>", 0), ("<image><image> ?", 1), ("a <image> b", 2), ("<image>" * 3, 2)],
)
def test_marks_and_images_differ(prompt: str, count: int, nano: Nano) -> None:
    marks = prompt.count("<image>")
    for question in (prompt, [{"role": "user", "content": prompt}]):
        with pytest.raises(ValueError, match=rf"{marks} <image> mark\(s\) for {count} image"):
            stream_generate(*nano, question, image=[PENGUINS] * count)


def test_marks_of_the_assistant_are_text(nano: Nano) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": ASK},
    ]
    assert isinstance(generate(*nano, turns, max_tokens=2), str)


def test_marks_say_where_images_go(nano: Nano, small_answer: str) -> None:
    assert generate(*nano, f"<image>\n{ASK}", **SMALL) == small_answer
    two = {"image": [PENGUINS, PANDA], "image_size": 64, "max_tokens": 1}
    first, second, third = (
        next(stream_generate(*nano, prompt, **two)).prompt_tokens
        for prompt in (ASK, f"<image>\n<image>\n{ASK}", f"<image>{ASK}<image>")
    )
    assert first == second == third + 2 * len(tokens_of(nano, "\n"))


@pytest.mark.parametrize("image_size", [64, 128, 320, 512])
def test_image_size(image_size: int, nano: Nano) -> None:
    response = next(
        stream_generate(*nano, ASK, image=PENGUINS, image_size=image_size, max_tokens=1)
    )
    assert response.prompt_tokens == len(prompt_of(nano)[0]) - 1 + (image_size // 64) ** 2


def test_native_image_size_is_the_default(nano: Nano) -> None:
    assert generate(*nano, ASK, image=PENGUINS, image_size=256) == ANSWER


@pytest.mark.parametrize("image_size", [0, -64, 32, 100, 255, 64.0, "64"])
def test_bad_image_size(image_size: Any, nano: Nano) -> None:
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 64"):
        generate(*nano, ASK, image=PENGUINS, image_size=image_size)


def test_a_chat_as_list(nano: Nano) -> None:
    turns = [{"role": "user", "content": ASK}]
    assert generate(*nano, turns, image=PENGUINS) == ANSWER
    turns += [
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "How many penguins are there?"},
    ]
    assert "6" in generate(*nano, turns, image=PENGUINS)
    assert turns[0]["content"] == ASK  # left as it was


def test_system_and_conversation_mode(nano: Nano) -> None:
    def length(**options: Any) -> int:
        return next(stream_generate(*nano, "Hi", max_tokens=1, **options)).prompt_tokens

    assert length(system="You are a helpful assistant.") == length() == length(conv_mode="qwen_2")
    assert length(system="Hi.") < length()
    assert length(conv_mode="plain") < length(system="Hi.")
    with pytest.raises(ValueError, match="given twice"):
        generate(*nano, [{"role": "system", "content": "a"}], system="b")


def test_no_image_and_empty_prompts(nano: Nano) -> None:
    for prompt in ("", " ", "How are you?"):
        assert isinstance(generate(*nano, prompt, max_tokens=3), str)
    assert generate(*nano, "", image=PENGUINS, max_tokens=3)
    assert generate(*nano, "Hi", image=[], max_tokens=4) == generate(*nano, "Hi", max_tokens=4)


def test_sources_of_images(nano: Nano, small_answer: str) -> None:
    opened = Image.open(PENGUINS)
    array = np.array(opened.convert("RGB"))
    data = PENGUINS.read_bytes()
    sources = [str(PENGUINS), opened, array, mx.array(array), data, (PENGUINS,), bytearray(data)]
    answers = {generate(*nano, ASK, image=source, image_size=64) for source in sources}
    assert answers == {small_answer}


def test_list_images() -> None:
    assert list_images(None) == list_images([]) == list_images(()) == []
    assert list_images("a.png") == list_images(["a.png"]) == list_images(("a.png",)) == ["a.png"]
    assert list_images(b"\0\1") == [b"\0\1"]
    assert list_images(["a.png", "b.png"]) == ["a.png", "b.png"]
    array = np.zeros((2, 2, 3))
    assert list_images(array)[0] is array


# Streams


def test_a_stream_may_be_left(nano: Nano, small_answer: str) -> None:
    stream = stream_generate(*nano, ASK, **SMALL)
    assert small_answer.startswith(next(stream).text)
    stream.close()
    assert list(stream) == []
    unread = stream_generate(*nano, ASK, **SMALL)
    del unread
    assert generate(*nano, ASK, **SMALL) == small_answer


def test_two_streams_at_once(nano: Nano) -> None:
    expected = [generate(*nano, ASK, image=image, image_size=64) for image in (PENGUINS, PANDA)]
    streams = [
        stream_generate(*nano, ASK, image=image, image_size=64) for image in (PENGUINS, PANDA)
    ]
    texts = ["", ""]
    for responses in zip_longest(*streams):
        texts = [
            text + (response.text if response else "")
            for text, response in zip(texts, responses, strict=True)
        ]
    assert texts == expected and texts[0] != texts[1]


# Ways of answering that do not go together


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"logits_processor": lambda tokens, logits: logits},
        {"prompt_lookup": 2},
        {"max_kv_size": 16},
        {"kv_bits": 8},
    ],
    ids=lambda options: next(iter(options)),  # a function's own text would differ in each process
)
def test_beam_search_refuses_by_name_what_it_can_not_take(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} does not go with beam search; leave it out.$"):
        Options(num_beams=2, **options)


def test_beam_search_is_an_option(nano: Nano) -> None:
    model, processor = nano
    _, embeddings = prompt_of(nano, image_size=256)
    ends = processor.tokenizer.eos_token_ids
    found = list(stream_generate(*nano, ASK, image=PENGUINS, num_beams=3, max_tokens=20))
    expected = beam_search(model, embeddings, ends, num_beams=3, max_tokens=20)
    assert [response.token for response in found] == expected
    assert found[-1].finish_reason == "stop" and text_of(found) == ANSWER
    cache = fv.PromptCache(model)
    for _ in range(2):  # images come from the prompt cache, and no beam's KV cache goes there
        assert generate(*nano, ASK, image=PENGUINS, num_beams=3, prompt_cache=cache) == ANSWER
    assert generate(*nano, ASK, image=PENGUINS, prompt_cache=cache) == ANSWER


# What would otherwise be a wrong answer without a word


@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x[:, :5], lambda x: None], ids="abc")
def test_a_logits_processor_that_returns_another_shape(change: Any, nano: Nano) -> None:
    with pytest.raises(
        ValueError, match=r"logits_processor must return logits of shape \(1, \d+\)"
    ):
        generate(*nano, ASK, **SMALL, logits_processor=lambda tokens, logits: change(logits))


@pytest.mark.parametrize("others", [{}, {"top_k": 9}, {"min_p": 0.1}], ids=str)
def test_the_smallest_top_p_keeps_the_likeliest_token(
    others: dict, nano: Nano, tokens: list[int]
) -> None:
    options = {"temperature": 5.0, "top_p": 5e-324, "seed": 1, **others}
    found = [response.token for response in stream_generate(*nano, ASK, **SMALL, **options)]
    assert found == tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model, processor = fv.load()
    weight = model.language_model.norm.weight
    model.language_model.norm.weight = mx.where(mx.arange(weight.size) == 3, value, weight)
    for answer in (
        lambda: generate(model, processor, ASK, max_tokens=2),
        lambda: fv.batch_generate(model, processor, [(ASK, None)], max_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"language_model\.norm\.weight holds NaN or infinite"):
            answer()


def test_a_prompt_that_is_too_long_is_refused_before_its_image_is_encoded(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = nano
    monkeypatch.setattr(FastVLM, "encode_image", lambda *_: pytest.fail("encodes"))
    tight = replace(processor, max_length=200)
    for ask in (
        lambda: generate(model, tight, ASK, image=PENGUINS, image_size=1024),
        lambda: fv.Chat(model, tight).ask(ASK, image=PENGUINS, image_size=1024),
    ):
        with pytest.raises(ValueError, match=r"The prompt has \d+ tokens, and the model's limit"):
            ask()
    with pytest.raises(fv.generation.batch.BatchError, match=r"The prompt has \d+ tokens"):
        fv.batch_generate(model, tight, [(ASK, PENGUINS)], image_size=1024)


# Log probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3, "top_k": 50}], ids=str)
def test_logprobs_are_those_of_the_models_logits(nano: Nano, options: dict[str, Any]) -> None:
    model, processor = nano
    options = {**options, "repetition_penalty": 1.7, "max_tokens": 8}
    responses = list(stream_generate(*nano, "Hello!", logprobs=3, **options))
    ids = build_prompt(processor.tokenizer, "Hello!", num_visual_tokens=[])
    answer = [response.token for response in responses]
    logits = model(mx.array([ids + answer]))[0, len(ids) - 1 : -1]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for response, row in zip(responses, expected, strict=True):
        assert response.logprobs is not None
        assert response.logprobs.logprob == pytest.approx(row[response.token], abs=1e-3)
        likeliest = np.argsort(-row)[:3]
        assert [token for token, _ in response.logprobs.top] == likeliest.tolist()
        found = [logprob for _, logprob in response.logprobs.top]
        assert found == pytest.approx(row[likeliest], abs=1e-3)
    plain = list(stream_generate(*nano, "Hello!", **options))
    assert [response.token for response in plain] == answer
    assert all(response.logprobs is None for response in plain)


def test_logprobs_in_a_conversation_and_a_batch(nano: Nano) -> None:
    options: dict[str, Any] = {"logprobs": 1, "max_tokens": 4}
    expected = [r.logprobs for r in stream_generate(*nano, "Hello!", **options)]
    chat = list(fv.Chat(*nano).ask("Hello!", stream=True, **options))
    batch = [response for _, response in stream_batch(*nano, [("Hello!", None)], **options)]
    for found in (chat, batch):
        for response, single in zip(found, expected, strict=True):
            assert response.logprobs is not None and single is not None
            assert response.logprobs.logprob == pytest.approx(single.logprob, abs=1e-4)
            assert response.logprobs.top[0][0] == single.top[0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": -1}, "logprobs must be a whole number from 0"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, found 21"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"logprobs": 1, "num_beams": 2}, "logprobs does not go with beam search"),
        ({"logprobs": 1, "prompt_lookup": 3}, "prompt_lookup or logprobs, not both"),
    ],
)
def test_logprobs_that_cannot_be_given(nano: Nano, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*nano, "Hello!", **options)


def test_the_stop_text_that_was_found_is_named(nano: Nano) -> None:
    first, last = ANSWER[4:7], ANSWER[12:]
    for stop, named in (([last, "zz", first], first), (["zz"], None), ([], None)):
        *_, response = stream_generate(*nano, ASK, image=PENGUINS, stop=stop)
        assert response.stop_text == named and response.finish_reason == "stop"
