"""The benchmarks of FastVLM's published table, and POPE and GQA: data, prompts, metrics, figures.

Data sets, prompts and token limits are those of lmms-eval's tasks, to the byte; published figures
are those of Apple's model cards (huggingface.co/apple/FastVLM-0.5B, -1.5B and -7B).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeAlias

from ..checks import reason, shown
from .items import ALL, Item, with_choices
from .metrics.choices import LETTERS
from .parquet import check_columns, count_rows, hub_files, image_bytes, local_files, read_rows

Row: TypeAlias = Mapping[str, Any]

SIZES = ("0.5B", "1.5B", "7B")  # that figures were published for
LETTER = "Answer with the option's letter from the given choices directly."
WORD_OR_PHRASE = "Answer the question using a single word or phrase."
SINGLE_WORD = "Answer the question with a single word."
LETTERED = re.compile(r"^([A-Z])\. ?(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """What a row asks: the fields of an `Item` that differ from preset to preset."""

    prompt: str
    references: Sequence[str]
    choices: Sequence[str] = ()
    task: str = ALL
    metric: str | None = None
    images: Sequence[bytes] | None = None  # the column "image" by default


@dataclass(frozen=True)
class Preset:
    """A benchmark.

    Attributes:
        source: Hub id of the data set.
        config: the folder of the data set's files.
        split: that is asked.
        metric: by name.
        own_metrics: that some rows have instead.
        ask: a row → what it asks.
        columns: that `ask` reads.
        max_tokens: of an answer.
        published: figures by size, in percent.
        only: a column and the value that rows must have there.
        images: where images stand in a table of their own: its config, by the column that names
            them.
        note: what to know when figures are compared.
    """

    source: str
    split: str
    metric: str
    ask: Callable[[Row], Asked]
    columns: Sequence[str]
    max_tokens: int
    published: Mapping[str, float] = field(default_factory=dict)
    config: str | None = None
    own_metrics: Sequence[str] = ()
    only: tuple[str, str] | None = None
    images: tuple[str, str] | None = None
    note: str = ""


class PresetItems:
    """The items of a preset, read from its Parquet files each time they are asked for.

    Args:
        preset: from `PRESETS`.
        source: a Parquet file or a folder of them, with the columns of the Hub's data set, instead
            of that.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError, OSError: the files can't be found or downloaded.
        ValueError: a file is damaged or lacks a column, or a row is not as the Hub has them.
    """

    def __init__(self, preset: Preset, source: Path | None = None):
        self.preset = preset
        self.files = _files(preset, source, preset.config)
        self.image_files = _files(preset, source, preset.images[0]) if preset.images else []
        check_columns(self.files, preset.columns)

    def __len__(self) -> int:
        if self.preset.only is None:
            return count_rows(self.files)
        return sum(map(self._is_kept, read_rows(self.files, [self.preset.only[0]])))

    def __iter__(self) -> Iterator[Item]:
        kept = filter(self._is_kept, read_rows(self.files))
        pictures = self._pictures()
        for number, row in enumerate(kept, 1):
            try:
                yield self._item(number, row, pictures)
            except (ValueError, TypeError, LookupError, SyntaxError, AttributeError) as error:
                raise ValueError(
                    f"Row {number} is not as {self.preset.source} has them: {reason(error)}."
                ) from None

    def _item(self, number: int, row: Row, pictures: Mapping[str, bytes]) -> Item:
        asked = self.preset.ask(row)
        return Item(
            id=str(number),
            images=tuple(self._images(row, asked, pictures)),
            prompt=asked.prompt,
            references=tuple(asked.references),
            choices=tuple(asked.choices),
            task=asked.task,
            metric=asked.metric,
        )

    def _is_kept(self, row: Row) -> bool:
        return self.preset.only is None or row[self.preset.only[0]] == self.preset.only[1]

    def _pictures(self) -> dict[str, bytes]:
        """The images of a table of their own, by their names."""
        return {row["id"]: image_bytes(row["image"]) for row in read_rows(self.image_files)}

    def _images(self, row: Row, asked: Asked, pictures: Mapping[str, bytes]) -> Sequence[bytes]:
        if self.preset.images is not None:
            name = row[self.preset.images[1]]
            if name not in pictures:
                raise ValueError(f"The table of images has no {shown(name)}.")
            return [pictures[name]]
        return [image_bytes(row["image"])] if asked.images is None else asked.images


def _files(preset: Preset, source: Path | None, config: str | None) -> list[Path]:
    if source is None:
        return hub_files(preset.source, config, preset.split)
    inside = source / config if config and (source / config).is_dir() else source
    return local_files(inside)


def find_preset(name: str) -> Preset:
    """The preset of a name; ValueError, with all names, if there is none."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {shown(name)}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


