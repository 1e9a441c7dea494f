import json
import shutil

import mlx.core as mx
import pytest

from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.checkpoint.layouts import adapters
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import CheckpointError
from fastvlm_mlx.hub.resolve import NANO

RANK, ALPHA = 4, 16
LAYER = "base_model.model.model.layers.1.self_attn.k_proj"


@pytest.fixture
def lora(small_folder, tmp_path):
    """A LoRA folder of one layer, and its matrices."""
    mx.random.seed(0)
    matrices = {
        f"{LAYER}.lora_A.weight": mx.random.normal((RANK, 64)),
        f"{LAYER}.lora_B.weight": mx.random.normal((32, RANK)),
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(small_folder / "config.json", folder)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices)
    write_settings(folder, base_model_name_or_path=str(small_folder))
    return folder, matrices


def write_settings(folder, **changes):
    settings = {"r": RANK, "lora_alpha": ALPHA} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_added_to_its_layer_alone(lora, small, small_folder, rslora):
    folder, matrices = lora
    write_settings(folder, base_model_name_or_path=str(small_folder), use_rslora=rslora)
    loaded = load_model(folder)
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    delta = scale * matrices[f"{LAYER}.lora_B.weight"] @ matrices[f"{LAYER}.lora_A.weight"]
    layers = zip(loaded.layers, small.layers, strict=True)
    found = [new.self_attn.qkv_proj.weight - old.self_attn.qkv_proj.weight for new, old in layers]
    assert mx.abs(found[0]).max() == 0
    assert mx.abs(found[1][64:96] - delta).max() < 1e-5
    assert mx.abs(found[1][:64]).max() == 0 and mx.abs(found[1][96:]).max() == 0


def test_adapter_that_fits_no_layer(lora, small_folder):
    folder, matrices = lora
    moved = {k.replace("layers.1", "layers.7"): v for k, v in matrices.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), moved)
    with pytest.raises(CheckpointError, match=r"layers\.7.* fits no layer"):
        load_model(folder)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {"x.dora": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="no LoRA"):
        load_model(folder)


def test_base_that_is_missing_or_quantized(lora):
    folder, _ = lora
    write_settings(folder, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model"):
        load_model(folder)
    write_settings(folder, base_model_name_or_path="no-such-folder")
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_model(folder)
    write_settings(folder, base_model_name_or_path=str(NANO))
    with pytest.raises(CheckpointError, match="full precision"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, plain",
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("model.mm_projector.2.bias", "model.mm_projector.2.bias"),
        ("model.model.mm_projector.2.bias", "model.mm_projector.2.bias"),
    ],
)
def testplain_names(name, plain):
    assert adapters.plain_name(name) == plain


def test_trained_projector_replaces_the_bases(small_folder):
    base = {"mm_projector.0.bias": mx.zeros(64), "language_model.model.norm.weight": mx.ones(64)}
    trained = {"model.mm_projector.0.bias": mx.ones(64)}
    for file in adapters.TRAINED:
        found = adapters.apply(base, {file: trained}, {})
        assert found.keys() == base.keys()
        assert mx.array_equal(found["mm_projector.0.bias"], mx.ones(64))
    assert not adapters.is_adapter(small_folder) and read_tensors(small_folder)


@pytest.mark.interop
def test_files_of_torch(lora, small_folder, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "projector"
    folder.mkdir()
    config = json.loads((small_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(small_folder)}))
    name = "model.mm_projector.0.bias"
    torch.save({name: torch.full((64,), 7.0)}, folder / "mm_projector.bin")
    assert (load_model(folder).mm_projector.layers[0].bias == 7).all()
