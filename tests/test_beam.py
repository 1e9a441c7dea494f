from collections.abc import Callable, Collection
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from models import PENGUINS, random_model

import fastvlm_mlx as fv
from fastvlm_mlx.generation.beam import Beam, beam_search, expand
from fastvlm_mlx.generation.generate import stream_generate
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.text.prompt import build_prompt

VOCAB_SIZE = 5
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]
Logprobs = Callable[[tuple[int, ...]], np.ndarray]


@cache
def small_model(seed: int) -> FastVLM:
    return random_model(
        seed,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=False,
        vision_config={"layers": [1] * 5, "embed_dims": [32] * 5, "image_size": 64},
    )


def prompt_of(model: FastVLM, length: int = 6) -> mx.array:
    ids = np.random.default_rng(length).integers(0, VOCAB_SIZE, (1, length))
    return model.language_model.embed_tokens(mx.array(ids))


def next_logprobs(model: FastVLM, embeddings: mx.array) -> Logprobs:
    """Log-probabilities after some tokens, without any cache."""

    @cache
    def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
        added = model.language_model.embed_tokens(mx.array([tokens], dtype=mx.int32))
        whole = mx.concatenate([embeddings, added], axis=1)
        logits = np.array(model.language_model(None, input_embeddings=whole)[0, -1], np.float64)
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    return logprobs


def best_of_all(
    logprobs: Logprobs, ends: Collection[int], max_tokens: int, penalty: float
) -> tuple[int, ...]:
    """The best answer by looking at every one."""
    best, best_score = (), -np.inf
    for tokens in product(range(VOCAB_SIZE), repeat=max_tokens):
        length = next((n for n, t in enumerate(tokens, 1) if t in ends), max_tokens)
        answer = tokens[:length]
        total = sum(logprobs(answer[:n])[answer[n]] for n in range(length))
        if total / length**penalty > best_score:
            best, best_score = answer, total / length**penalty
    return best


def narrow_beam(
    logprobs: Logprobs, ends: Collection[int], num_beams: int, max_tokens: int, penalty: float
) -> tuple[int, ...]:
    """The same search, followed to the last step and without a cache."""
    open_answers: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for step in range(1, max_tokens + 1):
        longer = [
            (total + logprobs(tokens)[token], (*tokens, token))
            for total, tokens in open_answers
            for token in range(VOCAB_SIZE)
        ]
        longer = sorted(longer, reverse=True)[: 2 * num_beams]
        finished += [
            (total / step**penalty, tokens)
            for total, tokens in longer[:num_beams]
            if tokens[-1] in ends
        ]
        open_answers = [answer for answer in longer if answer[1][-1] not in ends][:num_beams]
    finished += [(total / max_tokens**penalty, tokens) for total, tokens in open_answers]
    return max(finished)[1]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("ends", [{0}, {1, 3}, set()], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wide_beam_finds_the_best_of_all(seed: int, ends: set[int], penalty: float) -> None:
    model = small_model(seed)
    embeddings = prompt_of(model)
    logprobs = next_logprobs(model, embeddings)
    for max_tokens in (1, 2, 4 if ends else 3):
        options = {"max_tokens": max_tokens, "length_penalty": penalty}
        answer = beam_search(model, embeddings, ends, num_beams=VOCAB_SIZE**max_tokens, **options)
        assert tuple(answer) == best_of_all(logprobs, ends, max_tokens, penalty)


def test_the_length_penalty_prefers_longer_answers() -> None:
    model = small_model(0)
    lengths = [
        len(
            beam_search(
                model,
                prompt_of(model),
                {0},
                num_beams=VOCAB_SIZE**4,
                max_tokens=4,
                length_penalty=penalty,
            )
        )
        for penalty in PENALTIES
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_a_narrow_beam_equals_one_without_cache(num_beams: int, penalty: float) -> None:
    for seed, length in product(range(4), (1, 7)):
        model = small_model(seed)
        embeddings = prompt_of(model, length)
        answer = beam_search(
            model,
            embeddings,
            {0},
            num_beams=num_beams,
            max_tokens=6,
            length_penalty=penalty,
        )
        logprobs = next_logprobs(model, embeddings)
        assert tuple(answer) == narrow_beam(logprobs, {0}, num_beams, 6, penalty)


def test_one_beam_is_greedy() -> None:
    for seed in range(6):
        model = small_model(seed)
        embeddings = prompt_of(model)
        logprobs = next_logprobs(model, embeddings)
        greedy: tuple[int, ...] = ()
        while len(greedy) < 8 and 0 not in greedy:
            greedy = (*greedy, int(logprobs(greedy).argmax()))
        found = beam_search(model, embeddings, {0}, num_beams=1, max_tokens=8, length_penalty=0.0)
        assert tuple(found) == greedy


def test_wider_is_never_less_likely_at_full_length() -> None:
    """Without ends, scores can be compared."""
    model = small_model(1)
    embeddings = prompt_of(model)
    logprobs = next_logprobs(model, embeddings)

    def total(num_beams: int) -> float:
        tokens = beam_search(model, embeddings, (), num_beams=num_beams, max_tokens=4)
        assert len(tokens) == 4
        return sum(logprobs(tuple(tokens[:n]))[tokens[n]] for n in range(4))

    assert total(1) <= total(VOCAB_SIZE**4) + 1e-6


def test_scores() -> None:
    beam = Beam((4, 2), -3.0)
    assert beam.score(0) == -3 and beam.score(1) == -1.5 and beam.score(2) == -0.75
    assert beam.bound(1, 6) == -0.5  # the longest answer, if nothing more were lost
    assert beam.bound(-1, 6) == -9.0  # the next token already ends it


def test_expand_takes_the_likeliest_of_all_beams() -> None:
    logits = mx.array([[0.0, 1.0, -5.0], [2.0, 0.0, -5.0]])
    beams = [Beam((7,), -1.0), Beam((8,), -2.0)]
    expanded = expand(beams, logits, 3)
    assert [(parent, beam.tokens) for parent, beam in expanded] == [
        (0, (7, 1)),
        (1, (8, 0)),
        (0, (7, 0)),
    ]
    for (parent, beam), token in zip(expanded, (1, 0, 0), strict=True):
        row = np.array(logits[parent])
        logprob = row[token] - np.log(np.exp(row).sum())
        assert beam.logprob == pytest.approx(beams[parent].logprob + logprob, abs=1e-5)
    assert len(expand(beams, logits, 100)) == 6


@pytest.mark.parametrize("arguments", [{"num_beams": 0}, {"num_beams": -1}, {"max_tokens": 0}])
def test_bad_numbers(arguments: dict) -> None:
    model = small_model(0)
    with pytest.raises(ValueError, match=r"(num_beams|max_tokens) must be a whole number from 1"):
        beam_search(model, prompt_of(model), {0}, **{"num_beams": 2, **arguments})


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_bundled_model(num_beams: int, nano: tuple[fv.FastVLM, fv.Processor]) -> None:
    model, processor = nano
    features = model.encode_images([processor.preprocess(PENGUINS)])
    ids = build_prompt(processor.tokenizer, "Describe the image.", num_visual_tokens=[16])
    embeddings = model.embed_inputs(mx.array([ids]), visual_tokens=features)
    ends = processor.tokenizer.eos_token_ids
    answer = beam_search(model, embeddings, ends, num_beams=num_beams, max_tokens=16)
    greedy = stream_generate(model, processor, "Describe the image.", image=PENGUINS)
    assert answer == [response.token for response in greedy]
    assert processor.tokenizer.decode(answer) == "The image shows 6 penguins."
