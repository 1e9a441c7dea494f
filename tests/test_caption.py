"""Captions: what is asked, what is written, and what a second run does."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
from captions import QUICK, alone, numbered, picture, pictures, run

from fastvlm_mlx.caption import answers
from fastvlm_mlx.caption.items import Item, fill
from fastvlm_mlx.caption.job import CaptionJob
from fastvlm_mlx.caption.quality import UnfitError, judge, loops, shorten
from fastvlm_mlx.caption.tables import read_rows
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fingerprint import fingerprint

PROMPT = "Describe the image."


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of the encoder had."""
    counts = []
    plain = answers.encode_together

    def counting(model, images, encode_batch):
        counts.append(len(images))
        return plain(model, images, encode_batch)

    monkeypatch.setattr(answers, "encode_together", counting)
    return counts


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_captions_are_the_answers_of_generate_in_the_order_of_the_images(nano, tmp_path):
    folder, out = numbered(tmp_path / "p", 21), tmp_path / "c.jsonl"
    summary = run(nano, folder, out)
    found = rows(out)
    assert [row["image"] for row in found] == [str(file) for file in sorted(folder.iterdir())]
    for row in found:
        assert row["caption"] == alone(nano, PROMPT, row["image"])
    assert summary.written == 21 and not summary.failed


def test_each_image_is_encoded_once_for_several_questions(nano, tmp_path, encoded):
    folder, out = numbered(tmp_path / "p", 5), tmp_path / "c.jsonl"
    questions = {"number": "How many are there?", "said": "Read the text."}
    run(nano, folder, out, questions=questions, prompts=[PROMPT])
    assert sum(encoded) == 5
    for row in rows(out):
        assert row["caption"] == alone(nano, PROMPT, row["image"])
        for name, question in questions.items():
            assert row[name] == alone(nano, question, row["image"])


def test_the_same_pixels_are_captioned_once(nano, tmp_path, encoded):
    folder = pictures(tmp_path / "p", "a.png", "b.png")
    picture(0).save(folder / "c.bmp")  # another file with the pixels of the first
    summary = run(nano, folder, tmp_path / "c.jsonl")
    found = {Path(row["image"]).name: row["caption"] for row in rows(tmp_path / "c.jsonl")}
    assert found["c.bmp"] == found["a.png"] and len(found) == 3
    assert sum(encoded) == 2 and summary.repeated == 1 and summary.written == 3


def test_a_finished_run_asks_nothing_again(nano, tmp_path, encoded):
    folder, out = numbered(tmp_path / "p", 3), tmp_path / "c.jsonl"
    run(nano, folder, out)
    before = out.read_bytes()
    encoded.clear()
    summary = run(nano, folder, out)
    assert out.read_bytes() == before and not encoded
    assert summary.kept == 3 and summary.written == 0


def test_rows_that_got_lost_come_back_without_the_model(nano, tmp_path, encoded):
    folder, out = numbered(tmp_path / "p", 3), tmp_path / "c.jsonl"
    run(nano, folder, out)
    before = out.read_bytes()
    out.unlink()
    encoded.clear()
    run(nano, folder, out)
    assert out.read_bytes() == before and not encoded


def test_captions_stay_without_the_manifest(nano, tmp_path, encoded):
    folder, out = numbered(tmp_path / "p", 3), tmp_path / "c.jsonl"
    run(nano, folder, out)
    before = out.read_bytes()
    (tmp_path / "c.jsonl.manifest").unlink()
    encoded.clear()
    run(nano, folder, out)
    assert out.read_bytes() == before and not encoded


