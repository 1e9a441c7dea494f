from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PANDA, PENGUINS, Nano

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.bench.graph import has_fused_attention
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.generation import speculate
from fastvlm_mlx.generation.decode import generate_tokens, make_kv_cache
from fastvlm_mlx.generation.drafters import Drafter, DraftModel, PromptLookup
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.generation.response import stream_responses
from fastvlm_mlx.generation.speculate import (
    agree,
    check_vocabularies,
    make_drafter,
    speculate_tokens,
)
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM

PROMPT = [5, 9, 2, 7, 7, 1, 3]
LIMIT = 25
GREEDY = Options()
counts = range(1, 9)


def random_model(seed: int, vocab_size: int = 40, layers: int = 2) -> FastVLM:
    """A small decoder that says something else after every token."""
    config = {
        "model_type": "llava_qwen2",
        "mm_projector_type": "linear",
        "vision_config": {"layers": [1] * 5, "embed_dims": [32] * 5, "image_size": 64},
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
    }
    mx.random.seed(seed)
    model = FastVLM(fv.FastVLMConfig.from_dict(config))
    decoder = model.language_model
    decoder.embed_tokens.weight = mx.random.normal(decoder.embed_tokens.weight.shape)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model() -> FastVLM:
    return random_model(0)


@pytest.fixture(scope="module")
def other() -> FastVLM:
    return random_model(1, layers=1)


class Guess(Drafter):
    """Proposes what a list says, from the answer's place on."""

    def __init__(self, tokens: list[int], num_draft_tokens: int):
        super().__init__(num_draft_tokens)
        self.tokens = tokens

    def propose(self, answer: list[int], count: int) -> mx.array:
        assert answer and 0 <= count <= self.num_draft_tokens
        return mx.array(self.tokens[len(answer) :][:count], mx.uint32)


def embed(model: FastVLM, prompt: list[int] = PROMPT) -> mx.array:
    return model.embed_inputs(mx.array([prompt]))


def draft_model(model: FastVLM, num_draft_tokens: int, vocab_size: int = 40) -> DraftModel:
    return DraftModel(model, lambda: embed(model), num_draft_tokens, vocab_size)


def plain(model: FastVLM, options: Options = GREEDY, limit: int = LIMIT) -> list[int]:
    cache = make_kv_cache(model, options)
    return list(generate_tokens(model, PROMPT, embed(model), cache, options, limit))


def speculated(
    model: FastVLM, drafter: Drafter, options: Options = GREEDY, limit: int = LIMIT
) -> list[int]:
    cache = make_kv_cache(model, options)
    tokens = list(speculate_tokens(model, PROMPT, embed(model), cache, options, limit, drafter))
    assert {c.offset for c in cache} == {len(PROMPT) + limit - 1}
    return tokens


# Looking up


def proposals(tokens: list[int], count: int, max_ngram_size: int) -> list[int]:
    """What `PromptLookup` proposes, the slow way."""
    for size in range(min(max_ngram_size, len(tokens) - 1), 0, -1):
        last = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == last and min(last) >= 0:
                copied = list(tokens)
                for place in range(start + size, start + size + count):
                    copied.append(copied[place])
                copied = [*copied[len(tokens) :], -1]
                return copied[: next(i for i, token in enumerate(copied) if token < 0)]
    return []


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.lists(st.sampled_from([0, 1, 2, 3, -200]), max_size=25),
    rounds=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5),
    count=st.integers(0, 9),
    max_ngram_size=st.integers(1, 5),
)
def test_look_up(
    prompt: list[int], rounds: list[list[int]], count: int, max_ngram_size: int
) -> None:
    drafter = PromptLookup(prompt, 9, max_ngram_size)
    answer: list[int] = []
    for added in rounds:
        answer += added
        found = drafter.propose(list(answer), count)
        assert found.tolist() == proposals(prompt + answer, count, max_ngram_size)
        assert found.ndim == 1 and mx.issubdtype(found.dtype, mx.integer)


