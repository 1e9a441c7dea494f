import json
import shutil
import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.names import is_folded, quantized_linears
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.cli.main import app
from fastvlm_mlx.convert import convert
from fastvlm_mlx.evaluate.precision import precision_report
from fastvlm_mlx.evaluate.questions import DEFAULT_QUESTION
from fastvlm_mlx.train.calibrate import calibrate, list_questions

THREE = {"bits": 3, "group_size": 32}
VISION = "vision_tower."


@pytest.fixture(scope="module")
def source(small_folder, data, tmp_path_factory):
    """The small model with a tokenizer, and rows in its embedding for that."""
    folder = tmp_path_factory.mktemp("source")
    tensors = mx.load(str(small_folder / "model.safetensors"))
    name = "model.embed_tokens.weight"
    rows, width = tensors[name].shape
    more = 0.1 * mx.random.normal((768 - rows, width), key=mx.random.key(0))
    tensors[name] = mx.concatenate([tensors[name], more])
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((small_folder / "config.json").read_text()) | {"vocab_size": 768}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data / "tokenizer" / file, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128)).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def calibrated(source, images, tmp_path_factory):
    """A folder tuned with long steps, which so few images take."""
    target = tmp_path_factory.mktemp("calibrated") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules[convert.__module__],
            "tune",
            partial(calibrate, epochs=8, learning_rate=1e-3),
        )
        return convert(source, target, quantize=THREE, calibrate=images, progress=False)


def test_it_is_nearer_to_its_source_than_plain_rounding(source, images, calibrated):
    rows = precision_report(
        source,
        {"3 bits": THREE},
        folders={"3 bits, calibrated": calibrated},
        images=sorted(images.iterdir()),
    )
    _, plain, tuned = rows
    assert tuned.name == "3 bits, calibrated" and tuned.size == plain.size
    assert tuned.logit_error < 0.7 * plain.logit_error
    assert tuned.feature_error == plain.feature_error


def test_scales_of_the_decoder_alone_change(source, calibrated, tmp_path):
    _, exact = read_checkpoint(source)
    plain_folder = convert(source, tmp_path / "plain", quantize=THREE, progress=False)
    (_, plain), (_, tuned) = read_checkpoint(plain_folder), read_checkpoint(calibrated)
    assert plain.keys() == tuned.keys()
    changed = {name for name in plain if not mx.array_equal(plain[name], tuned[name])}
    assert changed == {
        name
        for name in plain
        if name.startswith("language_model.") and name.endswith((".scales", ".biases"))
    }
    encoder = [name for name in tuned if name.startswith(VISION)]
    assert encoder and all(mx.array_equal(tuned[name], exact[name]) for name in encoder)
    own = json.loads((plain_folder / "config.json").read_text())
    assert json.loads((calibrated / "config.json").read_text()) == own


def test_parts_of_unlike_precision_are_tuned_where_they_can_be(source, images, tmp_path):
    group = {"group_size": 32}
    given = {"preset": "mixed-3-6", **group, "vision": {"bits": 4, **group}, "embeddings": "mxfp4"}
    plain = convert(source, tmp_path / "plain", quantize=given, progress=False)
    tuned = convert(source, tmp_path / "q", quantize=given, calibrate=images, progress=False)
    (config, before), (_, after) = read_checkpoint(plain), read_checkpoint(tuned)
    changed = {
        name.removesuffix(".scales")
        for name in before
        if name.endswith(".scales") and not mx.array_equal(before[name], after[name])
    }
    assert changed == {
        name
        for name, settings in quantized_linears(before, config)
        if name.startswith("language_model.") and settings["mode"] == "affine"
    }
    assert is_folded(after)
    assert load_model(tuned).config.quantization == config.quantization


def test_plain_rounding_stays_where_training_makes_it_worse(source, images):
    plain = calibrate(source, THREE, images, epochs=0)
    spoiled = calibrate(source, THREE, images, epochs=1, learning_rate=10.0)
    assert plain.keys() == spoiled.keys()
    assert all(mx.array_equal(plain[name], spoiled[name]) for name in plain)


def test_it_prints_nothing_but_its_bar(source, images, capsys):
    calibrate(source, THREE, images, epochs=1)
    assert capsys.readouterr() == ("", "")  # and no bar, since this is no terminal


def test_questions_are_those_of_the_folder(images, tmp_path):
    assert list_questions(images) == [(images / f"{n}.png", DEFAULT_QUESTION) for n in range(3)]
    (tmp_path / "IMAGE.JPG").touch()
    (tmp_path / "notes.txt").touch()
    for name in ("._IMAGE.JPG", "._questions.jsonl", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")  # as macOS adds on exFAT
    assert list_questions(tmp_path) == [(tmp_path / "IMAGE.JPG", DEFAULT_QUESTION)]
    row = {"image": "sub/a.png", "question": "Which?", "task": "choice"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    assert list_questions(tmp_path) == [(tmp_path / "sub" / "a.png", "Which?")]
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png"}')
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 1 .*image, question"):
        list_questions(tmp_path)


@pytest.mark.parametrize(
    ("quantize", "layout", "message"),
    [
        (None, "mlx", "give quantize too"),
        (THREE, "llava", "only with the mlx layout, found llava"),
        (THREE, "apple-export", "only with the mlx layout, found apple-export"),
        ({"bits": 8, "group_size": 32}, "mlx", "6 bits or fewer"),
        ("mxfp4", "mlx", "tunes affine layers"),
        ({"vision": {"bits": 4, "group_size": 32}}, "mlx", "decoder would have none"),
        ({"projector": {"bits": 4, "group_size": 32}}, "mlx", "decoder would have none"),
    ],
)
def test_what_can_not_be_calibrated(source, images, tmp_path, quantize, layout, message):
    target = tmp_path / "q"
    with pytest.raises(ValueError, match=message):
        convert(source, target, quantize=quantize, layout=layout, calibrate=images, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_quantized_source_is_refused(calibrated, images, tmp_path):
    with pytest.raises(ValueError, match="quantized already"):
        convert(calibrated, tmp_path / "q", quantize=THREE, calibrate=images, progress=False)


def test_folders_without_images(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for name, error, message in (
        ("none", FileNotFoundError, "There is no folder .*none"),
        ("empty", FileNotFoundError, "empty holds no images"),
        ("broken", ValueError, r"a\.png"),
    ):
        images = tmp_path / name
        with pytest.raises(error, match=message):
            convert(source, tmp_path / "q", quantize=THREE, calibrate=images, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "broken"}


def test_the_command_reports_both(source, images, tmp_path):
    arguments = ["convert", str(source), "--quantize", "3", "--group-size", "32", "--report"]
    result = CliRunner().invoke(app, [*arguments, "--calibrate", str(images), "--json"])
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in json.loads(result.stdout)]
    assert names == ["float32", "3 bits", "3 bits, calibrated"]
