import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import one_sentence

from fastvlm_mlx.checkpoint import read
from fastvlm_mlx.checkpoint.adapt import apply
from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.checkpoint.layouts import adapters
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import CheckpointError, load_config
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


K_PROJ = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    "pattern, alpha",
    [
        ({}, ALPHA),
        ({"k_proj": 2}, 2),
        ({"proj": 2}, ALPHA),  # no part of a name begins there
        ({"self_attn.k_proj": 3}, 3),
        ({K_PROJ: 4}, 4),
        ({f"^{K_PROJ}": 5}, 5),
        ({"^layers.1.self_attn.k_proj": 5}, ALPHA),
        ({r"layers\.[02]\..*": 6, r"layers\.1\..*": 7}, 7),
        ({"k_proj": 8, K_PROJ: 9}, 8),  # the first
        ({"k_proj.lora_A": 10}, ALPHA),
        ({"q_proj|k_proj": 11}, 11),
        ({"k_proj": 0}, 0),
        ({"k_proj": 0.5}, 0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_by_pattern_is_that_of_peft(lora, small_folder, pattern, alpha, rslora):
    """`get_pattern_key` of peft: re.match(rf"(.*\\.)?({key})$", name), the first key that fits."""
    folder, matrices = lora
    write_settings(
        folder,
        base_model_name_or_path=str(small_folder),
        alpha_pattern=pattern,
        use_rslora=rslora,
    )
    up, down = (np.array(matrices[f"{LAYER}.lora_{name}.weight"], np.float64) for name in "BA")
    base = mx.load(str(small_folder / "model.safetensors"))[f"{K_PROJ}.weight"]
    wanted = np.array(base, np.float64) + alpha / (RANK**0.5 if rslora else RANK) * (up @ down)
    found = read_checkpoint(folder)[1][f"language_model.{K_PROJ}.weight"]
    # Sums of four products, each of float32: some 1e-7 of the largest.
    assert np.abs(np.array(found, np.float64) - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_rank_by_pattern(lora, small_folder):
    folder, _ = lora
    settings = {"base_model_name_or_path": str(small_folder), "r": 64}
    write_settings(folder, **settings, rank_pattern={"k_proj": RANK})
    assert load_model(folder)
    write_settings(folder, **settings, rank_pattern={"q_proj": RANK})
    with pytest.raises(CheckpointError, match=r"gives model\.layers\.1.* the rank 64.* have 4"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True, "use_qalora": True}, "lora_bias, use_qalora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights=OLoRA"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, found 'IA3'"),
        ({"modules_to_save": ["mm_projector"]}, "does not hold mm_projector"),
        ({"modules_to_save": "mm_projector"}, "must be a list of texts, found 'mm_projector'"),
        ({"modules_to_save": 5}, "must be a list of texts, found 5"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern must be an object"),
        ({"alpha_pattern": ["k_proj"]}, "alpha_pattern must be an object"),
        ({"rank_pattern": 5}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"k_proj": "16"}}, "lora_alpha of model.layers.1.self_attn.k_proj"),
        ({"lora_alpha": None}, "lora_alpha of model.layers.1.self_attn.k_proj must be a number"),
        ({"lora_alpha": float("nan")}, "must be a number"),
    ],
    ids=str,
)
def test_settings_that_are_not_plain_lora(lora, small_folder, settings, said):
    folder, _ = lora
    write_settings(folder, base_model_name_or_path=str(small_folder), **settings)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert said in one_sentence(error)


def test_settings_that_change_nothing(lora, small_folder):
    folder, _ = lora
    plain = {"use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "bias": "none"}
    plain |= {"init_lora_weights": "gaussian", "peft_type": "LORA", "lora_dropout": 0.05}
    plain |= {"layers_to_transform": None, "loftq_config": {}, "alpha_pattern": None}
    write_settings(folder, base_model_name_or_path=str(small_folder), **plain)
    assert load_model(folder)


@pytest.mark.parametrize("wrapper", ["", "modules_to_save.", "modules_to_save.default."])
def test_modules_that_were_trained_whole(lora, small_folder, wrapper):
    folder, matrices = lora
    weight = mx.random.normal((64, 256))
    name = f"base_model.model.model.mm_projector.0.{wrapper}weight"
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": mx.full((64,), 3.0)}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices | {name: weight} | bias)
    settings = {"base_model_name_or_path": str(small_folder), "bias": "lora_only"}
    write_settings(folder, **settings, modules_to_save=["mm_projector.0"])
    _, found = read_checkpoint(folder)
    assert mx.array_equal(found["mm_projector.0.weight"], weight)
    q_proj = found["language_model.model.layers.0.self_attn.q_proj.bias"]
    assert mx.array_equal(q_proj, mx.full((64,), 3.0))
    write_settings(folder, **settings)  # which does not say that the projector was trained
    with pytest.raises(CheckpointError, match=r"mm_projector\.0.* no LoRA matrix"):
        load_model(folder)


def test_modules_are_named_by_their_ends(lora, small_folder):
    """As peft matches them: `norm` means every `input_layernorm`, too."""
    folder, matrices = lora
    names = [f"layers.{i}.{part}_layernorm" for i in (0, 1) for part in ("input", "post_attention")]
    scales = {f"base_model.model.model.{name}.weight": mx.full((64,), 2.0) for name in names}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices | scales)
    settings = {"base_model_name_or_path": str(small_folder), "modules_to_save": ["norm"]}
    write_settings(folder, **settings)
    _, found = read_checkpoint(folder)
    for name in names:
        assert mx.array_equal(found[f"language_model.model.{name}.weight"], mx.full((64,), 2.0))


