"""Data files of every kind → rows, and what is wrong with them → one sentence each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import one_sentence
from models import PANDA, PENGUINS

import fastvlm_mlx as fv
from fastvlm_mlx.train.row_files import BadRow
from fastvlm_mlx.train.rows import BadRows, Row, find_rows, read_rows
from fastvlm_mlx.train.split import split_rows

ASKED = {"from": "human", "value": "What is it?"}
SAID = {"from": "gpt", "value": "A panda."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images."""
    (tmp_path / "panda.png").write_bytes(PANDA.read_bytes())
    (tmp_path / "penguins.png").write_bytes(PENGUINS.read_bytes())
    return tmp_path


def write(folder: Path, rows: Any, name: str = "data.json") -> Path:
    file = folder / name
    lines = name.endswith("l")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    file.write_text(text, encoding="utf-8")
    return file


def read(folder: Path, row: dict[str, Any], **options: Any) -> Row:
    (found,) = read_rows(write(folder, [row]), **options)
    return found


def problem(folder: Path, row: Any, **options: Any) -> str:
    """What is wrong with the only row of a file."""
    (found,) = find_rows(write(folder, [row]), **options)
    assert isinstance(found, BadRow), found
    assert found.where == "data.json, row 1, line 1"
    assert not found.problem.endswith(".") and "\n" not in found.problem
    return found.problem


# The formats


def test_llava_json_with_several_turns_and_without_an_image(folder: Path) -> None:
    rows = [
        {"id": 7, "image": "panda.png", "conversations": [ASKED, SAID, ASKED, SAID]},
        {"id": "text", "conversations": [{"from": "system", "value": "Be brief."}, ASKED, SAID]},
    ]
    first, second = read_rows(write(folder, rows))
    assert [first.id, second.id] == ["7", "text"]
    assert first.images == [folder / "panda.png"] and second.images == []
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant"]
    assert first.messages[3]["content"] == "A panda."
    assert second.where == "data.json, row 2, line 1"


def test_jsonl_also_under_the_name_of_json(folder: Path) -> None:
    rows = [{"id": n, "conversations": [ASKED, SAID]} for n in range(3)]
    lines = write(folder, rows, "data.jsonl")
    (folder / "lines.json").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes() + b"\n\n")
    assert [row.id for row in read_rows(lines)] == ["0", "1", "2"]
    assert [row.where for row in read_rows(folder / "lines.json")][1] == "lines.json, line 2"


@pytest.mark.parametrize(
    "images",
    [
        {"image": "panda.png"},
        {"image": ["panda.png"]},
        {"images": ["panda.png"]},
        {"images": "panda.png", "image": None},
        {"images": ["panda.png"], "image": "panda.png"},
        {"images": [{"path": "panda.png", "bytes": None}]},
    ],
)
def test_one_image_is_the_same_however_it_is_written(folder: Path, images: dict) -> None:
    row = read(folder, {**images, "conversations": [ASKED, SAID]})
    assert row.images == [folder / "panda.png"]
    assert row.messages[0]["content"] == "<image>\nWhat is it?"


def test_an_image_without_a_mark_goes_before_the_first_question(folder: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    row = read(
        folder,
        {"image": ["panda.png", "penguins.png"], "conversations": [system, ASKED, SAID, ASKED]},
    )
    contents = [message["content"] for message in row.messages]
    assert contents == ["Be brief.", "<image>\n<image>\nWhat is it?", "A panda.", "What is it?"]


def test_marks_keep_their_places_and_images_their_order(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "Is <image> a panda?"},
        SAID,
        {"from": "human", "value": "And this?\n<image>"},
        {"from": "gpt", "value": "An <image> of penguins."},
    ]
    row = read(folder, {"images": ["panda.png", "penguins.png"], "conversations": turns})
    assert [m["content"] for m in row.messages] == [turn["value"] for turn in turns]
    assert row.images == [folder / "panda.png", folder / "penguins.png"]


