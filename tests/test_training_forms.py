"""The forms that gradients pass through, against textbook formulas and PyTorch."""

import math
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint.load import inference_weights, load_for_training
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.segments import Segments
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.model.vision_gradients import (
    encode_with_pullback,
    trains_by_layer,
    value_and_grad,
)
from fastvlm_mlx.ops import cpu_training

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
TOLERANCE = 1e-5  # of float32, relative to the largest value
RANDOM_SMALL = Path(__file__).parent / "data" / "random-small" / "llava"


def relative(found: mx.array, expected: mx.array) -> float:
    """The largest difference, as a part of the largest value."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def assert_close(found, expected, tolerance: float = TOLERANCE) -> None:
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    largest = {name: relative(found[name], expected[name]) for name in expected}
    assert max(largest.values()) < tolerance, max(largest.items(), key=lambda pair: pair[1])


def random_ids(length: int, batch: int = 1) -> mx.array:
    return mx.random.randint(1, TEXT["vocab_size"], (batch, length), key=mx.random.key(length))


@pytest.fixture(scope="module")
def small() -> fv.FastVLM:
    return models.random_model(3, **TEXT)


FAULTS = """
import resource
import mlx.core as mx
from fastvlm_mlx.ops import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        mx.eval(mx.ones(2**22) + 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="for glibc's allocator")
def test_kept_memory_is_not_fetched_again():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    first, later = map(int, done.stdout.split())
    assert first > 1000 and later < first / 10


# --- Single operations ---


def textbook_gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.erf(x / math.sqrt(2)))


def textbook_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + mx.exp(-gate)) * up


def textbook_attention(qkv: mx.array, scale: float) -> mx.array:
    q, k, v = mx.split(qkv.swapaxes(1, 2), 3, axis=1)
    return (mx.softmax(scale * q @ k.swapaxes(-1, -2), axis=-1) @ v).swapaxes(1, 2)


