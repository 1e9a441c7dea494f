import gzip
import json
import math
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.files import atomic_folder, save_checkpoint
from fastvlm_mlx.checkpoint.layouts import llava, mlx_vlm
from fastvlm_mlx.checkpoint.load import cast, load_model, load_processor
from fastvlm_mlx.checkpoint.names import fuse, unfuse
from fastvlm_mlx.checkpoint.quantize import quantize_checkpoint
from fastvlm_mlx.checkpoint.read import check_tensors, read_layout, trust_tensors
from fastvlm_mlx.config import CheckpointError, FastVLMConfig, load_config
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM

PLACES = 4  # visual tokens of an image of 128 x 128 pixels
MIB = 2**20
# The decoders of the released checkpoints.
TEXT = {
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864},
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def released_config(size: str, **changes) -> FastVLMConfig:
    fields = {
        "model_type": "llava_qwen2",
        "mm_vision_tower": "mobileclip_l_1024",
        "mm_projector_type": "mlp2x_gelu",
        "vocab_size": 151936,
    }
    return FastVLMConfig.from_dict(fields | TEXT[size] | changes)


def manifest(data: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released checkpoint."""
    content = json.loads(gzip.decompress((data / "manifests" / f"{name}.json.gz").read_bytes()))
    return {name: tuple(shape) for name, (shape, _) in content.items()}


def shapes_of(tensors: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextmanager
def peak_memory():
    """Bytes that were allocated at most in the block, beyond those before: its one element."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, used = mx.get_active_memory(), []
    yield used
    used.append(max(mx.get_peak_memory(), before) - before)


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model's folder, to be spoiled."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


@pytest.fixture
def tensors(small_folder: Path) -> dict[str, mx.array]:
    """The small model's tensors as its file has them."""
    return mx.load(str(small_folder / "model.safetensors"))


@pytest.fixture
def on_a_gpu(assume) -> None:
    assume("cuda")


def rewrite(folder: Path, tensors: dict[str, mx.array], **fields) -> Path:
    """Save other tensors, or other fields of config.json, in a folder."""
    mx.eval(tensors)  # they may be those of the file that is replaced
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def logits_of(model: FastVLM) -> mx.array:
    """Logits of one prompt with one image."""
    ids = [5, 9, 11, *[-200] * PLACES, 17, 23, 42, 7]
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    return model(mx.array([ids]), pixel_values=pixels).astype(mx.float32)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


# The small model against PyTorch.


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


# Full-size models against the tensors of the released checkpoints.


@pytest.mark.parametrize("size", TEXT)
def test_tensors_of_the_original_checkpoints(data, size):
    with peak_memory() as used:
        found = llava.from_mlx(unfuse(FastVLM(released_config(size))))
    assert shapes_of(found) == manifest(data, f"llava-fastvithd_{size}")
    assert used[0] < MIB


def test_tensors_of_the_mlx_layout(data):
    with peak_memory() as used:
        found = unfuse(FastVLM(released_config("0.5b")))
    assert shapes_of(found) == manifest(data, "mlx-vlm_0.5b_fp16")
    assert used[0] < MIB


def test_tensors_of_the_mlx_layout_quantized(data):
    with peak_memory() as used:
        found = quantize_checkpoint(
            unfuse(FastVLM(released_config("0.5b"))), released_config("0.5b"), 4
        )[0]
    assert shapes_of(found) == manifest(data, "mlx-vlm_0.5b_q4")
    assert used[0] < MIB


@pytest.mark.parametrize("name, fields", [("fp16", {}), ("q4", {"bits": 4, "group_size": 64})])
def test_released_tensors_in_the_mlx_layout_are_taken(data, name, fields):
    tensors = {k: mx.zeros(shape) for k, shape in manifest(data, f"mlx-vlm_0.5b_{name}").items()}
    config = released_config("0.5b", quantization=fields)
    with peak_memory() as used:
        check_tensors(tensors, config, mlx_vlm, Path("folder"))
    assert used[0] < MIB


@pytest.mark.parametrize("size", TEXT)
def test_released_tensors_in_the_original_layout_are_taken(data, size):
    names = manifest(data, f"llava-fastvithd_{size}")
    tensors = llava.to_mlx({name: mx.zeros(shape) for name, shape in names.items()})
    config = trust_tensors(released_config(size), tensors)
    assert config.text.tie_word_embeddings is (size != "7b")
    check_tensors(tensors, config, llava, Path("folder"))


def test_the_encoder_has_125_1_million_parameters():
    tensors = unfuse(FastVLM(released_config("0.5b")))
    count = sum(math.prod(t.shape) for n, t in tensors.items() if n.startswith("vision_tower."))
    assert round(count / 1e6, 1) == 125.1


# dtype


def dtypes_of(model: FastVLM) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@pytest.fixture
def bfloat16_folder(folder, tensors) -> Path:
    as_bfloat16 = {name: cast(tensor, mx.bfloat16) for name, tensor in tensors.items()}
    return rewrite(folder, as_bfloat16, torch_dtype="bfloat16")


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


# What config.json says wrongly


def test_a_head_that_the_config_says_is_tied(folder, tensors):
    head = mx.random.normal(tensors["model.embed_tokens.weight"].shape)
    loaded = load_model(rewrite(folder, tensors | {"lm_head.weight": head}))
    assert not loaded.config.text.tie_word_embeddings
    assert mx.array_equal(loaded.language_model.lm_head.weight, head)
    states = mx.ones((1, 64))
    assert mx.allclose(loaded.language_model.logits(states), states @ head.T, atol=1e-4)


def test_a_head_that_the_config_says_is_there(folder, tensors, small):
    loaded = load_model(rewrite(folder, tensors, tie_word_embeddings=False))
    assert loaded.config.text.tie_word_embeddings
    assert "lm_head" not in loaded.language_model
    assert mx.array_equal(logits_of(loaded), logits_of(small))


# Tensors that do not fit

NORM = "model.layers.1.input_layernorm.weight"
NETWORK = "model.vision_tower.vision_tower.model.network"
CONV = f"{NETWORK}.1.proj.0.lkb_reparam.weight"
LAYER_SCALE = f"{NETWORK}.0.0.layer_scale"


def spoil(folder: Path, tensors: dict[str, mx.array], **changes: mx.array | None) -> str:
    """The message of the error that these tensors (None for missing) give."""
    with pytest.raises(CheckpointError) as error:
        spoiled = {k: v for k, v in (tensors | changes).items() if v is not None}
        load_model(rewrite(folder, spoiled))
    assert str(folder) in str(error.value)
    return one_sentence(error)


def test_missing_tensors(folder, tensors):
    message = spoil(folder, tensors, **{NORM: None, CONV: None})
    assert f"{NORM} (64,) is missing" in message
    assert f"{CONV} (32, 1, 7, 7) is missing" in message
    assert "more" not in message


def test_surplus_tensors(folder, tensors):
    extra = "model.layers.2.input_layernorm.weight"
    message = spoil(folder, tensors, **{extra: mx.zeros(64)})
    assert f"{extra} (64,) is surplus" in message


def test_misshapen_tensors(folder, tensors):
    message = spoil(folder, tensors, **{NORM: mx.zeros(63), CONV: mx.zeros((32, 1, 5, 5))})
    assert f"{NORM} is (63,) where (64,) is expected" in message
    assert f"{CONV} is (32, 1, 5, 5) where (32, 1, 7, 7) is expected" in message


@pytest.mark.parametrize("name", [NORM, CONV, LAYER_SCALE, "model.mm_projector.0.weight"])
@pytest.mark.parametrize("shape", [(), (7,), (64, 64), (1, 2, 3, 4), (2, 2, 2, 2, 2)])
def test_tensors_of_another_rank(folder, tensors, name, shape):
    assert name in spoil(folder, tensors, **{name: mx.zeros(shape)})


def test_up_to_ten_tensors_are_named(folder, tensors):
    missing = [name for name in tensors if name.startswith("model.layers.1.")]
    assert len(missing) == 12
    message = spoil(folder, tensors, **dict.fromkeys(missing))
    assert sum(name in message for name in missing) == 10
    assert message.endswith("; and 2 more.")


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.input_layernorm",
        f"{NETWORK}.0.0.convffn.fc1",
        f"{NETWORK}.0.0.nothing",
    ],
)
def test_scales_without_a_quantized_layer(folder, tensors, module):
    assert f"{module}." in spoil(folder, tensors, **{f"{module}.scales": mx.zeros((4, 2))})