def test_chat_messages_with_parts_of_every_spelling(folder: Path) -> None:
    content = [
        {"type": "text", "text": "Compare <image>"},
        {"type": "image", "image": "panda.png"},
        {"type": "image_url", "image_url": {"url": "penguins.png"}},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Both."}]
    rows = [{"messages": messages, "images": ["panda.png"]}]
    (row,) = read_rows(write(folder, rows, "chat.jsonl"))
    assert [image.name for image in row.images] == ["panda.png", "penguins.png", "panda.png"]
    parts = row.messages[0]["content"]
    assert parts[0] == {"type": "text", "text": "Compare <image>"}
    assert parts[1:] == [{"type": "image"}] * 3
    assert row.id == "chat-1"


def test_csv_with_default_and_given_columns(folder: Path) -> None:
    text = 'image,question,answer\npanda.png,What is it?,"A panda,\nof course."\npenguins.png,,Six'
    (folder / "data.csv").write_text(text, encoding="utf-8")
    first, second = read_rows(folder / "data.csv", question="How many?")
    assert first.messages[1]["content"] == "A panda,\nof course."
    assert second.messages[0]["content"] == "<image>\nHow many?"
    assert [first.where, second.where] == ["data.csv, line 2", "data.csv, line 4"]
    (folder / "data.tsv").write_text("file\ttask\tlabel\npanda.png\tName it.\t3\n", "utf-8")
    columns = {"image": "file", "question": "task", "answer": "label"}
    (row,) = read_rows(folder / "data.tsv", columns=columns)
    assert [m["content"] for m in row.messages] == ["<image>\nName it.", "3"]
    assert row.images == [folder / "panda.png"]


def test_only_line_ends_end_a_row_of_a_table(folder: Path) -> None:
    text = " image , answer\npanda.png,a\u2028b\x0cc\x85d\r\npanda.png, e\rpanda.png,f"
    (folder / "data.csv").write_bytes(text.encode())
    rows = read_rows(folder / "data.csv")
    answers = [row.messages[1]["content"] for row in rows]
    assert answers == ["a\u2028b\x0cc\x85d", " e", "f"]
    assert [row.where for row in rows] == [f"data.csv, line {n}" for n in (2, 3, 4)]


def test_questions_and_answers_stand_in_json_too(folder: Path) -> None:
    row = read(folder, {"image": "panda.png", "prompt": "Which?", "answer": ["panda", "bear"]})
    assert [m["content"] for m in row.messages] == ["<image>\nWhich?", "panda"]


def test_a_folder_with_captions_beside_its_images(folder: Path) -> None:
    (folder / "panda.txt").write_text(" A panda.\n", encoding="utf-8")
    (folder / "inner").mkdir()
    (folder / "inner" / "a.png").write_bytes(PANDA.read_bytes())
    (folder / "inner" / "a.txt").write_text("Another.", encoding="utf-8")
    found = list(find_rows(folder))
    good = {row.id: row for row in found if isinstance(row, Row)}
    assert set(good) == {"panda.png", "inner/a.png"}
    assert good["panda.png"].messages[1]["content"] == "A panda."
    assert good["panda.png"].messages[0]["content"] == "<image>\nDescribe the image."
    (bad,) = [row for row in found if isinstance(row, BadRow)]
    assert bad.where == "penguins.png" and "penguins.txt" in bad.problem


def test_images_from_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("data"), [{"image": "panda.png", "answer": "A"}])
    (row,) = read_rows(elsewhere, images=folder)
    assert row.images == [folder / "panda.png"]
    with pytest.raises(BadRows, match=r"panda.png.*does not exist"):
        read_rows(elsewhere)
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        read_rows(elsewhere, images=folder / "none")


def test_ids_are_unique_and_the_same_each_time(folder: Path) -> None:
    rows: list[Any] = [{"id": id, "answer": "x"} for id in ("a", None, "a", "a#2", "a", "data-2")]
    file = write(folder, rows)
    ids = [row.id for row in read_rows(file)]
    assert ids[:3] == ["a", "data-2", "a#2"] and len(set(ids)) == 6
    assert ids == [row.id for row in read_rows(file)]


# What is wrong

BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ([1], "must be an object"),
    "nothing in it": ({"image": "panda.png"}, "neither conversations nor messages nor an answer"),
    "a missing image": (
        {"image": "none.png", "conversations": [ASKED, SAID]},
        "its image 'none.png' does not exist",
    ),
    "a folder": ({"image": ".", "conversations": [ASKED, SAID]}, "'.' is a folder"),
    "a mark without an image": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, SAID]},
        r"1 <image> mark\(s\) .* for 0 image\(s\)",
    ),
    "more images than marks": (
        {"image": ["panda.png"] * 2, "conversations": [{**ASKED, "value": "<image>"}, SAID]},
        r"1 <image> mark\(s\) .* for 2 image\(s\)",
    ),
    "no question": ({"image": "panda.png", "conversations": [SAID]}, "no question"),
    "an empty answer": (
        {"conversations": [ASKED, SAID, ASKED, {"from": "gpt", "value": " \n"}]},
        "turn 4 is an empty answer",
    ),
    "an empty caption": ({"image": "panda.png", "caption": ""}, "turn 2 is an empty answer"),
    "no turns": ({"conversations": []}, "list of turns"),
    "an unknown role": ({"conversations": [{"from": "dog", "value": "Wow"}]}, "turn 1 .*'dog'"),
    "no text": ({"conversations": [ASKED, {"from": "gpt", "value": None}]}, "turn 2 .*None"),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "turn 1 .*part 1",
    ),
    "an image of the assistant's": (
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "only the user's turns",
    ),
    "two different images": (
        {"image": "panda.png", "images": ["penguins.png"], "answer": "x"},
        "different images",
    ),
    "a name that is too long": ({"image": "x" * 5000, "answer": "x"}, "can't be found .*too long"),
    "a name with a zero": ({"image": "a\0b", "answer": "x"}, "does not exist|can't be found"),
    "a number as image": ({"image": 3, "answer": "x"}, "path or URL, found 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_row_is_named_in_one_sentence(folder: Path, case: str) -> None:
    row, said = BROKEN[case]
    assert re.search(said, problem(folder, row))


def test_all_bad_rows_are_collected_and_the_error_is_short(folder: Path) -> None:
    rows = [{"id": n, "conversations": [ASKED, SAID]} if n % 2 else {} for n in range(40)]
    with pytest.raises(BadRows) as error:
        read_rows(write(folder, rows))
    message = one_sentence(error)
    assert message.startswith("20 row(s) can't be used: data.json, row 1, line 1: ")
    assert message.endswith("and 15 more.") and len(message) < 1500
    assert [bad.where for bad in error.value.bad][-1] == "data.json, row 39, line 1"


def test_broken_json_is_named_by_its_line(folder: Path) -> None:
    file = folder / "data.jsonl"
    file.write_text('{"answer": "x"}\n{"answer": \n{"answer": "y"}\n', encoding="utf-8")
    first, broken, third = find_rows(file)
    assert isinstance(first, Row) and isinstance(third, Row)
    assert str(broken).startswith("data.jsonl, line 2: it is broken JSON")
    (folder / "data.json").write_text('[\n{"answer": "x"},\n{"answer" "y"}\n]', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"data.json. is broken JSON at line 3, column 11"
    ) as error:
        read_rows(folder / "data.json")
    one_sentence(error)


def test_rows_of_a_list_are_named_by_their_lines(folder: Path) -> None:
    text = '[\n  {"answer": "x"},\n\n  {"answer": "a\\nb",\n   "id": 3}, {"answer": ""},\n[]]\n'
    (folder / "data.json").write_text(text, encoding="utf-8")
    where = [row.where for row in find_rows(folder / "data.json")]
    assert where == [f"data.json, row {n}, line {m}" for n, m in ((1, 2), (2, 4), (3, 5), (4, 6))]


@pytest.mark.parametrize(
    "text", ["", "[", "[{}", "[{} {}]", "[{},]", "[{}]]", "{", '{"a": 1} {', "[NULL]", "[" * 10**5]
)
def test_every_broken_list_is_named(folder: Path, text: str) -> None:
    (folder / "data.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken JSON|nested deeply") as error:
        read_rows(folder / "data.json")
    one_sentence(error)


def test_open_quotes_swallow_no_rows(folder: Path) -> None:
    text = 'image,answer\npanda.png,"a "quoted" b"\npanda.png,b\npanda.png,"c\npanda.png,d\n'
    (folder / "data.csv").write_text(text, encoding="utf-8")
    broken, good, unclosed = find_rows(folder / "data.csv")
    assert str(broken).startswith("data.csv, line 2: its quotes are not closed or not doubled")
    assert isinstance(good, Row) and good.messages[1]["content"] == "b"
    assert str(unclosed).startswith("data.csv, line 4: its quotes are not closed")


WHOLE = {
    "twice.csv": (b"image,answer,answer\na,b,c", "two columns named 'answer'"),
    "quotes.csv": (b'image,"answer', "line 1 is broken"),
    "data.json": (b'"text"', "must hold a list of rows"),
    "empty.json": (b"[]", "holds no rows"),
    "latin.csv": ("image,answer\na.png,Bär".encode("latin1"), "line 2 is not in UTF-8"),
    "data.xml": (b"<a/>", "no data file: rows are read from .json"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_can_not_be_read_is_named(folder: Path, name: str) -> None:
    data, said = WHOLE[name]
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_rows(folder / name)
    one_sentence(error)


def test_what_is_asked_wrongly_is_named(folder: Path) -> None:
    file = write(folder, [{"answer": "x"}])
    with pytest.raises(FileNotFoundError, match="no data file or folder"):
        read_rows(folder / "none.json")
    with pytest.raises(ValueError, match="no field 'picture'"):
        read_rows(file, columns={"picture": "img"})
    with pytest.raises(BadRows, match="no column 'img'; its columns are answer"):
        read_rows(file, columns={"image": "img"})
    with pytest.raises(ValueError, match="no subset or split"):
        read_rows(file, split="test")
    with pytest.raises(ValueError, match=r"2 image\(s\) and no .txt"):
        read_rows(folder)
    (folder / "bad.csv").write_text("image,answer\na,b,c\n", encoding="utf-8")
    (bad,) = find_rows(folder / "bad.csv")
    assert str(bad).startswith("bad.csv, line 2: it has 3 fields for 2 columns")


# What they are good for


def test_generate_takes_a_row_and_the_questions_of_one(folder: Path, nano: Any) -> None:
    row = read(folder, {"image": "panda.png", "conversations": [ASKED, SAID, ASKED, SAID]})
    first, second = row.questions()
    assert first.answer == "A panda." and len(second.messages) == 3
    text = fv.generate(*nano, first.messages, image=first.images, max_tokens=8)
    assert text == fv.generate(*nano, "What is it?", image=PANDA, max_tokens=8)


def pictures(folder: Path, count: int) -> list[str]:
    for n in range(count):
        (folder / f"{n}.png").write_bytes(PANDA.read_bytes() + bytes([n]))
    return [f"{n}.png" for n in range(count)]


def test_a_split_keeps_every_image_on_one_side(folder: Path) -> None:
    names = pictures(folder, 20)
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    rows = [{"id": n, "image": names[n % 20], "answer": "x"} for n in range(60)]
    rows += [{"id": "pair", "image": [names[3], names[4]], "answer": "x"}]
    rows += [{"id": "copy", "image": "copy.png", "answer": "x"}]
    rows += [{"id": f"text {n}", "answer": f"{n % 4}"} for n in range(8)]
    found = read_rows(write(folder, rows))
    for seed in range(8):
        train, validation = split_rows(found, 0.2, seed=seed)
        assert len(train) + len(validation) == 70 and 10 <= len(validation) <= 14
        held = [
            {image.read_bytes() for row in side for image in row.images}
            for side in (train, validation)
        ]
        assert held[0] & held[1] == set() != held[1]
        sides = {row.id: side for side in (0, 1) for row in (train, validation)[side]}
        assert sides["3"] == sides["23"] == sides["4"] == sides["pair"] == sides["copy"]
        assert all(sides[f"text {n}"] == sides[f"text {n + 4}"] for n in range(4))
        assert [row.id for row in train] == [row.id for row in found if sides[row.id] == 0]
    chosen = {tuple(row.id for row in split_rows(found, 0.2, seed=s)[1]) for s in range(5)}
    assert len(chosen) > 1


def test_a_split_does_not_depend_on_python_s_hashes(folder: Path) -> None:
    names = pictures(folder, 12)
    file = write(folder, [{"id": n, "image": names[n], "answer": "x"} for n in range(12)])
    program = (
        "import sys; from fastvlm_mlx.train.rows import read_rows\n"
        "from fastvlm_mlx.train.split import split_rows\n"
        "print([row.id for row in split_rows(read_rows(sys.argv[1]), 0.4)[1]])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program, str(file)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    here = [row.id for row in split_rows(read_rows(file), 0.4)[1]]
    assert said == {f"{here}\n"}


def test_at_least_the_rows_of_one_image_validate(folder: Path) -> None:
    names = pictures(folder, 4)
    rows = [{"id": n, "image": names[n % 4], "answer": f"{n}"} for n in range(20)]
    train, validation = split_rows(read_rows(write(folder, rows)), 0.05)
    assert (len(train), len(validation)) == (15, 5)
    assert len({row.images[0] for row in validation}) == 1


def test_what_can_not_be_split_is_named(folder: Path) -> None:
    rows = read_rows(write(folder, [{"image": "panda.png", "answer": f"{n}"} for n in range(4)]))
    with pytest.raises(ValueError, match="can't be divided") as error:
        split_rows(rows, 0.25)
    one_sentence(error)
    for fraction in (0, 1, 2.5, float("nan"), True):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_rows(rows, fraction)


# The datasets library


def test_a_data_set_of_the_library_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvlm-mlx\[datasets\]'") as error:
        read_rows("somebody/something")
    one_sentence(error)


@pytest.mark.needs("datasets")
def test_data_sets_of_the_library(folder: Path) -> None:
    import datasets

    image = {"bytes": PANDA.read_bytes(), "path": "p.png"}
    values = {
        "picture": [image, {"bytes": None, "path": str(folder / "penguins.png")}],
        "query": ["What?", "How many?"],
        "label": [["Panda"], ["Six"]],
    }
    features = datasets.Features(
        picture=datasets.Image(), query=datasets.Value("string"), label=[datasets.Value("string")]
    )
    saved = datasets.Dataset.from_dict(values, features=features)
    saved.save_to_disk(folder / "saved")
    columns = {"image": "picture", "question": "query", "answer": "label"}
    first, second = read_rows(folder / "saved", columns=columns)
    assert first.where == "saved, row 1" and first.messages[1]["content"] == "Panda"
    assert first.images[0].read() == PANDA.read_bytes()
    assert second.images[0].read() == PENGUINS.read_bytes()
    assert (fv.preprocess(first.images[0], 256) == fv.preprocess(PANDA, 256)).all()
    assert len(split_rows([first, second], 0.5)[0]) == 1
    saved.to_parquet(folder / "saved.parquet")
    again, _ = read_rows(folder / "saved.parquet", columns=columns)
    assert again.where == "saved.parquet, row 1" and again.images[0].read() == PANDA.read_bytes()


@pytest.mark.needs("datasets")
def test_conversations_and_lists_of_images_of_the_library(folder: Path) -> None:
    import datasets

    turns = [{"role": "user", "content": "<image><image>Same?"}]
    turns += [{"role": "assistant", "content": "No."}]
    both = [{"bytes": file.read_bytes(), "path": None} for file in (PANDA, PENGUINS)]
    features = datasets.Features(
        images=[datasets.Image()],
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    )
    values = {"images": [both, both[::-1]], "messages": [turns, turns]}
    data = datasets.Dataset.from_dict(values, features=features)
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(folder / "saved")
    first, _ = read_rows(folder / "saved")
    assert [i.read() for i in first.images] == [PANDA.read_bytes(), PENGUINS.read_bytes()]
    (test,) = read_rows(folder / "saved", split="test")
    assert [i.read() for i in test.images] == [PENGUINS.read_bytes(), PANDA.read_bytes()]
    with pytest.raises(ValueError, match="can't be read") as error:
        read_rows(folder / "saved", split="none")
    one_sentence(error)


# The document


def test_the_examples_in_the_document_are_read(folder: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "train_data.md").read_text(encoding="utf-8")
    llava, chats = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (table,) = re.findall(r"```\n(image,question.*?)```", text, re.DOTALL)
    for name in "ab":
        (folder / f"{name}.png").write_bytes(PANDA.read_bytes())
    for name, content in (("a.json", llava), ("b.jsonl", chats), ("c.csv", table)):
        (folder / name).write_text(content, encoding="utf-8")
    found = [read_rows(folder / name) for name in ("a.json", "b.jsonl", "c.csv")]
    assert [len(rows) for rows in found] == [3, 2, 2]
    assert [len(row.images) for rows in found for row in rows] == [1, 2, 0, 1, 1, 1, 1]
    asked = "<image>\nWhich animal is it?"
    assert found[0][0].messages[0]["content"] == asked == found[1][1].messages[0]["content"]
    assert found[2][0].messages[0]["content"] == asked