FORMS = {
    "gelu": (lambda x, y: ops.gelu(x, training=True), lambda x, y: textbook_gelu(x)),
    "biased gelu": (
        lambda x, y: ops.gelu(x, y[0, 0, 0], training=True),
        lambda x, y: textbook_gelu(x + y[0, 0, 0]),
    ),
    "swiglu": (lambda x, y: ops.swiglu(x, y, training=True), textbook_swiglu),
    "gated gelu": (
        lambda x, y: ops.gated_gelu(x, y, training=True),
        lambda x, y: textbook_gelu(x / (1 + mx.exp(-y))),
    ),
    "attention": (
        lambda x, y: ops.attention(mx.concatenate([x, y, x * y], axis=2), 0.3, training=True),
        lambda x, y: textbook_attention(mx.concatenate([x, y, x * y], axis=2), 0.3),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_an_operation_are_those_of_its_formula(assume, name, device):
    assume(device)
    keys = mx.random.split(mx.random.key(1), 3)
    x, y, weights = (3 * mx.random.normal((2, 7, 4, 6), key=key) for key in keys)
    found, expected = (
        mx.value_and_grad(lambda x, y, f=f: (weights * f(x, y)).sum(), argnums=(0, 1))(x, y)
        for f in FORMS[name]
    )
    assert_close(found, expected)


def test_for_the_gradients_of_swiglu_only_its_inputs_are_held():
    wide, layers = mx.random.normal((2**18,)), 16

    def of(x: mx.array) -> mx.array:
        for _ in range(layers):
            x = ops.swiglu(x, wide, training=True)
        return x.sum()

    mx.eval(wide)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(of)(wide))
    # Otherwise a sigmoid and a product would be held, too, for each.
    assert mx.get_peak_memory() - before < 2 * layers * wide.nbytes


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_gradients_in_half_precision(assume, name, dtype):
    """As on a GPU; within a few roundings of float32's."""
    assume("cuda")
    keys = mx.random.split(mx.random.key(1), 3)
    arrays = [3 * mx.random.normal((2, 7, 4, 6), key=key).astype(dtype) for key in keys]

    def gradients(form, x, y, weights):
        loss = lambda x, y: (weights * form(x, y)).sum()  # noqa: E731
        return mx.grad(loss, argnums=(0, 1))(x, y)

    found = gradients(FORMS[name][0], *arrays)
    expected = gradients(FORMS[name][1], *(a.astype(mx.float32) for a in arrays))
    assert all(g.dtype == dtype for g in found)
    assert_close(found, expected, 8 * (2**-11 if dtype == mx.float16 else 2**-8))


@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [
        (3, 1, (8, 5)),
        (3, 2, (8, 6)),
        (7, 1, (9, 16)),
        (7, 2, (12, 4)),
        (7, 2, (9, 7)),
        (5, 3, (7, 8)),
    ],
)
def test_gradients_of_depthwise_convolutions(kernel, stride, shape):
    keys = mx.random.split(mx.random.key(kernel), 3)
    x = mx.random.normal((2, *shape, 6), key=keys[0])
    weight = mx.random.normal((6, kernel, kernel, 1), key=keys[1])

    def plain(x, weight):
        return mx.conv2d(x, weight, stride, kernel // 2, groups=6)

    cotangent = mx.random.normal(plain(x, weight).shape, key=keys[2])
    found, expected = (
        mx.vjp(f, [x, weight], [cotangent])
        for f in (lambda x, w: cpu_training.depthwise_conv(x, w, stride), plain)
    )
    assert_close(found, expected)


# --- The decoder ---


def test_training_forms_give_what_inference_gives(small, nano):
    model, _ = nano
    ids, pixels = random_ids(20, 2), mx.random.uniform(shape=(2, 128, 128, 3))
    expected = model(ids), model.encode_image(pixels)
    model.train()
    try:
        assert_close((model(ids), model.encode_image(pixels)), expected)
    finally:
        model.eval()


def test_segments_are_computed_as_if_they_stood_alone(small):
    decoder, lengths = small.language_model, (5, 1, 9)
    alone = [random_ids(length) for length in lengths]
    segments = mx.array([[i for i, length in enumerate(lengths) for _ in range(length)]])
    packed = decoder.hidden_states(mx.concatenate(alone, axis=1), segments=segments)
    expected = mx.concatenate([decoder.hidden_states(ids) for ids in alone], axis=1)
    assert relative(packed, expected) < TOLERANCE


def test_a_segment_does_not_change_the_others_by_a_bit(small):
    decoder, ids = small.language_model, random_ids(12)
    segments = mx.array([[4] * 5 + [0] * 4 + [4] * 3])  # a number may come again
    expected = decoder.hidden_states(ids, segments=segments)
    other = mx.concatenate([ids[:, :5], 1 + ids[:, 5:9] % 90, ids[:, 9:]], axis=1)
    found = decoder.hidden_states(other, segments=segments)
    assert (found[:, :5] == expected[:, :5]).all()
    assert (found[:, 9:] == expected[:, 9:]).all()
    assert not (found[:, 5:9] == expected[:, 5:9]).any(axis=-1).all()


def test_padding_as_a_segment_of_its_own_changes_nothing(small):
    decoder, ids = small.language_model, random_ids(8)
    padded = mx.concatenate([ids, mx.zeros((1, 5), mx.int32)], axis=1)
    found = decoder.hidden_states(padded, segments=mx.array([[0] * 8 + [1] * 5]))
    assert relative(found[:, :8], decoder.hidden_states(ids)) < TOLERANCE
    assert mx.isfinite(found).all()


def test_segments_take_no_cache(small):
    with pytest.raises(ValueError, match="take no cache"):
        small.language_model.hidden_states(
            random_ids(3), small.make_kv_cache(), segments=mx.array([[0, 0, 1]])
        )


def test_positions_in_half_precision_keep_their_angles_in_float32(assume):
    assume("cuda")
    length, width = 4096, 16
    x = mx.random.normal((1, 1, length, width), key=mx.random.key(3)).astype(mx.bfloat16)
    found = ops.RoPE(x, length, width, 10_000.0, 0)(x)
    assert found.dtype == mx.bfloat16
    wide = np.array(x.astype(mx.float32), np.float64)
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(8) / 8)
    a, b = wide[..., :8], wide[..., 8:]
    cos, sin = np.cos(angles), np.sin(angles)
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    error = np.abs(np.array(found.astype(mx.float32)) - expected)
    # A few roundings to bfloat16; an angle of 4095 in bfloat16 would be off by 8.
    assert (error <= 2**-6 * np.abs(wide).max()).all()


