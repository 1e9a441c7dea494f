"""Presets: what each asks, to the byte, from files with the columns of the Hub's data sets."""

import io
import json

import pytest
from PIL import Image

from fastvlm_mlx.evaluate import parquet
from fastvlm_mlx.evaluate.metrics import METRICS, score_answers
from fastvlm_mlx.evaluate.presets import PRESETS, SIZES, PresetItems, find_preset

LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."


def picture(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


RED, BLUE = picture("red"), picture("blue")
MMMU_IMAGES = {f"image_{n}": None for n in range(1, 8)}
# The rows of each data set, with its columns.
ROWS = {
    "ai2d": [{"question": "Which is a?", "options": ["x", "y", "z"], "answer": "2", "image": RED}],
    "scienceqa": [
        {
            "question": "What now?",
            "choices": ["sink", "float"],
            "answer": 1,
            "hint": "Wood is light.",
            "image": RED,
        },
        {"question": "And?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": BLUE},
    ],
    "mmmu": [
        MMMU_IMAGES
        | {
            "id": "validation_Art_Theory_3",
            "question": "Compare <image 2> with <image 1>.",
            "options": "['same', \"it's other\"]",
            "question_type": "multiple-choice",
            "answer": "B",
            "image_1": RED,
            "image_2": BLUE,
        },
        MMMU_IMAGES
        | {
            "id": "validation_Math_1",
            "question": "<image 1> How long?",
            "options": "[]",
            "question_type": "open",
            "answer": "['24/7', '3.429']",
            "image_1": BLUE,
        },
    ],
    "vqav2": [
        {
            "question": "Is it?",
            "answers": [
                {"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(10)
            ],
            "image": RED,
            "question_id": 7,
        }
    ],
    "chartqa": [
        {"question": "How many?", "answer": "14", "type": "human_test", "image": RED},
    ],
    "textvqa": [{"question": "what is the Brand?", "answers": ["nokia"] * 10, "image": RED}],
    "infovqa": [{"question": "What share?", "answers": ["5%", "5 %"], "image": RED}],
    "docvqa": [{"question": "What date?", "answers": ["1 May"], "image": RED}],
    "ocrbench": [
        {
            "question": " what is written? ",
            "answer": ["CENTRE"],
            "dataset": "IIIT5K",
            "question_type": "Regular Text Recognition",
            "image": RED,
        },
        {
            "question": "Write the formula.",
            "answer": ["x ^ { 2 }"],
            "dataset": "HME100k",
            "question_type": "Handwritten Mathematical Expression Recognition",
            "image": RED,
        },
    ],
    "realworldqa": [
        {
            "question": "Which way?\nA. Left\nB. Right\nPlease answer directly with only the "
            "letter of the correct option and nothing else.",
            "answer": "B",
            "image": RED,
        },
        {"question": "How many cars?\nAnswer with a number.", "answer": "3", "image": RED},
    ],
    "seedbench": [
        {
            "question": "What is it?",
            "choice_a": "a cat",
            "choice_b": "a dog",
            "choice_c": "a cow",
            "choice_d": "a pig",
            "answer": "C",
            "data_type": kind,
            "image": [RED],
            "question_id": kind,
        }
        for kind in ("video", "image")
    ],
    "pope": [{"question": "Is there a cat?", "answer": "no", "image": RED, "category": "random"}],
    "gqa": [{"question": "Is it red?", "answer": "no", "imageId": "n1", "id": "1"}],
}
# What the model is asked, and what is right.
ASKED = {
    "ai2d": [(f"Which is a?\nA. x\nB. y\nC. z\n{LETTER}", ("C",))],
    "scienceqa": [
        (f"Context: Wood is light.\nWhat now?\nA. sink\nB. float\n{LETTER}", ("B",)),
        (f"And?\nA. a\nB. b\n{LETTER}", ("A",)),
    ],
    "mmmu": [
        (f"Compare <image 2> with <image 1>.\nA. same\nB. it's other\n\n{LETTER}", ("B",)),
        (f"<image 1> How long?\n\n{PHRASE}", ("24/7", "3.429")),
    ],
    "vqav2": [(f"Is it?\n{PHRASE}", ("yes",) * 10)],
    "chartqa": [("How many?\nAnswer the question with a single word.", ("14",))],
    "textvqa": [(f"What is the brand?\n{PHRASE}", ("nokia",) * 10)],
    "infovqa": [(f"What share?\n{PHRASE}", ("5%", "5 %"))],
    "docvqa": [(f"What date?\n{PHRASE}", ("1 May",))],
    "ocrbench": [("what is written?", ("CENTRE",)), ("Write the formula.", ("x ^ { 2 }",))],
    "realworldqa": [
        (
            "Which way?\nA. Left\nB. Right\nPlease answer directly with only the letter of the "
            "correct option and nothing else.",
            ("B",),
        ),
        ("How many cars?\nAnswer with a number.", ("3",)),
    ],
    "seedbench": [
        (f"What is it?\nA. a cat\nB. a dog\nC. a cow\nD. a pig\n{LETTER}", ("C",)),
    ],
    "pope": [(f"Is there a cat?\n{PHRASE}", ("no",))],
    "gqa": [(f"Is it red?\n{PHRASE}", ("no",))],
}


def write_parquet(file, rows):
    import pyarrow as pa
    from pyarrow import parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1)
    return file


@pytest.fixture
def folder(tmp_path):
    """The files of each preset, laid out as on the Hub."""

    def make(name):
        preset = PRESETS[name]
        root = tmp_path / name
        write_parquet(root / (preset.config or "data") / f"{preset.split}-0.parquet", ROWS[name])
        if preset.images:
            rows = [{"id": "n1", "image": RED}, {"id": "n2", "image": BLUE}]
            write_parquet(root / preset.images[0] / f"{preset.split}-0.parquet", rows)
        return root

    return make


def test_every_preset_is_tested():
    assert ROWS.keys() == ASKED.keys() == PRESETS.keys()


@pytest.mark.needs("pyarrow")
@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_asks_to_the_byte(name, folder):
    items = PresetItems(PRESETS[name], folder(name))
    found = list(items)
    assert [(item.prompt, item.references) for item in found] == ASKED[name]
    assert len(items) == len(found) and list(items) == found
    assert [item.id for item in found] == [str(n) for n in range(1, len(found) + 1)]
    assert all(item.images[0] in (RED["bytes"], BLUE["bytes"]) for item in found)
    assert {item.metric for item in found} - {None} <= set(PRESETS[name].own_metrics)
    for item in found:  # its own answers are right, by its metric
        metric = item.metric or PRESETS[name].metric
        right = item.references[0]
        (score,) = score_answers(metric, [right], [item.references], [item.choices])
        assert score.value == 1, (name, score)


@pytest.mark.needs("pyarrow")
def test_images_tasks_and_metrics_of_their_own(folder):
    first, second = PresetItems(PRESETS["mmmu"], folder("mmmu"))
    assert first.images == (RED["bytes"], BLUE["bytes"]) and second.images == (BLUE["bytes"],)
    assert (first.task, first.metric, first.choices) == ("Art_Theory", None, ("same", "it's other"))
    assert (second.task, second.metric, second.choices) == ("Math", "open", ())
    first, second = PresetItems(PRESETS["realworldqa"], folder("realworldqa"))
    assert first.choices == ("Left", "Right") and second.metric == "caseless"
    first, second = PresetItems(PRESETS["ocrbench"], folder("ocrbench"))
    assert (first.metric, second.metric) == (None, "formula")
    (item,) = PresetItems(PRESETS["chartqa"], folder("chartqa"))
    assert item.task == "human_test"


def test_published_figures_are_those_of_the_model_cards():
    published = {
        name: tuple(p.published.get(size) for size in SIZES) for name, p in PRESETS.items()
    }
    assert published == {
        "ai2d": (68.0, 77.4, 83.6),
        "scienceqa": (85.2, 94.4, 96.7),
        "mmmu": (33.9, 37.8, 45.4),
        "vqav2": (76.3, 79.1, 80.8),
        "chartqa": (76.0, 80.1, 85.0),
        "textvqa": (64.5, 70.4, 74.9),
        "infovqa": (46.4, 59.7, 75.8),
        "docvqa": (82.5, 88.3, 93.2),
        "ocrbench": (63.9, 70.2, 73.1),
        "realworldqa": (56.1, 61.2, 67.2),
        "seedbench": (71.0, 74.2, 75.4),
        "pope": (None, None, None),
        "gqa": (None, None, None),
    }
    assert all(preset.metric in METRICS for preset in PRESETS.values())


@pytest.mark.needs("pyarrow")
def test_files_that_are_no_good_are_named(tmp_path):
    preset = find_preset("chartqa")
    with pytest.raises(FileNotFoundError, match="no Parquet file at"):
        PresetItems(preset, tmp_path / "none")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"text.parquet is not a whole Parquet file\.$"):
        PresetItems(preset, tmp_path / "text.parquet")
    other = write_parquet(tmp_path / "other.parquet", [{"question": "?", "label": 1}])
    with pytest.raises(ValueError, match="no column answer, type, image; it has question, label"):
        PresetItems(preset, other)
    rows = [ROWS["chartqa"][0] | {"image": {"bytes": None, "path": "a.png"}}]
    lost = write_parquet(tmp_path / "lost.parquet", rows)
    with pytest.raises(ValueError, match=r"Row 1 is not as lmms-lab.* of an image's bytes"):
        list(PresetItems(preset, lost))
    rows = [ROWS["ai2d"][0], ROWS["ai2d"][0] | {"answer": "99"}]
    beyond = write_parquet(tmp_path / "beyond.parquet", rows)
    with pytest.raises(ValueError, match=r"Row 2 is not as lmms-lab-encoder/ai2d has them: .*\.$"):
        list(PresetItems(PRESETS["ai2d"], beyond))


