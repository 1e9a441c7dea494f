"""Models loaded from folders: against PyTorch, by dtype, quantized, and in how much memory."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import MIB, PLACES, logits_of, one_sentence, peak_memory, rewrite
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.checkpoint import load
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.load import DTYPES, cast, load_model, load_processor
from fastvlm_mlx.checkpoint.names import unfuse
from fastvlm_mlx.checkpoint.read import read_layout
from fastvlm_mlx.config import CheckpointError, load_config
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM

# --- the small model against PyTorch ---


@pytest.fixture(scope="module")
def expected(data: Path) -> tuple[dict[str, mx.array], list[dict]]:
    """What the PyTorch model makes of three prompts: with one image, with two, with none."""
    folder = data / "random-small"
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    return mx.load(str(folder / "expected.safetensors")), cases


@pytest.fixture(scope="module", params=["inference form", "training form"])
def model(request, small_folder, training_folder) -> FastVLM:
    is_training = request.param == "training form"
    return load_model(training_folder if is_training else small_folder, dtype="float32")


def inputs(case: dict, arrays: dict[str, mx.array]) -> tuple[list[int], mx.array | None]:
    """Token ids with a place for each visual token, and pixels with channels last."""
    ids = [i for token in case["input_ids"] for i in [token] * (PLACES if token == -200 else 1)]
    images = mx.array(case["images"], mx.int32)
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)[images] if case["images"] else None
    return ids, pixels


def test_visual_features_equal_the_reference(model, expected):
    arrays, _ = expected
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)
    for found, wanted in (
        (model.vision_tower(pixels), arrays["vision_features"]),
        (model.encode_image(pixels), arrays["projected"]),
    ):
        assert found.shape == wanted.shape
        assert mx.abs(found - wanted).max() < 1e-4 * mx.std(wanted)


@pytest.mark.parametrize("i", range(3), ids=["one image", "two images", "no image"])
def test_logits_and_greedy_tokens_equal_the_reference(model, expected, i):
    arrays, cases = expected
    ids, pixels = inputs(cases[i], arrays)
    cache = model.make_kv_cache()
    logits = model(mx.array([ids]), cache=cache, pixel_values=pixels)
    wanted = arrays[f"case{i}.logits"]
    assert logits.shape == wanted.shape
    assert mx.abs(logits - wanted).max() < 1e-3

    tokens = []
    for _ in cases[i]["greedy_tokens"]:
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(mx.array([tokens[-1:]]), cache=cache)
    assert tokens == cases[i]["greedy_tokens"]


# --- dtype ---


@pytest.fixture
def on_a_gpu(assume) -> None:
    assume("cuda")


def dtypes_of(model: FastVLM) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@pytest.fixture
def bfloat16_folder(small_copy, small_tensors) -> Path:
    as_bfloat16 = {name: cast(tensor, mx.bfloat16) for name, tensor in small_tensors.items()}
    return rewrite(small_copy, as_bfloat16, torch_dtype="bfloat16")


def test_on_the_cpu_weights_become_float32(bfloat16_folder, assume):
    assume("cpu")
    assert dtypes_of(load_model(bfloat16_folder)) == {mx.float32}


def test_on_a_gpu_weights_keep_their_dtype(bfloat16_folder, on_a_gpu):
    assert dtypes_of(load_model(bfloat16_folder)) == {mx.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", mx.float16, mx.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dtype_asked_for(bfloat16_folder, assume, dtype, device):
    assume(device)
    wanted = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    assert dtypes_of(load_model(bfloat16_folder, dtype=dtype)) == {wanted}


@pytest.mark.parametrize("dtype", ["int8", "half", "", mx.int32, 16])
def test_unknown_dtype(small_folder, dtype):
    with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16") as error:
        load_model(small_folder, dtype=dtype)
    assert repr(dtype) in one_sentence(error)


# --- quantized models ---


@pytest.fixture
def quantized_folder(small_copy, small_folder) -> Path:
    """The small model with decoder and projector at 8 bits, but for the last product of each MLP
    (of 160 columns, which groups of 64 do not divide)."""
    return fv.convert(small_folder, small_copy / "q8", quantize=8, progress=False)


def dequantized(folder: Path, target: Path) -> Path:
    """A copy of a quantized folder at full precision."""
    config = json.loads((folder / "config.json").read_text())
    tensors = mx.load(str(folder / "model.safetensors"))
    settings = config.pop("quantization")
    config.pop("quantization_config")
    for scales in [name for name in tensors if name.endswith(".scales")]:
        name = scales.removesuffix(".scales")
        packed = [tensors.pop(f"{name}.{key}") for key in ("weight", "scales", "biases")]
        tensors[f"{name}.weight"] = mx.dequantize(*packed, **settings)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    return target


def test_a_quantized_folder_equals_itself_dequantized(quantized_folder, tmp_path):
    loaded = load_model(quantized_folder)
    layer = loaded.language_model.layers[0]
    assert isinstance(layer.self_attn.qkv_proj, nn.QuantizedLinear)
    assert isinstance(layer.mlp.down_proj, nn.Linear)
    assert isinstance(loaded.language_model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(loaded.mm_projector.layers[0], nn.QuantizedLinear)
    plain = load_model(dequantized(quantized_folder, tmp_path / "plain"))
    assert mx.allclose(logits_of(loaded), logits_of(plain), atol=1e-4)


def test_quantizing_while_loading_equals_a_quantized_folder(quantized_folder, small_folder):
    loaded = load_model(small_folder, quantize=8)
    assert mx.array_equal(logits_of(loaded), logits_of(load_model(quantized_folder)))


def test_packed_weights_are_not_cast(quantized_folder):
    loaded = load_model(quantized_folder, dtype="float16")
    assert dtypes_of(loaded) == {mx.float16, mx.uint32}


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="quantized already"):
        load_model(NANO, quantize=4)


@pytest.mark.parametrize(
    "quantize", [1, 7, 16, "eight", {"bits": 9}, {"bits": 4, "group_size": 10}]
)
def test_settings_of_quantization_that_do_not_exist(small_folder, quantize):
    with pytest.raises(ValueError, match="quantize"):
        load_model(small_folder, quantize=quantize)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},  # those in the file are of 8
        {"bits": 8, "group_size": 32},
        {"bits": "8"},
        {"bits": 0},
        {"bits": 8, "group_size": 0},
        {"bits": 8, "group_size": None},
        {"bits": [8]},
        {"bits": 8.0},
        {"bits": True},
        {"bits": 10**400},
        {"bits": "8" * 10**6},
        {"bits": 8, "group_size": 64.0},
        {"bits": 8, "group_size": {}},
        {"bits": 8, "mode": {}},
        {"bits": 8, "group_size": 32.0, "mode": "mxfp8"},
        {"bits": 8, "mode": "magic"},
        {"bits": 8, "language_model.model.embed_tokens": {"bits": "four"}},
        {"bits": 8, "language_model.model.layers.0.self_attn.q_proj": {"bits": 4}},
    ],
)
def test_settings_that_are_not_those_of_the_tensors(quantized_folder, settings):
    config = json.loads((quantized_folder / "config.json").read_text())
    config |= {"quantization": settings, "quantization_config": settings}
    (quantized_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_model(quantized_folder)
    one_sentence(error)


# --- memory ---


def big_folder(folder: Path, dtype: mx.Dtype, width: int) -> int:
    """Write a checkpoint with a large decoder and return its bytes."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 16 * width}))
    tensors = unfuse(FastVLM(load_config(folder)))
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), llava.from_mlx(tensors))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "stored, dtype, width",
    [("float16", "float16", 256), ("float32", "float32", 512), ("bfloat16", "float32", 256)],
)
def test_loading_takes_little_more_than_the_weights(small_copy, stored, dtype, width):
    size = big_folder(small_copy, getattr(mx, stored), width)
    size *= getattr(mx, dtype).size // getattr(mx, stored).size
    assert size > (100 * MIB if width == 512 else 15 * MIB)
    with peak_memory() as used:
        loaded = load_model(small_copy, dtype=dtype)
    assert used[0] < 1.3 * size
    # All of it is there now, and nothing is left to be read from the file.
    assert sum(array.nbytes for _, array in tree_flatten(loaded.parameters())) > 0.95 * size
    os.truncate(small_copy / "model.safetensors", 0)
    with peak_memory() as used:
        mx.eval(loaded.parameters())
    assert used[0] == 0