def test_the_table_of_a_tied_model_is_trained_with_its_output_layer_or_refused(lora, small_folder):
    """PEFT trains a copy of the table, and the output layer keeps the base's unless it is told."""
    folder, matrices = lora
    table = {"base_model.model.model.embed_tokens.weight": mx.random.normal((320, 64))}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices | table)
    settings = {"base_model_name_or_path": str(small_folder), "modules_to_save": ["embed_tokens"]}
    write_settings(folder, **settings)
    with pytest.raises(CheckpointError, match=r"without ensure_weight_tying.*\(tied\)") as error:
        load_model(folder)
    one_sentence(error)
    write_settings(folder, **settings, ensure_weight_tying=True)
    (copy,) = table.values()  # which PEFT saves with it
    both = matrices | table | {"base_model.model.lm_head.weight": copy}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), both)
    model = load_model(folder)
    assert model.config.text.tie_word_embeddings
    assert mx.array_equal(model.language_model.embed_tokens.weight, copy)


@pytest.mark.parametrize("name", ["lora_embedding_A", "lora_A.weight"])
def test_lora_of_the_embeddings(lora, name):
    folder, matrices = lora
    table = {f"base_model.model.model.embed_tokens.{end}": mx.zeros((4, 64)) for end in ("a", name)}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices | table)
    with pytest.raises(CheckpointError, match=r"has LoRA of the embeddings .*merge") as error:
        load_model(folder)
    one_sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {f"{LAYER}.lora_A.weight": mx.zeros((RANK, 63))},
        {f"{LAYER}.lora_B.weight": mx.zeros((1, RANK))},
        {f"{LAYER}.lora_B.weight": mx.zeros((32, RANK + 1))},
        {f"{LAYER}.lora_A.weight": mx.zeros((RANK, 64, 1, 1))},
        {f"{LAYER}.lora_A.weight": mx.zeros(())},
    ],
    ids=lambda change: str(next(iter(change.values())).shape),
)
def test_matrices_that_do_not_fit(lora, change):
    folder, matrices = lora
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), matrices | change)
    with pytest.raises(
        CheckpointError, match=r"does not fit the base's|a matrix is expected"
    ) as error:
        load_model(folder)
    one_sentence(error)


def test_half_a_pair(lora):
    folder, matrices = lora
    for name in matrices:
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), {name: matrices[name]})
        with pytest.raises(CheckpointError, match=r"fits no layer|no LoRA matrix"):
            load_model(folder)


def test_adapter_that_fits_no_layer(lora, small_folder):
    folder, matrices = lora
    moved = {k.replace("layers.1", "layers.7"): v for k, v in matrices.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), moved)
    with pytest.raises(CheckpointError, match=r"layers\.7.* fits no layer"):
        load_model(folder)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {"x.dora": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="no LoRA"):
        load_model(folder)


def test_base_that_is_missing_or_another(lora):
    folder, _ = lora
    write_settings(folder, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model"):
        load_model(folder)
    write_settings(folder, base_model_name_or_path="no-such-folder")
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_model(folder)
    write_settings(folder, base_model_name_or_path=str(NANO))
    with pytest.raises(CheckpointError, match=r"does not fit the base's \(128, 256\)"):
        load_model(folder)  # quantized, so that its shape is not that of its file


def test_the_revision_of_the_base_is_the_one_it_was_trained_on(lora, small_folder, monkeypatch):
    folder, _ = lora
    asked = []

    def resolve(name, revision):
        asked.append((name, revision))
        return small_folder

    monkeypatch.setattr(read, "resolve", resolve)
    for revision in ("v1.5", None):
        write_settings(folder, base_model_name_or_path="user/base", revision=revision)
        load_model(folder)
    write_settings(folder, base_model_name_or_path=str(small_folder), revision="v1.5")
    load_model(folder)  # a folder has no revisions
    assert asked == [("user/base", "v1.5"), ("user/base", None), (str(small_folder), None)]
    write_settings(folder, base_model_name_or_path="user/base", revision=5)
    with pytest.raises(CheckpointError, match="revision must be a text, found 5"):
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
def test_plain_names(name, plain):
    assert adapters.plain_name(name) == plain


def test_trained_projector_replaces_the_bases(small_folder):
    base = {"mm_projector.0.bias": mx.zeros(64), "language_model.model.norm.weight": mx.ones(64)}
    trained = {"model.mm_projector.0.bias": mx.ones(64)}
    config = load_config(small_folder)
    for file in adapters.TRAINED:
        found, beside = apply(base, adapters.parse({file: trained}, {}), config)
        assert not beside and found.keys() == base.keys()
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
