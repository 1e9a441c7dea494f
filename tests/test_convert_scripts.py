import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command import Result
from hub_server import TOKEN, Hub
from sources import full_nano, with_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.hub.resolve import NANO

SCRIPTS = Path(__file__).parents[1] / "convert"
CONVERTERS = ("from_pytorch.py", "to_pytorch.py", "to_apple_app.py")
QUEEN = NANO / "images" / "queen.png"
Script = Callable[..., Result]
needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason="needs coremltools"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """Runs a script of `convert/` in this process."""

    def run(name: str, *arguments: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code: Any = 0
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return Result(code, *capfd.readouterr())

    return run


def assert_one_error(result: Result, *said: str) -> None:
    assert (result.code, result.out) == (2, "")
    line, end, rest = result.err.partition("\n")
    assert line.startswith("Error: ") and line.endswith(".") and end and not rest, result.err
    for text in said:
        assert text in line


class Reference:
    """What PyTorch computed for a small model: one prompt with one image."""

    def __init__(self, folder: Path):
        arrays = mx.load(str(folder / "expected.safetensors"))
        given = json.loads((folder / "expected.json").read_text())
        ids = given["cases"][0]["input_ids"] if "cases" in given else given["input_ids"]
        places = 4 if "cases" in given else 1  # of each image mark; there, marks are repeated
        self.mark = given["image_token"]
        self.ids = [i for token in ids for i in [token] * (places if token == self.mark else 1)]
        self.pixel_values = arrays["pixel_values"][:1].transpose(0, 2, 3, 1)
        self.features = arrays["vision_features"][:1]
        self.logits = arrays["case0.logits" if "cases" in given else "logits"]

    def check(self, folder: Path) -> None:
        """Assert that the model of a folder computes the same."""
        model = fv.load_model(folder, dtype="float32")
        features = model.vision_tower(self.pixel_values)
        assert mx.abs(features - self.features).max() < 1e-4 * mx.std(self.features)
        mark = model.config.image_token_index
        ids = mx.array([[mark if i == self.mark else i for i in self.ids]])
        logits = model(ids, pixel_values=self.pixel_values)
        assert mx.abs(logits - self.logits).max() < 1e-3


@pytest.fixture(scope="module")
def small_source(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in the original layout, with a tokenizer."""
    return with_tokenizer(small_folder, tmp_path_factory.mktemp("sources") / "small")


# from_pytorch.py


@pytest.mark.parametrize("form", ["inference", "training", "transformers"])
def test_from_pytorch_computes_what_pytorch_does(
    form: str, script: Script, data: Path, small_folder: Path, training_folder: Path, tmp_path: Path
) -> None:
    sources = {"inference": small_folder, "training": training_folder}
    source = sources.get(form, data / "transformers-small")
    target = tmp_path / "target"
    result = script("from_pytorch.py", source, target)
    assert result.code == 0 and result.out.startswith(f"Wrote {target}. ")
    names = mx.load(str(target / "model.safetensors")).keys()
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    assert not any("rbr_" in name or "timm_model" in name for name in names)
    Reference(source if form == "transformers" else data / "random-small").check(target)


def test_from_pytorch_adds_an_adapter_to_its_base(
    script: Script, small_folder: Path, tmp_path: Path
) -> None:
    layer = "model.layers.1.self_attn.k_proj"
    down = mx.random.normal((4, 64), key=mx.random.key(1))
    up = mx.random.normal((32, 4), key=mx.random.key(2))
    lora = tmp_path / "lora"
    lora.mkdir()
    matrices = {"lora_A": down, "lora_B": up}
    tensors = {f"base_model.model.{layer}.{name}.weight": m for name, m in matrices.items()}
    mx.save_safetensors(str(lora / "adapter_model.safetensors"), tensors)
    settings = {"base_model_name_or_path": str(small_folder), "r": 4, "lora_alpha": 8}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    assert script("from_pytorch.py", lora, tmp_path / "target").code == 0
    found = mx.load(str(tmp_path / "target" / "model.safetensors"))
    base = mx.load(str(small_folder / "model.safetensors"))
    moved = found[f"language_model.{layer}.weight"] - base[f"{layer}.weight"]
    assert mx.allclose(moved, 2 * up @ down, atol=1e-5)
    same = "model.layers.0.self_attn.k_proj.weight"
    assert mx.array_equal(found[f"language_model.{same}"], base[same])


def test_from_pytorch_quantizes(script: Script, tmp_path: Path) -> None:
    source, target = full_nano(tmp_path / "full"), tmp_path / "target"
    llava = fv.convert(source, tmp_path / "llava", layout="llava", progress=False)
    assert script("from_pytorch.py", llava, target, "--quantize", "8").code == 0
    settings = json.loads((target / "config.json").read_text())["quantization"]
    assert (settings["bits"], settings["group_size"]) == (8, 64)
    tensors = mx.load(str(target / "model.safetensors"))
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert "language_model.model.layers.0.mlp.up_proj" in packed and "mm_projector.0" in packed
    assert all(tensors[f"{name}.weight"].dtype == mx.uint32 for name in packed)
    answer = fv.generate(*fv.load(target), "Read the text.", image=QUEEN)
    assert answer == 'The note says "queen".'
    again = script("from_pytorch.py", llava, target, "--dtype", "bfloat16", "--overwrite")
    assert again.code == 0 and {t.dtype for t in read_tensors(target).values()} == {mx.bfloat16}


# to_pytorch.py


@pytest.mark.parametrize(
    "flags, stem",
    [
        ((), "model.vision_tower.vision_tower.model.patch_embed.0"),
        (("--layout", "transformers"), "model.vision_tower.timm_model.stem.0"),
    ],
    ids=["llava", "transformers"],
)
def test_to_pytorch_and_back(
    flags: tuple, stem: str, script: Script, data: Path, small_source: Path, tmp_path: Path
) -> None:
    mlx_folder = fv.convert(small_source, tmp_path / "mlx", progress=False)
    target, back = tmp_path / "target", tmp_path / "back"
    result = script("to_pytorch.py", mlx_folder, target, *flags)
    assert (result.code, result.out) == (0, f"Wrote {target}.\n")
    weight = mx.load(str(target / "model.safetensors"))[f"{stem}.reparam_conv.weight"]
    assert weight.shape == (16, 3, 3, 3)  # out, in, height, width
    original = mx.load(str(small_source / "model.safetensors"))
    source = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"
    assert mx.array_equal(weight, original[source])
    assert script("from_pytorch.py", target, back).code == 0
    for folder in (target, back):
        Reference(data / "random-small").check(folder)


# to_apple_app.py


@needs_coremltools
def test_to_apple_app(script: Script, data: Path, small_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    result = script("to_apple_app.py", small_source, target)
    assert result.code == 0 and result.out.startswith(f"Wrote {target}. ")
    assert (target / "fastvithd.mlpackage" / "Manifest.json").is_file()
    tensors = mx.load(str(target / "model.safetensors"))
    assert "multi_modal_projector.linear_0.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {mx.float16}
    found, wanted = fv.load_model(target, dtype="float32"), fv.load_model(small_source)
    pixel_values = Reference(data / "random-small").pixel_values
    features = wanted.encode_image(pixel_values)
    assert mx.abs(found.encode_image(pixel_values) - features).max() < 0.01 * mx.std(features)


@needs_coremltools
def test_to_apple_app_quantizes(script: Script, small_source: Path, tmp_path: Path) -> None:
    assert script("to_apple_app.py", small_source, tmp_path / "target", "--quantize", "8").code == 0
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 8}
    assert fv.load_model(tmp_path / "target").config.quantization["bits"] == 8


def test_to_apple_app_names_what_it_needs(
    script: Script, small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    result = script("to_apple_app.py", small_source, tmp_path / "target")
    assert_one_error(result, "coremltools", "pip install")
    assert not list(tmp_path.iterdir())


# push_to_hub.py


def test_push_to_hub(
    script: Script, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images"))
    assert_one_error(script("push_to_hub.py", folder, "user/mine"), "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_one_error(script("push_to_hub.py", folder, "mine"), "user/name")
    assert_one_error(script("push_to_hub.py", tmp_path / "nothing", "user/mine"), "nothing")
    assert not server.created
    result = script("push_to_hub.py", folder, "user/mine", "--private", "--message", "Four bits")
    assert result.code == 0 and result.out.splitlines()[-1] == f"{server.url}/user/mine"
    (made,) = server.created
    assert made.get("visibility") == "private" or made.get("private") is True
    ((_, lines),) = server.commits
    assert lines[0]["value"]["summary"] == "Four bits"
    assert server.files["user/mine"]["README.md"] == (folder / "README.md").read_bytes()
    answer = fv.generate(*fv.load("user/mine"), "Read the text.", image=QUEEN)
    assert answer == 'The note says "queen".'


def test_push_to_hub_notes_a_missing_licence(
    script: Script, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images", "README.md"))
    result = script("push_to_hub.py", folder, "user/mine")
    assert result.code == 0 and "Note: " in result.err and "licence" in result.err
    assert "Traceback" not in result.err and "Warning" not in result.err


# Bad input


@pytest.mark.parametrize("name", CONVERTERS[:2])
def test_sources_that_can_not_be_read(name: str, script: Script, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert_one_error(script(name, tmp_path / "nothing", target), "nothing")
    (tmp_path / "empty").mkdir()
    assert_one_error(script(name, tmp_path / "empty", target), "empty", "config.json")
    assert_one_error(script(name, NANO, target, "--dtype", "int8"), "dtype", "int8")
    assert not target.exists()


def test_what_exists_is_kept(script: Script, small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for name in CONVERTERS[:2]:
        result = script(name, small_source, tmp_path)
        assert_one_error(result, str(tmp_path), "holds mine.txt", "choose another target")
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_quantized_folder_does_not_become_pytorch(script: Script, tmp_path: Path) -> None:
    assert_one_error(script("to_pytorch.py", NANO, tmp_path / "target"), "quantized")
    assert_one_error(
        script("from_pytorch.py", NANO, tmp_path / "target", "--quantize", "4"), "quantized already"
    )
    assert not list(tmp_path.iterdir())


def test_malformed_commands(script: Script) -> None:
    for name in (*CONVERTERS, "push_to_hub.py"):
        for arguments in ((), ("a", "b", "--spam")):
            result = script(name, *arguments)
            assert result.code == 2 and result.err.startswith("usage: ")
            assert "Traceback" not in result.err


def test_a_script_runs_from_a_shell(small_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, from elsewhere."""
    command = [sys.executable, str(SCRIPTS / "from_pytorch.py"), str(small_folder), "target"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "target" / "config.json").is_file(), done.stderr
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_one_error(Result(done.returncode, done.stdout, done.stderr), "target", "--overwrite")


# The example commands


@pytest.mark.parametrize("name", [*CONVERTERS, "push_to_hub.py", "README.md"])
def test_example_commands_have_flags_that_exist(name: str, script: Script) -> None:
    commands = re.findall(r"python convert/(\w+\.py)(.*)", (SCRIPTS / name).read_text())
    assert commands
    for called, arguments in commands:
        words = script(called, "--help").out
        for flag in re.findall(r"--\w+", arguments):
            assert flag in words, f"{called} {flag}"
