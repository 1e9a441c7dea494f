"""`fastvlm train` from a file of rows to a model that answers, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from command import Run
from models import PANDA, PENGUINS
from sources import with_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx import finetuning
from fastvlm_mlx.checkpoint import load as loading
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.finetuning import Finetuned, pack_length
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.model.vision_training import TrainingFastViTHD
from fastvlm_mlx.train.log import LOG, Log, read_log
from fastvlm_mlx.train.loop import Result, Stopped
from fastvlm_mlx.train.plot import draw_losses, ticks
from fastvlm_mlx.train.report import REPORTERS, reporter
from fastvlm_mlx.train.settings import PACKED_LENGTH, TrainOptions

QUICK = ["--no-compiled", "--image-size", "64", "--batch-size", "2", "-q"]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(small_folder, tmp_path_factory.mktemp("train") / "model")


def row(number: int, image: Path | None = PANDA, answer: str = "Blue.") -> Row:
    mark = "" if image is None else "<image>\n"
    return {
        "id": f"row {number}",
        **({} if image is None else {"image": str(image)}),
        "conversations": [
            {"from": "human", "value": f"{mark}What is {number}?"},
            {"from": "gpt", "value": answer},
        ],
    }


def write(folder: Path, rows: list[Row]) -> str:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


def many() -> list[Row]:
    return [row(n, (PANDA, PENGUINS, None)[n % 3], "Blue" + "!" * n) for n in range(8)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(tmp_path, many())


def arguments(model: Path, data: str, out: Path, *more: str) -> list[str]:
    return ["train", "--model", str(model), "--data", data, "--out", str(out), *QUICK, *more]


def one_error(said: str) -> str:
    """The sentence that a command ended with; it is all that was said."""
    assert said.startswith("Error: ") and said.count("\n") == 1, said
    return said


def test_from_rows_to_an_adapter_that_answers(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, _, errors = run(
        *arguments(model, rows, out, "--epochs", "2", "--learning-rate", "0.01"),
        "--validation",
        "0.25",
        "--eval-samples",
        "2",
        "--max-tokens",
        "4",
    )
    assert code == 0, errors
    assert f"--adapter {out / 'adapter'}" in errors
    files = {path.name for path in out.iterdir()}
    assert files == {
        "adapter",
        "checkpoints",
        "data.json",
        "log.jsonl",
        "loss.png",
        "options.json",
    }
    options = json.loads((out / "options.json").read_text())
    assert options["epochs"] == 2.0 and options["decoder"] == "lora"
    summary = json.loads((out / "data.json").read_text())
    assert summary["rows"] + summary["validation_rows"] == 8
    (last,) = [line for line in read_log(out / "log.jsonl") if "exact" in line][-1:]
    assert 0 <= last["anls"] <= 1 and len(last["samples"]) == 2
    plain, processor = fv.load(model, dtype="float32")
    adapted, _ = fv.load(model, dtype="float32", adapter=out / "adapter")
    ids = mx.array([[5, 6, 7]])
    assert not mx.allclose(plain(ids), adapted(ids), atol=1e-4)
    assert isinstance(fv.generate(adapted, processor, "What?", max_tokens=2), str)


def test_a_frozen_encoder_sees_each_image_once(
    run: Run, model: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    encoded: list[int] = []
    original = FastViTHD.__call__

    def count(encoder: FastViTHD, pixels: mx.array) -> mx.array:
        encoded.append(len(pixels))
        return original(encoder, pixels)

    monkeypatch.setattr(FastViTHD, "__call__", count)
    found = {}
    for name, more in (("first", []), ("second", []), ("without", ["--no-cache-features"])):
        given = arguments(model, rows, tmp_path / name, "--epochs", "3", "--learning-rate", "0.01")
        code, _, errors = run(*given, *more)
        assert code == 0, errors
        found[name] = mx.load(str(tmp_path / name / "adapter" / "adapter_model.safetensors"))
        assert sum(encoded) == {"first": 2, "second": 0}.get(name, sum(encoded))
        assert name != "without" or sum(encoded) > 10
        encoded.clear()
    for name, value in found["first"].items():
        assert mx.array_equal(value, found["second"][name])
        assert mx.abs(value - found["without"][name]).max() <= 1e-6


@pytest.mark.parametrize("merge", ["flat", "spatial"])
@pytest.mark.parametrize("vision", ["frozen", "full"])
def test_images_in_tiles_are_trained_on_too(
    run: Run, model: Path, rows: str, tmp_path: Path, merge: str, vision: str
) -> None:
    tiled, out = tmp_path / "tiled", tmp_path / "run"
    shutil.copytree(model, tiled)
    config = json.loads((tiled / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": merge}
    config["image_grid_pinpoints"] = [[128, 64], [64, 128], [128, 128]]
    (tiled / "config.json").write_text(json.dumps(config))
    given = arguments(tiled, rows, out, "--vision", vision, "--epochs", "2")
    code, said, errors = run(*given, "--check")
    assert code == 0 and "Memory: about" in said, errors
    code, _, errors = run(*given)
    assert code == 0, errors
    assert all(line["loss"] > 0 for line in read_log(out / "log.jsonl"))


def test_a_decoder_in_full_becomes_a_whole_model(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, _, errors = run(*arguments(model, rows, out, "--stage", "2", "--steps", "2"))
    assert code == 0, errors
    assert not (out / "adapter").exists()
    before, after = (fv.load_model(folder, dtype="float32") for folder in (model, out / "model"))
    ids = mx.array([[5, 6, 7]])
    assert not mx.allclose(before(ids), after(ids), atol=1e-5)
    pixels = mx.random.uniform(shape=(1, 64, 64, 3), key=mx.random.key(0))
    assert not mx.allclose(before.encode_image(pixels), after.encode_image(pixels), atol=1e-5)


def test_a_model_from_nothing_is_trained_in_training_form_and_folded(
    run: Run, model: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "geometry", tmp_path / "run"
    shutil.copytree(model, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    towers: list[Any] = []
    note = finetuning.prepare
    monkeypatch.setattr(
        finetuning, "prepare", lambda m, o: towers.append(m.vision_tower) or note(m, o)
    )
    command = arguments(source, rows, out, "--from-scratch", "--steps", "2", "--image-size", "128")
    code, said, errors = run(*command, "--check")
    assert code == 0 and "Memory: about " in said, errors
    code, _, errors = run(*command)
    assert code == 0, errors
    assert f"--model {out / 'model'}" in errors
    assert {type(tower) for tower in towers} == {TrainingFastViTHD}
    trained, processor = fv.load(out / "model", dtype="float32")
    pixels = mx.random.uniform(shape=(2, 128, 128, 3), key=mx.random.key(0))
    towers[-1].eval()
    expected = towers[-1](pixels)
    distance = mx.abs(trained.vision_tower(pixels) - expected).max()
    assert (distance / mx.abs(expected).max()).item() < 1e-4
    assert (out / "model" / "training.json").is_file()
    assert isinstance(fv.generate(trained, processor, "What?", max_tokens=2), str)
    assert run(*command)[0] == 0  # it is over
    code, _, errors = run(
        *arguments(model, rows, tmp_path / "b", "--from-scratch", "--vision", "lora")
    )
    assert code == 2 and "from_scratch trains everything" in one_error(errors)


def test_the_same_command_after_the_end_does_nothing_twice(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(*arguments(model, rows, out))
    log = (out / "log.jsonl").read_text()
    code, _, errors = run(*arguments(model, rows, out))
    assert code == 0 and "Trained 4 steps." in errors
    assert (out / "log.jsonl").read_text() == log


def test_check_shows_rows_and_memory_and_reads_no_weight(
    run: Run, model: Path, rows: str, tmp_path: Path, no_weights: None
) -> None:
    code, said, errors = run(*arguments(model, rows, tmp_path / "run"), "--check")
    assert code == 0, errors
    assert "What is 0?" in said and "⟦Blue<|im_end|>⟧" in said
    assert "Memory: about " in said
    assert not (tmp_path / "run").exists()


def test_check_shows_the_rows_also_if_they_are_too_few(
    run: Run, model: Path, tmp_path: Path, no_weights: None
) -> None:
    few = write(tmp_path, [row(0)])
    code, said, errors = run(*arguments(model, few, tmp_path / "run"), "--check")
    assert code == 2 and "fewer than the 2 of a batch" in one_error(errors)
    assert "⟦Blue.<|im_end|>⟧" in said and "Memory" not in said


def test_check_divides_the_rows_as_the_run_will(
    run: Run, model: Path, rows: str, tmp_path: Path, no_weights: None
) -> None:
    given = arguments(model, rows, tmp_path / "run", "--check", "--validation")
    code, said, errors = run(*given, "0.25")
    assert code == 0, errors
    assert re.search(r"held out +\d", said) and not re.search(r"rows +8 ", said)
    other = tmp_path / "held.jsonl"
    other.write_text('{"answer": "x"}\n{"answer": ""}\n', encoding="utf-8")
    code, said, errors = run(*given, str(other))
    assert code == 2 and "1 of 10 row(s) can't be used" in one_error(errors)
    assert "held.jsonl, line 2: turn 2 is an empty answer" in said


@pytest.mark.usefixtures("no_weights")
def test_rows_to_validate_with_are_looked_at_first(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    wrong = {
        '{"image": "none.png", "answer": "x"}': "held.jsonl, line 1: its image 'none.png'",
        json.dumps({"image": __file__, "answer": "x"}): "is not an image",
        json.dumps({"answer": "x" * 9000}): "None of the 1 row(s) to validate with",
        "": "holds no rows to validate with",
    }
    for text, said in wrong.items():
        held.write_text(text, encoding="utf-8")
        code, _, errors = run(*arguments(model, rows, tmp_path / "r", "--validation", str(held)))
        assert code == 2 and said in one_error(errors)


BAD: dict[str, tuple[list[Row], list[str], str]] = {
    "a missing image": (
        [row(0), row(1, Path("no.png")), row(2)],
        [],
        "row 2, line 1: its image 'no.png' does not exist",
    ),
    "a mark without an image": (
        [row(0), {**row(1), "image": None}, row(2)],
        [],
        "row 2",
    ),
    "an empty answer": ([row(0), row(1, answer=""), row(2)], [], "row 2"),
    "fewer rows than a batch": ([row(0)], [], "fewer than the 2 of a batch"),
    "nothing to learn": (
        [{**row(0), "conversations": row(0)["conversations"][:1]}] * 3,
        [],
        "None of the 3 row(s) has a token to learn",
    ),
    "half precision": (many(), ["--dtype", "bfloat16"], "Training in bfloat16 is too slow"),
    "a pattern": (many(), ["--layers", "*.q_prj"], "matches no linear layer"),
    "a mode": (many(), ["--decoder", "qlora"], "decoder must be one of"),
    "no split": (many(), ["--validation", "2"], "validation"),
    "too long": (many(), ["--max-length", "9"], "tokens, more than 9"),
    "an image that is none": ([row(0), row(1, Path(__file__)), row(2)], [], "is not an image"),
    "a missing library": (many(), ["--report-to", "wandb"], "fastvlm-mlx[wandb]"),
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a weight is read."""

    def read(model: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "_evaluate", read)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("no_weights")
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run: Run, model: Path, tmp_path: Path, case: str
) -> None:
    given, more, message = BAD[case]
    out = tmp_path / "run"
    code, _, errors = run(*arguments(model, write(tmp_path, given), out, *more))
    assert code == 2
    assert message in one_error(errors)
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"x")
    code, _, errors = run(*arguments(model, rows, out))
    assert code == 2 and "holds cat.jpg, which is no part of a training run" in one_error(errors)


