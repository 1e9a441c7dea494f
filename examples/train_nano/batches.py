"""Batches: pictures with several questions each, from a store; pictures are encoded once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .store import Store, Stored
from .tokenizer import SYSTEM
from .words import ALL

if TYPE_CHECKING:
    from fastvlm_mlx.text import Tokenizer

    from .features import Features
    from .rows import Row

Arrays = dict[str, Any]
OPENED = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
ASKED = "<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = "<|im_end|>"
NEXT = "\n<|im_start|>user\n"
LENGTHS = 8  # rows are padded to a multiple of it
POSITIONS = 64  # supervised positions likewise
GROUPS = 8  # of rows of about one length in a batch
LONGEST_TEXT = 12
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:%$/-"
POLL = 1.0  # seconds between looks at a store that is being filled


class Encoder:
    """Rows → token ids, those of the prompt that `build_prompt` makes.

    A row's ids begin after the last image and its line break; what is before is the same for all.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Control tokens in the text are control tokens."""
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, allow_special=True)
        return self._cache[text]

    def prefix(self, images: int, visual_tokens: int) -> tuple[list[int], list[int]]:
        """Ids of the images, 0 at visual tokens, and the places of these."""
        ids: list[int] = []
        places: list[int] = []
        for _ in range(images):
            places += range(len(ids), len(ids) + visual_tokens)
            ids += [0] * visual_tokens + self.ids("\n")
        return ids, places

    def row(self, row: Row) -> tuple[list[int], list[bool]]:
        """Ids from the first question on, and which of them are answers."""
        ids: list[int] = []
        supervised: list[bool] = []
        for number, (question, answer) in enumerate(row.turns):
            asked = (self.ids(NEXT) if number else []) + self.ids(question) + self.ids(ASKED)
            answered = self.ids(answer) + self.ids(ANSWERED)
            ids += asked + answered
            supervised += [False] * len(asked) + [True] * len(answered)
        return ids, supervised


@dataclass
class Batch:
    """Scenes with the same number of pictures, and the same number of questions to each."""

    ids: list[str]
    arrays: dict[str, Any]
    tokens: int
    pixel_values: Sequence[int] = field(default_factory=list)
    """The numbers of the pictures, which the loop counts."""

    @property
    def input_ids(self) -> mx.array:
        return self.arrays["prefix"]


