"""From one layout to another and back: the same tensors and the same outputs."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from sources import LAYOUTS, full_nano, with_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import fold
from fastvlm_mlx.checkpoint.files import Weights, read_tensors
from fastvlm_mlx.checkpoint.layouts import llava, transformers
from fastvlm_mlx.checkpoint.layouts.mlx_vlm import ENCODER
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.checkpoint.names import quantized_linears
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import load_config
from fastvlm_mlx.convert import WRITTEN, convert
from fastvlm_mlx.hub.resolve import NANO

needs_coremltools = pytest.mark.needs("coremltools")


def pair_of(first: str, second: str) -> Any:
    pair = {first, second}
    marks = [needs_coremltools] if "apple-export" in pair else []
    # A Core ML program takes seconds to write, and all layouts go through the first.
    marks += [pytest.mark.slow] if "apple-export" in pair and "mlx" not in pair else []
    return pytest.param(first, second, marks=marks)


PAIRS = [pair_of(first, second) for first in WRITTEN for second in WRITTEN if first != second]


def written(source: Path, target: Path, layout: str) -> Path:
    dtype = None if layout == "apple-export" else "float32"  # which is always float16
    return convert(source, target, layout=layout, dtype=dtype, progress=False)


def tensors_of(folder: Path) -> Weights:
    return read_tensors(folder)


def folded(folder: Path) -> Weights:
    """What a folder holds, whatever its layout: the encoder folded, in the names of memory."""
    config, tensors = read_checkpoint(folder)
    encoder = fold.fold_encoder(lambda name: tensors.pop(ENCODER + name), config.vision)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(ENCODER)}
    return tensors | encoder


def outputs(folder: Path) -> list[mx.array]:
    """Features, visual tokens and logits of a prompt with one image."""
    model = fv.load_model(folder)
    size, image = model.config.vision.image_size, model.config.image_token_index
    pixels = mx.random.uniform(shape=(1, size, size, 3), key=mx.random.key(0))
    ids = mx.array([[5, 9, *[image] * (size // 64) ** 2, 17, 23, 42, 7]])
    features, visual = model.vision_tower(pixels), model.encode_image(pixels)
    return [features, visual, model(ids, pixel_values=pixels)]


def are_equal(found: Weights, wanted: Weights) -> bool:
    same = all(found[name].dtype == wanted[name].dtype for name in wanted)
    return (
        found.keys() == wanted.keys()
        and same
        and all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    )


def are_near(found: Weights, wanted: Weights, tolerance: float) -> bool:
    """Whether no value differs by more than a part of the largest in its tensor."""
    return found.keys() == wanted.keys() and all(
        mx.abs(found[name] - wanted[name]).max() <= tolerance * mx.abs(wanted[name]).max()
        for name in wanted
    )


@pytest.fixture(scope="module")
def source(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in float32, of values that float16 has too: the app's decoder is in that."""
    folder = with_tokenizer(small_folder, tmp_path_factory.mktemp("source") / "small")
    tensors = {
        name: tensor.astype(mx.float16).astype(mx.float32)
        if mx.issubdtype(tensor.dtype, mx.floating)
        else tensor
        for name, tensor in tensors_of(small_folder).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory):
    """The source in a layout, written when it is first asked for."""
    root = tmp_path_factory.mktemp("layouts")

    def folder(layout: str) -> Path:
        target = root / layout
        return target if target.exists() else written(source, target, layout)

    return folder


# There and back


@pytest.mark.parametrize("first, second", PAIRS)
def test_there_and_back(folders, tmp_path, first, second):
    once = folders(first)
    there = written(once, tmp_path / "there", second)
    back = written(there, tmp_path / "back", first)
    if "apple-export" in (first, second):  # whose Core ML program holds the encoder folded
        found, wanted = folded(back), folded(once)
        assert are_near(found, wanted, 1e-6)
        decoder = [name for name in wanted if name.startswith("language_model.")]
        assert decoder and all(mx.array_equal(found[name], wanted[name]) for name in decoder)
        tolerance = 1e-5
    else:
        found, wanted = tensors_of(back), tensors_of(once)
        if second == "transformers":  # which has no classifier, that none computes with
            (head,) = (name for name in wanted if name.endswith("head.proj"))
            assert not found.pop(head).any() and wanted.pop(head).any()
        assert are_equal(found, wanted)
        tolerance = 0
    for folder in (there, back):
        for a, b in zip(outputs(folder), outputs(once), strict=True):
            assert mx.abs(a - b).max() <= tolerance * mx.std(b)
    check_what_stands_beside_the_weights(once, back)


