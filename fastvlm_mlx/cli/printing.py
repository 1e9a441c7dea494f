"""What several commands print: an answer, its timings, notes, an error as one sentence."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..generation.response import Response
from ..hub.registry import find
from .interrupts import check_interrupt


def print_answer(responses: Iterator[Response], *, quiet: bool = False) -> tuple[str, Response]:
    """Print an answer as it appears; the whole text and the last response."""
    text = ""
    for response in responses:  # there is always one, since max_tokens is at least 1
        check_interrupt()
        text += response.text
        if not quiet:
            typer.echo(response.text, nl=False)
            sys.stdout.flush()
    if not quiet:
        typer.echo()
    return text, response


def print_timings(response: Response) -> None:
    """A table of where the time of an answer went, on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, seconds in (
        ("Read and resize", response.preprocess_time),
        ("Encode image", response.encode_time),
        ("Prefill", response.prefill_time),
        ("Time to first token", response.ttft),
    ):
        table.add_row(name, f"{1000 * seconds:.1f} ms")
    table.add_row("Prompt", f"{response.prompt_tokens} tokens")
    table.add_row(
        "Answer", f"{response.generation_tokens} tokens, {response.generation_tps:.1f} per second"
    )
    table.add_row("Peak memory", f"{response.peak_memory:.3f} GB")
    table.add_row("Ended by", str(response.finish_reason))
    Console(stderr=True).print(table)


def sentence(error: BaseException) -> str:
    """An error as one sentence; the system's own errors name their file."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}."
    return str(error) or type(error).__name__


def print_nano_note() -> None:
    """Say on standard error which model answers by default, and how to get a real one."""
    real = find("0.5b")
    typer.echo(
        "Note: this is nano, the small bundled model, which only knows drawn emoji, shapes and "
        f"short texts; for photos, --model {real.name} (a download of {real.gigabytes:.1f} GB).",
        err=True,
    )


def print_error(error: BaseException) -> None:
    """Say on standard error what went wrong."""
    typer.echo(f"Error: {sentence(error)}", err=True)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the process with one sentence and exit code 2 where the block meets bad input."""
    try:
        yield
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        sys.exit(2)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print the block's warnings on standard error, a line each, once it has ended well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        typer.echo(f"Note: {warning.message}", err=True)
