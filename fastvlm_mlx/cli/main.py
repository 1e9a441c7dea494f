"""The `fastvlm` command: its subcommands, its version, and how it ends on bad input."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from ..version import __version__
from .bench import FLOORS, bench
from .caption import caption
from .chat import chat
from .convert import convert
from .doctor import doctor
from .download import download
from .evaluate import EXAMPLE as QUESTIONS
from .evaluate import evaluate
from .fuse import fuse
from .generate import generate
from .images import repeat_image_flag
from .interrupts import interrupts_noted
from .models import models
from .printing import errors_as_sentences
from .serve import EXAMPLE, serve
from .train import EXAMPLE as TRAINING
from .train import train
from .upload import upload
from .watch import watch

app = typer.Typer(
    name="fastvlm",
    help="FastVLM, the vision language model, native in MLX.",
    epilog="Start with `fastvlm generate`: it describes a bundled image with the bundled model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, watch, caption, models, download, convert, fuse, upload, doctor):
    app.command()(command)
app.command(epilog=FLOORS)(bench)
app.command(epilog=EXAMPLE)(serve)
app.command(epilog=TRAINING)(train)
app.command("eval", epilog=QUESTIONS)(evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _fill_closed_streams() -> None:
    """Keep the numbers of closed streams from other files, since MLX reads no file numbered 0."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number


def main() -> None:
    """Run the command; bad input ends it with a sentence and exit code 2."""
    _fill_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may lack letters of an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):  # bytes of another encoding may be part of a path
        sys.stdin.reconfigure(errors="surrogateescape")
    with errors_as_sentences(), interrupts_noted():
        if sys.stdout is None:
            raise ValueError("Standard output is closed: there is nowhere to write to.")
        arguments = sys.argv[1:]
        if arguments[:1] in (["generate"], ["chat"]):
            arguments = repeat_image_flag(arguments)
        app(arguments, prog_name="fastvlm")
