import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.bench import graph
from fastvlm_mlx.bench.graph import as_on_gpu, count, count_primitives, kernel_launches
from fastvlm_mlx.bench.traffic import Trace, bytes_moved, kernels
from fastvlm_mlx.bench.work import encoder_work
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.batch_kv_cache import BatchKVCache
from fastvlm_mlx.model.qwen2 import Block
from fastvlm_mlx.model.vision import FastViTHD

pytestmark = pytest.mark.skipif(
    mx.default_device().type == mx.DeviceType.gpu, reason="describes graphs built on the CPU"
)


def ones(*shape: int) -> mx.array:
    x = mx.ones(shape)
    mx.eval(x)
    return x


def test_primitives_of_small_graphs() -> None:
    x = ones(4, 4)
    assert count_primitives(x) == {}
    assert count_primitives(mx.sin(mx.exp(x))) == {"Sin": 1, "Exp": 1}
    assert count_primitives([mx.exp(x), {"a": mx.exp(x)}, None, 3]) == {"Exp": 2}


def test_an_array_that_is_used_twice_is_computed_once() -> None:
    y = mx.exp(ones(4))
    assert count_primitives([mx.sin(y), mx.cos(y)]) == {"Exp": 1, "Sin": 1, "Cos": 1}


def test_what_is_evaluated_is_an_input() -> None:
    y = mx.exp(ones(4))
    mx.eval(y)
    assert count_primitives(mx.sin(y)) == {"Sin": 1}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(2, 8),
        lambda x: x.T,
        lambda x: x[1:3],
        lambda x: mx.split(x, 2)[1],
        lambda x: x[None],
        lambda x: mx.broadcast_to(x, (3, 4, 4)),
        lambda x: x.flatten(),
        lambda x: mx.unflatten(x, 0, (2, 2)),
        lambda x: x[None].squeeze(0),
        lambda x: mx.stop_gradient(x),
    ],
)
def test_views_launch_nothing(view: Callable[[mx.array], mx.array]) -> None:
    y = view(ones(4, 4))
    assert count_primitives(y).total() >= 1
    assert kernel_launches(y) == 0


@pytest.mark.parametrize(
    ("launches", "compute"),
    [
        (1, lambda x: x + 1),
        (1, lambda x: x @ x),
        (1, lambda x: mx.addmm(x, x, x)),
        (1, lambda x: mx.softmax(x, axis=-1)),
        (1, lambda x: x.sum()),
        (1, lambda x: mx.argmax(x)),
        (1, lambda x: x.astype(mx.float16)),
        (1, lambda x: mx.contiguous(x.T)),
        (2, lambda x: mx.concatenate([x, x])),
        (5, lambda x: mx.concatenate([x, x, x.T, x, x], axis=1)),
        (2, lambda x: mx.pad(x, 1)),
        (1, lambda x: mx.conv2d(x.reshape(1, 2, 2, 4), x.reshape(4, 2, 2, 1), groups=4)),
    ],
)
def test_launches_of_one_operation(launches: int, compute: Callable[[mx.array], mx.array]) -> None:
    assert kernel_launches(compute(ones(4, 4))) == launches


def test_an_update_in_place_is_one_launch() -> None:
    x, y = ones(4, 4), ones(2, 4)
    x[1:3] = y
    assert kernel_launches(x) == 1


def test_compiled_functions_are_one_primitive_each_time() -> None:
    x = ones(4)
    y = nn.gelu(nn.gelu(x))  # both share what is compiled
    assert count_primitives(y) == {"Compiled": 2}
    assert kernel_launches(y) == 2


def network(layers: int) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(layers)]
    model = nn.Sequential(*blocks)
    mx.eval(model.parameters())
    return model


def test_a_whole_compiled_network() -> None:
    model, x = network(3), ones(2, 8)
    with as_on_gpu():
        found = count_primitives(mx.compile(model)(x))
    assert {name: n for name, n in found.items() if name not in graph.VIEWS} == {
        "AddMM": 3,
        "LayerNorm": 3,
        "Compiled": 3,
    }