def test_another_question_model_or_image_is_asked_anew(nano, small, tmp_path, encoded):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.jsonl"
    run(nano, folder, out)
    for settings in ({"prompts": ["Read the text."]}, {"max_tokens": 3}, {"image_size": 128}):
        encoded.clear()
        run(nano, folder, out, existing="overwrite", **settings)
        assert encoded == [1], settings
    picture(7).save(folder / "a.png")
    encoded.clear()
    run(nano, folder, out, existing="overwrite", image_size=128)
    assert encoded == [1]
    assert rows(out)[0]["caption"] == alone(nano, PROMPT, folder / "a.png", image_size=128)
    assert fingerprint(nano[0]) != fingerprint(small)


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_what_happens_to_captions_that_are_there(nano, tmp_path, kind):
    folder, out = pictures(tmp_path / "p", "a.png", "b.png"), tmp_path / f"c{kind}"
    new = {name: alone(nano, PROMPT, folder / f"{name}.png") for name in "ab"}

    def captions(existing, separator=" "):
        out.unlink(missing_ok=True)
        Path(f"{out}.manifest").unlink(missing_ok=True)
        image = str(folder / "a.png")
        if kind == ".csv":
            out.write_text(f"image,caption,mine\n{image},old,1\nother.png,foreign,2\n")
        else:
            old = {"image": image, "caption": "old", "mine": 1}
            other = {"image": "other.png", "caption": "foreign"}
            out.write_text(f"{json.dumps(old)}\n{json.dumps(other)}\n")
        for _ in range(2):  # the second time nothing is left to do
            run(nano, folder, out, existing=existing, separator=separator)
        found = list(read_rows(out))
        assert str(found[0]["mine"]) == "1" and found[1]["caption"] == "foreign"
        assert len(found) == 3 and found[2]["image"] == str(folder / "b.png")
        assert found[2]["caption"] == new["b"]
        return found[0]["caption"]

    assert captions("skip") == "old"
    assert captions("overwrite") == new["a"]
    assert captions("append") == f"old {new['a']}"
    assert captions("prepend", ", ") == f"{new['a']}, old"


