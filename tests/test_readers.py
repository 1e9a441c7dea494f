"""What other programs look for in the folders that `convert` writes, and of which kind."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sources import LAYOUTS, full_nano, with_tokenizer

from fastvlm_mlx.checkpoint import processor_files
from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.checkpoint.layouts import transformers
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import NANO

# mlx-swift-lm decodes these, and fails where one is missing or of another kind.
TEXT = {
    "model_type": str,
    "hidden_size": int,
    "num_hidden_layers": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "tie_word_embeddings": bool,
}
BASE = {
    "image_token_index": int,
    "eos_token_id": int,
    "mm_projector_type": str,
    "mm_hidden_size": int,
    "tokenizer_model_max_length": int,
    "tokenizer_padding_side": str,
}
VISION = {
    "cls_ratio": float,
    "down_patch_size": int,
    "down_stride": int,
    "downsamples": [bool],
    "embed_dims": [int],
    "hidden_size": int,
    "image_size": int,
    "intermediate_size": int,
    "layers": [int],
    "layer_scale_init_value": float,
    "mlp_ratios": [int],
    "num_classes": int,
    "patch_size": int,
    "pos_embs_shapes": [(int, type(None))],
    "projection_dim": int,
    "repmixer_kernel_size": int,
    "token_mixers": [str],
}
# The original code, of its configuration alone, and the app, which reads the same file.
ORIGINAL = {
    "mm_vision_tower": str,
    "mm_use_im_start_end": bool,
    "mm_use_im_patch_token": bool,
    "unfreeze_mm_vision_tower": bool,
    "image_aspect_ratio": str,
}


def check_kinds(found: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        assert name in found, name
        assert is_of_kind(found[name], kind), (name, found[name])


def is_of_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) == 5 and all(of(v, kind[0]) for v in value)
    return of(value, kind)


def of(value: Any, kind: Any) -> bool:
    """Whether a decoder takes a JSON value for a kind; numbers are no booleans, nor the reverse."""
    if isinstance(value, list):  # the shape of a kernel
        return len(value) == 2 and all(of(v, int) for v in value)
    if isinstance(kind, tuple):
        return any(of(value, one) for one in kind)
    if kind is int:
        return type(value) in (int, float) and value == int(value)
    return type(value) in (int, float) if kind is float else type(value) is kind


def check_for_mlx(config: dict[str, Any], processor: dict[str, Any]) -> None:
    """What mlx-swift-lm and mlx-vlm decode."""
    check_kinds(config, TEXT | BASE)
    assert config["model_type"] == "llava_qwen2"
    assert config["image_token_index"] == -200  # which both put in a prompt, whatever is here
    assert "text_config" not in config  # mlx-vlm would take it instead of what is beside it
    check_kinds(config["vision_config"], VISION)
    assert config["mm_hidden_size"] == config["vision_config"]["hidden_size"]
    assert processor["processor_class"] == "FastVLMProcessor"
    check_images(processor, config["vision_config"]["image_size"])


def check_images(processor: dict[str, Any], image_size: int) -> None:
    assert processor["crop_size"] == {"width": image_size, "height": image_size}
    assert processor["size"] == {"shortest_edge": image_size}
    for name in ("image_mean", "image_std"):
        assert len(processor[name]) == 3 and all(of(value, float) for value in processor[name])


def check_for_original(config: dict[str, Any]) -> None:
    check_kinds(config, TEXT | BASE | ORIGINAL)
    # It takes the size of images from the name.
    size = int(config["mm_vision_tower"].rpartition("_")[2])
    assert size == config["vision_config"]["image_size"]
    # Or it would enlarge the vocabulary, or drop the encoder's weights.
    assert not config["mm_use_im_patch_token"] and not config["mm_use_im_start_end"]
    assert config["unfreeze_mm_vision_tower"]


def check_for_app(config: dict[str, Any], processor: dict[str, Any]) -> None:
    check_kinds(config, TEXT | {"mm_hidden_size": int, "image_token_index": int})
    assert config["model_type"] == "llava_qwen2"
    assert 0 <= config["image_token_index"] < config["vocab_size"]
    assert processor["processor_class"] == "LlavaProcessor"
    check_images(processor, config["vision_config"]["image_size"])


def check_for_transformers(config: dict[str, Any]) -> None:
    assert config["model_type"] == "fast_vlm"
    assert config["architectures"] == ["FastVlmForConditionalGeneration"]
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["model_type"], vision["architecture"]) == ("timm_wrapper", "fastvit_mci3")
    assert vision["model_args"].keys() == {"inference_mode", "layers", "embed_dims", "mlp_ratios"}
    assert vision["hidden_size"] == 2 * vision["model_args"]["embed_dims"][-1]
    check_kinds(text, TEXT)
    assert text["model_type"] == "qwen2"
    assert text["rope_parameters"]["rope_theta"] == text["rope_theta"]
    assert text["tie_word_embeddings"] == config["tie_word_embeddings"]
    assert 0 <= config["image_token_index"] < text["vocab_size"]
    assert config["image_seq_length"] ** 0.5 % 1 == 0


def read(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text())
    assert isinstance(value, dict)
    return value


def check_folder(folder: Path, layout: str) -> None:
    config = read(folder / "config.json")
    processor = read(folder / "preprocessor_config.json")
    if layout == "mlx":
        check_for_mlx(config, processor)
    if layout in ("mlx", "llava"):
        check_for_original(config)
    if layout == "transformers":
        check_for_transformers(config)
        size = 64 * int(config["image_seq_length"] ** 0.5)
        assert processor["processor_class"] == "LlavaProcessor"
        check_images(processor, size)
    if layout == "apple-export":
        check_for_app(config, processor)
    if layout in ("transformers", "apple-export"):
        tokens = {t["content"]: t["id"] for t in read(folder / "tokenizer.json")["added_tokens"]}
        assert tokens["<image>"] == config["image_token_index"]
        settings = read(folder / "tokenizer_config.json")["added_tokens_decoder"]
        assert {entry["content"]: int(i) for i, entry in settings.items()} == tokens
        assert read(folder / "processor_config.json")["image_token"] == "<image>"
    index = read(folder / "model.safetensors.index.json")["weight_map"]
    assert index.keys() == read_tensors(folder).keys()


# Folders


@pytest.fixture(scope="module")
def sources(small_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("sources")
    # Its configuration has other names, nested, and lacks what only the original has.
    nested = with_tokenizer(data / "transformers-small", root / "transformers")
    change(nested / "config.json", eos_token_id=258)
    return {
        "small": with_tokenizer(small_folder, root / "small"),
        "nano": full_nano(root / "nano"),
        "transformers": nested,
    }


def change(file: Path, **fields: Any) -> None:
    old = read(file) if file.is_file() else {}
    file.write_text(json.dumps(old | fields))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["small", "nano", "transformers"])
def test_folders(sources, tmp_path, source, layout):
    folder = convert(sources[source], tmp_path / "folder", layout=layout, progress=False)
    check_folder(folder, layout)
    text = read(folder / "config.json")
    text = text.get("text_config", text)
    assert text["rope_theta"] == (10_000 if source == "transformers" else 1_000_000)


QUANTIZED = {
    "4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_quantized_folders(sources, tmp_path, quantize):
    folder = convert(sources["nano"], tmp_path / "folder", quantize=quantize, progress=False)
    check_folder(folder, "mlx")
    config = read(folder / "config.json")
    check_quantization(config, QUANTIZED[quantize])
    packed = [name for name in read_tensors(folder) if name.endswith(".scales")]
    assert packed and not any(name.startswith("vision_tower.") for name in packed)


def test_the_bundled_folder_converted(tmp_path):
    check_folder(convert(NANO, tmp_path / "folder", progress=False), "mlx")


def check_quantization(config: dict[str, Any], settings: dict[str, Any]) -> None:
    assert config["quantization"] == config["quantization_config"]  # mlx's name, transformers'
    assert {name: config["quantization"][name] for name in settings} == settings


def test_of_several_ends_readers_get_one(sources, tmp_path):
    """mlx-swift-lm decodes one integer; the others stand where every reader looks for more."""
    source = with_tokenizer(sources["small"], tmp_path / "source")
    change(source / "config.json", eos_token_id=[258, 256])
    change(source / "generation_config.json", eos_token_id=7, do_sample=True)
    folder = convert(source, tmp_path / "folder", progress=False)
    assert read(folder / "config.json")["eos_token_id"] == 258
    generation = read(folder / "generation_config.json")
    assert generation == {"eos_token_id": [258, 256, 7], "do_sample": True}


def test_no_code_is_named_that_does_not_come_along(sources, tmp_path):
    source = with_tokenizer(sources["small"], tmp_path / "source")
    for name in ("config.json", "preprocessor_config.json"):
        change(source / name, auto_map={"AutoConfig": "code.Config"})
    folder = convert(source, tmp_path / "folder", progress=False)
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in read(folder / name)


# The released geometry, of which no weights are needed


def import_random_checkpoint() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / "random_checkpoint.py"
    spec = importlib.util.spec_from_file_location("random_checkpoint", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASED = {
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_key_value_heads": 2},
    "1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "tie_word_embeddings": False},
}


@pytest.fixture(params=RELEASED)
def released(request) -> tuple[FastVLMConfig, dict[str, Any]]:
    """The configuration of a released checkpoint, and what is its own in it."""
    fields = import_random_checkpoint().make_config(request.param, "bfloat16")
    return FastVLMConfig.from_dict(fields), RELEASED[request.param]


@pytest.mark.parametrize("quantization", [{}, *QUANTIZED.values()], ids=["plain", *QUANTIZED])
def test_released_geometry(released, tmp_path, quantization):
    config, own = released
    written = json.loads(json.dumps(processor_files.config_json(config, "bfloat16", quantization)))
    processor_files.write_processor(tmp_path, tmp_path, config.vision.image_size)
    check_for_mlx(written, read(tmp_path / "preprocessor_config.json"))
    check_for_original(written)
    assert {name: written[name] for name in own} == own
    assert (written["eos_token_id"], written["tokenizer_model_max_length"]) == (151645, 8192)
    vision = written["vision_config"]
    assert (vision["image_size"], vision["patch_size"], vision["hidden_size"]) == (1024, 64, 3072)
    assert vision["layers"] == [2, 12, 24, 4, 2]
    assert vision["embed_dims"] == [96, 192, 384, 768, 1536]
    assert "quantization" in written if quantization else "quantization" not in written
    if quantization:
        check_quantization(written, quantization)
    again = FastVLMConfig.from_dict(written)
    assert (again.vision, again.text) == (config.vision, config.text)


def test_released_geometry_for_transformers(released):
    config, own = released
    written = json.loads(json.dumps(transformers.config_json(config, "bfloat16", 151646)))
    check_for_transformers(written)
    assert {name: written["text_config"][name] for name in own} == own
    assert written["image_seq_length"] == 256 and written["image_token_index"] == 151646
    assert written["vision_config"]["hidden_size"] == 3072
    again = FastVLMConfig.from_dict(written)
    assert (again.vision, again.text) == (config.vision, config.text)


def test_another_image_size_is_written_everywhere(tmp_path):
    """The encoder runs at sizes other than that of its training."""
    fields = import_random_checkpoint().make_config("0.5b", "bfloat16")
    config = FastVLMConfig.from_dict(fields)
    config = replace(config, vision=replace(config.vision, image_size=512))
    processor_files.write_processor(tmp_path, tmp_path, 512)
    written = json.loads(json.dumps(processor_files.config_json(config, "bfloat16", {})))
    check_for_mlx(written, read(tmp_path / "preprocessor_config.json"))
    assert transformers.config_json(config, "bfloat16", 151646)["image_seq_length"] == 64
