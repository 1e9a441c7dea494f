"""Adapters of models trained here: written, loaded, trained further and fused."""

import json
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import logits_of, one_sentence
from hub_server import TOKEN
from mlx.utils import tree_flatten
from models import DEPTH
from sources import LAYOUTS, full_nano, with_tokenizer
from training import trained, write_rows

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.adapt import dequantized
from fastvlm_mlx.checkpoint.files import read_file, read_tensors
from fastvlm_mlx.checkpoint.layouts import adapters
from fastvlm_mlx.checkpoint.layouts.adapters import Adapter
from fastvlm_mlx.checkpoint.load import load_for_training, load_processor
from fastvlm_mlx.checkpoint.names import quantized_linears
from fastvlm_mlx.checkpoint.read import read_adapted, read_checkpoint
from fastvlm_mlx.checkpoint.record import MOST_LINES, read_record, read_run
from fastvlm_mlx.checkpoint.upload import base_problem, license_problem, upload
from fastvlm_mlx.checkpoint.write_adapter import shortened, write_adapter, write_torch
from fastvlm_mlx.fuse import (
    MOST_ROWS,
    Fused,
    FusedLayer,
    agreement,
    expanded,
    layer_inputs,
    packed_anew,
)
from fastvlm_mlx.hub.resolve import NANO, resolve
from fastvlm_mlx.train.adapters import apply_adapter, write

MODES = [
    {part: mode} for part in ("vision", "projector", "decoder") for mode in ("lora", "dora", "full")
]
MIXED = [
    {"decoder": "lora", "projector": "full"},
    {"decoder": "lora", "vision": "full", "projector": "dora"},
    {"decoder": "full", "vision": "lora"},
]
EVERY_MODE = pytest.mark.parametrize("modes", [*MODES, *MIXED], ids=str)
PANDA = NANO / "images" / "panda.png"


@pytest.fixture
def base(small_folder, tmp_path) -> Path:
    """A model in float, with a tokenizer."""
    return with_tokenizer(small_folder, tmp_path / "base")


@pytest.fixture
def quantized(base, tmp_path) -> Path:
    """The same in 8 bits, its encoder too."""
    settings = {"bits": 8, "group_size": 32, "vision": {"bits": 8, "group_size": 32}}
    return fv.convert(base, tmp_path / "quantized", quantize=settings, progress=False)


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """LoRA of the decoder and a projector."""
    return write(trained(base, decoder="lora", projector="full"), tmp_path / "adapter", base)


def is_near(found: fv.FastVLM, wanted: fv.FastVLM, tolerance: float = 1e-4) -> bool:
    """Whether two models answer alike, up to the rounding of products in another order."""
    a, b = logits_of(found), logits_of(wanted)
    scale = mx.abs(b).max()
    same = mx.array_equal(mx.argmax(a, axis=-1), mx.argmax(b, axis=-1))
    return bool(same.item()) and (mx.abs(a - b).max() < tolerance * scale).item()


@EVERY_MODE
def test_every_mode_is_loaded_and_fused(base, small, tmp_path, modes):
    model = trained(base, **modes)
    model.eval()
    assert not is_near(model, small)  # it was changed noticeably
    folder = write(model, tmp_path / "adapter", base)
    assert is_near(fv.load_model(base, adapter=folder), model)
    assert is_near(fv.load(folder)[0], model)  # it names its base
    done = fv.fuse(base, folder, tmp_path / "fused", progress=False)
    assert done == Fused(tmp_path / "fused")
    assert is_near(fv.load_model(done.folder), model)


@pytest.mark.parametrize("modes", [{"vision": "lora", "decoder": "lora"}, *MIXED[1:]], ids=str)
def test_adapters_in_the_names_of_transformers(data, tmp_path, modes):
    """Those of its model, the encoder's too."""
    base = data / "transformers-small"
    model = trained(base, **modes)
    model.eval()
    folder = write(model, tmp_path / "adapter", base)
    names = [name for file in folder.glob("*.safetensors") for name in read_file(file)]
    assert any("model.vision_tower.timm_model.stages.4.blocks." in name for name in names)
    assert not any("mm_projector" in name or "network" in name for name in names)
    assert is_near(fv.load_model(base, adapter=folder), model)


