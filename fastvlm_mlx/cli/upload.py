"""`fastvlm upload`: a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import warnings_as_notes


def upload(
    folder: Annotated[
        Path, typer.Argument(help="A folder that `fastvlm convert`, `fuse` or `train` wrote.")
    ],
    repo: Annotated[str, typer.Option(help="The repository to push to, user/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Push a model to the Hub, with its card; a folder that does not load is refused.

    fastvlm upload fastvlm-0.5b-4bit --repo user/FastVLM-0.5B-4bit
    """
    push(folder, repo, private=private)


def push(folder: Path, repo: str, *, private: bool = False) -> None:
    """Upload a folder, and print the notes on it and its page."""
    from ..checkpoint.upload import upload as upload_folder

    with warnings_as_notes():
        url = upload_folder(folder, repo, private=private)
    typer.echo(url)
