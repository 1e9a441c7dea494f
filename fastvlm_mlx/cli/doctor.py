"""`fastvlm doctor`: whether everything is right on this machine, to paste into a report."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from .arguments import Dtype, Model, Revision

WIDTH = 80


def doctor(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that a model computes here what it should, and how fast; run it first, and in reports.

    The exit code is 0 if all is right, and 1 if not.

    fastvlm doctor --model apple/FastVLM-0.5B
    """
    from ..bench.doctor import doctor as examine

    note = lambda line: typer.echo(line, err=True)  # noqa: E731
    result = examine(model, revision=revision, dtype=dtype, note=note)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        print_result(result)
    sys.exit(0 if result["healthy"] else 1)


def print_result(result: dict[str, Any]) -> None:
    """Print what `bench.doctor.doctor` found, in a terminal's 80 columns."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=WIDTH, highlight=False, markup=False)
    console.print(system_table(result["system"]))
    console.print(*said(result), sep="\n")
    table = Table("Against the CPU", "Error", "Bound", "")
    for check in result["checks"]:
        numbers = ("-" if x is None else f"{x:.1e}" for x in (check["error"], check["bound"]))
        table.add_row(check["name"], *numbers, "right" if check["holds"] else "WRONG")
    console.print(table)
    console.print(stage_table(result["bench"]["stages"]))
    for sentence in result["known"]:
        console.print(f"Known: {sentence}")
    verdict = "All is right." if result["healthy"] else "Something computes wrongly; report this."
    console.print(f"{verdict} ({result['seconds']:.0f} s)")


def system_table(system: dict[str, Any]) -> Any:
    """Versions, chip, system, memory and device, a line each."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    versions = (f"{name} {version}" for name, version in system["versions"].items())
    table.add_row("Versions", ", ".join(versions))
    table.add_row("Chip", system["chip"])
    table.add_row("System", f"{system['system']}, {system['machine']}")
    table.add_row("Memory", f"{system['memory'] / 2**30:.1f} GiB")
    info = system["device_info"]
    table.add_row("Device", ", ".join([system["device"], *(f"{k} {info[k]}" for k in info)]))
    return table


def said(result: dict[str, Any]) -> list[str]:
    """What was compared with what, and the answer."""
    compared, settings = result["compared"], result["bench"]["settings"]
    what = "the GPU" if compared["gpu"] else "the forms for a GPU, computed by the CPU,"
    lines = [
        f"{result['model']}: {what} in {compared['dtype']} against the CPU in float32; images of "
        f"{settings['image_size']} pixels."
    ]
    if not compared["gpu"]:
        lines.append("No GPU was there: this says nothing about its kernels.")
    if result["answer"] is not None:
        lines.append(f"Answer: {result['answer']}")
    return lines


def stage_table(stages: dict[str, Any]) -> Any:
    """Each stage beside its floor."""
    from rich.table import Table

    from ..bench.table import STAGES, format_figure

    table = Table("Stage", "")
    for title in ("Median", "Floor", "Times floor"):
        table.add_column(title, justify="right")
    for name, row in stages.items():
        stage = STAGES[name]
        numbers = (format_figure(row[key], stage.unit) for key in ("median", "floor"))
        unit = "ms" if stage.unit == "s" else stage.unit
        table.add_row(stage.title, unit, *numbers, f"{row['ratio']:.1f}")
    return table