def test_nothing_trained_is_no_adapter(base, tmp_path):
    with pytest.raises(ValueError, match="Nothing of the model is trained") as error:
        write(trained(base), tmp_path / "adapter", base)
    one_sentence(error)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("modes", [m for m in MODES if "full" not in m.values()], ids=str)
def test_adapters_stay_beside_quantized_weights(quantized, tmp_path, modes):
    model = trained(quantized, **modes)
    model.eval()
    folder = write(model, tmp_path / "adapter", quantized)
    loaded = fv.load_model(quantized, dtype="float32", adapter=folder)
    assert is_near(loaded, model)
    # The packed weights are the base's.
    _, weights, beside = read_adapted(quantized, folder)
    assert beside
    _, own = read_checkpoint(quantized)
    packed = [name for name in own if f"{name.rpartition('.')[0]}.scales" in own]
    assert packed and all(mx.array_equal(weights[name], own[name]) for name in packed)
    with pytest.raises(fv.CheckpointError, match="fastvlm fuse"):
        fv.convert(folder, tmp_path / "converted", progress=False)
    done = fv.fuse(quantized, folder, tmp_path / "fused", progress=False)
    assert {layer.name for layer in done.layers} == beside.keys() and not done.wider
    assert all(layer.agreement > 0.999 for layer in done.layers)
    fused = fv.load_model(done.folder, dtype="float32")
    found, wanted = logits_of(fused), logits_of(model)
    assert fused.config.quantization
    assert mx.abs(found - wanted).max() < 0.1 * mx.abs(wanted).max()


def test_a_base_that_is_quantized_on_loading_is_quantized_first(base, adapter):
    """As it was for QLoRA; the adapter keeps its precision."""
    settings = {"bits": 4, "group_size": 32}
    model = load_for_training(base, dtype="float32", quantize=settings)
    apply_adapter(model, adapter, base)
    model.eval()
    assert is_near(fv.load_model(base, dtype="float32", quantize=settings, adapter=adapter), model)
    assert is_near(fv.load_model(adapter, dtype="float32", quantize=settings), model)


@EVERY_MODE
def test_training_goes_on_from_an_adapter(base, tmp_path, modes):
    model = trained(base, **modes)
    folder = write(model, tmp_path / "adapter", base)
    again = load_for_training(base, dtype="float32")
    apply_adapter(again, folder, base)
    found, wanted = (dict(tree_flatten(m.parameters())) for m in (again, model))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Divided by a layer scale and multiplied again: a rounding or two.
        assert mx.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
    model.eval(), again.eval()
    assert is_near(again, model)


