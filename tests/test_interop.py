"""What we convert must load in mlx-vlm and in transformers, and all must say the same.

Each library may live in an environment of its own, whose Python is named in a variable:

    FASTVLM_PEER_PYTHON=~/mlx-vlm/bin/python pytest -m interop tests/test_interop.py
    FASTVLM_TRANSFORMERS_PYTHON=~/torch/bin/python pytest -m interop tests/test_interop.py

The first needs mlx-vlm, the second torch, torchvision, timm and transformers 5. All of it takes
some minutes, 5 GB of disk for temporary files and 3 GB of memory in each library's process. Where
MLX computes on the CPU, its float32 products are faster with OpenBLAS
(LD_PRELOAD=libopenblas.so.0).

LLaVA folders need no such test: `test_round_trips.py` finds in them, tensor for tensor, what the
original code wrote, and `test_names.py` the names and shapes of the released checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sources import full_nano, qwen3_folder, with_tokenizer
from training import learn, trained

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.convert import APPLE, WRITTEN, convert
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.train.adapters import write

WORKER = Path(__file__).with_name("peer_worker.py")
MLX_VLM = os.environ.get("FASTVLM_PEER_PYTHON", "")
TRANSFORMERS = os.environ.get("FASTVLM_TRANSFORMERS_PYTHON", "")
IMAGE = -200
TOKENS = 12
HALF = 0.05  # what float16 may change between two logits of these models
TEXT = "<|im_start|>user\n<image>What is this?<|im_end|>\n<|im_start|>assistant\n"

pytestmark = [pytest.mark.interop, pytest.mark.slow]
needs_mlx_vlm = pytest.mark.skipif(
    not MLX_VLM, reason="set FASTVLM_PEER_PYTHON to the Python of an environment with mlx-vlm"
)
needs_transformers = pytest.mark.skipif(
    not TRANSFORMERS,
    reason="set FASTVLM_TRANSFORMERS_PYTHON to the Python of an environment with transformers",
)

Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Remove a test's folders, which pytest would keep for a few runs: they are large."""
    yield
    shutil.rmtree(tmp_path)


def import_benchmark(name: str) -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


random_checkpoint = import_benchmark("random_checkpoint")