@pytest.mark.parametrize(
    "prompt, answer, expected",
    [
        ([1, 2, 3, 4, 5], [1, 2], [3, 4, 5, 1, 2, 3]),  # the copy runs into itself
        ([1, 2, 3], [4], []),
        ([9, 1, 7, 9, 2, 6], [9], [2, 6, 9, 2, 6, 9]),  # the latest place
        ([8, 9, 5, 4, 9, 6, 4], [8, 9], [5, 4, 9, 6, 4, 8]),  # the longest run
        ([3], [3, 3], [3] * 6),
        ([], [1], []),
        ([1, 2, -200, -200, 4], [1], [2]),
        ([1, -200, -200, 4], [1], []),
        ([-200, 1, 2, 3], [-200], []),
    ],
    ids=str,
)
def test_look_up_examples(prompt: list[int], answer: list[int], expected: list[int]) -> None:
    assert PromptLookup(prompt, 6).propose(answer, 6).tolist() == expected


# Agreement


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_agree(data: st.DataObject) -> None:
    draft = data.draw(st.lists(st.integers(0, 2), max_size=6))
    size = len(draft) + 1
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    agreed = agree(iter(chosen), draft)
    assert agreed == chosen[: len(agreed)]
    assert agreed[:-1] == draft[: len(agreed) - 1]
    assert len(agreed) == size or agreed[-1] != draft[len(agreed) - 1]


# The same answers