def test_segments_are_brought_apart_and_together_again():
    numbers = mx.array([[0, 0, 0, 1, 1, 2, 9, 9], [5, 5, 5, 5, 5, 9, 9, 9]])
    found = Segments.of(numbers, [6, 5], count=lambda n: 8, length=lambda n: 6)
    assert (found.tokens.shape, found.places.shape) == ((8, 6), (2, 8))
    x = mx.arange(16 * 3).reshape(2, 8, 3)
    apart = found.apart(x)
    for n, (b, start, stop) in enumerate([(0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 5)]):
        assert (apart[n, : stop - start] == x[b, start:stop]).all()
    together = found.together(apart)
    assert (together[0, :6] == x[0, :6]).all() and (together[1, :5] == x[1, :5]).all()
    weights = mx.random.normal(x.shape) * (mx.arange(8) < mx.array([[6], [5]]))[..., None]

    def loss(x: mx.array) -> mx.array:
        return (weights * found.together(found.apart(x) ** 2)).sum()

    x = x.astype(mx.float32)
    assert mx.array_equal(mx.grad(loss)(x), 2 * weights * x)
    with ops.exported():
        assert mx.array_equal(mx.grad(loss)(x), 2 * weights * x)
    assert Segments.of(mx.zeros((1, 4), mx.int32), [0]).tokens.shape == (1, 1)  # only padding


# --- Embedding ---


def batch_with_images(model: fv.FastVLM):
    """(input_ids with marks, visual tokens of two images, their places)."""
    ids = random_ids(12, 2)
    marks = [[1, 2, 3, 4], [0, 1, 9, 10]]
    places = mx.array([12 * row + i for row, marked in enumerate(marks) for i in marked])
    flat = ids.flatten()
    flat[places] = model.config.image_token_index
    visual = mx.random.normal((2, 4, TEXT["hidden_size"]), key=mx.random.key(5))
    return flat.reshape(2, 12), visual, places


def test_embedding_at_known_places_equals_embedding_by_marks(small):
    ids, visual, places = batch_with_images(small)
    expected = small.embed_inputs(ids, visual_tokens=list(visual))
    without = mx.where(ids == small.config.image_token_index, 0, ids)
    compiled = mx.compile(lambda *arrays: small.embed_at(*arrays))
    assert (compiled(without, visual.flatten(0, 1), places) == expected).all()


def test_gradients_reach_visual_tokens_and_only_the_embeddings_that_are_read(small):
    ids, visual, places = batch_with_images(small)
    ids = mx.where(ids == small.config.image_token_index, 0, ids)
    weights = mx.random.normal((24, TEXT["hidden_size"]), key=mx.random.key(6))

    def loss(table, visual):
        small.language_model.embed_tokens.weight = table
        return (weights * small.embed_at(ids, visual, places).flatten(0, 1)).sum()

    before = small.language_model.embed_tokens.weight
    to_table, to_visual = mx.grad(loss, argnums=(0, 1))(before, visual.flatten(0, 1))
    small.language_model.embed_tokens.weight = before
    assert (to_visual == weights[places]).all()
    assert (to_table[0] == 0).all()  # id 0 stands only where visual tokens are put
    text = mx.array([i for i in range(24) if i not in places.tolist()])
    expected = mx.zeros_like(before).at[ids.flatten()[text]].add(weights[text])
    assert relative(to_table, expected) < TOLERANCE


# --- Loading for training, and the way back ---


@pytest.mark.parametrize("folder", [NANO, RANDOM_SMALL], ids=["quantized", "float"])
def test_a_model_for_training_answers_as_the_one_for_inference(folder):
    model, trained = fv.load_model(folder), load_for_training(folder)
    assert trained.training and trained.language_model.layers[0].self_attn.training
    trained.eval()
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    ids = mx.random.randint(1, 90, (2, 20), key=mx.random.key(1))
    assert_close(
        (trained(ids), trained.encode_image(pixels)), (model(ids), model.encode_image(pixels))
    )


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_names_for_training_are_the_published_ones_on_every_device(assume, device):
    assume(device)
    layer = load_for_training(RANDOM_SMALL).language_model.layers[0]
    names = {name.rpartition(".")[0] for name, _ in tree_flatten(layer.parameters())}
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    mlp = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert names == attention | mlp | {"input_layernorm", "post_attention_layernorm"}
    assert "bias" in load_for_training(RANDOM_SMALL).vision_tower.network[0].convffn.conv