def test_integers_are_no_weights(folder, tensors):
    assert NORM in spoil(folder, tensors, **{NORM: mx.ones(64, mx.int8)})


def test_counters_and_frequencies_are_not_needed(folder, tensors, small):
    kept = {k: v for k, v in tensors.items() if "num_batches_tracked" not in k}
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    assert mx.array_equal(logits_of(load_model(rewrite(folder, kept))), logits_of(small))


def test_the_classifiers_head_is_not_needed(folder, tensors, small):
    kept = {k: v for k, v in tensors.items() if not k.endswith("head.proj")}
    assert len(kept) == len(tensors) - 1
    assert mx.array_equal(logits_of(load_model(rewrite(folder, kept))), logits_of(small))


# Files


def test_there_is_no_such_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError) as error:
            load_model(path)
        assert str(path) in str(error.value)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        load_model(folder)
    assert str(folder) in one_sentence(error)


def test_weights_without_tensors(folder):
    mx.save_safetensors(str(folder / "model.safetensors"), {})
    with pytest.raises(CheckpointError, match="without tensors"):
        load_model(folder)


def test_tensors_of_an_unknown_layout(folder):
    mx.save_safetensors(str(folder / "model.safetensors"), {"model.resnet.weight": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="unknown layout") as error:
        load_model(folder)
    assert "model.resnet.weight" in one_sentence(error)


def test_another_kind_of_model(folder, tensors):
    with pytest.raises(CheckpointError, match=r"model_type must be llava_qwen2 .* found 'llava'"):
        load_model(rewrite(folder, tensors, model_type="llava"))


def broken_files(whole: bytes) -> dict[str, bytes]:
    header = int.from_bytes(whole[:8], "little")
    return {
        "empty": b"",
        "cut in its length": whole[:4],
        "cut in its header": whole[:100],
        "cut after its header": whole[: 8 + header],
        "cut in its tensors": whole[: len(whole) // 2],
        "cut by four bytes": whole[:-4],
        "of an endless header": (2**62).to_bytes(8, "little") + whole[8:],
        "of no header": b"A web page that says: not found.",
        "of another header": (2).to_bytes(8, "little") + b"[]",
    }


@pytest.mark.parametrize("kind", broken_files(bytes(9)))
def test_a_broken_file(folder, kind):
    file = folder / "model.safetensors"
    file.write_bytes(broken_files(file.read_bytes())[kind])
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(file) in one_sentence(error)


def test_shards_load_as_one_file(folder, tensors, small):
    (folder / "model.safetensors").unlink()
    save_checkpoint(tensors, folder, shard_bytes=500_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 4
    assert mx.array_equal(logits_of(load_model(folder)), logits_of(small))


def test_a_shard_that_is_missing(folder, tensors):
    (folder / "model.safetensors").unlink()
    save_checkpoint(tensors, folder, shard_bytes=500_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as error:
        load_model(folder)
    assert shard.name in one_sentence(error)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_without_map(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as error:
        load_model(folder)
    one_sentence(error)


def test_other_safetensors_beside_the_index_are_not_read(folder, tensors, small):
    save_checkpoint(tensors, folder)
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"model.extra": mx.zeros(3)})
    assert mx.array_equal(logits_of(load_model(folder)), logits_of(small))


# PyTorch's own files


def test_without_torch_its_files_ask_for_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="torch is not installed") as error:
        load_model(folder)
    assert "pytorch_model.bin" in one_sentence(error) and "safetensors" in str(error.value)


@pytest.mark.interop
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_torch(folder, tensors, small, dtype, nested):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}
    state = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()
    }
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state, "epoch": 3} if nested else state, folder / "model.pth")
    found, wanted = logits_of(load_model(folder, dtype="float32")), logits_of(small)
    if dtype == "float32":
        assert mx.array_equal(found, wanted)
    assert mx.abs(found - wanted).max() < {"float32": 1e-9, "float16": 0.05, "bfloat16": 0.5}[dtype]


