"""`fastvlm download`: a published model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..hub.resolve import download_model
from .arguments import Revision


def download(
    model: Annotated[str, typer.Argument(help="0.5b, 1.5b or 7b, or a Hub id.")],
    stage: Annotated[
        int | None,
        typer.Option(help="Training stage, 2 or 3; stage 2 is in the original's archives."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Whose files: hub, pytorch, apple-silicon or mlx.")
    ] = None,
    revision: Revision = None,
    to: Annotated[
        Path | None, typer.Option(help="The folder to write, instead of the cache.")
    ] = None,
) -> None:
    """Fetch a published model, or resume an interrupted download, and print its folder.

    fastvlm download 0.5b
    """
    typer.echo(download_model(model, stage=stage, variant=variant, revision=revision, to=to))
