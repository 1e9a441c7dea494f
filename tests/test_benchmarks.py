"""The benchmarks' figures and tables, and that they run; of the sides, only this library's."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import DEPTH, VOCAB_SIZE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    __main__,
    asks,
    batch,
    caption,
    compare,
    constrained,
    memory,
    mlx_sides,
    packing,
    peers,
    plots,
    random_checkpoint,
    registry,
    report,
    run_all,
    same_picture,
    serve,
    speculate,
    tables,
    train,
    turns,
    worker,
)
from benchmarks.worker import EAGER, OURS, PEER  # noqa: E402
from fastvlm_mlx.bench.machine import OWN_CHOICE  # noqa: E402
from fastvlm_mlx.hub.resolve import NANO  # noqa: E402

WAYS = ("by layer", "as a whole")  # to differentiate an encoder on the CPU
MACHINE = {"cpu": "A CPU", "cores": 8, "system": "Linux", "preloaded": "", "gpus": []}


def comparison(device: str = "CPU") -> dict[str, Any]:
    """A result of `compare` with three sides and rounds of known ratios."""
    samples = {key: {OURS: [1.0, 2.0, 4.0]} for key in tables.FIGURES}
    for found in samples.values():
        found[PEER] = [4.0, 6.0, 20.0]
        found[EAGER] = [2.0, 4.0, 8.0]
    samples["arrays"][EAGER] = []
    margin = {OURS: {"margin": 1e-5, "std": 2.0}, EAGER: {"margin": -1e-5, "std": 2.0}}
    return {
        "command": "python -m benchmarks compare MODEL",
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
    """A result of `growth`: encoding proportional, prefill 20 % dearer at its longest."""
    return {
        "command": "python -m benchmarks growth MODEL",
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
    lines = report.section(comparison()).body.splitlines()
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("| ")]
    _, _, ours, peer, eager = rows
    assert ours[:2] == [OURS, "2 (1–4)"]
    assert peer[:2] == [PEER, "6 (4–20); 4.00×"]
    assert peer[3] == "6 (4–20); 0.25×"
    assert eager[0] == EAGER and eager[-1] == "–"


def test_markdown_of_a_comparison() -> None:
    page = report.section(comparison()).body
    assert "| fastvlm-mlx | 2 (1–4) |" in page
    assert "all 8 greedy tokens are the same" in page
    assert "differ first at step 3" in page
    assert "transformers 5 with torch 6 on CPU" in page


def test_a_table_is_as_wide_as_its_header() -> None:
    table = tables.markdown_table(("", "a", "b"), [("x", "1", "2")])
    assert table.splitlines() == ["|  | a | b |", "| --- | ---: | ---: |", "| x | 1 | 2 |"]


def test_command_line_hides_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    parsers = __main__.make_parsers()
    given = "compare /home/me/model --peer-python /p --rounds 3 --compile --json /j"
    args = parsers["benchmarks"].parse_args(given.split())
    line = registry.command_line(parsers["compare"], args)
    assert line == "python -m benchmarks compare MODEL --peer-python PATH --compile --rounds 3"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    line = registry.command_line(parsers["compare"], args)
    assert line.startswith("OPENBLAS_CORETYPE=Haswell python -m benchmarks compare MODEL")


def test_lists_stay_in_the_command_line() -> None:
    parsers = __main__.make_parsers()
    args = parsers["benchmarks"].parse_args(["growth", "folder", "--image-sizes", "64,128"])
    line = registry.command_line(parsers["growth"], args)
    assert line.endswith("python -m benchmarks growth MODEL --image-sizes 64,128")
    args = parsers["benchmarks"].parse_args(["image_size", "q.jsonl", "--sizes", "64", "128"])
    line = registry.command_line(parsers["image_size"], args)
    assert line.endswith("python -m benchmarks image_size QUESTIONS --sizes 64 128")


def test_departure_from_proportional() -> None:
    found = growing()
    encode = tables.unit_costs(found["encode"], lambda size: size**2)
    assert tables.departure(encode) == pytest.approx(0.0)
    assert tables.departure(tables.unit_costs(found["prefill"])) == pytest.approx(0.2)
    assert tables.drift(found["memory"]["process"]) == pytest.approx(0.1)
    assert tables.drift(found["memory"]["arrays"]) == 0


def test_every_side_has_a_sample_a_round() -> None:
    asked: list[int] = []

    def seconds(point: int) -> float:
        asked.append(point)
        return float(point)

    sides = {str(point): (lambda point=point: seconds(point)) for point in (1, 2)}
    assert turns.in_turns(sides, 2, "points") == {"1": [1.0, 1.0], "2": [2.0, 2.0]}
    assert asked == [2, 1, 1, 2, 2, 1]  # a warm-up, then forth and back
    asked.clear()
    assert turns.in_turns(sides, 1, "points", warm_up=0) == {"1": [1.0], "2": [2.0]}
    assert asked == [1, 2]


def test_memory_of_a_deeper_decoder() -> None:
    found = {"weights": 10, "encoding": 5, "answering": 4, "layer_weights": 3, "layer_cache": 1}
    deeper = memory.deeper(found, 2)
    assert (deeper["weights"], deeper["encoding"], deeper["answering"]) == (16, 5, 6)


def test_report(tmp_path: Path) -> None:
    results = tmp_path / "results"
    __main__.write_result(results / "compare.json", comparison())
    __main__.write_result(results / "growth.json", growing())
    rows = [{"name": "plain", "speed": 1.23456, "samples": [1, 2]}]
    __main__.write_result(results / "drafts-nano.json", {"device": "CPU", "results": rows})
    read = report.read_results(results)
    page = report.page(read, ["compare"])
    assert "| ≥ 3.5 | 4.00 |" in page  # the encoder on a CPU
    assert "departure from proportional to tokens | ≤ 25% | 20% |" in page
    assert "growth over 100 generations | ≤ 2% | +10.0% |" in page
    assert "](plots/compare.png)" in page and "](plots/growth.png)" not in page
    assert "## drafts-nano\n\n| name | speed |\n| --- | ---: |\n| plain | 1.23 |" in page
    assert page.index("## 0.5b on CPU") < page.index("## Growth of cost")
    assert "Nothing here was measured on a GPU." in page


def test_kernels_of_openblas_are_told_apart() -> None:
    preloaded = MACHINE | {"preloaded": "libopenblas.so.0"}
    own = comparison() | {"machine": preloaded | {"openblas_coretype": OWN_CHOICE}}
    forced = comparison() | {"machine": preloaded | {"openblas_coretype": "Haswell"}}
    page = report.page({"compare-0.5b-cpu": own, "compare-0.5b-cpu-haswell": forced})
    headings = [line for line in page.splitlines() if line.startswith("## 0.5b")]
    assert headings == [
        "## 0.5b on CPU: float32, 1024 pixels, kernels of OpenBLAS's own choice",
        "## 0.5b on CPU: float32, 1024 pixels, OpenBLAS forced to Haswell kernels",
    ]
    assert page.count("The kernels decide these times") == 2
    assert "libopenblas.so.0 preloaded (OPENBLAS_CORETYPE: Haswell)." in page
    before = report.section(comparison() | {"machine": preloaded})  # where it was not recorded
    assert before.title == "0.5b on CPU: float32, 1024 pixels" and "CORETYPE" not in before.body


def test_every_result_here_is_in_the_report() -> None:
    results = report.read_results(ROOT / "benchmarks" / "results")
    page = report.page(results)
    for result in results.values():
        assert f"## {report.section(result).title}\n" in page
        command = result.get("command", "python -m benchmarks load").split()
        command = command["=" in command[0] :]  # without the variable that forces kernels
        assert command[:3] == ["python", "-m", "benchmarks"] and command[3] in registry.MEASUREMENTS


def test_report_of_a_gpu() -> None:
    page = report.page({"compare": comparison("A GPU")})
    assert "| ≥ 2 | 4.00 |" in page and "≥ 3.5" not in page
    assert "Nothing here" not in page


def test_report_without_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        report.read_results(tmp_path)
    __main__.write_result(tmp_path / "other.json", {"kind": "unknown"})
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


def test_run_all_makes_each_checkpoint_before_its_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
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
        ["checkpoint", "small"],
        ["compare", str(tmp_path / "small")],
        ["growth", str(tmp_path / "small")],
        ["checkpoint", "nano"],
        ["compare", str(tmp_path / "nano")],
        ["memory", "7b"],
        ["speculate", "--json"],
        ["report", "--results"],
    ]
    assert commands[1][2:6] == ["--peer-python", "python", "--dtype", "float32"]
    assert commands[2][2:6] == ["--dtype", "float32", "--rounds", "2"]
    parser = __main__.make_parsers()["benchmarks"]
    for command in commands:
        parser.parse_args(command)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    _, (*_, file), *_ = run_all.commands(args, tmp_path)
    assert file.endswith("-haswell.json")  # beside the result of the default kernels


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "memory.json"
    command = ["memory", "small", "--image-size", "128", "--json", str(file)]
    assert __main__.main(command) == 0
    result = json.loads(file.read_text())
    assert result["command"].endswith("python -m benchmarks memory small --image-size 128")
    assert result["machine"]["openblas_coretype"]
    printed = capsys.readouterr().out
    assert report.section(result).title in printed and report.section(result).body in printed


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert __main__.main(["memory", "small", "--layers", "9"]) == 2
    assert "benchmarks memory: --layers must be from 1 to 2." in capsys.readouterr().err
    assert __main__.main(["report", "--results", str(tmp_path)]) == 2
    assert "There are no results in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["compare", "folder", "--rounds", "0"])
    assert "must be a whole number from 1, found 0" in capsys.readouterr().err


def test_features_that_differ_fail() -> None:
    near, far = {"features_difference": 1e-5}, {"features_difference": 0.1}
    assert compare.disagreement({PEER: near, EAGER: near}) is None
    assert "transformers" in str(compare.disagreement({PEER: near, EAGER: far}))


def test_batches_give_the_answers_of_single_requests() -> None:
    parser = __main__.make_parsers()["benchmarks"]
    args = parser.parse_args(["batch", "--requests", "3", "--rounds", "1", "--max-tokens", "5"])
    found = batch.measure(args)
    assert (found["requests"], found["same answers"]) == (3, 3)
    assert all(len(seconds) == 1 for seconds in found["seconds"].values())


@pytest.mark.needs("llguidance")
def test_a_schema_is_measured_beside_a_free_answer(nano_folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.tiktoken"
    texts = constrained.random_words(768)
    lines = (base64.b64encode(text) + f" {i}\n".encode() for i, text in enumerate(texts))
    file.write_bytes(b"".join(lines))
    assert constrained.read_tiktoken(file) == texts and len(texts) == 765
    tokenizer = constrained.make_tokenizer(texts)
    assert [tokenizer.token_bytes(i) for i in range(765)] == texts
    parser = __main__.make_parsers()["benchmarks"]
    asked = ["constrained", str(nano_folders / "source"), "--rounds", "2", "--max-tokens", "4"]
    free, schema = constrained.measure(parser.parse_args(asked))["results"]
    assert (free["times_free"], free["grammar_us_per_token"]) == (1.0, 0.0)
    assert schema["times_free"] > 0 and schema["grammar_us_per_token"] > 0
    assert len(schema["samples"]) == 2


@pytest.mark.needs("uvicorn")
def test_a_server_under_load_gives_the_answers_of_generate() -> None:
    parser = __main__.make_parsers()["benchmarks"]
    asked = "serve --clients 8 --seconds 1 --turn 0.5 --rounds 1 --pictures 2 --max-tokens 8"
    found = serve.measure(parser.parse_args(asked.split()))
    assert found["failure"] is None and found["memory"][0] > 10**7
    alone, many, long = found["results"]
    assert all(row["answers"] > 0 for row in (alone, many, long))
    assert all(row["errors"] == row["unlike `generate`'s"] == 0 for row in (alone, many, long))
    _, body, goals = report.section(found | {"machine": MACHINE})
    assert "2 pictures" in body and len(goals) == 3


def test_wrong_answers_and_broken_ones_are_counted() -> None:
    """A server that answers something else, or with an error, in place of the right answer."""
    replies = [(200, {"response": "Seven."}), (500, {}), (200, {"response": "Six."})]
    with replying(replies) as url:
        ways = {"ollama generate": asks.OLLAMA["ollama generate"]}
        load = asks.put_load(url, "m", {asks.Ask("Hi"): "Six."}, ways, clients=1, seconds=0.3)
    assert load.answers >= 2
    assert len(load.wrong) == 1 and "'Seven.'" in load.wrong[0]
    assert len(load.errors) == 1 and "500" in load.errors[0]


@contextmanager
def replying(replies: list[tuple[int, Any]]) -> Iterator[str]:
    """A server with these replies to one request after the other; the last goes on."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, value = replies.pop(0) if len(replies) > 1 else replies[0]
            data = json.dumps(value).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.needs("uvicorn")
