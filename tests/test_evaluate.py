"""Evaluations from questions to reports: items, answers, log, statistics, table and page."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import full_nano
from training import trained

import fastvlm_mlx as fv
from fastvlm_mlx.evaluate.evaluate import evaluate, files_of, write_reports
from fastvlm_mlx.evaluate.items import Item, first_items, read_items
from fastvlm_mlx.evaluate.log import Answer, Log
from fastvlm_mlx.evaluate.metrics import METRICS, check_metrics, figures_of, score_answers
from fastvlm_mlx.evaluate.metrics.score import Score, mean_score
from fastvlm_mlx.evaluate.page import mistakes_page
from fastvlm_mlx.evaluate.presets import PRESETS
from fastvlm_mlx.evaluate.results import Scored, as_json, compare, measured, score_records
from fastvlm_mlx.evaluate.run import Record, answer_items
from fastvlm_mlx.evaluate.statistics import difference, interval, percentiles
from fastvlm_mlx.evaluate.table import difference_lines, preset_table, result_table
from fastvlm_mlx.generation.prompt_cache import PromptCache
from fastvlm_mlx.generation.scheduler import Batch
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.train.adapters import write

IMAGES = sorted((NANO / "images").glob("*.png"))[:2]
QUESTIONS = ("Describe the image.", "Read the text.", "How many are there?")
TOKENS = 5


def write_lines(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def questions(tmp_path):
    """Three questions about each of two images."""
    rows = [
        {"image": str(image), "questions": [{"question": q, "answer": "?"} for q in QUESTIONS]}
        for image in IMAGES
    ]
    return write_lines(tmp_path / "questions.jsonl", *rows)


# Items


def test_a_line_is_a_question_or_several(tmp_path):
    file = write_lines(
        tmp_path / "a.jsonl",
        {"image": "a.png", "question": "What?", "answer": "a cat"},
        {"images": ["a.png", "http://x/b.png"], "question": "Same?", "answers": ["no", 0]},
        {"id": "q", "image": "c.png", "task": "t", "questions": [
            {"question": "Which?", "answer": "B", "choices": ["x", "y"], "metric": "mcq"},
            {"id": "own", "question": "How many?", "answer": 5, "task": "u"},
        ]},
    )  # fmt: skip
    one, two, three, four = read_items(file, suffix="In a word.")
    here = str(tmp_path)
    assert one == Item("1", (f"{here}/a.png",), "What?\nIn a word.", ("a cat",))
    assert two.images == (f"{here}/a.png", "http://x/b.png") and two.references == ("no", "0")
    assert three.prompt == "Which?\nA. x\nB. y\nIn a word." and three.choices == ("x", "y")
    assert (three.id, three.task, three.metric) == ("q.1", "t", "mcq")
    assert (four.id, four.task, four.references) == ("own", "u", ("5",))
    assert len(first_items([one, two, three], 2)) == 2
    assert list(first_items([one, two, three], 2)) == [one, two]


BAD = {
    '{"image": "a.png"': "line 1 is not JSON",
    "[1]": 'line 1 is not an object with "image"',
    '{"image": "a.png", "question": "?"}': "neither a text nor a number",
    '{"image": "a.png", "answer": "a"}': "line 1 is not an object",
    '{"image": 5, "question": "?", "answer": "a"}': '"images" is 5, not a list',
    '{"image": "a", "question": "?", "answers": []}': "line 1 is not an object",
    '{"image": "a", "question": "?", "answer": true}': "neither a text nor a number",
    '{"image": "a", "question": "?", "answer": "a", "choices": "ab"}': '"choices" is',
    '{"image": "a", "questions": [1]}': '"questions" is not a list of objects',
    '{"id": 1, "question": "?", "answer": "a"}\n{"id": "1", "question": "?", "answer": "a"}': (
        "line 2: the id '1' stands above"
    ),
    '{"image": "a", "question": "?", "answer": "owl", "choices": ["cat", "dog"]}': (
        "line 1: the answer 'owl' is none of the choices"
    ),
    json.dumps({"image": "a", "question": "?", "answer": "A", "choices": ["x"] * 27}): (
        "27 choices; A to Z are 26"
    ),
    "\n": "holds no questions",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_line_is_named(tmp_path, text):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(BAD[text])) as caught:
        read_items(tmp_path / "bad.jsonl")
    assert len(str(caught.value)) < 400


def test_a_line_separator_within_a_text_ends_no_line(tmp_path):
    row = {"image": "a.png", "question": "one\u2028two\x85", "answer": "x\x0by"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{text}\r\n\n{text}\r\n", encoding="utf-8", newline="")
    items = read_items(tmp_path / "a.jsonl")
    assert [(item.id, item.prompt) for item in items] == [(n, row["question"]) for n in "13"]


def test_a_file_of_another_kind_is_named(run):
    found = run("eval", "--data", IMAGES[0])
    assert found.code == 2 and f"{IMAGES[0].name} is not a JSONL file in UTF-8." in found.err


# Answers


class Calls:
    """Counts the squares that the encoder sees, and the answers that go on in one step."""

    def __init__(self, monkeypatch):
        self.squares, self.together = 0, 0
        encode, step = fv.FastVLM.encode_image, Batch.step

        def stepped(batch):
            responses = step(batch)
            self.together = max(self.together, len({id for id, _ in responses}))
            return responses

        monkeypatch.setattr(Batch, "step", stepped)

        def counted(model, pixel_values):
            self.squares += len(pixel_values)
            return encode(model, pixel_values)

        monkeypatch.setattr(fv.FastVLM, "encode_image", counted)


def test_answers_are_those_of_generate_and_each_image_is_encoded_once(nano, questions, monkeypatch):
    calls = Calls(monkeypatch)
    records = answer_items(*nano, read_items(questions), max_tokens=TOKENS)
    assert calls.squares == len(IMAGES) and calls.together == len(records)
    expected = [
        fv.generate(*nano, question, image=image, max_tokens=TOKENS)
        for image in IMAGES
        for question in QUESTIONS
    ]
    assert [record.answer.text for record in records] == expected
    assert [record.answer.encoded for record in records].count(True) == len(IMAGES)
    assert len({record.group for record in records}) == len(IMAGES)
    assert all(record.answer.ttft > 0 for record in records)
    cut = [record.answer.finish_reason == "length" for record in records]
    assert cut == [record.answer.tokens == TOKENS for record in records] and any(cut)


def test_mixed_questions_are_asked_image_by_image(nano, questions, monkeypatch):
    mixed = sorted(read_items(questions), key=lambda item: item.prompt)
    expected = answer_items(*nano, mixed, max_tokens=2)
    one = partial(PromptCache, max_bytes=2**18)  # too little for both images and their prompts
    monkeypatch.setattr("fastvlm_mlx.evaluate.run.PromptCache", one)
    calls = Calls(monkeypatch)
    found = answer_items(*nano, mixed, max_batch=1, max_tokens=2)
    assert calls.squares == len(IMAGES)
    assert [r.id for r in found] == [r.id for r in expected] == [item.id for item in mixed]
    assert [r.answer.text for r in found] == [r.answer.text for r in expected]


def test_a_question_without_images_is_a_group_of_its_own(nano):
    items = [Item(str(n), (), f"Say {n}.", ("?",)) for n in range(2)]
    result = evaluate(*nano, items, max_tokens=1)
    assert [each.record.group for each in result.scored] == ["0", "1"]
    assert result.rows[0].figures["exact"].low is not None and result.ttft() == {}


def test_two_questions_with_one_id_are_refused(nano):
    items = [Item("same", (), "One?", ("?",)), Item("same", (), "Two?", ("?",))]
    with pytest.raises(ValueError, match="Two questions have the id 'same'"):
        answer_items(*nano, items, max_tokens=1)


def test_what_fails_is_listed_and_the_others_are_answered(nano, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked = {"question": "Read the text.", "answer": "?"}
    file = write_lines(
        tmp_path / "a.jsonl",
        {"image": "none.png", **asked},
        {"image": "broken.png", **asked},
        {"image": str(IMAGES[0]), **asked},
        {"image": str(IMAGES[0]), **asked, "question": "<image><image> two?"},
    )
    result = evaluate(*nano, read_items(file), max_tokens=2)
    assert [each.record.id for each in result.scored] == ["3"]
    assert list(result.failed) == ["1", "2", "4"]
    assert "Cannot read" in result.failed["1"] and "none.png" in result.failed["1"]


# The log


def answer(id="1", key="k", text="yes"):
    return Answer(id, key, text, "stop", 1, 0.5, True)


def test_the_log_has_what_was_added(tmp_path):
    log = Log(tmp_path / "new" / "log.jsonl", {"weights": "a"})
    log.add([answer(), answer("2", text="ünï\n\ud800")])
    log.add([answer(text="no")])
    log.close()
    again = Log(tmp_path / "new" / "log.jsonl", {"weights": "a"})
    assert again.answers == {"1": answer(text="no"), "2": answer("2", text="ünï\n\ud800")}
    again.close()


def test_a_log_torn_at_any_byte_is_mended(tmp_path):
    file = tmp_path / "log.jsonl"
    log = Log(file, {"weights": "a"})
    log.add([answer(str(n)) for n in range(3)])
    log.close()
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        log = Log(file, {"weights": "a"})
        kept = max(0, whole[:end].count(b"\n") - 1)
        assert list(log.answers) == [str(n) for n in range(kept)]
        log.add([answer("last")])
        log.close()
        log = Log(file, {"weights": "a"})
        assert list(log.answers) == [*(str(n) for n in range(kept)), "last"]
        log.close()


def test_a_log_of_other_conditions_is_refused(tmp_path):
    file = tmp_path / "log.jsonl"
    Log(file, {"weights": "a", "option max_tokens": "5"}).close()
    before = file.read_bytes()
    for recipe in ({"weights": "b", "option max_tokens": "5"}, {"weights": "a"}):
        with pytest.raises(ValueError, match=r"other conditions \((weights|option max_tokens) ch"):
            Log(file, recipe)
    file.write_bytes(before + b'{"id": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Log(file, {"weights": "a", "option max_tokens": "5"})
    wrong = json.dumps({**vars(answer()), "text": 5}).encode()
    file.write_bytes(before + wrong + b"\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Log(file, {"weights": "a", "option max_tokens": "5"})


@pytest.mark.parametrize("text", ["hello\n", "hello", "one\ntwo", '{"image": "a"}', "[1]\n", "\n"])
def test_a_file_that_is_no_log_keeps_every_byte(tmp_path, text):
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match="not the log of an evaluation; name another file"):
        Log(file, {})
    assert file.read_text() == text


@pytest.mark.parametrize("file", ["/dev/zero", "."])
def test_a_log_is_a_plain_file(file):
    with pytest.raises(ValueError, match="not the log of an evaluation"):
        Log(Path(file), {})


def test_a_log_is_written_by_one_run_at_a_time(tmp_path):
    log = Log(tmp_path / "log.jsonl", {})
    with pytest.raises(ValueError, match="another evaluation"):
        Log(tmp_path / "log.jsonl", {})
    log.close()
    Log(tmp_path / "log.jsonl", {}).close()


def test_only_what_changed_is_asked_again(nano, questions, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    first = answer_items(*nano, read_items(questions), log, max_tokens=2)
    calls = Calls(monkeypatch)
    assert answer_items(*nano, read_items(questions), log, max_tokens=2) == first
    assert calls.squares == 0
    changed = [*read_items(questions)]
    changed[4] = Item(changed[4].id, changed[4].images, "Another?", ("?",))
    lines = len(log.read_text().splitlines())
    answer_items(*nano, changed, log, max_tokens=2)
    assert calls.squares == 1 and len(log.read_text().splitlines()) == lines + 1
    with pytest.raises(ValueError, match="option max_tokens changed"):
        answer_items(*nano, read_items(questions), log, max_tokens=3)


def test_other_bytes_at_the_same_path_are_asked_again(nano, tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    picture.write_bytes(IMAGES[0].read_bytes())
    items = [Item("1", (str(picture),), "Read the text.", ("?",))]
    answer_items(*nano, items, tmp_path / "log.jsonl", max_tokens=1)
    picture.write_bytes(IMAGES[1].read_bytes())
    calls = Calls(monkeypatch)
    answer_items(*nano, items, tmp_path / "log.jsonl", max_tokens=1)
    assert calls.squares == 1


def test_weights_and_options_name_the_files(nano, small, tmp_path):
    def stem(**options):
        return files_of(tmp_path, "a b/c", "m", *nano, **options).log.name

    assert stem() == stem() != stem(max_tokens=3)
    assert re.fullmatch(r"a-b-c-m-[0-9a-f]{8}\.jsonl", stem())
    other = files_of(tmp_path, "a b/c", "m", small, nano[1]).log.name
    assert other != stem()


def test_an_adapter_names_other_files(tmp_path, nano):
    folder = write(trained(NANO, decoder="lora"), tmp_path / "adapter", NANO)
    adapted = fv.load(dtype="float32", adapter=folder)
    stems = [files_of(tmp_path, "n", "m", *model).log.name for model in (nano, adapted)]
    assert stems[0] != stems[1]


def test_a_full_disk_ends_a_run_that_goes_on_later(nano, questions, tmp_path, monkeypatch):
    log, sync, left = tmp_path / "log.jsonl", os.fsync, [3]

    def full(file):
        left[0] -= 1
        if not left[0]:
            os.ftruncate(file, os.fstat(file).st_size - 5)  # what the disk has of the last line
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"log.jsonl: No space left on device; the answers before"):
        answer_items(*nano, read_items(questions), log, max_batch=1, max_tokens=2)
    monkeypatch.setattr(os, "fsync", sync)
    before = lines_of(log)
    records = answer_items(*nano, read_items(questions), log, max_batch=1, max_tokens=2)
    assert lines_of(log)[: len(before)] == before
    assert len(lines_of(log)) == 1 + len(records)


KILLED = """
import sys
import fastvlm_mlx as fv
from pathlib import Path
from fastvlm_mlx.evaluate.items import read_items
from fastvlm_mlx.evaluate.run import answer_items
model, processor = fv.load(dtype="float32")
answer_items(model, processor, read_items(Path(sys.argv[1])), sys.argv[2], max_batch=1,
             max_tokens=4)