def test_functions_of_fast_are_one_primitive() -> None:
    x, q, kv = ones(1, 3, 64), ones(1, 4, 3, 64), mx.exp(ones(1, 2, 5, 64))
    weight = ones(64)
    with as_on_gpu():
        assert count_primitives(nn.RMSNorm(64)(x))["RMSNorm"] == 1
        assert count_primitives(mx.fast.rms_norm(x, None, 1e-5)) == {"RMSNorm": 1}
        assert count_primitives(mx.fast.layer_norm(x, weight, None, 1e-5)) == {"LayerNorm": 1}
        assert count_primitives(nn.RoPE(64)(q, offset=3)) == {"RoPE": 1}
        attention = mx.fast.scaled_dot_product_attention(q, kv, kv, scale=1.0, mask="causal")
        assert attention.shape == q.shape
        assert count_primitives(attention) == {"ScaledDotProductAttention": 1, "Exp": 1}


def test_inputs_that_are_computed_are_counted() -> None:
    x = ones(1, 3, 64)
    q = ones(1, 1, 3, 64)
    with as_on_gpu():
        y = mx.fast.layer_norm(x, mx.exp(ones(64)), mx.sin(ones(64)), 1e-5)
        assert count_primitives(y) == {"LayerNorm": 1, "Exp": 1, "Sin": 1}
        y = mx.fast.rope(q, 64, traditional=False, base=1.0, scale=1.0, offset=mx.abs(mx.array(2)))
        assert count_primitives(y) == {"RoPE": 1, "Abs": 1}
        y = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mx.exp(ones(3, 3)))
        assert count_primitives(y) == {"ScaledDotProductAttention": 1, "Exp": 1}


def test_attention_without_a_fused_kernel_is_taken_apart() -> None:
    q = ones(1, 4, 16, 32)
    with as_on_gpu():
        found = count_primitives(mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0))
    assert (found["Matmul"], found["Softmax"]) == (2, 1)
    assert found["ScaledDotProductAttention"] == 0


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "dim", "fused"),
    [
        (256, 256, 8, 8, 32, False),
        (256, 256, 8, 8, 64, True),
        (256, 256, 8, 8, 80, True),
        (256, 256, 28, 4, 128, True),
        (256, 256, 8, 8, 256, False),
        (1, 300, 14, 2, 64, True),
        (1, 300, 14, 2, 80, False),
        (8, 300, 28, 4, 128, False),  # 8 x 7 queries a head of keys are more than 32
        (4, 300, 28, 4, 128, True),
        (8, 4, 4, 4, 64, False),
    ],
)
def test_where_attention_is_fused(
    queries: int, keys: int, heads: int, kv_heads: int, dim: int, fused: bool
) -> None:
    q, kv = (1, heads, queries, dim), (1, kv_heads, keys, dim)
    assert graph.has_fused_attention(q, kv, kv) is fused


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantizing_is_one_launch(bits: int) -> None:
    layer = nn.QuantizedEmbedding(16, 64, bits=bits)
    mx.eval(layer.parameters())
    tokens = mx.array([1, 2, 3])
    with as_on_gpu():
        y = layer(tokens)
        assert y.shape == (3, 64)
        assert y.dtype == layer.scales.dtype
        found = count_primitives(y)
    assert (found["Dequantize"], found["Gather"]) == (1, 3)


def test_nothing_is_left_behind(small: fv.FastVLM, assume: Callable[[str], None]) -> None:
    assume("cpu")
    pixel_values = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    run = mx.compile(small.encode_image)
    expected = np.array(run(pixel_values))
    functions = [getattr(mx.fast, name) for name in graph.FAST]
    before = count_primitives(small.encode_image(pixel_values))
    with as_on_gpu():
        inside = count_primitives(run(pixel_values))
        assert not ops.on_cpu()
    assert inside["LayerNorm"] > 0 and inside["Convolution"] > 1
    assert ops.on_cpu()
    assert [getattr(mx.fast, name) for name in graph.FAST] == functions
    assert count_primitives(small.encode_image(pixel_values)) == before
    assert np.array_equal(np.array(run(pixel_values)), expected)