def test_what_an_adapter_holds(adapter, base):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and not settings["use_dora"]
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["modules_to_save"] == ["mm_projector"]
    ends = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    assert settings["target_modules"] == ends.split()
    assert settings["r"] in (2, 3, 4) and len(settings["rank_pattern"]) in range(8, 11)
    names = read_file(adapter / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.mm_projector.2.bias" in names
    files = {path.name for path in adapter.iterdir()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
        "non_lora_trainables.safetensors",
    }


def test_a_projector_alone_is_what_llava_calls_it(base, tmp_path):
    folder = write(trained(base, projector="full"), tmp_path / "projector", base)
    files = {path.name for path in folder.iterdir()}
    assert files == {"README.md", "config.json", "mm_projector.bin", "mm_projector.safetensors"}
    names = read_tensors(folder).keys()
    assert names == {f"model.mm_projector.{i}.{key}" for i in (0, 2) for key in ("weight", "bias")}
    assert "peft" not in (folder / "README.md").read_text().lower()


def test_targets_are_as_short_as_they_can_be():
    modules = {"a.q_proj", "b.q_proj", "a.k_proj", "b.k_proj", "a.norm"}
    assert shortened({"a.q_proj", "b.q_proj", "a.k_proj"}, modules) == ["a.k_proj", "q_proj"]


def test_targets_are_no_containers(base, tmp_path):
    """`2` would be the last layer of the projector, and a stage of the encoder."""
    folder = write(trained(base, projector="lora"), tmp_path / "adapter", base)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["model.mm_projector.0", "model.mm_projector.2"]


def test_mixed_ranks_and_scales_survive(base, tmp_path):
    """The product of every layer, from the matrices to the files and back."""
    model = trained(base, decoder="lora")
    layers = {p: m for p, m in model.named_modules() if "lora_a" in m}
    wanted = {path: m.scale * (m.lora_b.T @ m.lora_a.T) for path, m in layers.items()}
    folder = write(model, tmp_path / "adapter", base)
    _, before = read_checkpoint(base)
    _, after, _ = read_adapted(base, folder)
    assert len(wanted) == 14
    for path, delta in wanted.items():
        name = path.replace("language_model.", "language_model.model.") + ".weight"
        found = np.array(after[name], np.float64) - np.array(before[name], np.float64)
        assert np.abs(found - np.array(delta, np.float64)).max() < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_fused_model_answers_alike(tmp_path, layout):
    base = full_nano(tmp_path / "base")
    model = trained(base, decoder="lora", vision="dora", projector="lora")
    model.eval()
    folder = write(model, tmp_path / "adapter", base)
    done = fv.fuse(base, folder, tmp_path / "fused", layout=layout, progress=False)
    tokens = []
    for found in (fv.load(base, adapter=folder), fv.load(done.folder)):
        responses = fv.stream_generate(*found, "What is this?", image=PANDA, max_tokens=12)
        tokens.append([response.token for response in responses])
    assert tokens[0] == tokens[1]
    with pytest.raises(fv.CheckpointError, match=r"holds .*adapter already") as error:
        fv.load(done.folder, adapter=folder)
    one_sentence(error)


# Quantized bases


def test_a_quantized_base_is_packed_anew_and_measured(tmp_path):
    model = trained(NANO, decoder="lora")
    model.eval()
    folder = write(model, tmp_path / "adapter", None)
    assert adapters.base_of(folder) == ("nano", None)
    done = fv.fuse(None, folder, tmp_path / "fused", progress=False)
    assert len(done.layers) == 7 * DEPTH and not done.wider
    assert all(layer.agreement > 0.999 for layer in done.layers)  # 8 bits lose little
    assert done.same_tokens is not None and done.same_tokens > 0.9
    ids = mx.array([[1, 2, 3]])
    base, adapted, fused = (
        found(ids) for found in (fv.load()[0], fv.load(adapter=folder)[0], fv.load(done.folder)[0])
    )
    assert mx.abs(fused - adapted).max() < 0.1 * mx.abs(base - adapted).max()
    (_, before), (config, after) = read_checkpoint(NANO), read_checkpoint(done.folder)
    assert config.quantization and before.keys() == after.keys()
    changed = {layer.name for layer in done.layers}
    for name, tensor in before.items():
        is_same = tensor.dtype == after[name].dtype and mx.array_equal(tensor, after[name])
        assert is_same != (
            name.rpartition(".")[0] in changed and "bias" not in name.split(".")[-1:]
        )
    with pytest.raises(fv.CheckpointError, match="already"):
        fv.fuse(done.folder, folder, tmp_path / "twice", progress=False)
    assert not (tmp_path / "twice").exists()


def test_dequantized_it_is_the_unfused_model_in_every_layout(quantized, tmp_path):
    model = trained(quantized, decoder="lora", vision="lora", projector="dora")
    model.eval()
    folder = write(model, tmp_path / "adapter", quantized)
    for layout in ("mlx", "llava"):
        done = fv.fuse(
            quantized, folder, tmp_path / layout, layout=layout, dequantize=True, progress=False
        )
        assert done.same_tokens is None
        assert not read_checkpoint(done.folder)[0].quantization
        assert is_near(fv.load_model(done.folder), model)
    with pytest.raises(ValueError, match="add dequantize"):
        fv.fuse(quantized, folder, tmp_path / "x", layout="llava", progress=False)


def test_layers_that_lose_too_much_get_more_bits(base, tmp_path):
    folder = fv.convert(
        base, tmp_path / "packed", quantize={"bits": 2, "group_size": 32}, progress=False
    )
    model = trained(folder, decoder="lora")
    written = write(model, tmp_path / "adapter", folder)
    config, weights, beside = read_adapted(folder, written)
    mx.random.seed(1)
    inputs = {name: mx.random.normal((64, each.down.shape[1])) for name, each in beside.items()}
    found_config, found, layers = packed_anew(config, weights, beside, inputs, progress=False)
    _, exact = expanded(config, weights, beside)
    settings = dict(quantized_linears(found, found_config))
    assert len(layers) == len(beside) and any(layer.before is not None for layer in layers)
    for layer in layers:
        own = settings[layer.name]
        assert own["bits"] == layer.bits
        assert layer.agreement >= 0.99
        assert (layer.before is None) == (layer.bits == 2)
        assert layer.before is None or layer.before < 0.99
        # Measured apart, with numpy
        parts = [found[f"{layer.name}.{key}"] for key in ("weight", "scales", "biases")]
        x = np.array(inputs[layer.name], np.float64)
        got, wanted = (
            x @ np.array(w.astype(mx.float32), np.float64).T
            for w in (mx.dequantize(*parts, **own), exact[f"{layer.name}.weight"])
        )
        cosine = (got * wanted).sum() / np.linalg.norm(got) / np.linalg.norm(wanted)
        assert abs(cosine - layer.agreement) < 1e-4


def test_layers_are_measured_on_what_the_unfused_model_gives_them(quantized, tmp_path):
    """What goes into `down_proj` is what the layers before it make of their inputs."""
    folder = write(trained(quantized, decoder="lora"), tmp_path / "adapter", quantized)
    config, weights, beside = read_adapted(quantized, folder)
    inputs = layer_inputs(quantized, folder, config, beside, progress=False)
    assert inputs.keys() == beside.keys()
    for i in range(config.text.num_hidden_layers):
        name = f"language_model.model.layers.{i}.mlp"
        x, wanted = inputs[f"{name}.up_proj"], inputs[f"{name}.down_proj"]
        assert len(x) == len(wanted) > MOST_ROWS / 4
        gate, up = (
            x @ beside[f"{name}.{part}"].added_to(dequantized(f"{name}.{part}", weights, config)).T
            for part in ("gate_proj", "up_proj")
        )
        found = gate * mx.sigmoid(gate) * up
        assert mx.abs(found - wanted).max() < 1e-4 * mx.abs(wanted).max()


def test_agreement_is_a_cosine():
    x = mx.array([[3.0, 4.0]])
    assert agreement(x, x) == pytest.approx(1)
    assert agreement(mx.array([[4.0, -3.0]]), x) == pytest.approx(0)


# What does not go together


def test_an_adapter_of_another_model(adapter, base, tmp_path, data):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = read_tensors(base)
    changed = {"model.norm.weight": tensors["model.norm.weight"] * 1.5}
    mx.save_safetensors(str(other / "model.safetensors"), tensors | changed)
    with pytest.raises(fv.CheckpointError, match=r"was trained on .*base, and .*other is another"):
        fv.load_model(other, adapter=adapter)
    with pytest.raises(fv.CheckpointError, match=r"whose vocab_size is 320; that of .* is ") as e:
        fv.load(adapter=adapter)
    one_sentence(e)
    # Rounding makes no other model of it.
    half = fv.convert(base, tmp_path / "half", dtype="bfloat16", progress=False)
    assert fv.load_model(half, dtype="float32", adapter=adapter)


def test_an_adapter_on_an_adapter(adapter, base, tmp_path):
    """As when a model is trained that is itself an adapter of another."""
    model = trained(adapter, seed=1, decoder="dora")
    model.eval()
    second = write(model, tmp_path / "second", adapter)
    assert is_near(fv.load_model(adapter, adapter=second), model)
    assert is_near(fv.load(second)[0], model)
    first = fv.fuse(base, adapter, tmp_path / "first", progress=False)
    both = fv.fuse(first.folder, second, tmp_path / "both", progress=False)
    assert is_near(fv.load_model(both.folder), model)
    for each in (adapter, second):
        with pytest.raises(fv.CheckpointError, match="already"):
            fv.load_model(both.folder, adapter=each)


def test_an_adapter_is_trained_on_as_a_model_is(run, base, quantized, tmp_path):
    """Its tokenizer is its base's; that of a quantized model is fused first."""
    write_rows(tmp_path / "rows.json", 4, 3)
    first = write(trained(base, decoder="lora"), tmp_path / "first", base)
    command = ["train", "--data", tmp_path / "rows.json", "--steps", 1, "-q", "--model"]
    options = ["--batch-size", 1, "--projector", "frozen", "--max-length", 2000]
    done = run(*command, first, "--out", tmp_path / "run", *options)
    assert done.code == 0, done.err
    loaded = fv.load_model(tmp_path / "run" / "adapter")
    assert not is_near(loaded, fv.load_model(base)) and is_near(loaded, fv.load_model(first), 0.1)
    packed = write(trained(quantized, decoder="lora"), tmp_path / "packed", quantized)
    assert load_processor(first).tokenizer.eos_token_ids  # for reports, calibration, benchmarks
    done = run(*command, packed, "--out", tmp_path / "other", *options)
    assert done.code == 2 and "fastvlm fuse" in done.err and "Traceback" not in done.err


def test_half_a_model_is_no_adapter(adapter, base, tmp_path):
    with pytest.raises(fv.CheckpointError, match="is no adapter"):
        fv.load_model(base, adapter=base)
    with pytest.raises(fv.CheckpointError, match="names itself"):
        fv.load_model(adapter, adapter=adapter)
    with pytest.raises(FileNotFoundError, match="no-such"):
        fv.load_model(base, adapter="no-such")


def test_dora_is_not_read_as_lora(base, tmp_path):
    folder = write(trained(base, decoder="dora"), tmp_path / "adapter", base)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"use_dora": False}))
    with pytest.raises(fv.CheckpointError, match="which is of DoRA") as error:
        fv.load_model(base, adapter=folder)
    one_sentence(error)


