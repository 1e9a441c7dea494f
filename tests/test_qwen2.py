from itertools import product
from typing import Any

import mlx.core as mx
import mlx_lm.models.qwen2
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_lm_cache

from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.generation.decode import generate_tokens
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.ops import swiglu
from fastvlm_mlx.ops.cpu import causal_attention as attend_causally

VOCAB_SIZE = 100
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}

quick = settings(max_examples=50, deadline=None)


def random_model(**text: Any) -> FastVLM:
    return models.random_model(2, **TEXT | text)  # a seed that does not repeat a single token


def reference_of(model: FastVLM) -> mlx_lm.models.qwen2.Model:
    """mlx_lm's Qwen2 with the same weights, by their names on disk."""
    text = model.config.text
    names = (*TEXT, "max_position_embeddings", "rms_norm_eps")
    arguments = {name: getattr(text, name) for name in names}
    reference = mlx_lm.models.qwen2.Model(
        mlx_lm.models.qwen2.ModelArgs(model_type="qwen2", **arguments)
    )
    prefix = "language_model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in unfuse(model).items()
        if name.startswith(prefix)
    }
    reference.load_weights(list(weights.items()), strict=True)
    return reference


def random_ids(length: int, batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(length).integers(0, VOCAB_SIZE, (batch, length)))


def assert_close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def model() -> FastVLM:
    return random_model()


@pytest.fixture(scope="module")
def reference(model: FastVLM) -> mlx_lm.models.qwen2.Model:
    return reference_of(model)


# Logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (8, 2), (1, 1)])
def test_logits_equal_those_of_mlx_lm(heads: tuple[int, int], tied: bool) -> None:
    model = random_model(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=tied
    )
    ids = random_ids(23, batch=3)
    logits = model.language_model(ids)
    assert logits.shape == (3, 23, VOCAB_SIZE)
    assert_close(logits, reference_of(model)(ids))


@pytest.mark.parametrize("theta", [500.0, 1_000_000.0])
def test_rope_theta(theta: float, model: FastVLM) -> None:
    other = random_model(rope_theta=theta)
    ids = random_ids(40)
    assert_close(other(ids), reference_of(other)(ids))
    assert mx.abs(other(ids) - model(ids)).max() > 0.1


def test_rms_norm_eps() -> None:
    model = random_model(rms_norm_eps=0.5)
    assert_close(model(random_ids(5)), reference_of(model)(random_ids(5)))


def test_embeddings_instead_of_ids(model: FastVLM) -> None:
    ids = random_ids(9, batch=2)
    embeddings = model.language_model.embed_tokens(ids)
    assert_close(model.language_model(None, input_embeddings=embeddings), model(ids), 0)
    hidden_states = model.language_model.hidden_states(ids)
    assert hidden_states.shape == (2, 9, TEXT["hidden_size"])
    assert_close(model.language_model.logits(hidden_states), model(ids), 0)


def test_a_cache_for_each_layer(model: FastVLM) -> None:
    with pytest.raises(ValueError, match="zip"):
        model(random_ids(3), cache=model.make_kv_cache()[1:])


# Caches


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 11], [19, 1], [3, 17], [20]])
def test_steps_equal_the_whole(chunks: list[int], model: FastVLM) -> None:
    ids = random_ids(20, batch=2)
    cache = model.make_kv_cache()
    starts = np.cumsum([0, *chunks[:-1]])
    steps = [model(ids[:, a : a + n], cache=cache) for a, n in zip(starts, chunks, strict=True)]
    assert_close(mx.concatenate(steps, axis=1), model(ids))
    assert [layer.offset for layer in cache] == [20] * 3


@pytest.mark.parametrize("prompt", [1, 250, 255, 256, 257, 600])
def test_same_as_mlx_lm_where_the_cache_grows(prompt: int, model: FastVLM) -> None:
    ids = random_ids(prompt + 10)
    ours, theirs = model.make_kv_cache(), mlx_lm_cache.make_prompt_cache(model)
    assert type(theirs[0]) is mlx_lm_cache.KVCache
    for start, end in (
        (0, prompt),
        (prompt, prompt + 3),
        *((prompt + i, prompt + i + 1) for i in range(3, 10)),
    ):
        step = ids[:, start:end]
        assert_close(model(step, cache=ours), model(step, cache=theirs), 1e-5)
    assert_close(model(ids)[:, -1:], model(ids[:, -1:], cache=_trimmed(ours, 1)))
    assert ours[0].keys.shape[2] % KVCache.step == 0


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize(
    "length, before", [(2, 0), (2, 7), (127, 0), (128, 1), (129, 0), (300, 40)]
)
def test_attention_by_rows(heads: int, kv_heads: int, length: int, before: int) -> None:
    q = mx.random.normal((2, heads, length, 16), key=mx.random.key(0))
    k, v = mx.random.normal((2, 2, kv_heads, before + length, 16), key=mx.random.key(1))
    found = attend_causally(q, 3 * k, v, 0.25)
    wanted = mx.fast.scaled_dot_product_attention(q, 3 * k, v, scale=0.25, mask="causal")
    assert_close(found, wanted, 1e-5)


