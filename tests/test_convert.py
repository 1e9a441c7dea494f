import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open
from sources import LAYOUTS, full_nano

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import processor_files
from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.config import CheckpointError
from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import NANO

# What readers of the MLX community's layout look for in config.json.
CONFIG_KEYS = {
    "model_type",
    "image_token_index",
    "eos_token_id",
    "mm_projector_type",
    "mm_hidden_size",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "vision_config",
}
VISION_KEYS = {
    "cls_ratio",
    "down_patch_size",
    "down_stride",
    "downsamples",
    "embed_dims",
    "hidden_size",
    "intermediate_size",
    "image_size",
    "patch_size",
    "layers",
    "layer_scale_init_value",
    "mlp_ratios",
    "num_classes",
    "pos_embs_shapes",
    "projection_dim",
    "repmixer_kernel_size",
    "token_mixers",
}


def converted(source: Path, target: Path, **options) -> Path:
    return convert(source, target, progress=False, **options)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def tensors_of(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def logits_of(folder: Path, **options) -> mx.array:
    """Logits of a prompt with one image; it fits both models."""
    model = fv.load_model(folder, **options)
    size = model.config.vision.image_size
    ids = mx.array([[5, 9, *[-200] * (size // 64) ** 2, 17, 23, 42, 7]])
    pixels = mx.random.uniform(shape=(1, size, size, 3), key=mx.random.key(0))
    return model(ids, pixel_values=pixels).astype(mx.float32)


def is_near(found: mx.array, wanted: mx.array, deviations: float) -> bool:
    return bool(mx.sqrt(mx.mean((found - wanted) ** 2)) < deviations * mx.std(wanted))


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory) -> Path:
    return converted(NANO, tmp_path_factory.mktemp("converted") / "nano")


@pytest.fixture(scope="module")
def mlx_folder(small_folder, tmp_path_factory) -> Path:
    return converted(small_folder, tmp_path_factory.mktemp("converted") / "small")


# What a converted folder computes


def test_the_converted_model_is_the_same(small_folder, mlx_folder):
    assert mx.array_equal(logits_of(mlx_folder), logits_of(small_folder))


def test_the_converted_bundled_model_is_the_same(nano_folder, nano):
    assert mx.array_equal(logits_of(nano_folder), logits_of(NANO))
    image = mx.random.uniform(shape=(256, 256, 3), key=mx.random.key(1))
    answers = [
        fv.generate(*loaded, "What is this?", image=image, max_tokens=8, temperature=0.0)
        for loaded in (nano, fv.load(nano_folder))
    ]
    assert answers[0] == answers[1]


def test_the_training_form_becomes_the_inference_form(training_folder, mlx_folder, tmp_path):
    folder = converted(training_folder, tmp_path / "target")
    found, wanted = tensors_of(folder), tensors_of(mlx_folder)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert {v.dtype for v in found.values()} == {mx.float32}
    assert mx.allclose(logits_of(folder), logits_of(mlx_folder), atol=1e-3)


@pytest.mark.parametrize("source", ["small", "nano"])
def test_converting_again_changes_nothing(request, tmp_path, source):
    once = request.getfixturevalue({"small": "mlx_folder", "nano": "nano_folder"}[source])
    twice = converted(once, tmp_path / once.name)
    assert names_in(twice) == names_in(once)
    first, second = tensors_of(once), tensors_of(twice)
    assert list(first) == list(second)
    assert all(mx.array_equal(first[k], second[k]) for k in first)
    assert all(first[k].dtype == second[k].dtype for k in first)
    for file in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        assert read(twice / file) == read(once / file)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(small_folder, tmp_path, dtype):
    folder = converted(small_folder, tmp_path / "target", dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {getattr(mx, dtype)}
    assert read(folder / "config.json")["torch_dtype"] == dtype
    loose = {"float32": 1e-6, "float16": 0.01, "bfloat16": 0.1}[dtype]
    assert is_near(logits_of(folder, dtype="float32"), logits_of(small_folder), loose)


def test_without_dtype_that_of_the_source_stays(small_folder, tmp_path):
    half = converted(small_folder, tmp_path / "half", dtype="bfloat16")
    again = converted(half, tmp_path / "again")
    assert {tensor.dtype for tensor in tensors_of(again).values()} == {mx.bfloat16}


# Quantizing


@pytest.mark.parametrize(
    "quantize, settings, deviations",
    [
        (8, {"bits": 8, "group_size": 64, "mode": "affine"}, 0.05),
        (4, {"bits": 4, "group_size": 64, "mode": "affine"}, 0.6),
        ({"bits": 8, "group_size": 32}, {"bits": 8, "group_size": 32, "mode": "affine"}, 0.05),
    ],
    ids=str,
)
def test_quantized(small_folder, tmp_path, quantize, settings, deviations):
    folder = converted(small_folder, tmp_path / "target", quantize=quantize)
    config = read(folder / "config.json")
    assert {k: config["quantization"][k] for k in settings} == settings
    assert config["quantization_config"] == config["quantization"]
    tensors = tensors_of(folder)
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert "language_model.model.embed_tokens" in packed and "mm_projector.0" in packed
    assert not any(name.startswith("vision_tower.") for name in packed)
    # Groups of 32 divide the 160 columns of this one, groups of 64 do not.
    has_down_proj = "language_model.model.layers.0.mlp.down_proj" in packed
    assert has_down_proj is (settings["group_size"] == 32)
    for name in packed:
        assert tensors[f"{name}.weight"].dtype == mx.uint32
    found, wanted = logits_of(folder), logits_of(small_folder)
    assert not mx.array_equal(found, wanted) and is_near(found, wanted, deviations)


def test_fewer_bits_take_less_room(small_folder, tmp_path):
    sizes = [
        (converted(small_folder, tmp_path / str(q), quantize=q) / "model.safetensors")
        .stat()
        .st_size
        for q in (None, 8, 4)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_quantized_source_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match="is quantized already"):
        converted(NANO, tmp_path / "target", quantize=4)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("layout", ["llava", "transformers"])
def test_layouts_that_hold_no_quantized_weights(small_folder, tmp_path, layout):
    with pytest.raises(ValueError, match=f"The {layout} layout .* leave out quantize"):
        converted(small_folder, tmp_path / "target", layout=layout, quantize=4)
    with pytest.raises(ValueError, match=r"is quantized, and .* full-precision") as error:
        converted(NANO, tmp_path / "target", layout=layout)
    assert str(NANO) in str(error.value) and "leave out" not in str(error.value)
    assert names_in(tmp_path) == []


LINEAR = "model.layers.1.mlp.gate_proj.weight"
TENSORS = {
    "model.layers.0.input_layernorm.weight": "layers.0.input_layernorm.weight",
    LINEAR: "layers.1.mlp.gate_proj.weight",
    "model.vision_tower.vision_tower.model.network.0.0.convffn.fc1.weight": "convffn.fc1.weight",
    "model.embed_tokens.weight": "embed_tokens.weight",
}


def spoiled(small_folder: Path, target: Path, name: str, value: float) -> Path:
    """The small model with one number replaced."""
    folder = Path(shutil.copytree(small_folder, target))
    tensors = tensors_of(folder)
    flat = tensors[name].flatten()
    flat[7] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


MODES = [None, 4, {"bits": 8, "vision": 8}, "mxfp4", "mxfp8", "nvfp4"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("quantize", MODES, ids=str)
def test_what_is_not_finite_is_not_written(small_folder, tmp_path, name, value, quantize):
    source = spoiled(small_folder, tmp_path / "source", name, value)
    with pytest.raises(CheckpointError, match="holds NaN or infinity") as error:
        converted(source, tmp_path / "target", quantize=quantize)
    assert f"{TENSORS[name]} holds" in str(error.value)
    assert names_in(tmp_path) == ["source"]


def test_numbers_too_large_for_a_dtype_are_not_written(small_folder, tmp_path):
    source = spoiled(small_folder, tmp_path / "source", LINEAR, 70_000.0)
    for dtype in ("float32", "bfloat16"):
        converted(source, tmp_path / dtype, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight holds .* infinity in float16"):
        converted(source, tmp_path / "float16", dtype="float16")
    assert names_in(tmp_path) == ["bfloat16", "float32", "source"]


@pytest.mark.parametrize("layout", ["mlx", "llava", "transformers"])
@pytest.mark.parametrize("name", [LINEAR, "model.embed_tokens.weight", "model.mm_projector.0.bias"])
def test_float16_is_refused_before_any_work(small_folder, tmp_path, monkeypatch, layout, name):
    source = spoiled(small_folder, tmp_path / "source", name, -70_000.0)
    monkeypatch.setattr(sys.modules["fastvlm_mlx.convert"], "atomic_folder", None)
    with pytest.raises(CheckpointError, match=r"holds .* infinity in float16") as error:
        converted(source, tmp_path / "target", dtype="float16", layout=layout)
    assert name.rpartition(".")[0].split(".", 1)[-1].split(".")[0] in str(error.value)


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("layout", ["mlx", "apple-export"])
def test_packed_weights_beyond_float16_are_named(small_folder, tmp_path, part, layout):
    if layout == "mlx":
        converted(small_folder, tmp_path / "packed", quantize={"bits": 8, "group_size": 32})
        names = [name for name in tensors_of(tmp_path / "packed") if name.endswith(part)]
        source = spoiled(tmp_path / "packed", tmp_path / "source", names[-1], 1e5)
        layer = names[-1].rpartition(".")[0]
    else:
        pytest.importorskip("coremltools")
        source = spoiled(small_folder, tmp_path / "source", LINEAR, 1e5)
        layer = "gate_proj"
    with pytest.raises(CheckpointError, match="infinity in float16") as error:
        converted(source, tmp_path / "target", dtype="float16", layout=layout)
    assert layer in str(error.value) and not (tmp_path / "target").exists()


def test_a_quantized_source_keeps_its_bits(nano_folder):
    config = read(nano_folder / "config.json")
    assert config["quantization"] == read(NANO / "config.json")["quantization"]
    found, wanted = tensors_of(nano_folder), tensors_of(NANO)
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)


# What is in a converted folder


def test_config_has_all_that_other_readers_need(mlx_folder):
    config = read(mlx_folder / "config.json")
    assert config.keys() >= CONFIG_KEYS
    assert config["vision_config"].keys() >= VISION_KEYS
    assert config["model_type"] == "llava_qwen2"
    assert config["image_token_index"] == -200
    assert config["eos_token_id"] == 2
    assert (config["mm_projector_type"], config["mm_hidden_size"]) == ("mlp2x_gelu", 256)
    assert config["tokenizer_model_max_length"] == 2048
    assert config["tokenizer_padding_side"] == "right"
    vision = config["vision_config"]
    assert (vision["image_size"], vision["patch_size"], vision["hidden_size"]) == (128, 64, 256)
    assert vision["embed_dims"] == [16, 32, 64, 64, 128]
    assert vision["pos_embs_shapes"] == [None, None, None, [7, 7], [7, 7]]
    assert "quantization" not in config


def test_config_keeps_the_fields_of_the_source(small_folder, mlx_folder):
    source, written = (read(f / "config.json") for f in (small_folder, mlx_folder))
    assert {k: written[k] for k in source if k != "vision_config"} == {
        k: v for k, v in source.items() if k != "vision_config"
    }
    assert written["vision_config"].items() >= source["vision_config"].items()


def test_the_geometry_that_a_towers_name_tells_is_written_out(tmp_path):
    config = {"mm_vision_tower": "mobileclip_l_512", "hidden_size": 896, "num_hidden_layers": 24}
    config |= {"model_type": "llava_qwen2", "vocab_size": 151936, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    written = processor_files.config_json(fv.FastVLMConfig.from_dict(config), "float16", {})
    vision = json.loads(json.dumps(written))["vision_config"]
    assert vision.keys() >= VISION_KEYS
    assert vision["image_size"] == 512 and vision["layers"] == [2, 12, 24, 4, 2]
    assert fv.FastVLMConfig.from_dict(written).vision == fv.FastVLMConfig.from_dict(config).vision


def test_wrong_fields_are_corrected(small_folder, tmp_path):
    source = Path(shutil.copytree(small_folder, tmp_path / "source"))
    config = read(source / "config.json") | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    folder = converted(source, tmp_path / "target")
    assert read(folder / "config.json")["tie_word_embeddings"] is True


def test_tensors_have_the_communitys_layout(mlx_folder):
    tensors = tensors_of(mlx_folder)
    roots = {"vision_tower.vision_model", "mm_projector.0", "mm_projector.2"}
    roots |= {"language_model.model"}
    assert {".".join(name.split(".")[:2]) for name in tensors} == roots
    conv = tensors["vision_tower.vision_model.network.1.proj.0.lkb_reparam.weight"]
    assert conv.shape == (32, 7, 7, 1)
    assert not any("num_batches_tracked" in name for name in tensors)
    with safe_open(mlx_folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}


def test_the_original_layout_and_back(small_folder):
    tensors = tensors_of(small_folder)
    again = llava.from_mlx(llava.to_mlx(tensors))
    assert again.keys() == tensors.keys()
    assert all(mx.array_equal(again[name], tensors[name]) for name in tensors)


def test_processor_files(nano_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (nano_folder / name).read_bytes() == (NANO / name).read_bytes()
    processor = read(nano_folder / "preprocessor_config.json")
    assert processor["crop_size"] == {"height": 256, "width": 256}
    assert processor["processor_class"] == "FastVLMProcessor"


def test_a_source_without_processor_files_gets_what_can_be_known(mlx_folder):
    processor = read(mlx_folder / "preprocessor_config.json")
    assert processor["crop_size"] == {"height": 128, "width": 128}
    assert processor["size"] == {"shortest_edge": 128}
    assert processor["processor_class"] == "FastVLMProcessor"
    assert (processor["image_mean"], processor["image_std"]) == ([0.0] * 3, [1.0] * 3)
    assert "tokenizer.json" not in names_in(mlx_folder)


def test_the_image_settings_of_the_source_stay_but_for_the_size(small_folder, tmp_path):
    source = Path(shutil.copytree(small_folder, tmp_path / "source"))
    own = {"image_mean": [0.5, 0.5, 0.5], "crop_size": {"height": 336, "width": 336}}
    (source / "preprocessor_config.json").write_text(json.dumps(own))
    (source / "merges.txt").write_text("a b\n")
    (source / "secrets.txt").write_text("not copied")
    folder = converted(source, tmp_path / "target")
    processor = read(folder / "preprocessor_config.json")
    assert processor["image_mean"] == [0.5, 0.5, 0.5]
    assert processor["crop_size"] == {"height": 128, "width": 128}
    assert "merges.txt" in names_in(folder) and "secrets.txt" not in names_in(folder)


def test_model_card_of_a_folder(nano_folder):
    card = (nano_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: image-text-to-text\n")
    assert "base_model" not in card
    assert "# nano\n" in card and "Converted from: `nano`" in card
    assert "8 bits" in card


def test_model_card_of_the_folder_one_is_in(small_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(small_folder)
    card = (converted(Path("."), tmp_path / "target") / "README.md").read_text()
    assert "Converted from: `llava`" in card


def test_model_card_of_a_hub_model(server, small_folder, tmp_path):
    files = {file.name: file.read_bytes() for file in small_folder.iterdir()}
    server.files["apple/FastVLM-0.5B"] = files
    folder = converted("apple/FastVLM-0.5B", tmp_path / "FastVLM-0.5B-fp16", dtype="float16")
    card = (folder / "README.md").read_text()
    header = card.split("---\n")[1].splitlines()
    assert "base_model: apple/FastVLM-0.5B" in header
    assert "# FastVLM-0.5B-fp16\n" in card
    assert "https://huggingface.co/apple/FastVLM-0.5B" in card and "float16" in card


# Where a folder is written


def test_a_target_that_exists(small_folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    converted(small_folder, target)  # it is empty
    with pytest.raises(FileExistsError, match="--overwrite"):
        converted(small_folder, target, dtype="float16")
    assert {tensor.dtype for tensor in tensors_of(target).values()} == {mx.float32}
    assert converted(small_folder, target, dtype="float16", overwrite=True) == target
    assert {tensor.dtype for tensor in tensors_of(target).values()} == {mx.float16}
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        converted(small_folder, target, overwrite=True)
    assert names_in(tmp_path) == ["target"]
    assert {"notes.txt", "model.safetensors"} <= {*names_in(target)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_in_any_layout_may_be_replaced(tmp_path, layout):
    source = full_nano(tmp_path / "source")
    (source / "LICENSE").write_text("Do what you like.")
    (source / "generation_config.json").write_text("{}")
    for _ in range(2):
        converted(source, tmp_path / "target", layout=layout, overwrite=True)


def test_the_target_is_checked_before_the_source_is_read(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(
        sys.modules[convert.__module__], "resolve", lambda *_, **options: pytest.fail("downloads")
    )
    with pytest.raises(FileExistsError, match=r"holds mine\.txt"):
        converted("apple/FastVLM-7B", tmp_path, overwrite=True)


def test_a_target_that_is_a_file(small_folder, tmp_path):
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        converted(small_folder, tmp_path / "target", overwrite=True)
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("by", ["itself", "link", "detour", "home"])
def test_source_and_target_are_the_same(small_folder, tmp_path, monkeypatch, by, overwrite):
    source = Path(shutil.copytree(small_folder, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    target = {
        "itself": source,
        "link": tmp_path / "link",
        "detour": source / ".." / "source",
        "home": Path("~/source"),
    }[by]
    with pytest.raises(ValueError, match="both the source and the target"):
        converted(source, target, overwrite=overwrite)
    assert names_in(source) == names_in(small_folder)


def test_a_target_that_holds_the_source_is_not_replaced(small_folder, tmp_path):
    outer = tmp_path / "outer"
    source = Path(shutil.copytree(small_folder, outer / "source"))
    with pytest.raises(ValueError, match="source"):
        converted(source, outer, overwrite=True)
    assert names_in(source) == names_in(small_folder)


def test_a_target_in_the_source(small_folder, tmp_path):
    source = Path(shutil.copytree(small_folder, tmp_path / "source"))
    target = converted(source, source / "mlx" / "float32")
    assert mx.array_equal(logits_of(target), logits_of(source))


def test_a_target_beside_the_source_by_its_name_alone(small_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert converted(small_folder, Path("target")) == Path("target")
    assert names_in(tmp_path) == ["target"]


def missing_tensor(folder: Path) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    tensors.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def broken_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("[")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "spoil", [missing_tensor, broken_config, broken_processor, no_weights], ids=lambda f: f.__name__
)
def test_a_broken_source_leaves_nothing(small_folder, tmp_path, spoil):
    source = Path(shutil.copytree(small_folder, tmp_path / "source"))
    spoil(source)
    with pytest.raises(CheckpointError):
        converted(source, tmp_path / "target")
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"quantize": 7}, {"quantize": {"group_size": 10}}], ids=str
)
def test_options_that_do_not_exist(small_folder, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        converted(small_folder, tmp_path / "target", **options)
    assert names_in(tmp_path) == []


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        converted(tmp_path / "nothing", tmp_path / "target")
    assert names_in(tmp_path) == []


# An exception of MLX's own says that a file can't be written.
@pytest.mark.parametrize("failure", [OSError, RuntimeError])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_all_as_it_was(small_folder, tmp_path, monkeypatch, exists, failure):
    target = tmp_path / "target"
    if exists:
        converted(small_folder, target)
        before = (target / "model.safetensors").read_bytes()

    def fail(file, tensors, metadata=None):
        Path(file).write_bytes(b"half of it")
        raise failure("[write] Unable to write 300094 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="Unable to write"):
        converted(small_folder, target, overwrite=True)
    assert names_in(tmp_path) == (["target"] if exists else [])
    assert not exists or (target / "model.safetensors").read_bytes() == before


LIMITED = """
import resource, signal, sys
from fastvlm_mlx.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert(sys.argv[1], sys.argv[2], progress=False)
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files can't be limited there")
def test_a_file_that_may_not_grow(small_folder, tmp_path):
    command = [sys.executable, "-c", LIMITED, str(small_folder), str(tmp_path / "target")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.stdout.startswith("OSError:"), found.stderr
    assert names_in(tmp_path) == []


def test_progress_is_shown_when_asked(small_folder, tmp_path, capfd):
    converted(small_folder, tmp_path / "target")
    assert capfd.readouterr() == ("", "")