@pytest.mark.parametrize("count", counts)
def test_same_model_as_drafter(count: int, model: FastVLM) -> None:
    drafter = draft_model(model, count)
    assert speculated(model, drafter) == plain(model)
    rounds = -(-(LIMIT - 1) // (count + 1))
    assert drafter.accepted == drafter.drafted == LIMIT - 1 - rounds


@pytest.mark.parametrize("count", counts)
def test_other_model_as_drafter(count: int, model: FastVLM, other: FastVLM) -> None:
    drafter = draft_model(other, count)
    assert speculated(model, drafter) == plain(model)
    assert 0 <= drafter.accepted < drafter.drafted / 4


def test_models_that_sometimes_agree() -> None:
    model, drafters_model = random_model(2), random_model(2)
    head = drafters_model.language_model.lm_head
    head.weight = head.weight + 0.01 * mx.random.normal(head.weight.shape)
    for count in counts:
        drafter = draft_model(drafters_model, count)
        assert speculated(model, drafter) == plain(model)
        assert drafter.drafted / 4 < drafter.accepted < drafter.drafted


@settings(max_examples=20, deadline=None)
@given(
    wrong=st.sets(st.integers(1, LIMIT - 1)),
    count=st.integers(1, LIMIT),
    limit=st.integers(1, LIMIT),
)
def test_any_agreement_and_limit(wrong: set[int], count: int, limit: int) -> None:
    model = random_model(0)
    tokens = plain(model)
    guesses = [(t + 1) % 40 if i in wrong else t for i, t in enumerate(tokens)]
    drafter = Guess(guesses, count)
    assert speculated(model, drafter, limit=limit) == tokens[:limit]
    expected, at = 0, 1  # tokens that the drafts save, from the second on
    while at < limit:
        last = min(at + count, limit - 1)
        end = next((i for i in range(at, last) if i in wrong), last)
        expected, at = expected + end - at, end + 1
    assert drafter.accepted == expected


def test_a_drafter_with_a_smaller_table(model: FastVLM) -> None:
    """Tokens that it lacks are taken for its last."""
    tokens = plain(model)
    assert max(tokens) >= 30
    assert speculated(model, draft_model(random_model(3, 30), 4)) == tokens
    found, expected = (draft_model(random_model(3, 30), 4).propose([t], 4) for t in (35, 29))
    assert found.tolist() == expected.tolist()


def test_a_drafter_with_a_larger_table(model: FastVLM) -> None:
    """It proposes no token that the model lacks."""
    drafters_model = random_model(5, 50)
    assert max(plain(drafters_model)) >= 40
    assert speculated(model, draft_model(drafters_model, 4)) == plain(model)
    proposed = draft_model(drafters_model, LIMIT).propose(plain(drafters_model, limit=1), LIMIT)
    assert proposed.size == LIMIT and max(proposed.tolist()) < 40


def test_a_prompt_in_chunks(model: FastVLM) -> None:
    whole = draft_model(model, 5).propose([4], 5)
    for step in (1, 3, len(PROMPT)):
        drafter = DraftModel(model, lambda: embed(model), 5, 40, prefill_step_size=step)
        assert drafter.propose([4], 5).tolist() == whole.tolist()


def test_the_cache_holds_only_the_answer(model: FastVLM, other: FastVLM) -> None:
    """A stream may be left at any token, and its cache used for what follows."""
    tokens = plain(model)
    drafter = Guess([0, *tokens[1:9], 0, 0, *tokens[11:]], 4)
    cache = model.make_kv_cache()
    stream = speculate_tokens(model, PROMPT, embed(model), cache, GREEDY, LIMIT, drafter)
    expected = model.make_kv_cache()
    mx.eval(model(mx.array([PROMPT + tokens]), expected))
    for n, _ in enumerate(stream, 1):
        size = min(cache[0].offset, len(PROMPT) + n)
        assert len(PROMPT) <= cache[0].offset and cache[0].offset >= size - 1
        for found, wanted in zip(cache, expected, strict=True):
            assert mx.allclose(found.keys[..., :size, :], wanted.keys[..., :size, :], atol=1e-5)


@pytest.fixture(scope="module", params=["Describe the image.", "a red a red a red a red"])
def question(request: pytest.FixtureRequest, nano: Nano) -> dict[str, Any]:
    """A question to nano and what it says, past the answer's end, where it repeats itself."""
    model, processor = nano
    inputs = read_inputs(model, processor, request.param, PANDA, GREEDY)
    asked = inputs.input_ids, inputs.embeddings
    return {
        "asked": asked,
        "tokens": list(generate_tokens(model, *asked, model.make_kv_cache(), GREEDY, 30)),
        "drafter": (processor, request.param, inputs),
    }


def nano_speculated(nano: Nano, question: dict[str, Any], drafter: Drafter) -> list[int]:
    model, cache = nano[0], nano[0].make_kv_cache()
    return list(speculate_tokens(model, *question["asked"], cache, GREEDY, 30, drafter))


@pytest.mark.parametrize("count", counts)
def test_nano_with_prompt_lookup(count: int, nano: Nano, question: dict[str, Any]) -> None:
    drafter = make_drafter(*question["drafter"], Options(prompt_lookup=count))
    assert isinstance(drafter, PromptLookup) and drafter.num_draft_tokens == count
    assert nano_speculated(nano, question, drafter) == question["tokens"]
    assert 0 < drafter.accepted <= drafter.drafted


@pytest.mark.parametrize("count", [2, 7])
def test_nano_with_itself_as_drafter(count: int, nano: Nano, question: dict[str, Any]) -> None:
    """The drafter sees the image: without it, nano would not say the same."""
    options = Options(draft_model=nano, num_draft_tokens=count)
    drafter = make_drafter(*question["drafter"], options)
    assert drafter is not None
    assert nano_speculated(nano, question, drafter) == question["tokens"]
    assert drafter.drafted == drafter.accepted > 0


def test_the_drafter_sees_the_prompt_as_the_model_does(nano: Nano) -> None:
    model, processor = nano
    for images, prompt, options in (
        (0, "Hi", {"system": "Be brief."}),
        (1, "What is this?", {}),
        (2, "<image>or<image>?", {"conv_mode": "plain"}),
    ):
        chosen = Options(image_size=128, draft_model=nano, **options)
        inputs = read_inputs(model, processor, prompt, [PENGUINS, PANDA][:images], chosen)
        asked = inputs.input_ids, inputs.embeddings
        tokens = list(generate_tokens(model, *asked, model.make_kv_cache(), chosen, 6))
        drafter = make_drafter(processor, prompt, inputs, chosen)
        assert drafter is not None
        assert drafter.propose(tokens[:1], 5).tolist() == tokens[1:]


# Ends


@pytest.mark.parametrize("stop", [(), ("image shows",), ("s",)], ids=str)
def test_ends_inside_a_draft(stop: tuple[str, ...], nano: Nano, question: dict[str, Any]) -> None:
    """With drafts of all that the model says, past any end."""
    model, processor = nano
    (ids, embeddings), tokens = question["asked"], question["tokens"]
    end = next(i for i, token in enumerate(tokens) if token in processor.tokenizer.eos_token_ids)
    assert 2 < end < 25
    for limit in (1, end, end + 1, 30):
        cache, drafter = model.make_kv_cache(), Guess(tokens, 9)
        answer = speculate_tokens(model, ids, embeddings, cache, GREEDY, limit, drafter)
        found, expected = (
            list(stream_responses(stream, processor, len(ids), stop, limit, (0.0, 0.0, 0.0)))
            for stream in (answer, iter(tokens[:limit]))
        )
        assert drafter.drafted == drafter.accepted > (0 if limit > 2 else -1)
        for name in ("text", "token", "finish_reason", "generation_tokens"):
            assert [getattr(p, name) for p in found] == [getattr(p, name) for p in expected]


# Options


SAID = {"frequency_penalty": 1.0, "presence_penalty": 0.5}


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, SAID, {"kv_bits": 8}], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_options(options: dict[str, Any], count: int, model: FastVLM, other: FastVLM) -> None:
    chosen = Options(**options)
    tokens = plain(model, chosen)
    drafters = draft_model(model, count), draft_model(other, count), Guess(tokens, count)
    for drafter in (*drafters, PromptLookup(PROMPT, count)):
        assert speculated(model, drafter, chosen) == tokens
    assert drafters[-1].accepted == drafters[-1].drafted > 0
    assert "kv_bits" in options or tokens != plain(model)


