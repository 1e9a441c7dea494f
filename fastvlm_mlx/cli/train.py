"""`fastvlm train`: fine-tune a model on a file of conversations and a folder of images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..finetuning import ADAPTER, finetune
from ..finetuning import check as look
from ..train.loop import NotFinite, Nothing, Stopped
from ..train.settings import TrainOptions, help_of, read_settings
from .arguments import Model, Revision
from .printing import print_error

EXAMPLE = (
    "For example: `fastvlm train --model 0.5b --data chats.json --images photos --out run "
    "--validation 0.05`. The data is LLaVA's JSON or JSONL, chats in JSONL, a CSV, or a folder of "
    "images with a .txt beside each. The same command goes on with a run that was interrupted. "
    "Then: `fastvlm generate --model 0.5b --adapter run/adapter --image photo.jpg`."
)
Data = Annotated[
    str,
    typer.Option(help="Rows: .json, .jsonl, .csv, a folder, or a data set on the Hub."),
]
Out = Annotated[
    Path, typer.Option(help="The run's folder: checkpoints, log, plot, and the result in the end.")
]
Images = Annotated[
    Path | None,
    typer.Option(help="Where paths of images start.", show_default="beside --data"),
]
Config = Annotated[
    Path | None,
    typer.Option(help="A JSON file of these options, such as another run's options.json."),
]
Question = Annotated[
    str | None,
    typer.Option(help="Asked in rows that have only captions.", show_default="Describe the image."),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=NAME",
        help="The column of image, question, answer, id, messages or conversations. Repeat it.",
        show_default=False,
    ),
]
Subset = Annotated[str | None, typer.Option(help="Of a data set on the Hub.")]
Split = Annotated[str | None, typer.Option(help="Of a data set on the Hub.", show_default="train")]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Show bad rows, two rows as the model sees them, token counts and the memory that "
        "the run will need; then stop, before any weight is read.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def train_flags(command: Any) -> Any:
    """Give a command that ends in `**options` a flag for each training option.

    A flag that is not given is None, so that a stage's preset and --config can say what it is.
    """
    hints = get_type_hints(TrainOptions)
    *own, _ = signature(command, eval_str=True).parameters.values()
    flags = [
        Parameter(
            each.name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_type_of(hints[each.name]), _flag(each.name, each)],
        )
        for each in fields(TrainOptions)
    ]
    command.__signature__ = Signature([*own, *flags])
    return command


def _type_of(hint: Any) -> Any:
    return list[str] | None if hint == tuple[str, ...] else hint | None


def _flag(name: str, each: Any) -> Any:
    default = each.default if each.default not in (None, ()) else False
    shown = str(default).lower() if isinstance(default, bool) and default else str(default)
    return typer.Option(help=help_of(each), show_default=False if default is False else shown)


@train_flags
def train(
    data: Data,
    out: Out,
    model: Model = None,
    images: Images = None,
    config: Config = None,
    check: Check = False,
    question: Question = None,
    column: Column = None,
    subset: Subset = None,
    split: Split = None,
    revision: Revision = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Fine-tune a model on conversations about images.

    fastvlm train --model 0.5b --data chats.json --images photos --out run --check

    fastvlm train --model 0.5b --data chats.json --images photos --out run --validation 0.05

    fastvlm train --model 7b --data scans.csv --out run --quantize 4 --rank 32

    Stopped at any moment, the same command goes on from the last checkpoint.
    """
    given = dict(read_settings(config)) if config is not None else {}
    given.pop("model", None)  # which options.json names beside them
    given |= {name: value for name, value in options.items() if value not in (None, [])}
    reading = {
        "images": images,
        "columns": dict(map(_column, column or [])) or None,
        "question": question,
        "subset": subset,
        "split": split,
    }
    if check:
        _run(lambda: _check(model, data, revision, reading, given))
        return
    _run(lambda: _finetune(model, data, out, revision, quiet, reading, given))


def _check(
    model: str | None,
    data: str,
    revision: str | None,
    reading: dict[str, Any],
    options: dict[str, Any],
) -> None:
    from rich.console import Console

    found = look(model, data, revision=revision, **reading, **options)
    found.data.print(Console(), found.processor.tokenizer)
    for line in found.memory.lines() if found.memory else []:
        typer.echo(line)
    if found.data.problem is not None:
        raise ValueError(found.data.problem)


def _finetune(
    model: str | None,
    data: str,
    out: Path,
    revision: str | None,
    quiet: bool,
    reading: dict[str, Any],
    options: dict[str, Any],
) -> None:
    done = finetune(model, data, out, revision=revision, progress=not quiet, **reading, **options)
    if done.rank:  # the first process speaks for all
        return
    result = done.result
    best = (
        ""
        if result.best is None
        else (f" The validation loss was lowest, {result.best:.4f}, after step {result.best_step}.")
    )
    typer.echo(f"Trained {result.steps} steps.{best}", err=True)
    name = "" if model is None else f" --model {model}"
    how = (
        f"{name} --adapter {done.folder}"
        if done.folder.name == ADAPTER
        else (f" --model {done.folder}")
    )
    typer.echo(f"Try it: fastvlm generate{how} --image photo.jpg", err=True)


def _run(work: Callable[[], None]) -> None:
    try:
        work()
    except KeyboardInterrupt as interrupt:
        where = "and saved; the same command goes on from here"
        if not isinstance(interrupt, Stopped):
            where = "at once; the same command goes on from the last checkpoint"
        typer.echo(f"Stopped {where}.", err=True)
        sys.exit(130)
    except (TypeError, NotFinite, Nothing) as error:
        print_error(error)
        sys.exit(2)


def _column(text: str) -> tuple[str, str]:
    field, equals, name = text.partition("=")
    if not equals:
        raise ValueError(f"--column must be FIELD=NAME, found {text!r}.")
    return field.strip(), name.strip()
