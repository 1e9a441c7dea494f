"""What the benchmarks make of their samples, and that they run: this library's side alone."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import growth  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import mlx_sides  # noqa: E402
import plots  # noqa: E402
import random_checkpoint  # noqa: E402
import report  # noqa: E402
import run_all  # noqa: E402
import tables  # noqa: E402
import worker  # noqa: E402
from worker import EAGER, OURS, PEER  # noqa: E402

MACHINE = {"cpu": "A CPU", "cores": 8, "system": "Linux", "preloaded": "", "gpus": []}


def comparison(device: str = "CPU") -> dict[str, Any]:
    """A result of compare.py with three sides and rounds of known ratios."""
    samples = {key: {OURS: [1.0, 2.0, 4.0]} for key in tables.FIGURES}
    for found in samples.values():
        found[PEER] = [4.0, 6.0, 20.0]
        found[EAGER] = [2.0, 4.0, 8.0]
    samples["arrays"][EAGER] = []
    margin = {OURS: {"margin": 1e-5, "std": 2.0}, EAGER: {"margin": -1e-5, "std": 2.0}}
    return {
        "command": "python benchmarks/compare.py MODEL",
        "kind": "compare",
        "model": {"name": "m", "hidden_size": 896, "num_hidden_layers": 24, "vocab_size": 9},
        "settings": {
            "dtype": "float32",
            "image_size": 1024,
            "text_tokens": 32,
            "tokens": 8,
            "rounds": 3,
        },
        "machine": MACHINE,
        "versions": {
            OURS: {"library": "1", "mlx": "2", "device": device},
            PEER: {"library": "3", "mlx": "2", "device": device},
            EAGER: {"library": "5", "torch": "6", "device": device},
        },
        "outputs": {
            PEER: {"features_difference": 1e-5, "tokens": 8, "first_difference": None},
            EAGER: {
                "features_difference": 2e-5,
                "tokens": 8,
                "first_difference": 3,
                "margin": margin,
            },
        },
        "samples": samples,
    }


def growing() -> dict[str, Any]:
    """A result of growth.py: encoding proportional, prefill 20 % dearer at its longest."""
    return {
        "command": "python benchmarks/growth.py MODEL",
        "kind": "growth",
        "model": {"name": "m"},
        "device": "CPU",
        "machine": MACHINE,
        "encode": {"256": [1.0, 1.0], "512": [4.0, 4.2, 3.0]},
        "prefill": {"100": [1.0], "200": [2.0], "400": [4.8]},
        "memory": {
            "generation": list(range(1, 101)),
            "process": [1e9] * 50 + [1.1e9] * 50,
            "arrays": [1e8] * 100,
            "cached": [1e7] * 100,
        },
    }


def test_advantage_is_the_median_of_the_rounds_ratios() -> None:
    samples = comparison()["samples"]
    assert tables.advantage("encode", samples, PEER) == 4.0  # of 4, 3 and 5: less is better
    assert tables.advantage("decode", samples, PEER) == 0.25  # more is better
    assert tables.advantage("arrays", samples, EAGER) is None


def test_spread() -> None:
    assert tables.spread([]) == "–"
    assert tables.spread([2.0]) == "2"
    assert tables.spread([3.0, 1.0, 2.0]) == "2 (1–3)"


def test_rows_have_a_side_each() -> None:
    ours, peer, eager = tables.rows(comparison())
    assert ours[:2] == (OURS, "2 (1–4)")
    assert peer[:2] == (PEER, "6 (4–20); 4.00×")
    assert peer[3] == "6 (4–20); 0.25×"
    assert eager[-1] == "–"


def test_markdown_of_a_comparison() -> None:
    page = tables.comparison(comparison())
    assert "| fastvlm-mlx | 2 (1–4) |" in page
    assert "all 8 greedy tokens are the same" in page
    assert "differ first at step 3" in page
    assert "transformers 5 with torch 6 on CPU" in page


def test_a_table_is_as_wide_as_its_header() -> None:
    table = tables.markdown_table(("", "a", "b"), [("x", "1", "2")])
    assert table.splitlines() == ["|  | a | b |", "| --- | ---: | ---: |", "| x | 1 | 2 |"]


def test_machine_in_words_names_gpu_and_driver() -> None:
    gpu = {"name": "G", "memory.total": "8 MiB", "driver_version": "1.2"}
    words = tables.describe_machine_in_words(MACHINE | {"gpus": [gpu], "preloaded": "lib.so"})
    assert words == "A CPU, 8 cores, Linux, lib.so preloaded; G, 8 MiB, driver 1.2."


def test_command_line_hides_paths() -> None:
    parser = compare.make_parser()
    args = parser.parse_args(
        ["/home/me/model", "--peer-python", "/p", "--rounds", "3", "--compile", "--json", "/j"]
    )
    line = machine.command_line(parser, args)
    assert line == "python benchmarks/compare.py MODEL --peer-python PATH --compile --rounds 3"


def test_departure_from_proportional() -> None:
    found = growth.summary(growing())
    assert found["encode"] == pytest.approx(0.0)
    assert found["prefill"] == pytest.approx(0.2)
    assert found["process"] == pytest.approx(0.1)
    assert found["arrays"] == 0


def test_every_point_has_a_sample_a_round() -> None:
    asked: list[int] = []

    def seconds(point: int) -> float:
        asked.append(point)
        return float(point)

    assert growth.in_turns((1, 2), 2, seconds) == {"1": [1.0, 1.0], "2": [2.0, 2.0]}
    assert asked == [2, 1, 1, 2, 2, 1]  # a warm-up, then forth and back


def test_memory_of_a_deeper_decoder() -> None:
    found = {"weights": 10, "encoding": 5, "answering": 4, "layer_weights": 3, "layer_cache": 1}
    deeper = memory.deeper(found, 2)
    assert (deeper["weights"], deeper["encoding"], deeper["answering"]) == (16, 5, 6)


def test_report(tmp_path: Path) -> None:
    results = tmp_path / "results"
    machine.write_result(results / "compare.json", comparison())
    machine.write_result(results / "growth.json", growing())
    rows = [{"name": "plain", "speed": 1.23456, "samples": [1, 2]}]
    machine.write_result(results / "drafts-nano.json", {"device": "CPU", "results": rows})
    read = report.read_results(results)
    page = report.page(read, ["compare"])
    assert "| ≥ 3.5 | 4.00 |" in page  # the encoder on a CPU
    assert "departure from proportional to tokens | ≤ 25% | 20% |" in page
    assert "growth over 100 generations | ≤ 2% | +10.0% |" in page
    assert "](plots/compare.png)" in page and "](plots/growth.png)" not in page
    assert "## drafts-nano\n\n| name | speed |\n| --- | ---: |\n| plain | 1.23 |" in page
    assert page.index("## 0.5b on CPU") < page.index("## Growth of cost")
    assert "Nothing here was measured on a GPU." in page


def test_report_of_a_gpu() -> None:
    page = report.page({"compare": comparison("A GPU")})
    assert "| ≥ 2 | 4.00 |" in page and "≥ 3.5" not in page
    assert "Nothing here" not in page


def test_report_without_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        report.read_results(tmp_path)
    machine.write_result(tmp_path / "other.json", {"kind": "unknown"})
    with pytest.raises(ValueError, match=r"other\.json is no result"):
        report.read_results(tmp_path)


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("result", [comparison(), growing()], ids=["compare", "growth"])
def test_plots_are_800_pixels_wide(tmp_path: Path, result: dict[str, Any]) -> None:
    from PIL import Image

    file = tmp_path / "plots" / "a.png"
    assert plots.draw(result, file)
    with Image.open(file) as image:
        assert image.width == 800
    assert not plots.draw({"kind": "memory"}, tmp_path / "none.png")


def test_run_all_makes_each_checkpoint_before_its_use(tmp_path: Path) -> None:
    args = argparse.Namespace(
        sizes=["small", "nano"],
        dtype="float32",
        steps=["compare", "growth", "memory", "speculate"],
        rounds=2,
        results=tmp_path / "results",
        peer_python="python",
        transformers_python=None,
        compile=False,
    )
    commands = list(run_all.commands(args, tmp_path))
    assert [command[:2] for command in commands] == [
        ["random_checkpoint.py", "small"],
        ["compare.py", str(tmp_path / "small")],
        ["growth.py", str(tmp_path / "small")],
        ["random_checkpoint.py", "nano"],
        ["compare.py", str(tmp_path / "nano")],
        ["memory.py", "7b"],
        ["speculate.py", "--json"],
        ["report.py", "--results"],
    ]
    for script, *options in commands:
        help_text = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True
        ).stdout
        assert all(option in help_text for option in options if option.startswith("--"))


@pytest.fixture(scope="module")
def nano_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of nano's geometry, in the layouts of all sides."""
    scratch = tmp_path_factory.mktemp("nano")
    source = random_checkpoint.write_checkpoint("nano", scratch / "source", dtype="float32")
    compare.write_folders(source, scratch, "float32", [OURS, PEER, EAGER])
    return scratch