def test_a_logits_processor_sees_the_answer_alone(model: FastVLM) -> None:
    """One that keeps count is called as without drafts, whether or not these are accepted."""

    def run(drafter: Drafter | None) -> tuple[list[int], list[list[int]]]:
        calls: list[list[int]] = []

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            assert logits.shape == (1, 40)
            calls.append(tokens.tolist())
            return mx.where(mx.arange(40) % 3 == len(calls) % 3, logits, -mx.inf)

        options = Options(logits_processor=process)
        return (speculated(model, drafter, options) if drafter else plain(model, options)), calls

    expected, calls = run(None)
    wrong = [0 if i % 4 == 0 else token for i, token in enumerate(expected)]
    for drafter in (Guess(expected, 5), Guess(wrong, 5), draft_model(model, 3)):
        assert run(drafter) == (expected, calls)


def test_max_kv_size_does_not_go_with_drafts(nano: Nano) -> None:
    for drafts in ({"prompt_lookup": 2}, {"draft_model": nano}):
        with pytest.raises(ValueError, match=f"Give {next(iter(drafts))} or max_kv_size, not both"):
            Options(max_kv_size=16, **drafts)


@pytest.mark.parametrize("temperature", [1e-9, 1.0])
def test_sampling_of_one_is_greedy(temperature: float, model: FastVLM) -> None:
    tokens = plain(model)
    options = Options(temperature=temperature, top_p=1e-6)
    assert speculated(model, draft_model(model, 3), options) == tokens


def test_sampled_answers_have_the_models_distribution() -> None:
    model = random_model(5, vocab_size=3, layers=1)
    prompt, draws = [0, 1], 300
    expected = {}
    for answer in product(range(3), repeat=3):
        logits = model(mx.array([[*prompt, *answer]]))[0, 1:4]
        chosen = mx.softmax(logits, axis=-1)[mx.arange(3), mx.array(answer)]
        expected[answer] = mx.prod(chosen).item()
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    found = dict.fromkeys(expected, 0.0)
    mx.random.seed(0)
    drafted = accepted = 0
    for _ in range(draws):
        drafter = Guess([0, 2, 1], 2)
        cache, options = model.make_kv_cache(), Options(temperature=1.0)
        inputs = model, prompt, embed(model, prompt), cache, options, 3
        found[tuple(speculate_tokens(*inputs, drafter))] += 1 / draws
        drafted, accepted = drafted + drafter.drafted, accepted + drafter.accepted
    assert 0.1 < accepted / drafted < 0.9
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=0.06)


def test_seed_repeats(model: FastVLM) -> None:
    def answer(seed: int) -> list[int]:
        return speculated(model, Guess([1] * LIMIT, 3), Options(temperature=1.0, seed=seed))

    assert answer(1) == answer(1) != answer(2)


# What can't work