def test_a_picture_is_asked_about_in_every_way(nano_folders: Path) -> None:
    parser = __main__.make_parsers()["benchmarks"]
    asked = ["same_picture", str(nano_folders / "source"), "--rounds", "1"]
    found = same_picture.measure(parser.parse_args(asked))
    assert {same_picture.FIRST, same_picture.AFTER, "its path", *asks.INTERFACES} <= set(
        found["seconds"]
    )
    _, _, goals = report.section(found | {"machine": MACHINE})
    assert len(goals) == len(found["seconds"]) - 1


def test_drafts_are_as_right_as_asked_for() -> None:
    answer = list(range(100))
    for share, expected in ((0.0, 0), (1.0, 100)):
        drafter = speculate.Agreeing(answer, share, 3, 1000)
        drafted = [int(drafter.propose(answer[:i], 1)[0]) for i in range(100)]
        assert sum(a == b for a, b in zip(drafted, answer, strict=True)) == expected


@pytest.fixture(scope="module")
def nano_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of nano's geometry, in the layouts of all sides."""
    scratch = tmp_path_factory.mktemp("nano")
    source = random_checkpoint.write_checkpoint("nano", scratch / "source", dtype="float32")
    peers.write_folders(source, scratch, "float32", [OURS, PEER, EAGER])
    return scratch


