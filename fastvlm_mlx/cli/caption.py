"""`fastvlm caption`: captions for folders, lists, tables and archives of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..caption.job import EXISTING, Job
from ..caption.open import KINDS, check_out
from ..caption.run import Summary, caption_images
from ..caption.shards import SHARD_SIZE
from ..caption.sources import find_sources
from ..checkpoint.load import load
from ..checks import brief
from ..evaluate.questions import DEFAULT_QUESTION
from ..generation.scheduler import MAX_BATCH
from .arguments import Adapter, Bits, Dtype, Model, Revision, option_flags
from .printing import print_nano_note

OWN = Job()
FLAGS = (
    "system",
    "conv_mode",
    "image_size",
    "fast",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "prefill_step_size",
    "schema",
    "regex",
    "choices",
)


Sources = Annotated[
    list[str],
    typer.Argument(
        help="Folders, patterns such as 'photos/**/*.jpg', images, URLs, text lists (.txt), "
        ".jsonl, .csv, .tsv and .parquet files, WebDataset .tar files, or - for a list on standard "
        "input.",
        show_default=False,
    ),
]
Out = Annotated[str, typer.Option(help=f"Where to: {KINDS}.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="What to ask; repeat it, and each image gets one of them at random. {name}, {folder}, "
        "{tags} and the columns of a row are filled in.",
        show_default=DEFAULT_QUESTION,
    ),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(help="How often each --prompt is drawn; one for each.", show_default=False),
]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TEXT",
        help="Ask each image this, too if there is a --prompt, and write the answer to the column "
        "NAME. Repeat it for several; the image is encoded once.",
        show_default=False,
    ),
]
Existing = Annotated[
    str, typer.Option(help=f"What happens to captions that are there: {', '.join(EXISTING)}.")
]
Separator = Annotated[str, typer.Option(help="Between an old caption and what is added to it.")]
Trigger = Annotated[str | None, typer.Option(help="A word that every caption begins with or has.")]
Banned = Annotated[
    list[str] | None,
    typer.Option(
        help="A word that no caption may have: one that does is not written. Repeat it for "
        "several.",
        show_default=False,
    ),
]
MinWords = Annotated[int, typer.Option(help="Captions of fewer words are not written.")]
MaxWords = Annotated[
    int | None, typer.Option(help="Longer captions are cut after the last whole sentence.")
]
RetryErrors = Annotated[
    bool, typer.Option("--retry-errors", help="Try again what failed in an earlier run.")
]
ManifestFile = Annotated[
    Path | None,
    typer.Option(
        help="The file that an interrupted run goes on from.", show_default="beside --out"
    ),
]
MaxBatch = Annotated[int, typer.Option(help="Captions that are decoded together.")]
ShardSize = Annotated[
    int, typer.Option(help="Images in each tar of a pattern such as captions-%06d.tar.")
]


@option_flags(*FLAGS)
def caption(
    sources: Sources,
    out: Out,
    model: Model = None,
    adapter: Adapter = None,
    prompt: Prompts = None,
    weight: Weights = None,
    question: Questions = None,
    existing: Existing = OWN.existing,
    separator: Separator = OWN.separator,
    trigger: Trigger = OWN.trigger,
    ban: Banned = None,
    min_words: MinWords = OWN.min_words,
    max_words: MaxWords = OWN.max_words,
    retry_errors: RetryErrors = OWN.retry_errors,
    manifest: ManifestFile = None,
    max_batch: MaxBatch = MAX_BATCH,
    shard_size: ShardSize = SHARD_SIZE,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    **options: Any,
) -> None:
    """Caption images, each exactly once: the same command goes on where it was interrupted.

    fastvlm caption photos --out captions.jsonl --model apple/FastVLM-0.5B
    """
    job = Job(
        prompts=tuple(prompt or ()),
        weights=tuple(weight or ()),
        questions=dict(map(_named_question, question or ())),
        existing=existing,
        separator=separator,
        trigger=trigger,
        banned=tuple(ban or ()),
        min_words=min_words,
        max_words=max_words,
        retry_errors=retry_errors,
    )
    found = find_sources(sources)
    check_out(out, found, job)  # before a model is downloaded
    loaded = load(model, revision=revision, dtype=dtype, quantize=quantize, adapter=adapter)
    options["stop"] = tuple(options["stop"])
    try:
        summary = caption_images(
            *loaded,
            found,
            out,
            job,
            manifest=manifest,
            max_batch=max_batch,
            shard_size=shard_size,
            progress=True,
            **options,
        )
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    if summary.rank == 0:  # others end with 0: a launcher ends all processes if one fails
        _end(summary, with_nano=model is None)


def _end(summary: Summary, *, with_nano: bool) -> None:
    for line in summary_lines(summary):
        typer.echo(line, err=True)
    if with_nano:
        print_nano_note()
    if summary.failed:
        sys.exit(1)


def _named_question(text: str) -> tuple[str, str]:
    name, equals, question = text.partition("=")
    if not equals:
        raise ValueError(f"--question must be NAME=TEXT, found {brief(text)}.")
    return name.strip(), question.strip()


def summary_lines(summary: Summary) -> list[str]:
    """What a run has done, for a person."""
    s = summary
    rate = f", {s.written / s.seconds:.1f} a second" if s.written and s.seconds else ""
    said = [f"Captioned {_images(s.written)} in {_duration(s.seconds)}{rate}"]
    if s.busy:
        said.append(f"the model was idle {s.idle / (s.busy + s.idle):.1%} of the time")
    lines = ["; ".join(said) + "."]
    if s.repeated:
        lines.append(f"{_images(s.repeated)} took answers about the same pixels.")
    if s.kept:
        lines.append(f"{_images(s.kept)} had captions already.")
    if s.flags:
        flags = ", ".join(f"{name}: {count}" for name, count in s.flags.most_common())
        lines.append(f"Captions to look at, by their flags: {flags}.")
    if s.failed:
        lines.append(f"{_images(len(s.failed))} failed, as listed; --retry-errors tries again.")
    if s.failed_before:
        lines.append(
            f"{_images(s.failed_before)} passed over: failed in an earlier run; --retry-errors "
            "tries again."
        )
    return lines


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
