"""What is asked of every image, and what a caption must be like, in one value."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checks import check_whole_number, is_number, shown
from ..evaluate.questions import DEFAULT_QUESTION
from .items import CAPTION, FLAGS, IMAGE_COLUMNS, PROMPT, Item, fill

SKIP, OVERWRITE, APPEND, PREPEND = "skip", "overwrite", "append", "prepend"
EXISTING = (SKIP, OVERWRITE, APPEND, PREPEND)


@dataclass(frozen=True)
class CaptionJob:
    """What to ask of every image, and what to do with the answers.

    Attributes:
        prompts: one of them is asked of each image, drawn by `weights`; the same one whenever the
            image is asked about. `{name}`, `{folder}`, `{tags}` and the columns of the image's row
            are filled in. A row's own `prompt` goes before them.
        weights: how often each prompt is drawn, in proportion; all alike by default.
        questions: asked of each image besides, or instead where there are no prompts: the name of
            the column that takes the answer → the question. The image is encoded once.
        existing: what happens to captions that are there already: "skip" keeps them and asks
            nothing, "overwrite" replaces them, "append" and "prepend" add the new one.
        separator: stands between an old caption and what is added to it.
        trigger: a word that every caption begins with, unless it has it somewhere already.
        banned: words that no caption may have; one that does is a failure.
        min_words: a caption of fewer words is a failure.
        max_words: longer captions are cut after the last whole sentence, and flagged.
        retry_errors: try again what failed in an earlier run.

    Raises:
        ValueError: a value is out of its range.
    """

    prompts: Sequence[str] = ()
    weights: Sequence[float] = ()
    questions: Mapping[str, str] = field(default_factory=dict)
    existing: str = SKIP
    separator: str = " "
    trigger: str | None = None
    banned: Sequence[str] = ()
    min_words: int = 1
    max_words: int | None = None
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if not self.prompts and not self.questions:
            object.__setattr__(self, "prompts", (DEFAULT_QUESTION,))
        if self.existing not in EXISTING:
            raise ValueError(f"existing must be one of {EXISTING}, found {shown(self.existing)}.")
        if self.weights and len(self.weights) != len(self.prompts):
            raise ValueError(
                f"There are {len(self.weights)} weight(s) for {len(self.prompts)} prompt(s): give "
                "one for each, or none."
            )
        if not all(is_number(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be numbers above 0, found {shown(self.weights)}.")
        check_whole_number("min_words", self.min_words, 0)
        if self.max_words is not None:
            check_whole_number("max_words", self.max_words, max(1, self.min_words))
        if not all([*self.prompts, *self.questions.values(), *self.banned]):
            raise ValueError("A prompt, a question or a banned word is empty.")
        for name in self.questions:
            if not name.isidentifier() or name in (CAPTION, PROMPT, FLAGS, "row", *IMAGE_COLUMNS):
                raise ValueError(
                    f"The name of a question must be letters, digits and _, and no column that a "
                    f"caption has anyway, found {shown(name)}."
                )

    def check_json(self) -> None:
        """ValueError for what would spoil captions that are JSON."""
        spoils = {"trigger": self.trigger, "max_words": self.max_words}
        spoils |= {f"existing {way}": self.existing == way for way in (APPEND, PREPEND)}
        for name, wanted in spoils.items():
            if wanted:
                raise ValueError(f"{name} does not go with a schema: a caption is one JSON value.")

    @property
    def fields(self) -> list[str]:
        """The columns that take answers."""
        return [CAPTION] * bool(self.prompts) + list(self.questions)

    def ask(self, item: Item, seed: int = 0) -> list[str]:
        """What to ask of an image, for each of `fields`; `seed` is that of the draw of prompts.

        Raises:
            ValueError: a prompt has a `{place}` for what the image doesn't have, or that of its
                row is no text.
        """
        asked = list(self.questions.values())
        if self.prompts:
            own = item.row.get(PROMPT) or self._draw(item, seed)
            if not isinstance(own, str):
                raise ValueError(f"its row's prompt is no text, but {shown(own)}")
            asked.insert(0, own)
        return [fill(prompt, item) for prompt in asked]

    def _draw(self, item: Item, seed: int) -> str:
        if len(self.prompts) == 1:
            return self.prompts[0]
        draw = random.Random(f"{seed} {item.key}")
        return draw.choices(self.prompts, self.weights or None)[0]

    def recipe(self, model: str, options: Mapping[str, Any]) -> str:
        """A short text that differs where anything does that a caption depends on."""
        own = asdict(self) | {"retry_errors": None}
        return digest([model, own, dict(options)])


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