# What each row asks


def _phrase(
    references: Callable[[Row], Sequence[str]], task: str | None = None
) -> Callable[..., Asked]:
    """A question that a word or phrase answers."""

    def ask(row: Row) -> Asked:
        prompt = f"{row['question']}\n{WORD_OR_PHRASE}"
        return Asked(prompt, references(row), task=str(row[task]) if task else ALL)

    return ask


def _ai2d(row: Row) -> Asked:
    choices = row["options"]
    right = ascii_uppercase[int(row["answer"])]
    return Asked(with_choices(row["question"], choices, LETTER), [right], choices)


def _scienceqa(row: Row) -> Asked:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    prompt = context + with_choices(row["question"], row["choices"], LETTER)
    return Asked(prompt, [ascii_uppercase[row["answer"]]], row["choices"])


def _mmmu(row: Row) -> Asked:
    subject = row["id"].split("_", 1)[1].rsplit("_", 1)[0]
    choices = ast.literal_eval(row["options"])
    if row["question_type"] == "multiple-choice":
        asked = with_choices(row["question"], choices)
        prompt, references, metric = f"{asked}\n\n{LETTER}", [row["answer"]], None
    else:
        asked, choices = row["question"], []
        prompt, references, metric = f"{asked}\n\n{WORD_OR_PHRASE}", _listed(row["answer"]), "open"
    marks = sorted(set(re.findall(r"<image (\d+)>", asked)))
    images = [image_bytes(row[f"image_{number}"]) for number in marks]
    return Asked(prompt, references, choices, subject, metric, images)


def _listed(text: str) -> list[str]:
    """Right answers that stand as a list in a text, or the text."""
    try:
        found = ast.literal_eval(text) if text.startswith("[") else text
    except (ValueError, SyntaxError):
        found = text
    return [str(each) for each in found] if isinstance(found, list) else [text]


def _chartqa(row: Row) -> Asked:
    return Asked(f"{row['question']}\n{SINGLE_WORD}", [row["answer"]], task=row["type"])


def _textvqa(row: Row) -> Asked:
    return Asked(f"{row['question'].capitalize()}\n{WORD_OR_PHRASE}", row["answers"])


def _ocrbench(row: Row) -> Asked:
    answer = row["answer"]
    metric = "formula" if row["dataset"] == "HME100k" else None
    references = answer if isinstance(answer, list) else [answer]
    return Asked(row["question"].strip(), references, task=row["question_type"], metric=metric)


def _realworldqa(row: Row) -> Asked:
    question, answer = row["question"].strip(), row["answer"].strip()
    if answer.upper() not in LETTERS[:4]:
        return Asked(question, [answer], metric="caseless")
    found = LETTERED.findall(question)
    in_order = "".join(letter for letter, _ in found) == ascii_uppercase[: len(found)]
    return Asked(question, [answer], [text for _, text in found] if in_order else ())


def _seedbench(row: Row) -> Asked:
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    prompt = with_choices(row["question"], choices, LETTER)
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return Asked(prompt, [row["answer"]], choices, images=[image_bytes(each) for each in images])


def _pope(row: Row) -> Asked:
    task = row.get("category") or ALL
    return Asked(f"{row['question'].strip()}\n{WORD_OR_PHRASE}", [row["answer"]], task=task)


def _published(*figures: float) -> dict[str, float]:
    return dict(zip(SIZES, figures, strict=True))


