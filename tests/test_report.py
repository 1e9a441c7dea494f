import json
import shutil

import pytest
from sources import full_nano

from fastvlm_mlx.cli.convert import _print_report, quantize_flags
from fastvlm_mlx.evaluate.evaluate import evaluate
from fastvlm_mlx.evaluate.items import read_items
from fastvlm_mlx.evaluate.precision import QUESTION_TOKENS, Row, accuracy, precision_report
from fastvlm_mlx.evaluate.questions import read_questions
from fastvlm_mlx.evaluate.samples import SAMPLES, token_agreement
from fastvlm_mlx.evaluate.table import said
from fastvlm_mlx.hub.resolve import NANO


@pytest.fixture
def questions(tmp_path):
    shutil.copy(SAMPLES[-1], tmp_path / "queen.png")
    row = {"image": "queen.png", "question": "Read the text.", "task": "reading"}
    answers = ['The note says "queen".', "Something else."]
    lines = [json.dumps(row | {"answer": answer}) for answer in answers]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path / "questions.jsonl"


def test_fewer_bits_are_smaller_and_less_exact(tmp_path, questions):
    full = full_nano(tmp_path / "full")
    compared = {"8": 8, "3": {"bits": 3, "vision": 4}}
    images = SAMPLES[-2:]
    source, eight, three = precision_report(full, compared, images=images, questions=questions)
    assert source.name == "float16" and source.bits_per_weight == 16
    assert (source.feature_error, source.logit_error, source.agreement) == (0, 0, 1)
    assert source.size > eight.size > three.size
    assert 0 < eight.feature_error < three.feature_error < 1
    assert 0 < eight.logit_error < 0.1 < three.logit_error
    assert eight.agreement == 1 and source.accuracy == eight.accuracy
    assert source.accuracy["reading"].value == 0.5


def test_answers_are_counted_as_by_eval_and_shown_with_intervals(nano, tmp_path, capsys):
    rows = [
        {"image": str(image), "question": "Read the text.", "answer": "The note says so."}
        for image in SAMPLES[-2:]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = read_items(tmp_path / "a.jsonl")
    found = accuracy(*nano, items, "cer")
    figures = evaluate(*nano, items, "cer", max_tokens=QUESTION_TOKENS).rows[0].figures
    assert found == {"all": figures["cer"]} and found["all"].low < found["all"].high
    _print_report([Row("float16", 10**6, 16, accuracy=found)], "cer", as_json=False)
    shown = capsys.readouterr().out
    assert "all: cer [95 %]" in shown and said(found["all"], percent=True) in shown


def test_a_quantized_source_is_refused():
    with pytest.raises(ValueError, match="quantized already"):
        list(precision_report(NANO, {"4": 4}))


def test_what_can_t_be_scored_ends_a_conversion_before_it_begins(run, tmp_path, questions):
    convert = ("convert", str(NANO), str(tmp_path / "to"), "--eval")
    for arguments, sentence in {
        (questions,): "--eval is part of a --report",
        (questions, "--report", "--metric", "f2"): "no metric 'f2'",
        (tmp_path / "none.jsonl", "--report"): "none.jsonl",
    }.items():
        found = run(*convert, *arguments)
        assert found.code == 2 and sentence in found.err
    assert not (tmp_path / "to").exists()


def test_questions_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png", "question": 5}')
    with pytest.raises(ValueError, match="line 1"):
        read_questions(tmp_path / "bad.jsonl")


def test_agreement_counts_places():
    assert token_agreement([[1, 2, 3]], [[1, 5, 3, 4]]) == 0.5
    assert token_agreement([[1], [2]], [[1], [2]]) == 1


def test_flags_become_settings():
    parts = {"vision": "8", "projector": "none", "embeddings": None}
    assert quantize_flags("4", 32, None, parts) == {
        "bits": 4,
        "group_size": 32,
        "vision": {"bits": 8, "group_size": 32},
        "projector": False,
    }
    assert quantize_flags(None, None, "mxfp4", {}) == {"mode": "mxfp4"}
    assert quantize_flags(None, None, None, {"vision": None}) is None