def questions_of(encoder: Encoder, rows: Sequence[Sequence[Row]]) -> tuple[list[Arrays], int]:
    """Arrays of the rows of all scenes, in groups of about one length; and the tokens in them.

    Rows are sorted by length, so that little of a group is padding.
    """
    encoded = [(n, *encoder.row(row)) for n, scene in enumerate(rows) for row in scene]
    encoded.sort(key=lambda row: len(row[1]))
    each = -(-len(encoded) // GROUPS)
    groups = [group_of(encoded[i : i + each]) for i in range(0, len(encoded), each)]
    return groups, sum(group["input_ids"].size for group in groups)


def group_of(encoded: Sequence[tuple[int, list[int], list[bool]]]) -> Arrays:
    """Arrays of rows (scene, ids, supervised), the last of which is the longest."""
    length = -(-(len(encoded[-1][1]) - 1) // LENGTHS) * LENGTHS
    input_ids = np.zeros((len(encoded), length), np.int32)
    positions, targets = [], []
    for n, (_, ids, supervised) in enumerate(encoded):
        input_ids[n, : len(ids) - 1] = ids[:-1]
        for at in range(1, len(ids)):
            if supervised[at]:
                positions.append(n * length + at - 1)
                targets.append(ids[at])
    room = -len(positions) % POSITIONS
    weights = [1.0] * len(positions) + [0.0] * room
    return {
        "input_ids": mx.array(input_ids),
        "scenes": mx.array([scene for scene, _, _ in encoded]),
        "positions": mx.array(positions + [0] * room),
        "targets": mx.array(targets + [0] * room),
        "weights": mx.array(weights),
    }


def labels_of(scenes: Sequence[Stored]) -> dict[str, mx.array]:
    """What helper heads are to say of each scene."""
    kinds = list(ALL)
    present = np.zeros((len(scenes), len(kinds)), np.float32)
    counts = np.zeros(len(scenes), np.int32)
    letters = np.zeros((len(scenes), LONGEST_TEXT), np.int32)
    for n, scene in enumerate(scenes):
        for name, number in scene.names.items():
            present[n, kinds.index(name)] = 1
            counts[n] += number
        for at, character in enumerate(scene.text[:LONGEST_TEXT]):
            letters[n, at] = CHARACTERS.find(character) + 2  # 1: another; 0: none
    return {
        "present": mx.array(present),
        "counts": mx.array(counts),
        "letters": mx.array(letters),
        "has_names": mx.array([float(bool(scene.names)) for scene in scenes]),
        "has_text": mx.array([float(bool(scene.text)) for scene in scenes]),
    }


@dataclass(eq=False)
class StoreData:
    """The batches of a store: an epoch is all scenes once.

    Args:
        store: being filled or full.
        encoder: of the model's tokenizer.
        scenes: in a batch.
        singles, talks: questions and conversations of each scene; an epoch draws others.
        visual_tokens: of a picture.
        seed: of the order and of the rows.
        features: cached visual features instead of pixels.
        helper: the helper heads' weight in the first step and in the last.
        steps: of the whole stage, over which that weight falls.
    """

    store: Store
    encoder: Encoder
    scenes: int
    singles: int
    talks: int
    visual_tokens: int
    seed: int = 0
    features: Features | None = None
    helper: tuple[float, float] = (0.0, 0.0)
    steps: int = 1

    def count(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def batch(self, epoch: int, number: int) -> Batch:
        plan = self._plan(epoch)
        share = min(1.0, (epoch * len(plan) + number) / self.steps)
        return self._batch(plan[number], Random(f"{self.seed} {epoch} {number}"), share)

    @lru_cache(maxsize=2)  # noqa: B019, it lives as long as the run
    def _plan(self, epoch: int) -> list[list[int]]:
        """The scenes of each batch. A store of single pictures is read in order the first time, so
        that training can begin while it is being filled."""
        total = self.store.settings.scenes
        if not self.store.settings.has_pairs:
            groups = [list(range(total))]
        else:
            self._wait(total - 1)
            found = self.store.scenes
            groups = [[i for i in range(total) if len(found[i].pictures) == n] for n in (1, 2)]
        rng = Random(f"{self.seed} {epoch}")
        if epoch or len(groups) > 1:
            for group in groups:
                rng.shuffle(group)
        sizes = [max(1, self.scenes // (n + 1)) for n in range(len(groups))]
        plan = [
            group[i : i + size]
            for group, size in zip(groups, sizes, strict=True)
            for i in range(0, len(group) - size + 1, size)
        ]
        if epoch or len(groups) > 1:
            rng.shuffle(plan)
        return plan

    def _wait(self, number: int) -> None:
        """Until that scene is drawn."""
        while len(self.store) <= number and self.store.refresh() <= number:
            time.sleep(POLL)

    def _batch(self, numbers: list[int], rng: Random, share: float) -> Batch:
        self._wait(max(numbers))
        scenes = [self.store.scenes[number] for number in numbers]
        images = len(scenes[0].pictures)
        ids, places = self.encoder.prefix(images, self.visual_tokens)
        starts = np.arange(len(scenes))[:, None] * len(ids)
        rows = [
            _chosen(scene, False, self.singles, rng) + _chosen(scene, True, self.talks, rng)
            for scene in scenes
        ]
        questions, tokens = questions_of(self.encoder, rows)
        arrays = {
            "opened": mx.array([self.encoder.ids(OPENED)]),
            "prefix": mx.array([ids] * len(scenes)),
            "places": mx.array((starts + np.array(places)).ravel()),
            "questions": questions,
        }
        tokens += len(ids) * len(scenes)
        pictures = [picture for scene in scenes for picture in scene.pictures]
        if self.features is not None:
            arrays["features"] = self.features.read(pictures)
        else:
            arrays["pixel_values"] = mx.array(self.store.pixels[pictures])
        weight = self.helper[0] + (self.helper[1] - self.helper[0]) * share
        if any(self.helper):
            arrays |= labels_of(scenes) | {"helper": mx.array(weight)}
        return Batch([f"{self.store.folder.name}/{n}" for n in numbers], arrays, tokens, pictures)


@dataclass
class Mixed:
    """The batches of several stores, in any order, as the trainer asks for them."""

    parts: Sequence[StoreData]

    def count(self, epoch: int) -> int:
        return sum(part.count(epoch) for part in self.parts)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = [n for n, part in enumerate(self.parts) for _ in range(part.count(epoch))]
        Random(epoch).shuffle(order)
        for at in range(start, len(order)):
            yield self.parts[order[at]].batch(epoch, order[:at].count(order[at]))


def _chosen(scene: Stored, talk: bool, number: int, rng: Random) -> list[Row]:
    """So many rows of a scene, conversations or not, some twice if there are too few."""
    rows = [row for row in scene.rows if (len(row.turns) > 1) == talk]
    rows = rows or list(scene.rows)
    return (rng.sample(rows, len(rows)) * number)[:number]