def test_stand_ins_keep_their_own_names_outside() -> None:
    assert count_primitives(mx.cumprod(ones(4))) == {"CumProd": 1}


def test_an_inner_block_leaves_the_outer_one_as_it_was() -> None:
    with as_on_gpu():
        with as_on_gpu():
            pass
        assert not ops.on_cpu()
        assert count_primitives(mx.fast.rms_norm(ones(4), None, 1e-5)) == {"RMSNorm": 1}
    assert count_primitives(mx.cumprod(ones(4))) == {"CumProd": 1}


def test_leaving_by_an_error(assume: Callable[[str], None]) -> None:
    assume("cpu")
    functions = [getattr(mx.fast, name) for name in graph.FAST]
    with pytest.raises(RuntimeError, match="on purpose"), as_on_gpu():
        raise RuntimeError("on purpose")
    assert ops.on_cpu()
    assert [getattr(mx.fast, name) for name in graph.FAST] == functions
    assert count_primitives(mx.cumprod(ones(4))) == {"CumProd": 1}


def test_encoder_has_the_layers_of_its_configuration(small: fv.FastVLM) -> None:
    config = small.config.vision
    attention = sum(
        depth
        for depth, mixer in zip(config.layers, config.token_mixers, strict=True)
        if mixer == "attention"
    )
    counts = graph.count_encode(small, 128)
    assert counts.primitives["LayerNorm"] == attention
    assert counts.primitives["ScaledDotProductAttention"] == attention
    assert counts.primitives["Pad"] == attention  # its heads are 32 wide, and the kernel's 64
    assert counts.launches < counts.primitives.total()
    assert graph.count_encode(small, 256).primitives == counts.primitives


def test_an_image_launches_what_each_block_needs() -> None:
    """At the released depths; how wide the layers are makes no difference."""
    config = VisionConfig(embed_dims=(16, 32, 64, 128, 256))
    pixel_values = mx.zeros((1, 128, 128, 3), mx.uint8)
    with as_on_gpu():
        tower = FastViTHD(config)
        tower.set_dtype(mx.float16)
        tower.fold_biases()
        mx.eval(tower.parameters(), pixel_values)
        found = count(tower(pixel_values))
    stem = 1 + 3 * 2  # rescaling; each layer and its bias and GELU
    repmixer = 2 + 1 + 3  # convolution and biases; convolution; products and GELU
    attention = 1 + 1 + 2 + 1 + 2 + 1 + 3  # norm to proj, with its biases; as above
    downsample, position = 2 + 1 + 2, 2  # convolutions, joined; product and GELU
    expand = 2 + 1 + 4 + 4  # convolutions, joined; mean in float32; gate and GELU
    blocks = 38 * repmixer + 6 * attention + 4 * downsample + 2 * position
    assert found.launches == stem + blocks + expand == 336
    projector = 3
    assert found.launches + projector <= 0.40 * 864  # mlx-vlm's, in benchmarks/RESULTS.md


def test_decoder_has_the_layers_of_its_configuration(small: fv.FastVLM) -> None:
    layers = small.config.text.num_hidden_layers
    prefill, decode = graph.count_prefill(small, 20), graph.count_decode(small, 20)
    for counts in (prefill, decode):
        assert counts.primitives["RMSNorm"] == 2 * layers + 1
        assert counts.primitives["RoPE"] == layers
        assert counts.primitives["SliceUpdate"] in (layers, 2 * layers)  # keys and values
        assert counts.primitives["ArgReduce"] == 1
    assert prefill.primitives["Full"] in (layers, 2 * layers)  # room for keys and values
    assert decode.primitives["Full"] == 0
    assert decode.launches < prefill.launches