def _trimmed(cache: list[KVCache], n: int) -> list[KVCache]:
    assert [layer.trim(n) for layer in cache] == [n] * len(cache)
    return cache


steps = st.lists(
    st.tuples(st.just("append"), st.integers(1, 12))
    | st.tuples(st.just("trim"), st.integers(0, 20))
    | st.just(("state", 0)),
    max_size=20,
)


@quick
@given(steps=steps, seed=st.integers(0, 5))
def test_any_use_equals_mlx_lm(steps: list[tuple[str, int]], seed: int) -> None:
    mx.random.seed(seed)
    ours, theirs = KVCache(), mlx_lm_cache.KVCache()
    ours.step = theirs.step = 8
    for kind, n in steps:
        if kind == "append":
            keys, values = mx.random.normal((2, 2, 3, n, 4))
            for a, b in zip(
                ours.update_and_fetch(keys, values),
                theirs.update_and_fetch(keys, values),
                strict=True,
            ):
                assert mx.array_equal(a, b)
        elif kind == "trim":
            assert ours.trim(n) == theirs.trim(n)
        else:
            restored = KVCache()
            restored.step, restored.state = ours.step, ours.state
            ours = restored
        assert ours.offset == theirs.offset == ours.size() == theirs.size()
        assert ours.empty() == theirs.empty()
        assert ours.is_trimmable() and theirs.is_trimmable()


def test_caches_of_both_kinds_exchange_their_state(model: FastVLM) -> None:
    ids = random_ids(12)
    for here, there in product((KVCache, mlx_lm_cache.KVCache), repeat=2):
        cache = [here() for _ in model.layers]
        model(ids[:, :8], cache=cache)
        copies = [there() for _ in model.layers]
        for copy, layer in zip(copies, cache, strict=True):
            copy.state = layer.state
        assert_close(model(ids[:, 8:], cache=copies), model(ids)[:, 8:])


def test_nbytes_count_what_is_stored(model: FastVLM) -> None:
    cache = KVCache()
    assert cache.nbytes == 0 and cache.empty()
    cache.update_and_fetch(mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 4)))
    assert cache.nbytes == 2 * 4 * (1 * 2 * KVCache.step * 4)
    assert not cache.empty()


def _mask_as_array(mask: Any, length: int, offset: int) -> np.ndarray:
    if isinstance(mask, mx.array):
        return np.array(mask)
    rows, columns = np.arange(offset, offset + length)[:, None], np.arange(offset + length)[None]
    return rows >= columns if mask == "causal" else np.ones((length, offset + length), bool)


@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize("length, offset", [(1, 0), (1, 2), (1, 5), (2, 0), (5, 4)])
def test_masks_equal_those_of_mlx_lm(
    length: int, offset: int, return_array: bool, window_size: int | None
) -> None:
    ours, theirs = KVCache(), mlx_lm_cache.KVCache()
    ours.offset = theirs.offset = offset
    masks = [
        cache.make_mask(length, return_array=return_array, window_size=window_size)
        for cache in (ours, theirs)
    ]
    arrays = [_mask_as_array(mask, length, offset) for mask in masks]
    np.testing.assert_array_equal(*arrays)
    assert not return_array or length == 1 or isinstance(masks[0], mx.array)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlx_lm_cache.RotatingKVCache(max_size=64, keep=4),
        lambda: mlx_lm_cache.RotatingKVCache(max_size=12, keep=4),
        lambda: mlx_lm_cache.QuantizedKVCache(group_size=32, bits=8),
        lambda: mlx_lm_cache.QuantizedKVCache(group_size=32, bits=4),
        lambda: mlx_lm_cache.ConcatenateKVCache(),
    ],
    ids=["rotating", "rotating-wrapped", "8-bit", "4-bit", "concatenating"],
)
def test_caches_of_mlx_lm_drop_in(make: Any, model: FastVLM, reference: Any) -> None:
    ids = random_ids(30)
    ours, theirs = ([make() for _ in model.layers] for _ in range(2))
    for start, end in ((0, 20), (20, 21), (21, 26), *((i, i + 1) for i in range(26, 30))):
        step = ids[:, start:end]
        assert_close(model(step, cache=ours), reference(step, cache=theirs))