def test_this_side_answers_every_request(nano_folders: Path, tmp_path: Path) -> None:
    side = compare.Worker(OURS, sys.executable, nano_folders / "mlx", "float32")
    prompt = compare.random_prompt(8, 700)
    assert side.ask("load")["seconds"] > 0
    assert side.ask("encode", image_size=64)["seconds"] > 0
    generated = side.ask("generate", image_size=64, prompt=prompt, max_tokens=4)
    assert len(generated["tokens"]) == 4 and generated["tokens_per_second"] > 0
    side.ask("features", image_size=64, file=str(tmp_path / "features.npy"))
    assert np.load(tmp_path / "features.npy").shape == (1, 1, 512)
    margin = side.ask("margin", image_size=64, prompt=prompt, tokens=[1, 1])
    assert margin["margin"] == 0 and margin["std"] > 0
    peak = side.ask("memory")
    assert peak["resident"] > peak["arrays"] > 0
    assert side.ask("about")["mlx"]
    graph = str(BENCHMARKS.parent / "fastvlm_mlx" / "bench" / "graph.py")
    counts = side.ask("launches", image_size=64, prompt=prompt, graph=graph)
    assert counts["encode"]["launches"] > counts["decode"]["launches"] > 0
    assert counts["decode"]["primitives"]["ScaledDotProductAttention"] == 4  # one a layer
    side.close()
    with pytest.raises((RuntimeError, ValueError)):
        side.ask("load")


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    side = compare.Worker(OURS, sys.executable, tmp_path / "nothing", "float32")
    with pytest.raises(RuntimeError, match=r"fastvlm-mlx ended while asked to load"):
        side.ask("load")
    side.close()