def test_rows_without_a_caption_get_one_in_their_places(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png", "b.png"), tmp_path / "c.jsonl"
    images = [str(folder / name) for name in ("a.png", "b.png")]
    lines = [{"image": images[0], "caption": " "}, {"image": images[1], "caption": "old"}]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(nano, folder, out)
    assert [row["image"] for row in rows(out)] == images
    assert [row["caption"] for row in rows(out)] == [alone(nano, PROMPT, images[0]), "old"]


def test_bad_files_are_listed_and_passed_over_until_they_are_retried(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png", "c.png"), tmp_path / "c.jsonl"
    (folder / "b.png").write_bytes(b"junk")
    summary = run(nano, folder, out)
    assert [key for key, _ in summary.failed] == [str(folder / "b.png")]
    assert "not an image" in summary.failed[0][1] and summary.written == 2
    summary = run(nano, folder, out)
    assert summary.failed == [] and summary.failed_before == 1
    summary = run(nano, folder, out, retry_errors=True)
    assert len(summary.failed) == 1
    picture(1).save(folder / "b.png")  # mended: it is another file now
    summary = run(nano, folder, out)
    assert summary.written == 1 and summary.failed_before == 0
    assert len(rows(out)) == 3


def test_a_failed_image_with_an_old_caption_is_listed_and_retried(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.png")
    good = (folder / "a.png").read_bytes()
    (folder / "a.txt").write_text("old")
    (folder / "a.png").write_bytes(b"junk")
    assert len(run(nano, folder, ".txt", existing="overwrite").failed) == 1
    assert run(nano, folder, ".txt").failed_before == 1
    assert (folder / "a.txt").read_text() == "old"
    (folder / "a.png").write_bytes(good)
    assert run(nano, folder, ".txt", retry_errors=True).written == 1
    assert (folder / "a.txt").read_text() == alone(nano, PROMPT, folder / "a.png") + "\n"


def test_an_empty_caption_is_a_failure(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.jsonl"
    summary = run(nano, folder, out, stop="The")
    assert summary.failed == [(str(folder / "a.png"), "the caption is empty")]
    assert out.read_bytes() == b""
    assert len(run(nano, folder, out, stop="The", retry_errors=True).failed) == 1


def test_captions_that_end_at_max_tokens_are_flagged(nano, tmp_path):
    summary = run(nano, str(NANO / "images" / "penguins.png"), tmp_path / "c.jsonl", max_tokens=2)
    assert rows(tmp_path / "c.jsonl")[0]["flags"] == ["truncated"]
    assert summary.flags == {"truncated": 1}


def test_sampled_captions_are_repeatable_with_a_seed(nano, tmp_path):
    folder = numbered(tmp_path / "p", 4)
    options = {"temperature": 1.5, "seed": 3}
    run(nano, folder, tmp_path / "a.jsonl", **options)
    run(nano, folder, tmp_path / "b.jsonl", **options, max_batch=2)
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "b.jsonl")
    first = rows(tmp_path / "a.jsonl")[0]
    assert first["caption"] == alone(nano, PROMPT, first["image"], **options)


# Prompts


def test_prompts_are_drawn_by_their_weights_and_always_the_same():
    job = CaptionJob(prompts=["a", "b"], weights=[3, 1])
    drawn = [job.ask(Item(str(i), None))[0] for i in range(4000)]
    assert 0.72 < drawn.count("a") / 4000 < 0.78  # three quarters, within 4 standard deviations
    assert drawn == [job.ask(Item(str(i), None))[0] for i in range(4000)]
    assert drawn != [job.ask(Item(str(i), None), seed=1)[0] for i in range(4000)]


def test_places_in_prompts_are_filled(tmp_path):
    folder = pictures(tmp_path / "holiday", "22.05.png")
    item = Item("22.05.png", None, {"tags": ["sea", "sun"], "who": "Ann"}, folder / "22.05.png")
    asked = fill('{name} of {folder}: {tags}, {who}, {"json": 1} {}', item)
    assert asked == '22.05 of holiday: sea, sun, Ann, {"json": 1} {}'
    (folder / "22.05.tags").write_text("beach, boat\n")
    assert fill("{tags}", Item("x", None, path=folder / "22.05.png")) == "beach, boat"
    with pytest.raises(ValueError, match=r"place for \{nope\}"):
        fill("{nope}", item)


def test_a_rows_own_prompt_is_asked(nano, tmp_path):
    folder = pictures(tmp_path, "a.png", "b.png")
    table = tmp_path / "in.jsonl"
    lines = [{"image": "a.png", "prompt": "Read the text.", "id": 7}, {"image": "b.png"}]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(nano, table, tmp_path / "c.jsonl")
    found = rows(tmp_path / "c.jsonl")
    assert found[0]["caption"] == alone(nano, "Read the text.", folder / "a.png")
    assert found[1]["caption"] == alone(nano, PROMPT, folder / "b.png")
    assert found[0]["id"] == 7 and found[0]["prompt"] == "Read the text."


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tar"])
def test_several_rows_may_ask_about_one_image(nano, tmp_path, encoded, kind):
    folder, out = pictures(tmp_path, "a.png"), tmp_path / f"c{kind}"
    asked = ["Read the text.", "How many {what} are there?", "Read the text."]
    lines = [{"image": "a.png", "prompt": prompt, "what": "balls"} for prompt in asked]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for existing in ("skip", "skip", "append") if kind != ".tar" else ("skip", "skip"):
        run(nano, tmp_path / "in.jsonl", out, existing=existing)
    if kind == ".tar":
        with tarfile.open(out) as tar:
            found = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    else:
        found = list(read_rows(out))
    assert [row["prompt"] for row in found] == [asked[0], "How many balls are there?"]
    for row in found:
        text = alone(nano, row["prompt"], folder / "a.png")
        assert row["caption"] == (text if kind == ".tar" else f"{text} {text}")


@pytest.mark.parametrize("prompt", [7, ["a"], {"a": 1}, True])
def test_a_prompt_that_is_no_text_fails_for_its_image(nano, tmp_path, prompt):
    pictures(tmp_path, "a.png")
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": "a.png", "prompt": prompt}))
    summary = run(nano, tmp_path / "in.jsonl", tmp_path / "c.jsonl")
    assert "prompt is no text" in summary.failed[0][1]


def test_a_broken_manifest_is_said_and_not_needed(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.jsonl"
    run(nano, folder, out)
    before, manifest = out.read_bytes(), tmp_path / "c.jsonl.manifest"
    manifest.write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=r"c.jsonl.manifest' can't be used .*remove it"):
        run(nano, folder, out)
    manifest.unlink()
    assert run(nano, folder, out).kept == 1 and out.read_bytes() == before


def test_a_prompt_that_does_not_fit_fails_for_its_image(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.png")
    summary = run(nano, folder, tmp_path / "c.jsonl", prompts=["<image> and <image>"])
    assert "2 <image> mark(s) for 1 image(s)" in summary.failed[0][1]
    summary = run(nano, folder, tmp_path / "c.jsonl", prompts=["{nope}"])
    assert "place for {nope}" in summary.failed[0][1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"existing": "replace"}, "existing must be one of"),
        ({"prompts": ["a"], "weights": [1, 2]}, "2 weight"),
        ({"prompts": ["a"], "weights": [0]}, "above 0"),
        ({"prompts": [""]}, "empty"),
        ({"questions": {"caption": "a"}}, "name of a question"),
        ({"questions": {"a b": "a"}}, "name of a question"),
        ({"min_words": 9, "max_words": 3}, "max_words"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        CaptionJob(**settings)


# What a caption must be like

LOOPING = "A red car and " + "a red car and " * 5 + "a red"


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        (LOOPING, True),
        ("the the the the the the the the", True),
        ("It is " + "very " * 9, True),
        ("好的" * 12, True),
        ("It is very, very, very good.", False),
        ("A cat and a dog sit on a mat. A bird and a fish do not.", False),
        ("one two three one two three", False),
        ("", False),
    ],
)
def test_loops_are_found(text, looping):
    assert loops(text) == looping


def test_a_caption_is_kept_within_its_bounds():
    text = "A cat sits. It has 2.5 legs! Then it goes on and on"
    assert judge(text, "stop", CaptionJob(max_words=8)) == ("A cat sits. It has 2.5 legs!", ["cut"])
    assert judge(text, "stop", CaptionJob(max_words=2)) == ("A cat", ["cut"])
    assert judge(text, "length", CaptionJob(max_words=50)) == (text, ["truncated"])
    assert judge(LOOPING, "length", CaptionJob()) == (LOOPING, ["truncated", "loop"])
    assert shorten("One, two, three", 2) == "One, two"
    with pytest.raises(UnfitError, match="2 word"):
        judge("Two words", "stop", CaptionJob(min_words=3))
    with pytest.raises(UnfitError, match="empty"):
        judge(" \n", "stop", CaptionJob(min_words=0))


def test_banned_and_trigger_words_are_whole_words():
    job = CaptionJob(banned=["art", "water mark"], trigger="ohwx")
    assert judge("A cart.", "stop", job) == ("ohwx, A cart.", [])
    assert judge("Ohwx sleeps.", "stop", job) == ("Ohwx sleeps.", [])
    for text in ("Art!", "A Water Mark."):
        with pytest.raises(UnfitError, match="banned"):
            judge(text, "stop", job)


# Structured captions

COUNTED = {
    "type": "object",
    "properties": {"what": {"enum": ["ball", "note"]}, "many": {"type": "boolean"}},
    "required": ["what", "many"],
    "additionalProperties": False,
}


@pytest.mark.needs("llguidance")
def test_captions_follow_a_schema(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png", "b.png"), tmp_path / "c.jsonl"
    options = {"schema": COUNTED, "max_tokens": 40}
    run(nano, folder, out, **options)
    for row in rows(out):
        assert row["caption"] == alone(nano, PROMPT, row["image"], **options)
        found = json.loads(row["caption"])
        assert found["what"] in ("ball", "note") and isinstance(found["many"], bool)


@pytest.mark.needs("llguidance")
def test_a_broken_off_json_is_no_caption(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.jsonl"
    summary = run(nano, folder, out, schema=COUNTED, max_tokens=2)
    assert "before it was complete" in summary.failed[0][1] and not out.read_bytes()


@pytest.mark.needs("llguidance")
def test_answers_to_questions_may_be_choices(nano, tmp_path):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.csv"
    run(nano, folder, out, questions={"person": "Is there a person?"}, choices=["yes", "no"])
    assert '"yes"' in out.read_text() or '"no"' in out.read_text()


@pytest.mark.parametrize(
    "settings", [{"trigger": "x"}, {"max_words": 3}, {"existing": "append"}], ids=str
)
@pytest.mark.needs("llguidance")
def test_what_would_spoil_json_does_not_go_with_a_schema(nano, tmp_path, settings):
    folder = pictures(tmp_path / "p", "a.png")
    with pytest.raises(ValueError, match="does not go with a schema"):
        run(nano, folder, tmp_path / "c.jsonl", schema=COUNTED, **settings)


# The command


def test_the_command_says_what_it_did(run_caption, tmp_path):
    folder = pictures(tmp_path / "p", "a.png", "b.png")
    (folder / "z.png").write_bytes(b"junk")
    done = run_caption(folder, "--out", tmp_path / "c.jsonl")
    assert done.code == 1 and "Captioned 2 images" in done.err
    assert f"Left out {folder / 'z.png'}: it is not an image" in done.err
    assert "--retry-errors" in done.err and "the model was idle" in done.err
    assert len(rows(tmp_path / "c.jsonl")) == 2


def test_a_bar_shows_the_rate_and_the_time_left(nano, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    run(nano, pictures(tmp_path / "p", "a.png", "b.png"), tmp_path / "c.jsonl", progress=True)
    shown = sys.stderr.getvalue()
    assert "Captioning" in shown and "2/2" in shown
    assert re.search(r"\[\d\d:\d\d<(\d\d:\d\d|\?), .*image", shown)


def test_flags_are_said_where_no_row_has_them(run_caption, tmp_path):
    folder = pictures(tmp_path / "p", "a.png")
    done = run_caption(folder, "--out", ".txt")
    assert f"Look at {folder / 'a.png'}: truncated" in done.err and "truncated: 1" in done.err
    assert "Look at" not in run_caption(folder, "--out", tmp_path / "c.jsonl").err


@pytest.fixture
def run_caption(run):
    size = ("--image-size", QUICK["image_size"], "--max-tokens", QUICK["max_tokens"])
    return lambda *arguments: run("caption", *arguments, *size)


def test_questions_have_names(run_caption, tmp_path):
    folder = pictures(tmp_path / "p", "a.png")
    done = run_caption(folder, "--out", tmp_path / "c.jsonl", "--question", "n=How many?")
    assert done.code == 0 and set(rows(tmp_path / "c.jsonl")[0]) == {"image", "n", "flags"}
    assert "NAME=TEXT" in run_caption(folder, "--out", "c.jsonl", "--question", "How many?").err


@pytest.mark.parametrize(
    ("source", "out", "said"),
    [
        ("nope", "c.jsonl", "no file, folder or match for"),
        ("empty", "c.jsonl", "There are no images in"),
        ("p", "c.docx", "Captions are written to a .jsonl"),
        ("p", ".png", "may be the picture itself"),
        ("p", ".JPEG", "may be the picture itself"),
        ("p", "nowhere/c.csv", "its folder does not exist"),
        ("in.jsonl", "in.jsonl", "choose another file"),
        ("p", "p.csv", "it is a folder"),
        ("old.tar.gz", "c.jsonl", "compressed"),
        ("p", "header.csv", "lacks caption"),
        ("p", "broken.csv", "ends in half a record"),
        ("p", "foreign.tar", "is no tar"),
    ],
)
def test_bad_input_is_one_sentence_and_loses_nothing(
    run_caption, tmp_path, monkeypatch, source, out, said
):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "p", "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.csv").mkdir()
    (tmp_path / "in.jsonl").write_text('{"image": "p/a.png"}\n')
    (tmp_path / "old.tar.gz").write_bytes(b"x")
    (tmp_path / "header.csv").write_text("image,text\na.png,old\n")
    (tmp_path / "broken.csv").write_text('image,caption\na.png,"old\n')
    (tmp_path / "foreign.tar").write_bytes(b"no tar" * 200)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = run_caption(source, "--out", out)
    assert done.code == 2 and done.err.count("Error:") == 1, done.err
    assert said in done.err and "Traceback" not in done.err
    assert before == {file: file.read_bytes() for file in before}