@pytest.mark.interop
def test_shards_of_torch(folder, tensors, small):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    state = {name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}
    shards = {f"pytorch_model-0000{i}-of-00002.bin": list(state)[i - 1 :: 2] for i in (1, 2)}
    for file, names in shards.items():
        torch.save({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert mx.array_equal(logits_of(load_model(folder)), logits_of(small))


class Executed:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.interop
@pytest.mark.parametrize("by_torch", [True, False])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, by_torch):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    file, trace = folder / "pytorch_model.bin", tmp_path / "trace"
    state = {"model.embed_tokens.weight": Executed(trace)}
    torch.save(state, file) if by_torch else file.write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(file) in one_sentence(error)
    assert not trace.exists()


@pytest.mark.interop
@pytest.mark.parametrize(
    "make",
    [
        lambda torch: b"",
        lambda torch: b"no pickle",
        lambda torch: [1, 2],
        lambda torch: {},
        lambda torch: {"state_dict": 5},
        lambda torch: {5: torch.zeros(3)},
        lambda torch: {"model.norm.weight": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        lambda torch: {"model.norm.weight": torch.zeros(3, 3).to_sparse()},
    ],
    ids=["empty", "text", "list", "nothing", "number", "unnamed", "8 bits", "sparse"],
)
def test_broken_files_of_torch(folder, make):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    content, file = make(torch), folder / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(folder) in one_sentence(error)


# Quantized models


@pytest.fixture
def quantized_folder(folder, small_folder) -> Path:
    """The small model with decoder and projector at 8 bits, but for the last product of each MLP
    (of 160 columns, which groups of 64 do not divide)."""
    return fv.convert(small_folder, folder / "q8", quantize=8, progress=False)


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


# Memory


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
def test_loading_takes_little_more_than_the_weights(folder, stored, dtype, width):
    size = big_folder(folder, getattr(mx, stored), width)
    size *= getattr(mx, dtype).size // getattr(mx, stored).size
    assert size > (100 * MIB if width == 512 else 15 * MIB)
    with peak_memory() as used:
        loaded = load_model(folder, dtype=dtype)
    assert used[0] < 1.3 * size
    # All of it is there now, and nothing is left to be read from the file.
    assert sum(array.nbytes for _, array in tree_flatten(loaded.parameters())) > 0.95 * size
    os.truncate(folder / "model.safetensors", 0)
    with peak_memory() as used:
        mx.eval(loaded.parameters())
    assert used[0] == 0


def test_quantizing_while_loading_never_holds_the_weights(folder):
    size = big_folder(folder, mx.float16, 256)
    with peak_memory() as used:
        load_model(folder, dtype="float16", quantize=4)
    assert used[0] < 0.7 * size


@pytest.mark.parametrize("form", ["small_folder", "training_folder"])
def test_tensors_are_read_when_they_are_needed(request, form):
    found = request.getfixturevalue(form)
    with peak_memory() as used:
        tensors, _ = read_layout(found)
    assert used[0] < 0.01 * sum(tensor.nbytes for tensor in tensors.values())


# Saving


def test_to_checkpoint_is_the_inverse_of_to_memory(small):
    tensors = unfuse(small)
    again = fuse(dict(tensors), small.config)
    parameters = dict(tree_flatten(small.parameters()))
    assert again.keys() == parameters.keys()
    assert all(mx.allclose(again[k], parameters[k], rtol=1e-6, atol=0) for k in again)


@pytest.mark.parametrize("shard_bytes", [1, 100, 250, 10**9])
def test_saved_tensors_come_back(tmp_path, shard_bytes):
    tensors = {f"t{i}": mx.arange(10 * i, (10 * i) + i + 1) for i in range(12)}
    tensors["half"] = mx.ones((3, 2), mx.bfloat16)
    sizes, total = [], sum(tensor.nbytes for tensor in tensors.values())
    left = dict(tensors)
    save_checkpoint(left, tmp_path, shard_bytes=shard_bytes, progress=sizes.append)
    assert not left and sum(sizes) == total
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 or all(
        f.name.endswith(f"of-{len(files):05d}.safetensors") for f in files
    )
    found = {}
    for file in files:
        shard = mx.load(str(file))
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= shard_bytes
        found |= shard
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and mx.array_equal(found[name], tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == tensors.keys()
    assert {*index["weight_map"].values()} == {file.name for file in files}


def test_saving_holds_one_shard_at_most(tmp_path):
    tensors = {f"t{i}": mx.full((MIB // 4,), i, mx.float32) + 1 for i in range(16)}
    with peak_memory() as used:
        save_checkpoint(tensors, tmp_path, shard_bytes=2 * MIB)
    assert used[0] < 5 * MIB


def write_into(target: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with atomic_folder(target, overwrite=overwrite) as temporary:
        assert temporary != target and temporary.is_dir()
        (temporary / "file").write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with a file that must not be lost."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    return target


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "some" / "where" / "target"
    write_into(target)
    assert (target / "file").read_text() == "new" and names_in(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_folder_is_replaced_when_asked(old):
    (old / "another").touch()
    write_into(old, overwrite=True)
    assert names_in(old) == ["file"] and (old / "file").read_text() == "new"
    assert names_in(old.parent) == ["target"]


def test_a_folder_is_not_replaced_unasked(old):
    with pytest.raises(FileExistsError, match="--overwrite") as error:
        write_into(old)
    assert str(old) in one_sentence(error)
    assert (old / "file").read_text() == "old" and names_in(old.parent) == ["target"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"):
        write_into(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("failure", [OSError("full"), ValueError("wrong"), KeyboardInterrupt()])
def test_after_a_failure_all_is_as_before(tmp_path, old, failure):
    for target in (tmp_path / "another", old):
        with (
            pytest.raises(type(failure)),
            atomic_folder(target, overwrite=True) as temporary,
        ):
            (temporary / "file").write_text("new")
            raise failure
    assert names_in(tmp_path) == ["target"] and (old / "file").read_text() == "old"


def test_the_old_folder_survives_a_failure_at_the_last_step(tmp_path, old, monkeypatch):
    rename = Path.rename

    def fail_for_the_new_one(self, target):
        if Path(target) == old and (self / "file").read_text() == "new":
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="no space"):
        write_into(old, overwrite=True)
    assert names_in(tmp_path) == ["target"] and (old / "file").read_text() == "old"


def test_a_link_to_a_folder_is_replaced_without_harm(tmp_path, old):
    link = tmp_path / "link"
    link.symlink_to(old, target_is_directory=True)
    write_into(link, overwrite=True)
    assert (link / "file").read_text() == "new"
    assert names_in(tmp_path) == ["link", "target"]


# A model with its processor


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


def test_load_of_a_name_that_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        fv.load(tmp_path / "nothing")


def test_weights_are_wired_on_metal(small_folder, monkeypatch, assume):
    limits = []
    assume("metal")
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**34})
    load_model(small_folder)
    assert limits == [2**34]
