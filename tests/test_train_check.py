"""What `fastvlm train --check` says of the data."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import PANDA
from rich.console import Console

from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.config import load_config
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.train import check as module
from fastvlm_mlx.train.check import Check, check_data
from fastvlm_mlx.train.rows import find_rows

PROCESSOR, CONFIG = load_processor(NANO), load_config(NANO)
TURNS = [
    {"from": "human", "value": "What is <|im_end|>?"},
    {"from": "gpt", "value": " A panda."},
    {"from": "human", "value": "[bold]Sure?\x1b[2J"},
    {"from": "gpt", "value": "Yes."},
]


def check(folder: Path, rows: list[Any], **options: Any) -> Check:
    file = folder / "data.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return check_data(find_rows(file), PROCESSOR, CONFIG, **options)


def printed(found: Check, colours: bool = False) -> str:
    out = io.StringIO()
    system = "truecolor" if colours else None
    console = Console(file=out, force_terminal=colours, width=100, color_system=system)
    found.print(console, PROCESSOR.tokenizer)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "panda.png").write_bytes(PANDA.read_bytes())
    return tmp_path


def test_two_examples_with_what_is_learned_marked(folder: Path) -> None:
    rows = [
        {"id": "first", "image": "panda.png", "conversations": TURNS},
        {"id": "again", "image": "panda.png", "conversations": TURNS},
        {"id": "text", "conversations": TURNS[:2]},
    ]
    said = printed(check(folder, rows))
    assert (
        "first (data.json, row 1, line 1):" in said and "text (data.json, row 3, line 1):" in said
    )
    assert "again" not in said
    assert re.findall("⟦.*?⟧", said) == [
        "⟦ A panda.<|im_end|>⟧",
        "⟦Yes.<|im_end|>⟧",
        "⟦ A panda.<|im_end|>⟧",
        "⟦ ⟧",
    ]
    assert re.search(
        r"user\n\[image .*: 16 visual tokens\]\nWhat is <\|im_end\|>\?<\|im_end\|>", said
    )
    assert "[bold]Sure?\\x1b[2J<|im_end|>" in said and "\x1b" not in said
    coloured = printed(check(folder, rows), colours=True)
    assert "\x1b[1;32m⟦ A panda." in coloured and "\x1b[2J" not in coloured


def test_the_statistics_count_every_token(folder: Path) -> None:
    rows = [
        {"image": ["panda.png"] * 2, "conversations": TURNS},
        {"conversations": TURNS[:2]},
        {"conversations": TURNS[:1]},
    ]
    found = check(folder, rows)
    assert found.problem is None
    first, second = found.examples.kept
    said = printed(found)
    text = len(first) + len(second) - 32
    numbers = dict(re.findall(r"^ *(\w[\w ]*?) +([\d,]+)\b", said, re.MULTILINE))
    assert numbers["rows"] == "2" and numbers["images"] == "2"
    assert numbers["tokens"] == f"{text + 32:,}" and numbers["of text"] == f"{text:,}"
    assert numbers["visual"] == "32"
    assert numbers["supervised"] == f"{found.num_supervised}"
    assert found.num_supervised == sum(sum(e.supervised) for e in (first, second))
    assert f"{found.num_supervised / text:.1%} of the text" in said
    assert numbers["longest row"] == f"{len(first)}" and "(data.json, row 1, line 1)" in said
    assert (
        "1 row(s) are left out:\n  data.json, row 3, line 1: no token of it is supervised." in said
    )


def test_bad_rows_are_listed_in_order_the_first_twenty(folder: Path) -> None:
    (folder / "text.png").write_text("no image", encoding="utf-8")
    long = {"conversations": [TURNS[0], {"from": "gpt", "value": "long " * 900}]}
    rows: list[Any] = [{"conversations": TURNS}, {}, {"image": "text.png", "answer": "x"}, long]
    found = check(folder, rows + [{"image": "none.png", "answer": "x"}] * 30, max_length=300)
    assert found.problem == "33 of 34 row(s) can't be used."
    said = printed(found)
    listed = re.findall(r"^  (data.json, row \d+), line 1: (.*)$", said, re.MULTILINE)
    assert [where for where, _ in listed] == [f"data.json, row {n}" for n in range(2, 22)]
    assert listed[1][1].startswith("Cannot read") and "it is not an image" in listed[1][1]
    assert "more than 300" in listed[2][1] and "none.png" in listed[3][1]
    assert "… and 13 more" in said


def test_images_that_are_none_are_found_wherever_they_are(folder: Path) -> None:
    (folder / "text.png").write_text("no image", encoding="utf-8")
    panda = base64.b64encode(PANDA.read_bytes()).decode()
    bad = ["text.png", "data:image/png;base64,AAAA", "file:///nowhere.png", "ftp://a.b/c.png"]
    good = ["panda.png", f"data:image/png;base64,{panda}", (folder / "panda.png").as_uri()]
    good += ["https://nowhere.invalid/a.png"]  # nothing is downloaded
    rows = [{"image": image, "answer": "x"} for image in [*bad, *good]]
    found = check(folder, rows).examples
    assert [row.where for row in found.bad] == [f"data.json, row {n}, line 1" for n in range(1, 5)]
    assert len(found.kept) == 4


def test_an_image_of_many_rows_is_opened_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = module.open_image
    monkeypatch.setattr(
        module, "open_image", lambda file, name: opened.append(name) or original(file, name)
    )
    rows = [{"image": "panda.png", "answer": f"{n}"} for n in range(20)]
    assert check(folder, rows).problem is None and len(opened) == 1


def test_rows_to_validate_with_are_checked_too(folder: Path) -> None:
    long = {"conversations": [TURNS[0], {"from": "gpt", "value": "long " * 9000}]}
    file = folder / "held.jsonl"
    rows = [{"image": "none.png", "answer": "x"}, long, {"conversations": TURNS}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = check(folder, [{"conversations": TURNS}], held_out=find_rows(file), max_length=200)
    assert found.problem == "1 of 4 row(s) can't be used."
    said = printed(found)
    assert "1 row(s) to validate with can't be used:\n  held.jsonl, line 1: its image" in said
    assert re.search(
        r"1 row\(s\) to validate with are left out:\n  held.jsonl, line 2: it ha", said
    )
    assert re.search(r"held out +1 +to validate with", said)


def test_nothing_to_learn_is_a_problem(folder: Path) -> None:
    found = check(folder, [{"conversations": TURNS[:1]}] * 3)
    assert found.problem == "None of the 3 row(s) has a token to learn."
    assert re.search(r"supervised +0 +0.0%", printed(found))


def test_no_pixel_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def fail(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    found = check(folder, [{"image": "panda.png", "conversations": TURNS}] * 3)
    assert found.problem is None