def test_this_side_answers_every_request(nano_folders: Path, tmp_path: Path) -> None:
    side = peers.Worker(OURS, sys.executable, nano_folders / "mlx", "float32")
    prompt = peers.random_prompt(8, 700)
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
    graph = str(ROOT / "fastvlm_mlx" / "bench" / "graph.py")
    counts = side.ask("launches", image_size=64, prompt=prompt, graph=graph)
    assert counts["encode"]["launches"] > counts["decode"]["launches"] > 0
    assert counts["batch"]["launches"] > counts["decode"]["launches"]
    assert counts["decode"]["primitives"]["ScaledDotProductAttention"] == DEPTH
    side.close()
    with pytest.raises((RuntimeError, ValueError)):
        side.ask("load")


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    side = peers.Worker(OURS, sys.executable, tmp_path / "nothing", "float32")
    with pytest.raises(RuntimeError, match=r"fastvlm-mlx ended while asked to load"):
        side.ask("load")
    side.close()


def test_no_file_hides_a_library() -> None:
    """A worker's own folder comes first where it looks for what its library imports."""
    for file in (ROOT / "benchmarks").glob("[a-z]*.py"):
        assert file.stem not in sys.stdlib_module_names
        assert importlib.util.find_spec(file.stem) is None, file


def test_folder_for_transformers(nano_folders: Path) -> None:
    config = json.loads((nano_folders / "transformers/config.json").read_text())
    assert config["model_type"] == "fast_vlm" and config["image_token_index"] == VOCAB_SIZE - 1
    assert (nano_folders / "transformers/model.safetensors").is_file()