def test_quantizing_while_loading_never_holds_the_weights(small_copy, monkeypatch):
    size = big_folder(small_copy, mx.float16, 256)
    monkeypatch.setattr(load, "READ_AT_ONCE", size // 20)  # as the default is to a real model
    with peak_memory() as used:
        load_model(small_copy, dtype="float16", quantize=4)
    assert used[0] < 0.7 * size


@pytest.mark.parametrize("form", ["small_folder", "training_folder"])
def test_tensors_are_read_when_they_are_needed(request, form):
    found = request.getfixturevalue(form)
    with peak_memory() as used:
        tensors, _ = read_layout(found)
    assert used[0] < 0.01 * sum(tensor.nbytes for tensor in tensors.values())


# --- a model with its processor ---


def test_load_gives_the_bundled_model_and_its_processor(nano):
    loaded, processor = nano
    assert isinstance(loaded, FastVLM)
    assert processor.image_size == loaded.config.vision.image_size == 256
    assert processor.patch_size == 64 and processor.mode == "pad"


def test_end_tokens_come_from_both_configs(tmp_path):
    folder = Path(shutil.copytree(NANO, tmp_path / "nano"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [740, 742]}')
    ids = load_processor(folder).tokenizer.eos_token_ids
    assert {740, 742} <= set(ids)


@pytest.mark.parametrize("ends", [{}, [[7]], "end", True, 2**63, -1, 1.5], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_none(tmp_path, file, ends):
    folder = Path(shutil.copytree(NANO, tmp_path / "nano"))
    fields = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(fields | {"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match="eos_token_id must be") as error:
        load_processor(folder)
    assert file in one_sentence(error)


# --- token ids and the embedding table ---


@pytest.fixture
def nano_copy(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoiled."""
    ignored = shutil.ignore_patterns("images")
    return Path(shutil.copytree(NANO, tmp_path / "nano", ignore=ignored))


def change(file: Path, **fields: object) -> None:
    value = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(value | fields))


def last_id(folder: Path) -> int:
    return load_config(folder).text.vocab_size - 1


@pytest.mark.parametrize("beyond", [1, 1000, 10**9])
@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
def test_a_token_beyond_the_embedding_table(nano_copy, where, beyond):
    file = nano_copy / "tokenizer.json"
    content = json.loads(file.read_text())
    found = last_id(nano_copy) + beyond
    if where == "vocab":
        content["model"]["vocab"]["zebra"] = found
    else:
        vocab = content["model"]["vocab"] | {"<zebra>": found}
        content["model"]["vocab"] = vocab
        content["added_tokens"].append(
            {"id": found, "content": "<zebra>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        )
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the tokenizer is not this model's") as error:
        fv.load(nano_copy)
    sentence = one_sentence(error)
    assert (
        str(found) in sentence and "zebra" in sentence and str(last_id(nano_copy) + 1) in sentence
    )


def test_a_tokenizer_of_another_model(small_copy, nano_copy):
    """Whose vocabulary is larger than the table."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_copy / name, small_copy)
    assert load_config(small_copy).text.vocab_size < load_config(nano_copy).text.vocab_size
    with pytest.raises(CheckpointError, match="the tokenizer is not this model's"):
        fv.load(small_copy)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("beyond", [1, 10**9, 10**30, -(10**7)])
def test_an_end_token_beyond_the_embedding_table(nano_copy, file, beyond):
    end = last_id(nano_copy) + beyond
    change(nano_copy / file, eos_token_id=[2, end])
    with pytest.raises(CheckpointError, match="eos_token_id") as error:
        fv.load(nano_copy)
    assert str(end) in one_sentence(error)


def test_the_last_row_of_the_table_may_be_an_end_token(nano_copy):
    change(nano_copy / "generation_config.json", eos_token_id=last_id(nano_copy))
    assert last_id(nano_copy) in load_processor(nano_copy).tokenizer.eos_token_ids


def test_the_token_of_an_image_needs_no_row(nano_copy):
    """Its embedding is never read."""
    file, beyond = nano_copy / "tokenizer.json", last_id(nano_copy) + 5
    content = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": beyond, "content": "<image>", "special": True} | flags)
    # Added tokens keep their ids only if the vocabulary has them.
    content["model"]["vocab"] |= {
        token["content"]: token["id"] for token in content["added_tokens"]
    }
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'<image>' has the id"):
        load_processor(nano_copy)
    change(nano_copy / "config.json", image_token_index=beyond)
    model, processor = fv.load(nano_copy)
    image = NANO / "images" / "penguins.png"
    answer = fv.generate(model, processor, "<image>Describe the image.", image=image)
    assert answer == "The image shows 6 penguins."


def test_the_place_of_a_visual_token_is_no_text(nano_copy):
    bpe = load_processor(nano_copy).tokenizer.bpe
    for index in (-200, -1, last_id(nano_copy) + 1, 2**29, bpe.token_to_id("<|im_end|>")):
        change(nano_copy / "config.json", image_token_index=index)
        load_processor(nano_copy)
    change(nano_copy / "config.json", image_token_index=bpe.token_to_id("a"))
    with pytest.raises(CheckpointError, match=r"image_token_index \d+, which is the text 'a'"):
        load_processor(nano_copy)


def test_load_of_a_name_that_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        fv.load(tmp_path / "nothing")


# --- the dtype on a GPU ---


def in_bfloat16(small_folder: Path, folder: Path, largest: float) -> Path:
    """The small model in bfloat16, with one weight of that size in the decoder."""
    shutil.copytree(small_folder, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = {name: t.astype(mx.bfloat16) for name, t in mx.load(str(file)).items()}
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = largest
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "architecture, dtype",
    [
        ("applegpu_g13g", mx.float16),  # M1
        ("applegpu_g13d", mx.float16),  # M1 Ultra
        ("applegpu_g14s", mx.float16),  # M2 Max
        ("applegpu_g15g", mx.bfloat16),  # M3
        ("applegpu_g17s", mx.bfloat16),  # M5
        ("unheard of", mx.bfloat16),
    ],
)
def test_bfloat16_becomes_float16_where_the_gpu_lacks_it(
    small_folder, tmp_path, monkeypatch, assume, architecture, dtype
):
    folder = in_bfloat16(small_folder, tmp_path / "model", 100.0)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assume("metal")
    assert load_model(folder).language_model.norm.weight.dtype == dtype
    for chosen in ("bfloat16", "float32"):
        found = load_model(folder, dtype=chosen).language_model.norm.weight.dtype
        assert found == DTYPES[chosen]


def test_other_dtypes_stay_as_stored(monkeypatch, assume):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g13g"})
    assume("metal")
    assert ops.fast_dtype(mx.float32) == mx.float32
    assert ops.fast_dtype(mx.float16) == mx.float16
    assume("cuda")
    assert ops.fast_dtype(mx.bfloat16) == mx.bfloat16


def test_a_weight_beyond_float16_does_not_become_infinite(
    small_folder, tmp_path, monkeypatch, assume
):
    folder = in_bfloat16(small_folder, tmp_path / "model", 1e5)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g13g"})
    assume("metal")
    assert load_model(folder).language_model.norm.weight.dtype == mx.bfloat16
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*beyond float16"):
        load_model(folder, dtype="float16")
    for quantize in ({"bits": 4, "group_size": 32}, "mxfp4", "nvfp4"):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp.*weight has .* beyond float16"):
            load_model(folder, dtype="float16", quantize=quantize)


@pytest.mark.parametrize("source", ["small_folder", "training_folder"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kernels_lie_row_by_row(source, dtype, request):
    """MLX's GPU backends copy any other at every call."""
    model = fv.load_model(request.getfixturevalue(source), dtype=dtype)
    kernels = [p for _, p in tree_flatten(model.parameters()) if p.ndim == 4]
    assert len(kernels) > 10
    for kernel in kernels:
        wanted = np.empty(kernel.shape, dtype).strides
        assert np.array(kernel, copy=False).strides == wanted