def released_depth() -> fv.FastVLM:
    """A narrow model with the layers and heads of FastVLM-0.5B."""
    config = {
        "model_type": "llava_qwen2",
        "vision_config": {"layers": [1] * 5, "embed_dims": [32] * 5, "image_size": 64},
        "hidden_size": 14 * 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    model = fv.FastVLM(fv.FastVLMConfig.from_dict(config))
    model.set_dtype(mx.float16)
    return model


def test_a_token_launches_what_each_layer_needs() -> None:
    # norm, qkv, rope, cache, attention, output; norm, gate and up, SwiGLU, down
    layer = 6 + 4
    found = graph.count_decode(released_depth(), 300)
    assert found.launches == 24 * layer + 4 == 244  # embedding, norm, logits, the likeliest


def test_a_step_of_a_batch_launches_hardly_more_than_a_token() -> None:
    model = released_depth()
    cache = BatchKVCache(len(model.layers))
    cache.add(graph.filled_cache(model, 16, 300), [300 - i for i in range(16)])
    mx.eval([layer.stored for layer in cache.layers])
    found = graph.count_step(model, cache.layers, 16)
    for name in ("RoPE", "ScaledDotProductAttention", "Scatter"):
        assert found.primitives[name] == 24
    assert found.primitives["AsType"] == 0
    mask = 3  # positions, comparison, written out for all heads
    assert found.launches == 244 + mask + 24 == 271  # a scatter counts as two, a copy and itself


def test_more_layers_launch_more(small: fv.FastVLM) -> None:
    text = small.config.text
    before = graph.count_decode(small, 20)
    block = Block(text)
    small.language_model.layers.append(block)
    try:
        after = graph.count_decode(small, 20)
    finally:
        small.language_model.layers.pop()
    more = after.primitives - before.primitives
    assert (more["RMSNorm"], more["RoPE"], more["ScaledDotProductAttention"]) == (2, 1, 0)
    assert (more["Matmul"] + more["AddMM"], more["Softmax"]) == (4 + 2, 1)  # heads of 16
    assert 4 + 5 < after.launches - before.launches < 25


def test_the_file_alone_in_an_environment_without_this_package(tmp_path: Path) -> None:
    file = Path(graph.__file__)
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('graph', {str(file)!r}); "
        "graph = importlib.util.module_from_spec(spec); spec.loader.exec_module(graph); "
        "import mlx.core as mx; import mlx.nn as nn\n"
        "y = nn.LayerNorm(4)\n"
        "with graph.as_on_gpu(): print(graph.kernel_launches(y(mx.array([0.0] * 4))))\n"
        "print([name for name in sys.modules if name.startswith('fastvlm')])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["3", "[]"]  # the norm, and its weight and bias


def test_counts_are_of_both_kinds() -> None:
    y = mx.exp(ones(4).reshape(2, 2))
    assert count(y) == (Counter({"Exp": 1, "Reshape": 1}), 1)


def test_bytes_of_kernels_known_by_hand() -> None:
    """Pointwise neighbours are one kernel, views are read where they lie, products stand alone."""
    shapes = ((8, 4), (4, 16), (4, 16), (16,))
    x, w, v, bias = (mx.zeros(shape, mx.float16) for shape in shapes)
    mx.eval(x, w, v, bias)
    product = 2 * (8 * 4 + 4 * 16 + 8 * 16)
    assert bytes_moved(lambda x: x @ w, x) == product
    assert bytes_moved(lambda x: mx.erf(x @ w + bias) * 2, x) == product + 2 * (8 * 16 * 2 + 16) + 2
    # The sum is used twice: it is written, and read by the second product.
    assert bytes_moved(lambda x: (y := mx.abs(x)) @ w + y @ v, x) == (
        2 * 2 * 8 * 4 + 2 * product + 3 * 2 * 8 * 16
    )
    assert bytes_moved(lambda x: x.T[:2].reshape(-1), x) == 0


def test_bytes_of_an_image_in_their_order(small: fv.FastVLM) -> None:
    """Every kernel of the graph is there, and the bytes are no less than the floor."""
    with as_on_gpu():
        model = FastViTHD(small.config.vision)
        image = mx.zeros((1, 64, 64, 3), mx.uint8)
        mx.eval(model.parameters(), image)
        trace = Trace(model, image)
    counted = graph.count_encode(small, 64).launches
    assert abs(len(list(kernels(trace))) - counted) < 0.1 * counted
    floor = encoder_work(small.config.vision, 64)
    assert bytes_moved(model, image) > 4 * (floor.weights + floor.activations)