# lmms-eval's copies of the data sets
LMMS = "lmms-lab-encoder"
MMMU_COLUMNS = ("id", "question", "options", "question_type", "answer", "image_1")
SERVER = "The published split is not named; test splits are scored by servers, and this one is not."
PRESETS: dict[str, Preset] = {
    "ai2d": Preset(
        f"{LMMS}/ai2d",
        "test",
        "mcq",
        _ai2d,
        ("question", "options", "answer", "image"),
        16,
        _published(68.0, 77.4, 83.6),
    ),
    "scienceqa": Preset(
        f"{LMMS}/ScienceQA",
        "test",
        "mcq",
        _scienceqa,
        ("question", "choices", "answer", "hint", "image"),
        16,
        _published(85.2, 94.4, 96.7),
        config="ScienceQA-IMG",
        note="The questions that have an image.",
    ),
    "mmmu": Preset(
        f"{LMMS}/MMMU",
        "validation",
        "mcq",
        _mmmu,
        MMMU_COLUMNS,
        128,
        _published(33.9, 37.8, 45.4),
        own_metrics=("open",),
    ),
    "vqav2": Preset(
        f"{LMMS}/VQAv2",
        "validation",
        "vqa",
        _phrase(lambda row: [each["answer"] for each in row["answers"]]),
        ("question", "answers", "image"),
        16,
        _published(76.3, 79.1, 80.8),
        note=SERVER,
    ),
    "chartqa": Preset(
        f"{LMMS}/ChartQA",
        "test",
        "relaxed",
        _chartqa,
        ("question", "answer", "type", "image"),
        16,
        _published(76.0, 80.1, 85.0),
    ),
    "textvqa": Preset(
        f"{LMMS}/textvqa",
        "validation",
        "textvqa",
        _textvqa,
        ("question", "answers", "image"),
        32,
        _published(64.5, 70.4, 74.9),
    ),
    "infovqa": Preset(
        f"{LMMS}/DocVQA",
        "validation",
        "anls",
        _phrase(lambda row: row["answers"]),
        ("question", "answers", "image"),
        32,
        _published(46.4, 59.7, 75.8),
        config="InfographicVQA",
        note=SERVER,
    ),
    "docvqa": Preset(
        f"{LMMS}/DocVQA",
        "validation",
        "anls",
        _phrase(lambda row: row["answers"]),
        ("question", "answers", "image"),
        32,
        _published(82.5, 88.3, 93.2),
        config="DocVQA",
        note=SERVER,
    ),
    "ocrbench": Preset(
        "echo840/OCRBench",
        "test",
        "contains",
        _ocrbench,
        ("question", "answer", "dataset", "question_type", "image"),
        128,
        _published(63.9, 70.2, 73.1),
        own_metrics=("formula",),
        note="Published as a share of its 1000 questions, as here.",
    ),
    "realworldqa": Preset(
        f"{LMMS}/RealWorldQA",
        "test",
        "mcq",
        _realworldqa,
        ("question", "answer", "image"),
        16,
        _published(56.1, 61.2, 67.2),
        own_metrics=("caseless",),
    ),
    "seedbench": Preset(
        f"{LMMS}/SEED-Bench",
        "test",
        "mcq",
        _seedbench,
        (
            "question",
            "choice_a",
            "choice_b",
            "choice_c",
            "choice_d",
            "answer",
            "data_type",
            "image",
        ),
        16,
        _published(71.0, 74.2, 75.4),
        only=("data_type", "image"),
        note="SeedBench-Img: the questions about images.",
    ),
    "pope": Preset(
        f"{LMMS}/POPE",
        "test",
        "yesno",
        _pope,
        ("question", "answer", "image"),
        128,
    ),
    "gqa": Preset(
        f"{LMMS}/GQA",
        "testdev",
        "caseless",
        _phrase(lambda row: [row["answer"]]),
        ("question", "answer", "imageId"),
        16,
        config="testdev_balanced_instructions",
        images=("testdev_balanced_images", "imageId"),
    ),
}