def test_quantized_layers_stay_quantized_for_training():
    attention = load_for_training(NANO).language_model.layers[0].self_attn
    assert isinstance(attention.q_proj, nn.QuantizedLinear)


@pytest.mark.parametrize("folder", [NANO, RANDOM_SMALL], ids=["quantized", "float"])
def test_weights_of_a_model_for_training_are_those_of_its_checkpoint(folder):
    _, expected = read_checkpoint(Path(folder))
    found = inference_weights(load_for_training(folder))
    for name in (n for n in expected if n.startswith(("language_model", "mm_projector"))):
        assert (found[name] == expected[name].astype(found[name].dtype)).all(), name
    assert found.keys() == expected.keys()


def test_an_adapter_that_is_not_fused_has_no_place_in_a_checkpoint():
    model = load_for_training(RANDOM_SMALL)
    attention = model.language_model.layers[0].self_attn
    attention.q_proj = LoRALinear.from_base(attention.q_proj)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.lora_a belongs to an adapter; fuse"):
        inference_weights(model)


# --- Adapters in the place of layers ---


def with_adapters(model: fv.FastVLM) -> fv.FastVLM:
    """LoRA in the place of every linear layer, its second factor not zero."""

    def replace(module: nn.Module) -> nn.Module:
        adapted = LoRALinear.from_base(module, r=2, scale=1.0)
        adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape, key=mx.random.key(1))
        return adapted

    layers = tree_map(
        lambda m: replace(m) if isinstance(m, nn.Linear | nn.QuantizedLinear) else m,
        model.leaf_modules(),
        is_leaf=nn.Module.is_module,
    )
    model.update_modules(layers)
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adapters_on_every_layer_count_in_every_form(assume, device):
    assume(device)
    model = with_adapters(load_for_training(RANDOM_SMALL, dtype="float32"))
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    ids = mx.random.randint(1, 90, (1, 20), key=mx.random.key(1))
    found = []
    for mode in (True, False):
        model.train(mode)
        found.append((model(ids), model.encode_image(pixels), model(ids[:, :1])))
    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    model.update_modules(tree_unflatten([(name, layer.fuse()) for name, layer in adapted]))
    expected = model(ids), model.encode_image(pixels), model(ids[:, :1])
    for each in found:
        assert_close(each, expected, 1e-4)


def test_an_adapter_on_tied_embeddings_reaches_the_head():
    decoder = models.random_model(3, **TEXT).language_model
    decoder.embed_tokens = LoRAEmbedding.from_base(decoder.embed_tokens, r=2, scale=1.0)
    decoder.embed_tokens.lora_b = mx.random.normal(decoder.embed_tokens.lora_b.shape)
    for ids in (random_ids(7), random_ids(1)):  # one row has a form of its own on the CPU
        found = decoder(ids)
        adapted = decoder.embed_tokens
        decoder.embed_tokens = adapted.fuse()
        assert relative(found, decoder(ids)) < TOLERANCE
        decoder.embed_tokens = adapted


# --- Whole parts, against MLX's own forms and PyTorch ---


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_gradients_of_the_decoder_are_those_of_plain_forms(quantized):
    """Where a device has no forms of its own, only MLX's operations are left."""
    model = load_for_training(NANO if quantized else RANDOM_SMALL, dtype="float32")
    decoder, ids = model.language_model, mx.random.randint(1, 90, (2, 30), key=mx.random.key(1))
    decoder.freeze(keys=["scales", "biases"], recurse=True)

    def loss(decoder):
        return nn.losses.cross_entropy(decoder(ids)[:, :-1], ids[:, 1:], reduction="mean")

    found = nn.value_and_grad(decoder, loss)(decoder)
    with ops.assume("cuda"):
        expected = nn.value_and_grad(decoder, loss)(decoder)
    assert_close(found, expected, 1e-4)
    assert any("q_proj.bias" in name for name, _ in tree_flatten(found[1]))