def test_sides_agree_with_themselves(nano_folders: Path) -> None:
    """The comparison of outputs finds none between two workers of the same library."""
    workers = {
        name: peers.Worker(OURS, sys.executable, nano_folders / "mlx", "float32")
        for name in (OURS, PEER)
    }
    for side in workers.values():
        side.ask("load")
    generate = {"image_size": 64, "prompt": peers.random_prompt(8, 700), "max_tokens": 6}
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


def test_this_side_captions_files(tmp_path: Path) -> None:
    files = caption.make_pictures(tmp_path / "pictures", 6, 64)
    assert len({file.read_bytes() for file in files}) == 6  # no two alike, so none is saved
    side = peers.Worker(OURS, sys.executable, NANO, "float32")
    asked = {"images": list(map(str, files)), "prompt": "Describe the image.", "max_tokens": 3}
    found = side.ask("caption", **asked)
    side.close()
    assert len(found["texts"]) == 6 and all(found["texts"])
    assert found["seconds"] > 0 and 0 <= found["idle"] <= 1


def test_captions_of_both_sides_are_compared() -> None:
    ours = {"seconds": 1.0, "idle": 0.02, "texts": ["a", "b"]}
    theirs = {"seconds": 3.0, "texts": ["a", "c"]}
    args = argparse.Namespace(pictures=2, model=None)
    _, body, goals = report.section(caption.table({OURS: [ours], PEER: [theirs]}, args))
    assert [found for *_, found in goals] == ["3.00", "2.0%"] and "1 of 2" in body