def check_what_stands_beside_the_weights(once: Path, back: Path) -> None:
    old, new = (load_config(folder) for folder in (once, back))
    classes = old.vision.projection_dim  # of the classifier
    assert (replace(new.vision, projection_dim=classes), new.text) == (old.vision, old.text)
    assert new.image_token_index == old.image_token_index
    assert (new.eos_token_ids, new.mm_projector_type) == ((2,), "mlp2x_gelu")
    text = "<|im_start|>user\nWhat is this?<|im_end|>"
    before, after = (load_processor(folder) for folder in (once, back))
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert (after.image_size, after.mode) == (before.image_size, before.mode) == (128, "pad")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (back / name).exists() == (once / name).exists()
        if (once / name).exists():
            assert json.loads((back / name).read_text()) == json.loads((once / name).read_text())


def test_the_original_comes_back_from_every_layout(source, folders, tmp_path):
    """Tensor for tensor what PyTorch wrote, counters and all."""
    wanted = tensors_of(source)
    assert are_equal(tensors_of(folders("llava")), wanted)
    again = written(folders("mlx"), tmp_path / "again", "llava")
    assert are_equal(tensors_of(again), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_training_form_in_every_layout(training_folder, folders, tmp_path, layout):
    """It is merged on the way: the folder is that of the inference form."""
    training = with_tokenizer(training_folder, tmp_path / "training")
    folder = written(training, tmp_path / "written", layout)
    found, wanted = tensors_of(folder), tensors_of(folders(layout))
    shapes = [{name: (t.shape, t.dtype) for name, t in ts.items()} for ts in (found, wanted)]
    assert shapes[0] == shapes[1]
    for a, b in zip(outputs(folder), outputs(training), strict=True):
        # The app's decoder and projector are float16.
        assert mx.abs(a - b).max() <= (0.02 if layout == "apple-export" else 1e-5) * mx.std(b)


@pytest.mark.parametrize("layout", ["llava", "transformers"])
def test_answers_stay_the_same(tmp_path, layout):
    """Of a trained model, from its folder in the layout and from one converted back."""
    full = full_nano(tmp_path / "full")
    there = convert(full, tmp_path / "there", layout=layout, progress=False)
    back = convert(there, tmp_path / "back", progress=False)
    question, image = "Describe the image.", NANO / "images" / "penguins.png"
    answers = {
        fv.generate(*fv.load(folder), question, image=image, max_tokens=20, temperature=0.0)
        for folder in (full, there, back)
    }
    assert answers == {"The image shows 6 penguins."}


# The training form under timm's names


def test_the_training_form_of_transformers_loads(
    training_folder, small_folder, folders, tmp_path, small
):
    pass

    tensors = transformers.from_mlx(llava.to_mlx(tensors_of(training_folder)))
    assert any(".large_conv." in name for name in tensors)
    folder = Path(shutil.copytree(folders("transformers"), tmp_path / "training"))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_args"]["inference_mode"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for a, b in zip(outputs(folder), outputs(small_folder), strict=True):
        assert mx.abs(a - b).max() < 1e-3 * mx.std(b)
    back = written(folder, tmp_path / "back", "transformers")
    assert tensors_of(back).keys() == tensors_of(folders("transformers")).keys()


# Quantized folders


QUANTIZED = {
    "4 bits": {"bits": 4, "group_size": 32},
    "all parts": {"bits": 4, "group_size": 32, "vision": {"bits": 8, "group_size": 32}},
    "mixed": {"preset": "mixed-3-6", "group_size": 32},
    "mxfp4": "mxfp4",
    "nvfp4": {"mode": "nvfp4", "vision": "mxfp8"},
}


@pytest.mark.parametrize("quantize", QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_folder_stays_as_it_is(source, tmp_path, quantize):
    once = convert(source, tmp_path / "once", quantize=quantize, progress=False)
    twice = convert(once, tmp_path / "twice", progress=False)
    assert any(name.endswith(".scales") for name in tensors_of(once))
    assert are_equal(tensors_of(twice), tensors_of(once))
    for file in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        assert json.loads((twice / file).read_text()) == json.loads((once / file).read_text())
    for a, b in zip(outputs(twice), outputs(once), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("quantize", ["4", "mxfp4", "mxfp8", "nvfp4"])
def test_a_quantized_folder_computes_with_what_it_holds(source, tmp_path, quantize):
    """The same as one that holds its weights expanded, in float32."""
    given = {"bits": 4, "group_size": 32} if quantize == "4" else quantize
    packed = convert(source, tmp_path / "packed", quantize=given, progress=False)
    config, tensors = read_checkpoint(packed)
    for layer, settings in list(quantized_linears(tensors, config)):
        names = [f"{layer}.{name}" for name in ("weight", "scales", "biases")]
        parts = [tensors.pop(name) for name in names if name in tensors]
        tensors[f"{layer}.weight"] = mx.dequantize(*parts, **settings).astype(mx.float32)
    plain = Path(shutil.copytree(packed, tmp_path / "plain"))
    (plain / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(plain / "model.safetensors"), tensors)
    fields = json.loads((packed / "config.json").read_text())
    kept = {k: v for k, v in fields.items() if not k.startswith("quantization")}
    (plain / "config.json").write_text(json.dumps(kept))
    for a, b in zip(outputs(packed), outputs(plain), strict=True):
        assert mx.abs(a - b).max() < 1e-3 * mx.std(b)


@needs_coremltools
def test_a_quantized_decoder_of_the_app_keeps_its_bits(data, tmp_path):
    once = data / "apple-export-small"
    folder = convert(once, tmp_path / "mlx", progress=False)
    found, wanted = tensors_of(folder), read_checkpoint(once)[1]
    decoder = [name for name in wanted if name.startswith(("language_model.", "mm_projector."))]
    assert any(name.endswith(".scales") for name in decoder)
    assert all(mx.array_equal(found[name], wanted[name]) for name in decoder)
    for a, b in zip(outputs(folder)[1:], outputs(once)[1:], strict=True):
        assert mx.abs(a - b).max() < 0.02 * mx.std(b)  # the encoder is stored in float16


# Linear layers of a block, as they end in a checkpoint and in memory. That of a downsampling is
# another matter: folding puts its columns in another order, so other weights share a scale.
MATRIX = re.compile(r".*(convffn\.fc[12]|token_mixer\.(qkv|proj))\.weight")
GROUP = 32


def rounded(matrix: mx.array) -> mx.array:
    """As 4 bits hold it."""
    packed = mx.quantize(matrix.flatten(1), group_size=GROUP, bits=4)
    return mx.dequantize(*packed, group_size=GROUP, bits=4).reshape(matrix.shape)


def rounded_blocks(tensors: Weights) -> Weights:
    return {
        name: rounded(t) if MATRIX.fullmatch(name) and t.shape[-1] % GROUP == 0 else t
        for name, t in tensors.items()
    }


def test_quantizing_commutes_with_folding(small_folder):
    """Of every layer of every block: scaling rows scales their groups, and no more."""
    config, tensors = read_checkpoint(small_folder)
    encoder = {n.removeprefix(ENCODER): t for n, t in tensors.items() if n.startswith(ENCODER)}

    def fold_all(source: Weights) -> Weights:
        return fold.fold_encoder(source.__getitem__, config.vision)

    exact = fold_all(encoder)
    before, after = fold_all(rounded_blocks(encoder)), rounded_blocks(exact)
    changed = [name for name in exact if not mx.array_equal(after[name], exact[name])]
    assert len(changed) == 15
    for name in changed:
        error = mx.abs(after[name] - exact[name]).max()
        differences = mx.abs(before[name] - after[name])
        # A weight in the middle of two steps may go to either.
        assert (differences > 1e-4 * error).sum() <= 0.001 * differences.size, name
        assert differences.max() <= 2.1 * error, name