def test_without_pyarrow_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"fastvlm-mlx\[eval\]"):
        PresetItems(find_preset("chartqa"), tmp_path / "a.parquet")


def test_the_files_of_a_split_are_known_by_their_names():
    names = {
        "data/test-00000-of-00002.parquet": (None, "test", True),
        "data/testdev-00000-of-00001.parquet": (None, "test", False),
        "DocVQA/validation-00000-of-00006.parquet": ("DocVQA", "validation", True),
        "InfographicVQA/validation-0.parquet": ("DocVQA", "validation", False),
        "test.parquet": (None, "test", True),
        "test-0.json": (None, "test", False),
    }
    for name, (config, split, expected) in names.items():
        assert parquet.is_of_split(name, config, split) == expected


@pytest.mark.needs("pyarrow")
def test_a_preset_comes_from_the_hub(monkeypatch, folder):
    import huggingface_hub

    root = folder("gqa")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.parquet"))
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, repo_type))
        return str(root / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda self, repo, repo_type: ["README.md", *names],
    )
    (item,) = PresetItems(PRESETS["gqa"])
    assert item.images == (RED["bytes"],)
    assert set(asked) == {("lmms-lab-encoder/GQA", "dataset")}
    with pytest.raises(FileNotFoundError, match="no Parquet files of test"):
        PresetItems(PRESETS["chartqa"])


@pytest.mark.needs("pyarrow")
def test_the_command_measures_a_preset_beside_published_figures(run, folder, tmp_path):
    out = tmp_path / "out"
    found = run("eval", "--preset", "chartqa", "--data", folder("chartqa"), "--out", out)
    assert found.code == 0 and "Published: 0.5B 76.0, 1.5B 80.1, 7B 85.0." in found.out
    assert "strict years" in found.out
    result = json.loads(next(out.glob("*.json")).read_text())
    assert result["items"][0]["prompt"] == ASKED["chartqa"][0][0]
    listed = run("eval", "--list", "--out", out)
    assert listed.out.count("not run") == 12 and "nano: " in listed.out
