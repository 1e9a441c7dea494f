"""A row → what the model sees of it: token ids, the places of images, and which are supervised.

The tokens before an answer are those of the prompt that `generate` builds; the answer follows as
`generate` would give it, token by token, and the token that ends it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..checks import check_whole_number, reason, shown
from ..config import FastVLMConfig
from ..image.grid import anyres_grid
from ..image.load import ImageSource, read_picture
from ..model.fastvlm import count_visual_tokens
from ..processor import Processor
from ..progress import progress_bar
from ..text.messages import IMAGE_PLACE, read_messages
from ..text.prompt import ANSWER_PLACE, encode_prompt, render_prompt
from ..text.tokenizer import Tokenizer
from .row_files import BadRow
from .rows import MANY, BadRows, Row

TOO_LONG = ("error", "skip", "truncate")
# How rows are seen that nothing is learned from: whole, as far as the model can.
VALIDATION: dict[str, Any] = {"max_length": None, "too_long": "skip"}

Measure = tuple[int, tuple[int, int] | None]
"""How many visual tokens an image has, and its original size where they depend on it."""


class Span(NamedTuple):
    """Some tokens that follow one another: the first, and the one behind the last."""

    start: int
    stop: int


@dataclass(frozen=True)
class ExampleImage:
    """An image of an example.

    Attributes:
        source: what reads it.
        start: where its places begin in `input_ids`.
        tokens: how many visual tokens it has.
        size: original (width, height), where its tiles depend on it.
    """

    source: ImageSource
    start: int
    tokens: int
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    Attributes:
        id: the row's.
        where: file and line or row, for errors.
        input_ids: with `config.image_token_index` at the place of each visual token.
        answers: the spans of supervised tokens: each answer with the token that ends it.
        images: in the order of their places.
    """

    id: str
    where: str
    input_ids: array[int]
    answers: tuple[Span, ...]
    images: tuple[ExampleImage, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> list[bool]:
        """Which tokens are targets."""
        found = [False] * len(self)
        for start, stop in self.answers:
            found[start:stop] = [True] * (stop - start)
        return found

    @property
    def num_supervised(self) -> int:
        """How many tokens are targets."""
        return sum(stop - start for start, stop in self.answers)

    @property
    def num_visual(self) -> int:
        """How many places of visual tokens there are."""
        return sum(image.tokens for image in self.images)


def build_example(
    row: Row,
    processor: Processor,
    config: FastVLMConfig,
    *,
    image_size: int | None = None,
    system: str | None = None,
    conv_mode: str | None = None,
) -> Example:
    """A row as the model sees it; no weights are needed, and images are read only for "anyres".

    What follows the last answer is left out. Without an answer nothing is supervised.

    Args:
        row: of `rows.read_rows`.
        processor: the model's, as `checkpoint.load.load_processor` gives it.
        config: the model's.
        image_size: side of the squares that images become; by default the processor's.
        system, conv_mode: as in `build_prompt`.

    Raises:
        ValueError: the row and what is wrong with it.
    """
    try:
        return _build(row, processor, config, image_size, system, conv_mode)
    except (ValueError, OSError) as error:
        raise ValueError(f"{row.where}: {reason(error)}.") from None


def _build(
    row: Row,
    processor: Processor,
    config: FastVLMConfig,
    image_size: int | None,
    system: str | None,
    conv_mode: str | None,
) -> Example:
    turns, slots = read_messages(row.messages)
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    last = answers[-1] + 1 if answers else len(turns)
    sources = row.images[: sum(slot.turn <= last for slot in slots)]
    measures = [measure_image(source, processor, config, image_size) for source in sources]
    counts = [tokens for tokens, _ in measures]
    text = render_prompt(
        processor.tokenizer,
        row.messages[:last],
        images=len(sources),
        system=system,
        conv_mode=conv_mode,
        add_generation_prompt=not answers,
        answers=False,
    )
    said = [turns[n]["content"] for n in answers]
    ids, spans = _encode(processor.tokenizer, text, said, counts, config.image_token_index)
    return Example(row.id, row.where, ids, spans, _locate(ids, sources, measures, config))


def measure_image(
    source: ImageSource, processor: Processor, config: FastVLMConfig, image_size: int | None = None
) -> Measure:
    """How many visual tokens an image has; only "anyres" depends on its size and reads it."""
    side = processor.image_size if image_size is None else image_size
    if processor.mode != "anyres":
        return processor.num_visual_tokens(side), None
    size = read_picture(source).full_size
    across, down = anyres_grid(size, processor.grid_pinpoints or (), side)
    return count_visual_tokens(config, 1 + across * down, side, size), size


def _encode(
    tokenizer: Tokenizer, text: str, answers: Sequence[str], counts: Sequence[int], index: int
) -> tuple[array[int], tuple[Span, ...]]:
    """The ids of a text, with answers in their places, and the spans of these and their ends."""
    first, *others = text.split(ANSWER_PLACE)
    if len(others) != len(answers):
        raise ValueError("the chat template leaves out answers of the assistant's")
    if not answers:
        return array("i", encode_prompt(tokenizer, first, counts, index)), ()
    end = _end_of_answer(tokenizer, others)
    ids, spans, waiting = array("i"), [], iter(counts)
    befores = [first, *(piece[len(end) :] for piece in others[:-1])]
    for before, answer in zip(befores, answers, strict=True):
        # Prompts end without the space that some modes have before an answer.
        prompt = before.rstrip(" ")
        places = [next(waiting) for _ in range(prompt.count(IMAGE_PLACE))]
        ids.extend(encode_prompt(tokenizer, prompt, places, index))
        start = len(ids)
        ids.extend(tokenizer.encode(before[len(prompt) :] + answer))
        ids.extend(tokenizer.encode(end, allow_special=True))
        spans.append(Span(start, len(ids)))
    return ids, tuple(spans)


def _end_of_answer(tokenizer: Tokenizer, others: Sequence[str]) -> str:
    """What ends each answer, given the texts behind them: a control token, or all that closes a
    turn in a mode without one."""
    closing = others[-1]
    end = next((token for token in tokenizer.controls if closing.startswith(token)), closing)
    if not end or not all(piece.startswith(end) for piece in others):
        raise ValueError("the chat template does not end the assistant's answers")
    return end


def _locate(
    ids: array[int],
    sources: Sequence[ImageSource],
    measures: Sequence[Measure],
    config: FastVLMConfig,
) -> tuple[ExampleImage, ...]:
    found, start = [], 0
    for source, (count, size) in zip(sources, measures, strict=True):
        start = ids.index(config.image_token_index, start)
        found.append(ExampleImage(source, start, count, size))
        start += count
    return tuple(found)


# All rows


@dataclass(frozen=True)
class Examples:
    """The rows of a data set as the model sees them.

    Attributes:
        kept: to train on, each with supervised tokens.
        bad: rows that can't be used.
        skipped: rows that are left out because they are too long.
        cut: rows that are used without what is too much.
        silent: rows that are left out because nothing in them is supervised.
    """

    kept: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    skipped: list[BadRow] = field(default_factory=list)
    cut: list[BadRow] = field(default_factory=list)
    silent: list[BadRow] = field(default_factory=list)


def build_examples(
    rows: Sequence[Row], processor: Processor, config: FastVLMConfig, **options: Any
) -> Examples:
    """As `collect_examples` with its options, but every row can be used.

    Raises:
        BadRows: some can't be.
        ValueError: nothing in any row is supervised, or an unknown option.
    """
    examples = collect_examples(rows, processor, config, **options)
    if examples.bad:
        raise BadRows(examples.bad)
    if not examples.kept:
        raise ValueError(
            f"None of the {len(rows)} row(s) has a token to learn: answers are the assistant's "
            'turns ("from": "gpt", or "role": "assistant").'
        )
    return examples


def collect_examples(
    rows: Sequence[Row],
    processor: Processor,
    config: FastVLMConfig,
    *,
    max_length: int | None = None,
    too_long: str = "error",
    **options: Any,
) -> Examples:
    """The rows of a data set as the model sees them, and those that it can't see.

    Args:
        rows, processor, config: as in `build_example`.
        max_length: of an example in tokens; by default, and at most, the processor's.
        too_long: what becomes of longer ones: an "error" makes them bad rows, "skip" leaves them
            out, and "truncate" drops what is too much from their end, never a part of an image.
        options: as in `build_example`.

    Raises:
        ValueError: `too_long` or `max_length` is unknown or out of range.
    """
    limit = _check_limit(max_length, processor.max_length)
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long must be {', '.join(TOO_LONG)}, found {shown(too_long)}.")
    found = Examples()
    with progress_bar(len(rows), "Rows", unit="row", shown=len(rows) >= MANY) as bar:
        for row in rows:
            try:
                example = build_example(row, processor, config, **options)
            except ValueError as error:
                said = str(error).removeprefix(f"{row.where}: ").removesuffix(".")
                found.bad.append(BadRow(row.where, said))
            else:
                _sort_in(found, example, limit, too_long)
            bar.update()
    return found


def _sort_in(found: Examples, example: Example, limit: int, too_long: str) -> None:
    if len(example) > limit:
        longer = BadRow(example.where, f"it has {len(example)} tokens, more than {limit}")
        lists = {"error": found.bad, "skip": found.skipped, "truncate": found.cut}
        lists[too_long].append(longer)
        if too_long != "truncate":
            return
        example = cut_example(example, limit)
    if example.answers:
        found.kept.append(example)
    else:
        found.silent.append(BadRow(example.where, "no token of it is supervised"))


def _check_limit(max_length: int | None, most: int) -> int:
    if max_length is None:
        return most
    check_whole_number("max_length", max_length, 2)
    if max_length > most:
        raise ValueError(f"max_length can be at most {most}, the model's own, not {max_length}.")
    return max_length


def cut_example(example: Example, limit: int) -> Example:
    """The start of an example, of at most `limit` tokens and up to its last supervised one; no
    image is cut."""
    inside = (i.start for i in example.images if i.start < limit < i.start + i.tokens)
    limit = min(limit, next(inside, limit))
    answers = tuple(Span(s, min(e, limit)) for s, e in example.answers if s < limit)
    stop = answers[-1].stop if answers else limit
    return replace(
        example,
        input_ids=example.input_ids[:stop],
        answers=answers,
        images=tuple(image for image in example.images if image.start < stop),
    )