def run_peer(python: str, library: str, folder: Path, scratch: Path, **inputs: Any) -> Arrays:
    """What another library makes of a folder; see `peer_worker.py`."""
    given, found = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(given, **inputs)
    command = [python, str(WORKER), library, str(folder), str(given), str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(found) as outputs:
        return dict(outputs)


def run_transformers(
    what: str, folder: Path, scratch: Path, pixel_values: Any, ids: list[int]
) -> Arrays:
    token = json.loads((folder / "config.json").read_text())["image_token_index"]
    ids = [token if i == IMAGE else i for i in ids]
    inputs = {"pixel_values": pixel_values, "input_ids": ids, "tokens": TOKENS, "text": TEXT}
    return run_peer(TRANSFORMERS, what, folder, scratch, **inputs)


def run_ours(folder: Path, pixel_values: np.ndarray, input_ids: list[int]) -> Arrays:
    """Features, logits of every place of the prompt, greedy tokens, and how far each leads."""
    model = fv.load_model(folder, dtype="float32")
    pixels, cache = mx.array(pixel_values), model.make_kv_cache()
    places = [model.config.image_token_index if i == IMAGE else i for i in input_ids]
    logits = model(mx.array([places]), cache, pixel_values=pixels)
    whole, tokens, leads = logits[0], [], []
    for _ in range(TOKENS):
        token = mx.argmax(logits[:, -1], axis=-1)
        second, first = mx.topk(logits[0, -1], 2).tolist()
        leads.append(abs(first - second))
        tokens.append(token.item())
        logits = model(token[None], cache)
    features = model.vision_tower(pixels)[0]
    found = {"features": np.array(features), "logits": np.array(whole)}
    return found | {"tokens": tokens, "leads": leads}


def random_inputs(image_size: int, vocab_size: int, length: int = 16) -> tuple[Any, list[int]]:
    """Pixels, and token ids with one image's places in their middle."""
    random = np.random.default_rng(0)
    pixel_values = random.random((1, image_size, image_size, 3), dtype=np.float32)
    ids: list[int] = random.integers(0, vocab_size, length).tolist()
    half = length // 2
    return pixel_values, [*ids[:half], *[IMAGE] * (image_size // 64) ** 2, *ids[half:]]


def check(ours: Arrays, theirs: Arrays) -> None:
    logits = ours["logits"] if theirs["logits"].ndim == 2 else ours["logits"][-1]
    for found, wanted in ((ours["features"], theirs["features"]), (logits, theirs["logits"])):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-3
    assert ours["tokens"] == theirs["tokens"].tolist()


# mlx-vlm


def check_with_mlx_vlm(folder: Path, scratch: Path, image_size: int = 128) -> None:
    config = json.loads((folder / "config.json").read_text())
    pixel_values, ids = random_inputs(image_size, config["vocab_size"] - 2)  # no end of text
    ours = run_ours(folder, pixel_values, ids)
    assert len(set(ours["tokens"])) > TOKENS // 2  # not the same token over and over
    at = ids.index(IMAGE)
    one_place = [*ids[: at + 1], *ids[at + (image_size // 64) ** 2 :]]
    inputs = {"pixel_values": pixel_values, "input_ids": one_place, "tokens": TOKENS}
    check(ours, run_peer(MLX_VLM, "mlx-vlm", folder, scratch, **inputs))


@pytest.fixture
def make_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a checkpoint with the released encoder and a tiny decoder, some fields changed."""

    def make(**fields: Any) -> Path:
        changed = random_checkpoint.SIZES["small"] | fields
        monkeypatch.setitem(random_checkpoint.SIZES, "changed", changed)
        target = tmp_path / "checkpoint"
        return random_checkpoint.write_checkpoint("changed", target, dtype="float32")

    return make


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The 0.5B model with random weights, plain and at 4 bits, in the layout that mlx-vlm reads."""
    root = tmp_path_factory.mktemp("full")
    source = random_checkpoint.write_checkpoint("0.5b", root / "source", dtype="bfloat16")
    # On a CPU, mlx-vlm is bearable in float32 alone.
    options = {"dtype": "float32", "progress": False}
    folders = {
        "plain": convert(source, root / "plain", **options),
        "4 bits": convert(source, root / "4bit", quantize=4, **options),
    }
    shutil.rmtree(source)
    yield folders
    shutil.rmtree(root)


@needs_mlx_vlm
@pytest.mark.parametrize("precision", ["plain", "4 bits"])
def test_full_size(full_size: dict[str, Path], tmp_path: Path, precision: str) -> None:
    check_with_mlx_vlm(full_size[precision], tmp_path)


@needs_mlx_vlm
def test_released_encoder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert(make_checkpoint(), tmp_path / "converted", progress=False)
    check_with_mlx_vlm(folder, tmp_path, image_size=256)


@needs_mlx_vlm
def test_untied_head(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=False)
    folder = convert(checkpoint, tmp_path / "converted", progress=False)
    check_with_mlx_vlm(folder, tmp_path)


@needs_mlx_vlm
@pytest.mark.parametrize(
    "quantize",
    [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}, "mixed-3-6", "mxfp4", "nvfp4"],
    ids=str,
)
def test_quantized(make_checkpoint: Callable[..., Path], tmp_path: Path, quantize: Any) -> None:
    # 160 columns are no multiple of 64: a layer that stays as it was must load as well.
    checkpoint = make_checkpoint(intermediate_size=160)
    folder = convert(checkpoint, tmp_path / "converted", quantize=quantize, progress=False)
    check_with_mlx_vlm(folder, tmp_path)


@needs_mlx_vlm
def test_from_the_layout_of_transformers(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Whose configuration names another id for images, and the base of positions elsewhere."""
    checkpoint = make_checkpoint(rope_theta=10000.0)
    source = with_tokenizer(checkpoint, tmp_path / "source")
    there = convert(source, tmp_path / "there", layout="transformers", progress=False)
    check_with_mlx_vlm(convert(there, tmp_path / "back", progress=False), tmp_path)


@needs_mlx_vlm
def test_images_and_prompts(tmp_path: Path) -> None:
    """mlx-vlm's processor, read from the folder, makes of them what ours makes."""
    folder = convert(NANO, tmp_path / "folder", progress=False)
    image = NANO / "images" / "penguins.png"
    theirs = run_peer(MLX_VLM, "processor", folder, tmp_path, text=TEXT, image=str(image))
    processor = fv.load(folder)[1]
    before, after = (
        processor.tokenizer.encode(text, allow_special=True) for text in TEXT.split("<image>")
    )
    assert theirs["input_ids"].tolist() == [*before, IMAGE, *after]
    pixel_values = np.array(processor.preprocess(image)).transpose(0, 3, 1, 2)
    assert theirs["pixel_values"].shape == pixel_values.shape
    # It resizes after rescaling and rounds down once more.
    assert np.abs(theirs["pixel_values"] - pixel_values).max() < 2.01 / 255


# transformers


@pytest.fixture
def sources(
    data: Path, small_folder: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> dict[str, Callable[[], Path]]:
    def released() -> Path:
        return with_tokenizer(make_checkpoint(tie_word_embeddings=False), tmp_path / "released")

    def qwen3() -> Path:
        (tmp_path / "plain").mkdir()
        return with_tokenizer(qwen3_folder(data, tmp_path / "plain"), tmp_path / "qwen3")

    return {
        "nano": lambda: full_nano(tmp_path / "nano"),
        "small": lambda: with_tokenizer(small_folder, tmp_path / "small"),
        "the released encoder, untied": released,
        "Qwen3": qwen3,
    }


@needs_transformers
@pytest.mark.parametrize("source", ["nano", "small", "the released encoder, untied", "Qwen3"])
def test_transformers(sources: dict[str, Callable[[], Path]], tmp_path: Path, source: str) -> None:
    written = sources[source]()
    folder = convert(
        written, tmp_path / "folder", layout="transformers", dtype="float32", progress=False
    )
    config = json.loads((folder / "config.json").read_text())
    image_size = 64 * int(config["image_seq_length"] ** 0.5)
    pixel_values, ids = random_inputs(image_size, 250)
    ours = run_ours(written, pixel_values, ids)
    theirs = run_transformers("transformers", folder, tmp_path, pixel_values, ids)
    check(ours, theirs)
    before, after = (
        load_processor(written).tokenizer.encode(text, allow_special=True)
        for text in TEXT.split("<image>")
    )
    assert theirs["text_ids"].tolist() == [*before, config["image_token_index"], *after]


@needs_transformers
def test_the_small_qwen3_is_what_transformers_makes(data: Path, tmp_path: Path) -> None:
    folder = data / "qwen3-small"
    command = [TRANSFORMERS, str(folder / "make.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for file in ("config.json", "expected.json"):
        assert (tmp_path / file).read_text() == (folder / file).read_text()
    for file in ("model.safetensors", "expected.safetensors"):
        found, stored = mx.load(str(tmp_path / file)), mx.load(str(folder / file))
        assert found.keys() == stored.keys()
        assert all(mx.allclose(found[k], stored[k], rtol=1e-4, atol=1e-4) for k in stored)


@needs_transformers
def test_training_form_of_transformers(small_folder: Path, tmp_path: Path) -> None:
    """A model that timm itself made of parallel branches."""
    source = with_tokenizer(small_folder, tmp_path / "source")
    folder = convert(source, tmp_path / "folder", layout="transformers", progress=False)
    (folder / "model.safetensors.index.json").unlink()
    pixel_values, ids = random_inputs(128, 250)
    theirs = run_transformers("training-form", folder, tmp_path, pixel_values, ids)
    names = mx.load(str(folder / "model.safetensors")).keys()
    assert any(".conv_kxk." in name for name in names) and not any("reparam" in n for n in names)
    check(run_ours(folder, pixel_values, ids), theirs)


# Adapters


@needs_mlx_vlm
@needs_transformers
@pytest.mark.needs("coremltools")
@pytest.mark.parametrize("quantize", [None, 8])
def test_a_fused_adapter_gives_the_same_tokens_everywhere(
    make_checkpoint: Callable[..., Path], tmp_path: Path, quantize: int | None
) -> None:
    """LoRA of a plain or a quantized model: here from four layouts, in mlx-vlm and transformers
    each from its own."""
    base = with_tokenizer(make_checkpoint(), tmp_path / "base")
    if quantize is not None:
        base = convert(base, tmp_path / "packed", quantize=quantize, progress=False)
    adapter = write(learn(trained(base, decoder="lora")), tmp_path / "adapter", base)
    pixel_values, ids = random_inputs(256, 250)
    unfused = run_ours(adapter, pixel_values, ids)  # beside its base
    assert len(set(unfused["tokens"])) > TOKENS // 3
    assert run_ours(base, pixel_values, ids)["tokens"] != unfused["tokens"]
    folders = {layout: tmp_path / layout for layout in WRITTEN}
    for layout, folder in folders.items():
        options = {"layout": layout, "dequantize": quantize is not None, "progress": False}
        fv.fuse(base, adapter, folder, **options)
        # The Apple export is float16, which decides where two tokens are as good.
        close = [i for i, lead in enumerate(unfused["leads"]) if lead < HALF]
        alike = min(close, default=TOKENS) if layout == APPLE else TOKENS
        tokens = run_ours(folder, pixel_values, ids)["tokens"]
        assert alike > 2 and tokens[:alike] == unfused["tokens"][:alike], layout
    check_with_mlx_vlm(folders["mlx"], tmp_path, image_size=256)
    image_size = 64 * int(len(unfused["features"]) ** 0.5)
    assert image_size == 256
    theirs = run_transformers("transformers", folders["transformers"], tmp_path, pixel_values, ids)
    check(unfused, theirs)