def test_an_8_bit_cache_changes_little(model: FastVLM) -> None:
    ids = random_ids(30)
    cache = [mlx_lm_cache.QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
    whole, quantized = model(ids), model(ids, cache=cache)
    error = mx.abs(whole - quantized).max()
    assert 1e-6 < error < 0.1


def test_batch_cache_with_left_padding(model: FastVLM) -> None:
    prompts = [random_ids(n)[0].tolist() for n in (3, 9, 6)]
    padding = [9 - len(prompt) for prompt in prompts]
    batch = mx.array([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
    cache = [mlx_lm_cache.BatchKVCache(padding) for _ in model.layers]
    logits = model(batch, cache=cache)
    following = model(mx.array([[5], [6], [7]]), cache=cache)
    for row, (n, prompt) in enumerate(zip(padding, prompts, strict=True)):
        alone = model(mx.array([[*prompt, 5 + row]]))[0]
        assert_close(logits[row, n:], alone[:-1])
        assert_close(following[row], alone[-1:])


def test_to_quantized(model: FastVLM) -> None:
    ids = random_ids(40)
    cache = model.make_kv_cache()
    model(ids[:, :30], cache=cache)
    quantized = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
    assert all(type(layer) is mlx_lm_cache.QuantizedKVCache for layer in quantized)
    assert [(layer.offset, layer.bits, layer.group_size) for layer in quantized] == [
        (30, 8, 32)
    ] * 3
    assert_close(model(ids[:, 30:], cache=quantized), model(ids)[:, 30:], 0.1)
    assert KVCache().to_quantized(group_size=32, bits=4).empty()


# mlx_lm's generation takes this model as one of its own


def greedy(model: FastVLM, ids: mx.array, limit: int, **options: Any) -> list[int]:
    embeddings = model.embed_inputs(ids[None])
    cache = model.make_kv_cache()
    return list(generate_tokens(model, ids.tolist(), embeddings, cache, Options(**options), limit))


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("prefill_step_size", [5, 2048])
def test_generate_step(embedded: bool, prefill_step_size: int, model: FastVLM) -> None:
    ids = random_ids(17)[0]
    embeddings = model.embed_inputs(ids[None])[0] if embedded else None
    theirs = generate_step(
        ids,
        model,
        max_tokens=12,
        prefill_step_size=prefill_step_size,
        input_embeddings=embeddings,
    )
    tokens = [int(token) for token, _ in theirs]
    assert tokens == greedy(model, ids, 12)
    assert len(set(tokens)) > 3


def test_generate_step_with_only_embeddings(model: FastVLM) -> None:
    ids = random_ids(17)[0]
    theirs = generate_step(
        mx.array([], mx.int32),
        model,
        max_tokens=8,
        input_embeddings=model.embed_inputs(ids[None])[0],
    )
    assert [int(token) for token, _ in theirs] == greedy(model, ids, 8)


def test_generate_step_with_a_limited_cache(model: FastVLM, reference: Any) -> None:
    ids = random_ids(30)[0]
    ours, theirs = (
        [int(token) for token, _ in generate_step(ids, m, max_tokens=10, max_kv_size=16)]
        for m in (model, reference)
    )
    assert ours == theirs
    assert ours != greedy(model, ids, 10)
    made = mlx_lm_cache.make_prompt_cache(model, max_kv_size=16)
    assert [type(layer) for layer in made] == [mlx_lm_cache.RotatingKVCache] * 3


def test_generate_step_quantizes_our_cache(model: FastVLM) -> None:
    ids = random_ids(30)[0]
    cache: list[Any] = model.make_kv_cache()
    steps = generate_step(
        ids,
        model,
        max_tokens=3,
        prompt_cache=cache,
        kv_bits=8,
        kv_group_size=32,
        quantized_kv_start=0,
    )
    tokens = [int(token) for token, _ in steps]
    assert [type(layer) for layer in cache] == [mlx_lm_cache.QuantizedKVCache] * 3
    assert tokens == greedy(model, ids, 3)


def test_swiglu_on_the_cpu_is_exact_to_rounding(assume):
    assume("cpu")
    extremes = [0, 1e-20, -1e-20, 50, -50, 1e4, -1e4, 3e38]
    gate = np.concatenate([np.linspace(-20, 20, 20001), extremes]).astype(np.float32)
    exact = gate.astype(np.float64) / (1 + np.exp(-np.maximum(gate.astype(np.float64), -700)))
    found = np.array(swiglu(mx.array(gate), mx.ones(gate.shape)), np.float64)
    assert (np.abs(found - exact) <= 5e-7 * np.maximum(1, np.abs(gate))).all()
    halves = swiglu(mx.array(gate), mx.full(gate.shape, 0.5))
    assert mx.array_equal(2 * halves, mx.array(found, mx.float32))


def test_gradients_of_swiglu_on_the_cpu(assume):
    assume("cpu")
    gate = mx.array([-1000.0, -60, -3, -0.1, 0, 0.1, 3, 60, 1000])
    up = mx.linspace(-1, 1, gate.size)
    found = mx.grad(lambda *x: swiglu(*x).sum(), argnums=(0, 1))(gate, up)
    wanted = mx.grad(lambda g, u: (g * mx.sigmoid(g) * u).sum(), argnums=(0, 1))(gate, up)
    for a, b in zip(found, wanted, strict=True):
        assert mx.allclose(a, b, atol=1e-6)
