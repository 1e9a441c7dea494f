import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.bench import bench, machine
from fastvlm_mlx.bench.bench import (
    PHOTO,
    load_with_processor,
    make_prompt,
    sample_photo,
    summarize,
    time_loads,
)
from fastvlm_mlx.bench.machine import copy_bandwidth, product_rate, product_rates
from fastvlm_mlx.bench.table import STAGES, differences, times_better
from fastvlm_mlx.bench.work import (
    Need,
    Work,
    attention_work,
    conv_work,
    decoder_work,
    encoder_work,
    linear_work,
    projector_work,
    size_of,
    stage_needs,
)
from fastvlm_mlx.cli.main import main
from fastvlm_mlx.config import TextConfig, VisionConfig
from fastvlm_mlx.model.fastvlm import Projector
from fastvlm_mlx.model.qwen2 import Qwen2
from fastvlm_mlx.model.vision import FastViTHD

SMALL_TEXT = TextConfig(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
)


def parameters(module: nn.Module) -> int:
    return sum(value.size for _, value in tree_flatten(module.parameters()))


# Work


def test_linear() -> None:
    assert linear_work(3, 4, 5) == Work(2 * 3 * 4 * 5, 4 * 5 + 5, 3 * 4 + 3 * 5)
    assert linear_work(3, 4, 5, bias=False).weights == 20


def test_convolution() -> None:
    # 3 x 3, stride 2, on 8 x 8 x 3: 4 x 4 x 16 outputs of 27 products each
    assert conv_work(8, 3, 16, 3, 2) == Work(2 * 256 * 27, 27 * 16 + 16, 64 * 3 + 256)
    # depthwise 7 x 7, two outputs of each input
    assert conv_work(8, 4, 8, 7, groups=4) == Work(2 * 64 * 8 * 49, 8 * 49 + 8, 64 * 4 + 64 * 8)
    assert conv_work(7, 1, 1, 3, 2).flops == 2 * 16 * 9


def test_attention() -> None:
    # 4 queries, 6 keys, 8 heads of 16 over 2: scores and values are a product of 16 each
    assert attention_work(4, 6, 8, 2, 16) == Work(
        2 * 2 * 4 * 6 * 8 * 16, 0, 2 * 4 * 8 * 16 + 2 * 6 * 2 * 16
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 4), (3, 7)])
def test_causal_attention_skips_what_it_masks(queries: int, keys: int) -> None:
    pairs = sum(keys - queries + i + 1 for i in range(queries))
    assert attention_work(queries, keys, 1, 1, 1, causal=True).flops == 4 * pairs


def test_work_adds_up() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
    assert Work(1, 2, 3) * 4 == Work(4, 2, 12)  # the weights are read once


def test_weights_are_those_of_the_encoder() -> None:
    config = VisionConfig()
    assert encoder_work(config, 1024).weights == parameters(FastViTHD(config))
    assert encoder_work(config, 256).weights == encoder_work(config, 1024).weights


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_decoder(tied: bool, model_type: str) -> None:
    config = TextConfig(model_type=model_type, tie_word_embeddings=tied)
    decoder = Qwen2(config)
    read = parameters(decoder) - (0 if tied else parameters(decoder.embed_tokens))
    assert decoder_work(config, 5).weights == read


def test_weights_are_those_of_the_projector(small: fv.FastVLM) -> None:
    assert projector_work(small.config, 4).weights == parameters(Projector(small.config))


def products(compute: Callable[[mx.array], mx.array], x: mx.array) -> int:
    """Operations of all products and convolutions that a function's trace tells the shapes of."""
    found = 0

    def add(record: dict[str, Any]) -> None:
        nonlocal found
        name = record.get("name")
        if name not in ("Convolution", "Matmul", "AddMM"):
            return
        (_, a, _), (_, b, _), *_ = record["inputs"]
        ((_, out, _),) = record["outputs"]
        inner = math.prod(b[1:]) if name == "Convolution" else a[-1]
        found += 2 * math.prod(out) * inner

    mx.export_function(add, compute, x)
    return found


