import json
import re

import mlx.core as mx
import pytest

from fastvlm_mlx.checkpoint import processor_files
from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.checkpoint.layouts import llava, transformers
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.read import read_layout
from fastvlm_mlx.config import FastVLMConfig
from fastvlm_mlx.convert import convert
from fastvlm_mlx.hub.resolve import NANO


@pytest.fixture(scope="module")
def folder(data):
    return data / "transformers-small"


def test_reference_outputs(folder):
    model = load_model(folder)
    expected = mx.load(str(folder / "expected.safetensors"))
    case = json.loads((folder / "expected.json").read_text())
    pixel_values = expected["pixel_values"].transpose(0, 2, 3, 1)
    wanted = expected["vision_features"]
    features = model.vision_tower(pixel_values)
    assert mx.abs(features - wanted).max() < 1e-4 * mx.std(wanted)
    cache = model.make_kv_cache()
    logits = model(mx.array([case["input_ids"]]), cache, pixel_values=pixel_values)
    assert mx.abs(logits - expected["logits"]).max() < 1e-3
    tokens = []
    for _ in case["greedy_tokens"]:
        token = mx.argmax(logits[:, -1], axis=-1)
        tokens.append(token.item())
        logits = model(token[None], cache)
    assert tokens == case["greedy_tokens"]


def test_names_and_axes_there_and_back(folder):
    tensors = read_tensors(folder)
    back = transformers.from_mlx(transformers.to_mlx(tensors))
    assert back.keys() == tensors.keys()
    for name in tensors.keys() - {n for n in tensors if "num_batches_tracked" in n}:
        assert mx.array_equal(back[name], tensors[name]), name


def test_each_name_is_translated_without_the_others(folder):
    """As an adapter's are, which holds a few layers."""
    tensors = read_tensors(folder)
    together = transformers.to_mlx(tensors)
    assert {name for key in tensors for name in transformers.to_mlx({key: mx.zeros(1)})} == set(
        together
    )
    assert any(name.startswith("vision_tower.vision_model.network.10.") for name in together)
    for name in together:
        assert transformers.from_mlx({name: mx.zeros(1)}).keys() <= tensors.keys()


TIMM_BRANCHES = (
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.pe\.", ".pos_enc."),
)


def test_training_form_in_timms_names(training_folder, small_folder):
    """The original's training form under timm's names merges to the original's inference form."""
    training = llava.to_mlx(read_tensors(training_folder))
    renamed = transformers.from_mlx({k: v for k, v in training.items() if "head.proj" not in k})
    timm_names = set(renamed)
    assert any(".mixer.conv_kxk.0." in name for name in timm_names)
    assert not any(re.search(old, name) for name in timm_names for old, _ in TIMM_BRANCHES)
    assert transformers.to_mlx(renamed).keys() == training.keys() - {
        "vision_tower.vision_model.head.proj"
    }


@pytest.mark.parametrize("layout", ["llava", "transformers"])
def test_a_folder_written_in_a_layout_is_read_back(small_folder, tmp_path, small, layout, data):
    source = tmp_path / "source"
    source.mkdir()
    for file in (small_folder / "config.json", small_folder / "model.safetensors"):
        (source / file.name).write_bytes(file.read_bytes())
    for file in (data / "tokenizer").glob("tokenizer*.json"):
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    if layout == "transformers":
        with pytest.raises(ValueError, match="vocabulary"):  # 320 rows and 743 tokens
            convert(source, tmp_path / "written", layout=layout, progress=False)
        return
    written = convert(source, tmp_path / "written", layout=layout, progress=False)
    tensors, found = read_layout(written)
    original, _ = read_layout(source)
    assert found is llava and tensors.keys() == original.keys()
    assert all(mx.array_equal(tensors[name], original[name]) for name in original)
    assert json.loads((written / "config.json").read_text())["hidden_size"] == config["hidden_size"]


def test_layouts_hold_no_quantized_weights(tmp_path):
    for layout in ("llava", "transformers"):
        with pytest.raises(ValueError, match="quantized"):
            convert(NANO, tmp_path / layout, layout=layout, progress=False)
    with pytest.raises(ValueError, match="layout must be one of"):
        convert(NANO, tmp_path / "other", layout="onnx", progress=False)
    assert not any(tmp_path.iterdir())


def test_config_of_transformers(folder):
    config = FastVLMConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.vision.image_size == 128 and config.image_token_index == 319
    written = transformers.config_json(config, "float32", 319)
    again = FastVLMConfig.from_dict(written)
    assert (again.vision, again.text) == (config.vision, config.text)
    flat = processor_files.config_json(config, "float32", {})
    assert FastVLMConfig.from_dict(flat).vision == config.vision
    with pytest.raises(ValueError, match="geometry"):
        odd = flat | {"vision_config": flat["vision_config"] | {"repmixer_kernel_size": 5}}
        transformers.config_json(FastVLMConfig.from_dict(odd), "float32", 319)