@pytest.mark.parametrize("count", [0, -1, 1.5, "a", None, True])
def test_bad_number_of_draft_tokens(count: Any, nano: Nano) -> None:
    model, _ = nano
    for make in (
        lambda: PromptLookup([1], count),
        lambda: DraftModel(model, lambda: embed(model), count, 40),
        lambda: Options(draft_model=nano, num_draft_tokens=count),
        lambda: Options(prompt_lookup=0 if count is None else count),
    ):
        with pytest.raises(ValueError, match=r"whole number from 1, found "):
            make()


def test_one_drafter_is_enough(nano: Nano) -> None:
    with pytest.raises(ValueError, match="prompt_lookup or draft_model"):
        Options(prompt_lookup=3, draft_model=nano)
    for wrong in (nano[0], [nano[0]], (nano[0],), "folder"):
        with pytest.raises(ValueError, match="a model and its processor"):
            Options(draft_model=wrong)


class Words:
    """As much of a tokenizer as vocabularies need."""

    def __init__(self, words: list[str], controls: dict[str, int] | None = None):
        self.words = words
        self.vocab_size = len(words)
        self.controls = controls or {}

    def token_bytes(self, token: int, *, skip_special_tokens: bool = True) -> bytes:
        assert not skip_special_tokens
        return self.words[token].encode()


def test_vocabularies() -> None:
    many = [f"w{i}" for i in range(5000)]
    words = Words(many, {"w4999": 4999})
    same: list[Any] = [words, Words([*many, "<image>"], {"<image>": 5000}), Words(many[:4000])]
    for other in same:
        check_vocabularies(words, other)
        check_vocabularies(other, words)
    other = Words([*many[:-1], "<end>"], {"<end>": 4999})
    with pytest.raises(ValueError, match=r"token 4999 is b'<end>' there and b'w4999' here"):
        check_vocabularies(words, other)
    with pytest.raises(ValueError, match="another vocabulary"):
        check_vocabularies(words, Words([f"v{i}" for i in range(9)]))


def test_another_tokenizer_is_refused(nano: Nano) -> None:
    processor = load_processor(NANO)
    check_vocabularies(nano[1].tokenizer, processor.tokenizer)
    spelled = processor.tokenizer.token_bytes
    processor.tokenizer.token_bytes = lambda token, **skip: spelled(token, **skip)[::-1]
    inputs = read_inputs(*nano, "Hi", None, GREEDY)
    with pytest.raises(ValueError, match="draft model of the same family"):
        make_drafter(nano[1], "Hi", inputs, Options(draft_model=(nano[0], processor)))


def test_a_stream_may_be_left(model: FastVLM) -> None:
    cache = model.make_kv_cache()
    drafter = draft_model(model, 4)
    stream: Iterator[int] = speculate_tokens(
        model, PROMPT, embed(model), cache, GREEDY, LIMIT, drafter
    )
    first = next(stream)
    assert drafter.drafted == 0  # the first token waits for no draft
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == [] and first == plain(model)[0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "most"),
    [
        (14, 2, 64, 4),  # 0.5B
        (12, 2, 128, 5),  # 1.5B
        (28, 4, 128, 4),  # 7B
        (8, 8, 64, 8),
        (64, 1, 64, 0),
    ],
)
def test_a_step_checks_no_more_than_metals_attention_takes(
    heads: int,
    kv_heads: int,
    head_dim: int,
    most: int,
    assume: Callable[[str], None],
) -> None:
    assume("metal")
    assert ops.most_queries(heads, kv_heads, head_dim) == most
    for T in range(1, 9):
        shapes = (1, heads, T, head_dim), (1, kv_heads, 300, head_dim)
        assert has_fused_attention(*shapes, shapes[1]) is (most >= T)


@pytest.mark.parametrize(("most", "options"), [(4, {}), (1, {}), (3, {"kv_bits": 8})], ids=str)
def test_drafts_are_no_more_than_are_worth_checking(
    most: int, options: dict[str, Any], model: FastVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the answer's last token; a quantized cache has no such kernel."""
    monkeypatch.setattr(speculate, "most_queries", lambda *_: most)
    asked: list[int] = []

    class Recorder(Guess):
        def propose(self, answer: list[int], count: int) -> mx.array:
            asked.append(count)
            return super().propose(answer, count)

    chosen = Options(**options)
    tokens = plain(model, chosen)
    assert speculated(model, Recorder(tokens, 10), chosen) == tokens
    assert max(asked) == (10 if options else max(1, most - 1))