def test_another_run_in_the_folder_is_refused_before_weights_are_read(
    run: Run, model: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(*arguments(model, rows, out, "--steps", "1"))

    def read(model: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "_evaluate", read)
    code, _, errors = run(*arguments(model, rows, out, "--steps", "1", "--rank", "4"))
    assert code == 2 and "rank was 16 and is 4" in one_error(errors)
    other = write(tmp_path, many()[1:])
    code, _, errors = run(*arguments(model, other, out, "--steps", "1"))
    assert code == 2 and "data was" in one_error(errors)


def test_options_come_from_a_file_and_flags_overrule_them(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "options.json", tmp_path / "run"
    file.write_text('{"model": "x", "rank": 3, "steps": 1, "layers": ["*.o_proj"]}')
    code, _, errors = run(*arguments(model, rows, out, "--config", str(file), "--rank", "5"))
    assert code == 0, errors
    options = json.loads((out / "options.json").read_text())
    assert (options["rank"], options["layers"]) == (5, ["*.o_proj"])
    file.write_text('{"rnk": 3}')
    code, _, errors = run(*arguments(model, rows, tmp_path / "b", "--config", str(file)))
    assert code == 2 and "no training option 'rnk'; did you mean rank?" in one_error(errors)


def test_a_damaged_last_checkpoint_costs_only_its_steps(
    run: Run, model: Path, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(*arguments(model, rows, out, "--save-every", "1", "--keep", "3"))
    expected = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "adapter")
    newest = sorted((out / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    code, _, errors = run(*arguments(model, rows, out, "--save-every", "1", "--keep", "3"))
    assert code == 0, errors
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("interrupt", "said"),
    [
        (Stopped(), "Stopped and saved; the same command goes on from here.\n"),
        (
            KeyboardInterrupt(),
            "Stopped at once; the same command goes on from the last checkpoint.",
        ),
    ],
)
def test_what_is_said_of_an_interrupt_is_true(
    run: Run, monkeypatch: pytest.MonkeyPatch, interrupt: BaseException, said: str
) -> None:
    def finetune(*_: Any, **__: Any) -> None:
        raise interrupt

    monkeypatch.setattr("fastvlm_mlx.cli.train.finetune", finetune)
    code, _, errors = run("train", "--data", "x", "--out", "y")
    assert code == 130 and said in errors


def test_only_the_first_of_several_processes_says_how_it_went(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finetune(*_: Any, **__: Any) -> Finetuned:
        return Finetuned(Path("run/adapter"), Result(3, 1.0, None, None), rank)

    monkeypatch.setattr("fastvlm_mlx.cli.train.finetune", finetune)
    for rank in range(2):
        code, _, errors = run("train", "--data", "x", "--out", "y")
        assert code == 0 and ("Trained 3 steps." in errors) == (rank == 0)


def test_rows_are_packed_to_a_length_that_attention_can_bear(model: Path) -> None:
    processor = load_processor(model)
    assert pack_length(TrainOptions(), processor) is None
    assert pack_length(TrainOptions(pack=True), processor) == PACKED_LENGTH < processor.max_length
    assert pack_length(TrainOptions(pack=True, max_length=700), processor) == 700


# Reports


def test_numbers_go_to_tensorboard_and_wandb_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, float, int]] = []
    begun: list[dict[str, Any]] = []

    class SummaryWriter:
        def __init__(self, folder: str):
            begun.append({"folder": folder})

        def add_scalar(self, name: str, value: float, step: int) -> None:
            found.append((name, value, step))

    def init(**named: Any) -> Any:
        begun.append(named)
        return SimpleNamespace(log=lambda numbers, step: found.append((*numbers.items(), step)))

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in REPORTERS:
        log = Log(tmp_path / LOG, report=reporter(name, tmp_path / "run", {"rank": 3}))
        log.write(step=4, loss=1.5, rows=["a"])
        log.close()
    assert found == [(("loss", 1.5), 4), ("loss", 1.5, 4)]
    assert begun[0]["config"] == {"rank": 3} and begun[0]["name"] == "run"
    again, other = (tmp_path / name / "run" for name in ("", "elsewhere"))
    for out in (again, other):
        reporter("wandb", out, {})
    ids = [each["id"] for each in begun if "id" in each]
    assert ids[0] == ids[1] != ids[2]  # a run goes on, and another one is another
    assert begun[1]["folder"] == str(tmp_path / "run" / "tensorboard")


@pytest.mark.parametrize("name", REPORTERS)
def test_a_missing_reporter_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'fastvlm-mlx\[{name}\]'"):
        reporter(name, tmp_path, {})


# The plot


def test_the_plot_shows_both_losses(tmp_path: Path) -> None:
    from PIL import Image

    lines: list[dict[str, Any]] = [{"step": n, "loss": 3 / n} for n in range(1, 60)]
    lines += [{"step": 30, "validation_loss": 1.0}, {"step": 59, "validation_loss": 0.9}]
    file = tmp_path / "loss.png"
    assert draw_losses(lines, file)
    colours = {colour for _, colour in Image.open(file).getcolors(10**6)}
    assert {(0x1B, 0x6C, 0xA8), (0xD1, 0x49, 0x5B)} <= colours
    assert draw_losses(lines[:1], file) and draw_losses(lines[:2], file)
    assert not draw_losses([], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 12), (1e-7, 3e-7), (5, 6000), (2.5, 2.6)])
def test_ticks_are_few_round_numbers_within(ends: tuple[float, float]) -> None:
    low, high = ends
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
