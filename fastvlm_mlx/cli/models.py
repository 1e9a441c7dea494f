"""`fastvlm models`: the published models, and which of them are on this disk."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..hub.cached import cached, size_on_disk
from ..hub.registry import ENTRIES, LICENSE, Entry


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the published models: sizes, precision, licence, and which are downloaded.

    fastvlm models
    """
    rows = [_row(entry) for entry in ENTRIES]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        _print_rows(rows)


def _row(entry: Entry) -> dict[str, Any]:
    folder = cached(entry)
    return {
        "name": entry.name,
        "size": entry.size,
        "stage": entry.stage,
        "variant": entry.variant,
        "precision": entry.precision,
        "gigabytes": entry.gigabytes if folder is None else size_on_disk(folder) / 1e9,
        "downloaded": None if folder is None else str(folder),
        "url": entry.url,
        **LICENSE,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("Name", "Size", "Stage", "Variant", "Decoder in", "GB", "Downloaded", box=None)
    for row in rows:
        gigabytes = "-" if row["gigabytes"] is None else f"{row['gigabytes']:.2f}"
        there = "yes" if row["downloaded"] else "no"
        told = (str(row[key]) for key in ("name", "size", "stage", "variant", "precision"))
        table.add_row(*told, gigabytes, there)
    Console(width=110).print(table)
    typer.echo(f"Licence of all: {LICENSE['license_name']}, {LICENSE['license_link']}")
    typer.echo(
        "`fastvlm download NAME` fetches one; 0.5b, 1.5b and 7b are the first of their size."
    )