def test_operations_are_those_of_the_encoder(
    small: fv.FastVLM, assume: Callable[[str], None]
) -> None:
    assume("cuda")
    for size in (64, 128, 192):
        config = small.config
        expected = encoder_work(config.vision, size) + projector_work(config, (size // 64) ** 2)
        assert products(small.encode_image, mx.zeros((1, size, size, 3))) == expected.flops


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_operations_are_those_of_the_decoder(
    model_type: str, assume: Callable[[str], None]
) -> None:
    assume("cuda")
    config = replace(SMALL_TEXT, model_type=model_type, head_dim=24)
    decoder = Qwen2(config)
    expected = decoder_work(config, 1)
    assert products(decoder, mx.zeros((1, 1), mx.int32)) == expected.flops


def test_decoding_grows_with_what_is_cached() -> None:
    first, later = decoder_work(SMALL_TEXT, 1, 10), decoder_work(SMALL_TEXT, 1, 11)
    layers, heads, kv_heads, D = 2, 4, 2, 16
    assert later.flops - first.flops == layers * 4 * heads * D
    assert later.activations - first.activations == layers * 2 * kv_heads * D
    assert later.weights == first.weights


def test_a_prompt_in_pieces_is_the_same_work() -> None:
    whole = decoder_work(SMALL_TEXT, 12).flops
    parts = decoder_work(SMALL_TEXT, 5).flops + decoder_work(SMALL_TEXT, 7, 5).flops
    logits = 2 * SMALL_TEXT.hidden_size * SMALL_TEXT.vocab_size
    assert parts == whole + logits


def test_needs_are_of_the_weights_as_they_are_stored(nano: tuple[fv.FastVLM, fv.Processor]) -> None:
    model, _ = nano
    needs = stage_needs(model, (1, 256), (4032, 3024), 48, 32)
    stored = size_of(model)
    assert needs["load"] == Need(0, 2 * stored)
    assert stored < needs["memory"].bytes < 1.2 * stored
    weights = decoder_work(model.config.text, 1).weights
    assert weights < needs["decode"].bytes < 1.5 * weights  # 8 bits each, and scales
    assert needs["encode"].bytes > 4 * encoder_work(model.config.vision, 256).activations
    assert needs["preprocess"].bytes > 2 * 3 * 4032 * 3024
    twice = stage_needs(model, (2, 256), (4032, 3024), 48, 32)
    assert twice["encode"].flops == 2 * needs["encode"].flops
    assert twice["encode"].bytes < 2 * needs["encode"].bytes


# The machine


def test_rate_is_of_the_best_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {512: 0.001, 1024: 0.004, 2048: 0.1}
    monkeypatch.setattr(machine, "best_time", lambda run, _: seconds[run()])
    assert product_rate(lambda n: lambda: n) == 2 * 1024**3 / 0.004


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RATE_SECONDS", 0.02)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 22)
    model, _ = fv.load(dtype="float32")
    rates = product_rates(model)
    assert {"float32", "8 bits"} <= set(rates)
    assert all(1e7 < rate < 1e16 for rate in rates.values())
    assert 1e8 < copy_bandwidth() < 1e14


def test_machine_in_words_names_gpu_and_driver() -> None:
    gpu = {"name": "G", "memory.total": "8 MiB", "driver_version": "1.2"}
    plain = {"cpu": "A CPU", "cores": 8, "system": "Linux", "preloaded": "", "gpus": []}
    words = machine.machine_in_words(plain | {"gpus": [gpu], "preloaded": "lib.so"})
    assert words == "A CPU, 8 cores, Linux, lib.so preloaded; G, 8 MiB, driver 1.2"
    assert machine.machine_in_words(plain) == "A CPU, 8 cores, Linux"


def test_the_blas_and_its_kernels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libopenblas.so.0:/nowhere/libother.so")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    found = machine.describe_machine()
    assert found["preloaded"] == "libopenblas.so.0, libother.so"
    assert found["openblas_coretype"] == machine.OWN_CHOICE
    assert found["openblas_kernels"] is None  # there is no such file to ask
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert machine.describe_machine()["openblas_coretype"] == "Haswell"
    words = machine.machine_in_words(found | {"openblas_coretype": "Haswell"})
    assert "libother.so preloaded (OPENBLAS_CORETYPE: Haswell)" in words
    words = machine.machine_in_words(found | {"openblas_kernels": "SkylakeX"})
    assert "preloaded with SkylakeX kernels (OPENBLAS_CORETYPE: the library's own" in words


# A whole run


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "RATE_SECONDS", 0.02)
        patch.setattr(machine, "COPY_BYTES", 1 << 22)
        patch.setattr(bench, "PHOTO", (640, 480))
        return bench.bench(image_size=128, prompt_tokens=5, tokens=3, runs=2)


def test_every_stage_is_measured(result: dict[str, Any]) -> None:
    assert list(result["stages"]) == list(STAGES)
    for name, row in result["stages"].items():
        assert 0 < row["least"] <= row["median"] <= row["most"], name
        assert row["floor"] > 0
        assert len(row["samples"]) == 2
    stages = {name: row["samples"] for name, row in result["stages"].items()}
    for i in range(2):
        parts = sum(stages[name][i] for name in ("preprocess", "encode", "prefill"))
        assert stages["ttft"][i] == pytest.approx(parts)
        rest = stages["total"][i] - stages["ttft"][i]
        assert stages["decode"][i] == pytest.approx(2 / rest)


def test_what_was_measured_is_said(result: dict[str, Any]) -> None:
    settings = result["settings"]
    assert settings["model"] == "nano"
    assert settings["image"] == [640, 480]
    assert (settings["image_size"], settings["visual_tokens"]) == (128, 4)
    assert (settings["prompt_tokens"], settings["tokens"], settings["runs"]) == (5, 3, 2)
    assert result["machine"]["cpu"]
    assert set(result["graph"]) == {"encode", "prefill", "decode"}
    for counts in result["graph"].values():
        assert 0 < counts["launches"] < sum(counts["primitives"].values())
    assert json.loads(json.dumps(result)) == result


def test_floors(result: dict[str, Any]) -> None:
    needs = {name: Need(8, 100) for name in ("load", "preprocess", "encode", "prefill", "decode")}
    needs["prefill"] = Need(6000, 100)
    needs["memory"] = Need(0, 10**9)
    samples = {name: [4.0, 2.0, 3.0] for name in STAGES}
    stages = summarize(samples, needs, {"flops": 1000.0, "bytes": 100.0}, 11)
    floors = {name: row["floor"] for name, row in stages.items()}
    assert floors == {
        "load": 1.0,
        "preprocess": 1.0,
        "encode": 1.0,
        "prefill": 6.0,
        "ttft": 8.0,
        "decode": 1.0,
        "total": 18.0,
        "memory": 1.0,
    }
    assert (stages["encode"]["ratio"], stages["prefill"]["ratio"]) == (3.0, 0.5)
    assert stages["decode"]["ratio"] == pytest.approx(1 / 3)  # above its floor: more is better
    row = stages["encode"]
    assert (row["median"], row["least"], row["most"], row["flops"]) == (3.0, 2.0, 4.0, 8)


def test_times_better(result: dict[str, Any]) -> None:
    earlier = json.loads(json.dumps(result))
    for row in earlier["stages"].values():
        row["median"] *= 2
    better = times_better(result, earlier)
    assert better.pop("decode") == pytest.approx(0.5)
    assert set(better.values()) == {2.0}


def test_differences_are_told(result: dict[str, Any]) -> None:
    assert differences(result, result) == []
    earlier = json.loads(json.dumps(result))
    earlier["settings"] |= {"image_size": 256, "runs": 9}
    earlier["machine"]["device"] = "Apple M4"
    first, second = differences(result, earlier)
    assert "image size is 128, and was 256" in first
    assert "Apple M4" in second
    del earlier["machine"]["openblas_coretype"]  # by an earlier version, which did not record it
    assert len(differences(result, earlier)) == 2


def test_a_photo_of_twelve_megapixels() -> None:
    content = sample_photo(PHOTO)
    image = Image.open(BytesIO(content))
    assert (image.format, image.size) == ("JPEG", (4032, 3024))
    assert 2e6 < len(content) < 8e6  # as photographs are


def test_a_folder_without_tokenizer(small_folder: Path) -> None:
    model, processor = load_with_processor(small_folder)
    assert processor.image_size == model.config.vision.image_size == 128
    assert processor.preprocess(Image.new("RGB", (9, 9))).shape == (1, 128, 128, 3)
    assert make_prompt(model, 4, 3).count(model.config.image_token_index) == 4


def test_loading_is_not_repeated_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    seconds, *_ = time_loads(lambda: ("model", "processor"), 3)  # type: ignore[arg-type, return-value]
    assert seconds == [5.0]


# The command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(machine, "RATE_SECONDS", 0.02)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 22)
    monkeypatch.setattr(bench, "PHOTO", (640, 480))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvlm", "bench", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


QUICK = ("--image-size", "64", "--tokens", "2", "--runs", "1", "--prompt-tokens", "2")


def test_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (120, 90)).save(picture)
    code, out, _ = run(*QUICK, "--json", "--image", str(picture))
    assert code == 0
    found = json.loads(out)
    assert found["settings"]["image"] == [120, 90]
    file = tmp_path / "before.json"
    file.write_text(out)
    code, out, err = run(*QUICK, "--compare", str(file))
    assert code == 0
    for said in ("Encode", "Times floor", "Times better", "Kernel launches", "GFLOP/s"):
        assert said in out
    assert "image is [640, 480], and was [120, 90]" in out
    assert "run 1 of 1" in err
    code, out, _ = run(*QUICK, "--compare", str(file), "--json", "--image", str(picture))
    assert set(json.loads(out)["times_better"]) == set(STAGES)
    assert json.loads(out)["differences"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runs", "0"), "runs must be a whole number from 1, found 0"),
        (("--tokens", "1"), "tokens must be a whole number from 2"),
        (("--prompt-tokens", "0"), "prompt_tokens must be a whole number from 1"),
        (("--prompt-tokens", "100000"), "the model's limit"),
        (("--image", "nothing.jpg"), "nothing.jpg"),
        (("--compare", "nothing.json"), "nothing.json"),
        (("--compare", __file__), "is not a result of"),
        (("--image-size", "100"), "multiple of 64"),
        (("--model", "nothing"), "no model folder nothing"),
    ],
)
def test_bad_input(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("Error: ") and said in error