def test_a_projector_that_is_missing(adapter, base):
    file = adapter / "adapter_model.safetensors"
    tensors = {n: t for n, t in mx.load(str(file)).items() if "mm_projector" not in n}
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(fv.CheckpointError, match="does not hold mm_projector"):
        fv.load_model(base, adapter=adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    del settings["modules_to_save"]  # as LLaVA, which has it in non_lora_trainables.bin
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(fv.CheckpointError, match="lacks the projector") as error:
        fv.load_model(base, adapter=adapter)
    one_sentence(error)


def test_tied_heads_stay_tied(base, small, tmp_path):
    model = trained(base, decoder="full")
    folder = write(model, tmp_path / "adapter", base)
    done = fv.fuse(base, folder, tmp_path / "fused", progress=False)
    assert fv.load_model(done.folder).config.text.tie_word_embeddings
    config, weights = read_checkpoint(base)
    head = {"language_model.lm_head.weight": mx.zeros((320, 64))}
    untied = write_adapter(Adapter({}, head), tmp_path / "untied", str(base), weights, config)
    with pytest.raises(fv.CheckpointError, match=r"its output layer is the table .* \(tied\)"):
        fv.load_model(base, adapter=untied)


def test_only_adapters_and_models_are_replaced(adapter, base, tmp_path):
    model = trained(base, decoder="lora")
    with pytest.raises(FileExistsError, match="exists"):
        write(model, adapter, base)
    assert write(model, adapter, base, overwrite=True) == adapter
    (adapter / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        write(model, adapter, base, overwrite=True)


def test_what_is_not_finite_is_not_written(base, tmp_path):
    model = trained(base, decoder="lora")
    model.layers[0].self_attn.q_proj.lora_b *= float("nan")
    with pytest.raises(fv.CheckpointError, match=r"q_proj\.lora_B\.weight holds NaN"):
        write(model, tmp_path / "adapter", base)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("writer", ["save_safetensors", "_add"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_what_was_there(base, tmp_path, monkeypatch, writer, exists):
    model, target = trained(base, decoder="lora", projector="full"), tmp_path / "out" / "adapter"
    if exists:
        write(trained(base, seed=1, projector="full"), target, base)
    before = {path.name: path.read_bytes() for path in target.glob("*")}

    def fail(file, *_, **__):
        if writer == "_add":
            raise OSError(28, "No space left on device")
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("[write] Unable to write 300094 bytes to file.")  # as MLX says it

    module = mx if writer == "save_safetensors" else sys.modules[write_adapter.__module__]
    monkeypatch.setattr(module, writer, fail)
    with pytest.raises(OSError, match=r"can't be written: .*(Unable to write|No space left)"):
        write(model, target, base, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert [path.name for path in target.parent.glob("*")] == (["adapter"] if exists else [])


# The command and the card


def test_the_command(run, adapter, base, tmp_path):
    done = run("fuse", base, adapter, "--to", tmp_path / "fused")
    assert done.code == 0 and done.out == f"Wrote {tmp_path / 'fused'}.\n"
    alone = run("fuse", adapter, "--to", tmp_path / "alone")
    assert alone.code == 0
    found, wanted = (read_tensors(tmp_path / name) for name in ("alone", "fused"))
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    question = ["generate", "--prompt", "Hi", "--max-tokens", 3, "--image", PANDA, "--model"]
    texts = [
        run(*question, base, "--adapter", adapter).out,
        run(*question, adapter).out,
        run(*question, tmp_path / "fused").out,
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0]
    wrong = run("fuse", base, "--to", tmp_path / "x")
    assert wrong.code == 2 and "is no adapter" in wrong.err and "Traceback" not in wrong.err


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "chat",
        "caption {} --out {}/x.jsonl",
        "watch --folder {}",
        "eval --data {}/q.jsonl",
    ],
)
def test_every_command_takes_an_adapter(run, tmp_path, command):
    shutil.copy(PANDA, tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "?", "answer": "?"}')
    arguments = command.format(tmp_path, tmp_path).split()
    done = run(*arguments, "--adapter", "./none")
    assert done.code == 2 and "./none" in done.err and "Traceback" not in done.err


def test_the_command_names_what_was_kept_wider(run, base, tmp_path):
    settings = {"bits": 2, "group_size": 32}
    packed = fv.convert(base, tmp_path / "packed", quantize=settings, progress=False)
    folder = write(trained(packed, decoder="lora"), tmp_path / "adapter", packed)
    done = run("fuse", packed, folder, "--to", tmp_path / "fused")
    assert done.code == 0
    assert "Kept wider: language_model.model.layers.0." in done.err
    assert "Packed 14 quantized layers anew" in done.err
    assert "of the tokens are those of the unfused model" in done.err


def test_adapters_on_the_hub(server, tmp_path, monkeypatch):
    """Pushed as they are, and loaded from there with what LLaVA keeps in a file of its own."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = write(trained(NANO, decoder="lora", projector="lora"), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the licence
        upload(folder, "user/clocks")
    assert server.files["user/clocks"].keys() == {path.name for path in folder.iterdir()}
    model, _ = fv.load(adapter="user/clocks", dtype="float32")
    wanted = fv.load_model(NANO, dtype="float32", adapter=folder)
    found, wanted = (dict(tree_flatten(each.parameters())) for each in (model, wanted))
    assert all(mx.array_equal(found[name], value) for name, value in wanted.items())
    there = resolve("user/clocks")
    assert (there / "non_lora_trainables.bin").is_file()


@pytest.fixture
def run_folder(base, tmp_path) -> Path:
    """A run's folder with an adapter, as `fastvlm train` leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"model": str(base), "decoder": "lora", "rank": 4, "stage": None}
    (folder / "options.json").write_text(json.dumps(options))
    data = {"data": "/home/me/clocks|a.jsonl", "rows": 500}
    (folder / "data.json").write_text(json.dumps(data))
    lines = [{"step": i, "loss": 2.0 / i} for i in range(1, 5)]
    lines += [{"step": 2, "validation_loss": 0.75}, {"step": 4, "validation_loss": 1.5}]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
    (folder / "log.jsonl").write_text(log)
    (folder / "loss.png").write_bytes(b"a picture")
    write(trained(base, decoder="lora"), folder / "adapter", base)
    return folder


def test_cards_say_how_it_was_trained(run_folder, base, tmp_path):
    fused = fv.fuse(base, run_folder / "adapter", tmp_path / "fused", progress=False).folder
    again = fv.convert(fused, tmp_path / "again", layout="llava", progress=False)
    direct = fv.convert(run_folder / "adapter", tmp_path / "direct", progress=False)
    for folder in (run_folder / "adapter", fused, again, direct):
        card = (folder / "README.md").read_text()
        places = [
            card.index(said)
            for said in (
                "## Training",
                "| rank | 4 |",
                r"| data | clocks\|a.jsonl |",
                "| rows | 500 |",
                "The loss was 2.000 at first and 0.500 after 4 steps.",
                "The validation loss was lowest, 0.750, after step 2.",
                "![Loss by step](loss.png)",
                "```bash",
            )
        ]
        assert all(a < b for a, b in pairwise(places))
        assert "stage" not in card and "nothing was trained" not in card
        assert ("fine-tuned with" in card) == (folder != run_folder / "adapter")
        assert (folder / "loss.png").read_bytes() == b"a picture"
        for file in ("README.md", "training.json"):  # which leave this machine
            text = (folder / file).read_text()
            assert "/home/me" not in text and str(tmp_path) not in text
    found = read_record(fused)
    assert found is not None and found.options["rank"] == 4 and len(found.lines) == 6
    # A second time, over what it wrote
    fv.fuse(base, run_folder / "adapter", fused, overwrite=True, progress=False)


def test_a_run_is_no_adapter_and_has_one(run, run_folder, base, tmp_path):
    for command in (
        ["fuse", base, run_folder, "--to", tmp_path / "fused"],
        ["fuse", run_folder, "--to", tmp_path / "fused"],
        ["generate", "--prompt", "Hi", "--model", base, "--adapter", run_folder],
    ):
        done = run(*command)
        assert done.code == 2 and "Traceback" not in done.err
        assert "is no adapter: it has neither adapter_model.safetensors nor" in done.err
        assert f"the one in it is {run_folder / 'adapter'}." in done.err.replace("\n", "")


def test_an_adapter_is_uploaded_with_its_curves(run, server, run_folder, base, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = run("upload", run_folder / "adapter", "--repo", "user/clocks")
    assert done.code == 0 and done.out == f"{server.url}/user/clocks\n"
    assert f"names its base by a folder of this machine, {base}" in done.err.replace("\n", "")
    files = server.files["user/clocks"]
    assert files["loss.png"] == b"a picture" and b"![Loss by step](loss.png)" in files["README.md"]
    assert base_problem(base) is None


def test_the_licence_of_an_adapter_is_its_bases(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")  # of something else
    folder = write(trained(NANO, projector="lora"), tmp_path / "nano")
    assert "license: mit" in (folder / "README.md").read_text()
    assert base_problem(folder) is None and license_problem(folder) is None
    folder = write(trained(base, projector="lora"), tmp_path / "adapter", base)
    assert "license:" not in (folder / "README.md").read_text()
    hub = fv.convert(base, tmp_path / "hub", progress=False)
    (hub / "README.md").write_text("---\nlicense: mit\nbase_model: user/clocks\n---\n")
    fused = fv.fuse(hub, folder, tmp_path / "fused", progress=False).folder
    for each in (fused, fv.convert(fused, tmp_path / "again", layout="llava", progress=False)):
        card = (each / "README.md").read_text()
        assert "license: mit" in card
        assert "base_model: user/clocks\nbase_model_relation: finetune" in card


def test_long_logs_are_thinned(tmp_path):
    lines = [{"step": i, "loss": 1.0, "rows": ["a"] * 9} for i in range(1, 4 * MOST_LINES)]
    lines += [{"step": 777, "validation_loss": 0.5}, {"step": len(lines) + 1, "loss": 0.25}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_run(tmp_path)
    assert found is not None and len(found.lines) <= MOST_LINES + 2
    assert found.lines[-1] == lines[-1] and lines[-2] in found.lines
    assert all("rows" not in line for line in found.lines)


def test_cards_without_a_record(adapter):
    card = (adapter / "README.md").read_text()
    assert "## Training" not in card and "library_name: peft" in card


def test_wider_layers_are_those_with_a_measure_before():
    layers = (FusedLayer("a", 0.999, 4), FusedLayer("b", 0.995, 6, 0.98))
    assert Fused(Path(), layers).wider == [layers[1]]


@pytest.mark.interop
def test_files_of_torch_without_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        "a.weight": mx.random.normal((3, 4)),
        "half": mx.random.normal((5,)).astype(mx.float16),
        "brain": mx.random.normal((2, 3, 4)).astype(mx.bfloat16),
        "number": mx.array(7, mx.int64),
    }
    write_torch(tmp_path / "x.bin", tensors)
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tuple(found[name].shape) == tensor.shape
        assert mx.array_equal(mx.array(found[name].float().numpy()), tensor.astype(mx.float32))