"""


# Whoever runs the tests in the background ignores SIGINT, and so would the command.
STOPPED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastvlm_mlx.cli.main import main
main()
"""


def test_ctrl_c_says_how_to_go_on(questions, tmp_path):
    asked = [{"image": str(IMAGES[0]), "question": f"Say {n}.", "answer": "?"} for n in range(50)]
    write_lines(questions, *asked)
    command = [sys.executable, "-c", STOPPED, "eval", "--data", str(questions), "--max-batch", "1"]
    command += ["--out", str(tmp_path / "o"), "--max-tokens", "4"]
    root = Path(fv.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        while (
            process.poll() is None and sum(map(len, map(lines_of, (tmp_path / "o").glob("*")))) < 3
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Stopped; the same command goes on from here.\n"
    assert 3 <= len(lines_of(next((tmp_path / "o").glob("*.jsonl")))) < 51


def test_a_killed_run_goes_on_and_repeats_nothing(nano, tmp_path):
    asked = [
        {"question": f"{question} {n}", "answer": "?"} for n in range(6) for question in QUESTIONS
    ]
    rows = [{"image": str(image), "questions": asked} for image in IMAGES]
    questions, log = write_lines(tmp_path / "questions.jsonl", *rows), tmp_path / "log.jsonl"
    command = [sys.executable, "-c", KILLED, str(questions), str(log)]
    with subprocess.Popen(command, cwd=Path(fv.__file__).parents[1]) as process:
        while process.poll() is None and len(lines_of(log)) < 3:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    before = lines_of(log)
    assert process.returncode == -signal.SIGKILL and 3 <= len(before) < 36
    subprocess.run(command, cwd=Path(fv.__file__).parents[1], check=True)
    after = lines_of(log)
    assert after[: len(before)] == before
    unbroken = answer_items(*nano, read_items(questions), max_batch=1, max_tokens=4)
    texts = [(row["id"], row["text"]) for row in map(json.loads, after[1:])]
    assert sorted(texts) == sorted((r.id, r.answer.text) for r in unbroken)  # each once


def lines_of(log):
    """The whole lines of a log, if there is one yet."""
    return log.read_bytes().split(b"\n")[:-1] if log.exists() else []


# Statistics


def means(values):
    return [mean_score(float(value)) for value in values]


def ratio(parts):
    return parts[0] / parts[1]


def test_an_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        values = random.random(60) < 0.7
        found = interval(ratio, means(values), [str(n) for n in range(60)], seed=trial)
        assert found.value == pytest.approx(values.mean())
        covered += found.low <= 0.7 <= found.high
    assert 88 <= covered <= 100  # 95 expected; the binomial's 0.999 range


def test_an_interval_agrees_with_the_normal_approximation_and_can_be_repeated():
    values = np.arange(400) % 10 < 3
    found = interval(ratio, means(values), [str(n) for n in range(400)])
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert found.low == pytest.approx(0.3 - spread, abs=0.006)
    assert found.high == pytest.approx(0.3 + spread, abs=0.006)
    assert found == interval(ratio, means(values), [str(n) for n in range(400)])


def test_questions_about_one_image_are_drawn_together():
    values = np.repeat(np.arange(40) % 2, 10)  # ten questions per image, all alike
    apart = interval(ratio, means(values), [str(n) for n in range(400)])
    together = interval(ratio, means(values), [str(n // 10) for n in range(400)])
    wider = (together.high - together.low) / (apart.high - apart.low)
    assert wider == pytest.approx(np.sqrt(10), rel=0.15)


def test_one_image_has_no_interval():
    found = interval(ratio, means([1, 0]), ["a", "a"])
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_the_paired_test_counts_all_swaps_of_few_images():
    first, second = [1, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]
    found = difference(ratio, means(first), means(second), list("abcdefg"))
    moved = [1, 1, 1, 1, 1, -1]
    sums = [abs(sum(s * m for s, m in zip(signs, moved, strict=True)))
            for signs in itertools.product((1, -1), repeat=6)]  # fmt: skip
    assert found.p_value == pytest.approx(sum(s >= 4 for s in sums) / 64)
    assert (found.better, found.worse, found.images) == (5, 1, 7)
    assert found.interval.value == pytest.approx(4 / 7)


def test_the_paired_test_of_many_images_agrees_with_mcnemar():
    from math import comb

    first, second = [1] * 12 + [0] * 26 + [1] * 62, [0] * 12 + [1] * 26 + [1] * 62
    found = difference(ratio, means(first), means(second), [str(n) for n in range(100)])
    exact = 2 * sum(comb(38, n) for n in range(13)) / 2**38  # 12 against 26 of 38
    assert found.p_value == pytest.approx(exact, rel=0.15)
    assert found.interval.low > 0


def test_the_paired_test_of_very_many_images_takes_little_memory():
    random = np.random.default_rng(0)
    first, second = random.integers(2, size=(2, 2000))
    groups = [str(n) for n in range(2000)]
    tracemalloc.start()
    difference(ratio, means(first), means(second), groups)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24  # all swaps together would be 80 million bytes and more


def test_equal_runs_don_t_differ():
    found = difference(ratio, means([1, 0, 1]), means([1, 0, 1]), list("abc"))
    assert found.p_value == 1 and found.interval.value == found.interval.low == 0


def test_rates_are_tested_as_rates():
    scores = score_answers("cer", ["ab", "abcdefgh"], [["xb"], ["abcdefgh"]])
    figure = figures_of("cer")["cer"]
    assert interval(figure, scores, ["a", "b"]).value == 1 / 10
    assert isinstance(scores[0], Score)


def test_percentiles_are_interpolated():
    assert percentiles([1.0, 2, 3, 4, 5], 0.5, 0.95) == [3, pytest.approx(4.8)]
    assert percentiles([], 0.5) == []


# Results


def record(id, text, references, task="all", **more):
    said = Answer(id, "k", text, more.pop("finish_reason", "stop"), 2, more.pop("ttft", 0.1), True)
    fields = {"prompt": f"Question {id}?", "choices": (), "metric": None, "group": id} | more
    return Record(id=id, references=tuple(references), task=task, answer=said, **fields)


def test_figures_are_counted_by_task():
    records = [
        record("1", "yes", ["yes"], "a", ttft=0.1),
        record("2", "maybe", ["yes"], "a", finish_reason="length", ttft=0.3),
        record("3", "no", ["no"], "b", ttft=0.2),
    ]
    result = score_records("n", "m", "yesno", records)
    a, b, both = result.rows
    assert (a.task, a.count, a.figures["yesno"].value) == ("a", 2, 0.5)
    assert (a.unparsed, a.cut_off, b.unparsed) == (1, 1, 0)
    assert (both.task, both.count) == ("all tasks", 3)
    assert both.figures["yesno"].value == pytest.approx(2 / 3)
    assert result.ttft() == {"p50": pytest.approx(0.2), "p95": pytest.approx(0.29)}
    assert [each.record.id for each in result.mistakes()] == ["2"]


def test_an_item_may_have_a_metric_of_its_own():
    records = [record("1", "A", ["A"]), record("2", "so it is 5", ["5"], metric="open")]
    result = score_records("n", "m", "mcq", records)
    assert result.rows[0].figures["mcq"].value == 1
    with pytest.raises(ValueError, match="no metric 'none'"):
        score_records("n", "m", "mcq", [record("1", "A", ["A"], metric="none")])


@pytest.mark.parametrize("pair", ["exact cer", "cer exact", "exact cider", "relaxed exact"])
def test_metrics_that_can_t_be_averaged_are_refused_before_anything_is_asked(run, tmp_path, pair):
    main, own = pair.split()
    asked = {"image": str(IMAGES[0]), "question": "?", "answer": "5"}
    file = write_lines(tmp_path / "a.jsonl", asked, asked | {"metric": own})
    found = run("eval", "--data", file, "--metric", main, "--out", tmp_path / "o")
    assert found.code == 2 and not (tmp_path / "o").exists()
    assert f"own metric is {own} can't be counted among those of {main}" in found.err
    with pytest.raises(ValueError, match=f"those of {main}"):
        score_records("n", "m", main, [record("1", "A", ["A"], metric=own)])
    check_metrics("exact", ["vqa", "relaxed", None, "mcq"])


def test_captions_of_one_image_have_no_cider(run, tmp_path):
    records = [record(str(n), "a cat", ["a cat"], group="one") for n in range(2)]
    with pytest.raises(ValueError, match="two or more, not 1"):
        score_records("n", "m", "cider", records)
    asked = {"image": "a.png", "question": "?", "answer": "a cat"}
    file = write_lines(tmp_path / "a.jsonl", asked, asked)
    assert "two or more, not 1" in run("eval", "--data", file, "--metric", "cider").err


def test_models_are_compared_on_what_both_answered():
    first = score_records("n", "a", "exact", [record("1", "x", ["x"]), record("2", "x", ["y"])])
    second = score_records("n", "b", "exact", [record("2", "y", ["y"]), record("3", "x", ["y"])])
    found = compare(first, second)["exact"]
    assert (found.interval.value, found.better, found.worse, found.images) == (1, 1, 0, 1)
    with pytest.raises(ValueError, match="no question in common"):
        compare(first, score_records("n", "c", "exact", [record("9", "x", ["x"])]))


class Tags(HTMLParser):
    """The tags of a page, and the words between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, questions):
        self.texts.append(questions)


def test_the_page_shows_mistakes_and_runs_nothing(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (600, 300), "red").save(picture)
    evil = '<script>alert(1)</script><img src=x onerror="a()">'
    records = [record("1", evil, [evil + "&"], task=evil), record("2", "x", ["x"])]
    result = score_records(evil, "m", "exact", records)
    items = [
        Item("1", (str(picture), str(tmp_path / "gone.png")), evil, ("x",)),
        Item("2", (), "?", ("x",)),
    ]
    page = mistakes_page(result, items)
    found = Tags(page)
    names = [name for name, _ in found.tags]
    assert "script" not in names and names.count("img") == 1 and names.count("article") == 1
    image = next(attrs for name, attrs in found.tags if name == "img")
    assert image["src"].startswith("data:image/webp;base64,")
    policy = next(a["content"] for n, a in found.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert evil in found.texts  # as text
    assert "http://" not in page and "https://" not in page


def test_the_tables_show_names_as_they_are(capsys):
    from rich.console import Console

    result = score_records("[b]n", "m[/]", "anls", [record("1", "x", ["x"], task="[red]t[/red]")])
    Console(width=100).print(result_table(result))
    shown = capsys.readouterr().out
    assert "[b]n: m[/]" in shown and "[red]t[/red]" in shown
    found = as_json(result) | {"model": "m[/]"}
    Console(width=200).print(preset_table(PRESETS, {"docvqa": [found]}))
    assert "m[/]: 100.0 %, 1 answers" in capsys.readouterr().out


def test_differences_are_said_in_the_metric_s_own_unit():
    one = [record("1", "a red cat", ["a red cat"]), record("2", "x", ["a blue dog"])]
    two = [one[0], record("2", "a blue dog", ["a blue dog"])]
    for metric, said in {"cider": "b − a = +3.75 [95 %: ", "exact": "+50.0 points [95 %: "}.items():
        first, second = (score_records("n", m, metric, r) for m, r in (("a", one), ("b", two)))
        (line,) = difference_lines(first, second, compare(first, second))
        assert said in line and "1 answers better, 0 worse" in line


def test_results_are_kept_and_found_again(tmp_path, nano):
    files = files_of(tmp_path / "out", "n", "m", *nano)
    result = score_records("n", "m", "exact", [record("1", "x", ["y"])], {"7B": 50.0})
    write_reports(result, [Item("1", (), "?", ("y",))], files)
    assert sorted(p.suffix for p in files.log.parent.iterdir()) == [".html", ".json"]
    (found,) = measured(tmp_path / "out")["n"]
    assert found == json.loads(json.dumps(as_json(result)))
    assert found["published"] == {"7B": 50.0} and found["items"][0]["answer"] == "x"
    assert measured(tmp_path) == {}


def test_only_results_of_presets_are_listed_as_measured(run, tmp_path):
    asked = {"image": str(tmp_path / "none.png"), "question": "?", "answer": "5"}
    file = write_lines(tmp_path / "chartqa.jsonl", asked, asked | {"image": str(IMAGES[0])})
    command = ("eval", "--data", file, "--out", tmp_path / "o", "--max-tokens", 1)
    for limit in (1, 2):  # nothing is answered; then a question that is not the benchmark's
        assert run(*command, "--limit", limit).code == 1
        assert run("eval", "--list", "--out", tmp_path / "o").out.count("not run") == 13


def test_captions_are_listed_from_the_worst_on():
    records = [record("1", "a red cat", ["a red cat"]), record("2", "x", ["a blue dog"])]
    result = score_records("n", "m", "cider", records)
    assert [each.record.id for each in result.mistakes()] == ["2", "1"]
    assert all(isinstance(each, Scored) for each in result.scored)


# The command


def test_the_command_measures_and_goes_on(run, questions, tmp_path):
    command = (
        "eval",
        "--data",
        questions,
        "--metric",
        "anls",
        "--out",
        tmp_path / "o",
        "--max-tokens",
        4,
    )
    first = run(*command)
    assert first.code == 0 and "anls [95 %]" in first.out and "nano" in first.err
    log = next((tmp_path / "o").glob("*.jsonl"))
    lines = log.read_bytes()
    assert run(*command, "--no-html").code == 0 and log.read_bytes() == lines
    found = json.loads(run(*command, "--json").out)
    assert found["tasks"][0]["count"] == 6 and len(found["items"]) == 6
    listed = run("eval", "--list", "--out", tmp_path / "o")
    assert listed.out.count("not run") == 13


def test_the_command_compares_two_precisions(run, questions, tmp_path):
    command = (
        "eval",
        "--model",
        full_nano(tmp_path / "full"),
        "--data",
        questions,
        "--out",
        tmp_path / "o",
    )
    command += ("--max-tokens", 6, "--compare-quantize", 2)
    found = run(*command)
    assert found.code == 0 and len(list((tmp_path / "o").glob("*.jsonl"))) == 2
    assert re.search(r"full-2bit − .*full = [+-]\d.*p = .*paired permutation over 2 im", found.out)
    both = json.loads(run(*command, "--json").out)
    assert len(both["models"]) == 2 and both["difference"]["exact"]["images"] == 2


def test_questions_with_choices_are_counted_as_such(run, tmp_path):
    asked = {"image": str(IMAGES[0]), "question": "Which?", "answer": "A"}
    write_lines(tmp_path / "a.jsonl", asked | {"choices": ["five mushrooms", "six dogs"]})
    write_lines(tmp_path / "b.jsonl", asked)
    for name, metric in {"a": "mcq", "b": "exact"}.items():
        file = tmp_path / f"{name}.jsonl"
        found = run("eval", "--data", file, "--out", tmp_path / "o", "--max-tokens", 2)
        assert f"{metric} [95 %]" in found.out


def test_bad_input_ends_the_command_with_a_sentence(run, questions, tmp_path):
    for arguments, said in {
        (): "--data",
        ("--preset", "mme"): "no preset 'mme'",
        ("--data", tmp_path / "none.jsonl"): "none.jsonl",
        ("--data", questions, "--metric", "f2"): "no metric 'f2'; there are exact",
        (
            "--data",
            questions,
            "--log",
            "x",
            "--compare",
            "0.5b",
        ): "--log holds the answers of one model",
        ("--data", questions, "--metric", "cider", "--limit", 1): "two or more, not 1",
        ("--preset", "gqa", "--suffix", "x"): "leave out --suffix",
        ("--data", questions, "--compare-quantize", 4): "quantized already",
        ("--data", questions, "--compare", "./none"): "no model folder ./none",
        ("--data", questions, "--compare-adapter", "./none"): "no model folder ./none",
        ("--data", questions, "--compare-adapter", questions.parent): "is no adapter",
        ("--data", questions, "--compare-adapter", "./none", "--log", "x"): "of one model",
    }.items():
        found = run("eval", *arguments, "--out", tmp_path / "out")
        assert found.code == 2 and said in found.err and "Traceback" not in found.err
    assert not (tmp_path / "out").exists()  # nothing was asked before


def test_the_help_names_all_metrics(run):
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", run("eval", "--help").out).split())
    assert all(name in shown for name in METRICS)