def test_training_the_encoder_is_measured_in_both_forms(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["encoder_training", "--batch", "2", "--rounds", "1", "--image-size", "64"]
    assert __main__.main(command) == 0
    rows = re.findall(
        r"^\| (\w.*?) \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE
    )
    forms = [f"{form} form, {way}" for form in ("inference", "training") for way in WAYS]
    assert [name for name, *_ in rows] == ["encode", *forms]
    assert all(float(figure) > 0 for _, *figures in rows for figure in figures)


def test_this_side_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # its first call takes a minute
    side = peers.Worker(OURS, sys.executable, NANO, "float32")
    asked = {"rows": 2, "batch_size": 1, "image_size": 64, "text_tokens": 8}
    found = [side.ask("train", epoch=epoch, **asked)["seconds"] for epoch in (1, 2)]
    side.close()
    assert min(found) > 0


def test_training_of_both_sides_is_compared() -> None:
    found = {1: {OURS: [1.0, 1.1], PEER: [1.5, 1.65]}, 2: {OURS: [0.5], PEER: [2.0]}}
    args = argparse.Namespace(batch_size=4)
    result = train.table(found, {OURS: 1.0, PEER: 2.0}, args)
    title, body, _ = report.section(result)
    assert "1.50 times as fast" in title and "4.00 times in later ones" in title
    assert "0.50 of its memory" in title and "later epochs" in body


def test_packing_measures_useful_tokens_of_each_way(
    small_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "Step", partial(packing.Step, compiled=False))
    command = ["packing", str(small_folder), "--rows", "48", "--rounds", "1", "--batch-size", "2"]
    assert __main__.main([*command, "--text-tokens", "20", "--image-size", "64"]) == 0
    said = capsys.readouterr().out
    assert "times the useful tokens per second" in said
    for way in (packing.UNPACKED, packing.LARGER, packing.PACKED):
        assert f"| {way} |" in said