def test_gradients_of_the_encoder_are_those_of_plain_forms():
    encoder = load_for_training(RANDOM_SMALL, dtype="float32").vision_tower
    pixels = mx.random.uniform(shape=(2, 128, 64, 3), key=mx.random.key(0))
    weights = mx.random.normal(encoder(pixels).shape, key=mx.random.key(1))

    def loss(encoder):
        return (weights * encoder(pixels)).sum()

    found = nn.value_and_grad(encoder, loss)(encoder)
    with ops.assume("cuda"):
        expected = nn.value_and_grad(encoder, loss)(encoder)
    assert_close(found, expected, 1e-4)


def test_an_encoder_alone_is_made_for_inference():
    assert not FastViTHD(VisionConfig(layers=(1,) * 5, embed_dims=(16,) * 5)).training


# --- The encoder, layer by layer ---


@pytest.mark.parametrize("sides", [(64, 64), (192, 128)])
def test_gradients_layer_by_layer_are_those_of_autodiff(sides):
    encoder = load_for_training(RANDOM_SMALL, dtype="float32").vision_tower
    pixels = mx.random.uniform(shape=(2, *sides, 3), key=mx.random.key(0))
    features, pullback = encode_with_pullback(encoder, pixels)
    weights = mx.random.normal(features.shape, key=mx.random.key(1))
    with ops.assume("cuda"):
        expected = nn.value_and_grad(encoder, lambda e: (weights * e(pixels)).sum())(encoder)
    assert_close(((weights * features).sum(), pullback(weights)), expected, 1e-4)


def batch_of() -> dict:
    ids = mx.random.randint(1, 90, (2, 20), key=mx.random.key(1))
    places = mx.array([3, 4, 5, 6, 28, 29, 30, 31])
    pixels = mx.random.uniform(shape=(2, 128, 128, 3), key=mx.random.key(2))
    return {"input_ids": ids, "places": places, "pixel_values": pixels}


def loss_of(model: fv.FastVLM, batch: dict) -> tuple[mx.array, mx.array]:
    features = batch.get("features")
    if features is None and "pixel_values" in batch:
        pixels = batch["pixel_values"]
        several = isinstance(pixels, list)
        features = (
            [model.vision_tower(p) for p in pixels] if several else model.vision_tower(pixels)
        )
    ids = batch["input_ids"]
    embeddings = None
    if features is not None:
        features = mx.concatenate(features) if isinstance(features, list) else features
        visual = model.mm_projector(features).flatten(0, 1)
        embeddings = model.embed_at(ids, visual, batch["places"])
    logits = model.language_model(ids, None, embeddings)
    return nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:]).sum(), mx.array(ids.size)


@pytest.mark.parametrize("frozen", [(), ("mm_projector", "language_model"), ("vision_tower",)])
def test_loss_and_gradients_of_a_whole_model(assume, frozen):
    assume("cpu")
    model = load_for_training(RANDOM_SMALL, dtype="float32")
    for part in frozen:
        model[part].freeze()
    assert trains_by_layer(model) == ("vision_tower" not in frozen)
    before = tree_flatten(model.parameters())
    several = batch_of() | {"pixel_values": list(batch_of()["pixel_values"][:, None])}
    for batch in (batch_of(), several, {"input_ids": batch_of()["input_ids"]}):
        found = value_and_grad(model, loss_of)(model, batch)
        expected = nn.value_and_grad(model, loss_of)(model, batch)
        assert_close(found[0], expected[0])
        for name, gradient in tree_flatten(expected[1]):
            own = dict(tree_flatten(found[1]))[name]
            assert (own == gradient).all() if not gradient.any() else relative(own, gradient) < 1e-4
    after = dict(tree_flatten(model.parameters()))
    assert all((after[name] == value).all() for name, value in before)


def test_an_encoder_with_adapters_is_left_to_autodiff(assume):
    assume("cpu")
    model = load_for_training(RANDOM_SMALL, dtype="float32")
    assert trains_by_layer(model)
    assert not trains_by_layer(with_adapters(model))
    with ops.assume("metal"):
        assert not trains_by_layer(load_for_training(RANDOM_SMALL))