def test_folder_for_transformers(nano_folders: Path) -> None:
    config = json.loads((nano_folders / "transformers/config.json").read_text())
    assert config["model_type"] == "fast_vlm" and config["image_token_index"] == 767
    assert (nano_folders / "transformers/model.safetensors").is_file()


def test_sides_agree_with_themselves(nano_folders: Path) -> None:
    """The comparison of outputs finds none between two workers of the same library."""
    workers = {
        name: compare.Worker(OURS, sys.executable, nano_folders / "mlx", "float32")
        for name in (OURS, PEER)
    }
    for side in workers.values():
        side.ask("load")
    generate = {"image_size": 64, "prompt": compare.random_prompt(8, 700), "max_tokens": 6}
    outputs = compare.compare_outputs(workers, generate)
    for side in workers.values():
        side.close()
    assert outputs["features_difference"] == 0 and outputs["first_difference"] is None


def test_next_submitted_is_what_the_loop_computes() -> None:
    import mlx.core as mx

    def loop() -> Any:
        token = mx.array(1)
        while True:
            token = token + 1
            mx.async_eval(token)
            yield token.item()

    tokens = loop()
    assert next(tokens) == 2
    (submitted,) = mlx_sides.next_submitted(tokens)
    assert submitted.item() == 3
    with pytest.raises(RuntimeError, match="async_eval"):
        mlx_sides.next_submitted(iter([1]))


def test_noise_is_the_same_everywhere() -> None:
    image = worker.noise_image(64)
    assert image.shape == (1, 64, 64, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() < 1
    assert np.array_equal(image, worker.noise_image(64))
