"""`fastvlm convert`: a checkpoint in another layout or precision, and a report of the cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.quantize import parse_quantize
from ..checkpoint.upload import check_repo
from ..convert import convert as convert_checkpoint
from .arguments import Revision
from .upload import push

if TYPE_CHECKING:
    from ..evaluate.precision import Row

SourceDtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16. The default is the checkpoint's own."),
]
BitsOrPreset = Annotated[
    str | None,
    typer.Option(help="Bits per weight (8, 6, 5, 4, 3, 2), or mixed-2-6, -3-4, -3-6, -4-6."),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Number of weights that share a scale: 32, 64 or 128.")
]
Mode = Annotated[
    str | None, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4; the last three fix the bits.")
]
VisionBits = Annotated[
    str | None, typer.Option(help="Bits of the encoder, which otherwise is not quantized.")
]
ProjectorBits = Annotated[str | None, typer.Option(help="Bits of the projector, or none.")]
EmbeddingBits = Annotated[
    str | None, typer.Option(help="Bits of the embeddings and the output layer, or none.")
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="A folder of images, and optionally a .jsonl of images and questions, on which a "
        "decoder below 8 bits learns to answer as the source does."
    ),
]
Layout = Annotated[
    str, typer.Option(help="mlx, llava, transformers or apple-export (needs coremltools).")
]
Report = Annotated[
    bool,
    typer.Option(
        help="Print the size and error of the chosen precision, or of many if none is chosen."
    ),
]
Questions = Annotated[
    Path | None,
    typer.Option(
        "--eval", help="With --report: a .jsonl of questions, as `fastvlm eval` takes them."
    ),
]
ReportMetric = Annotated[
    str, typer.Option(help="How --eval counts answers; `fastvlm eval --help` lists the metrics.")
]
UploadRepo = Annotated[
    str | None, typer.Option(help="Also upload the folder to this repository, user/name.")
]


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint, in any layout.")],
    target: Annotated[
        Path | None, typer.Argument(help="The folder to write; not needed with --report.")
    ] = None,
    revision: Revision = None,
    dtype: SourceDtype = None,
    quantize: BitsOrPreset = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    quantize_vision: VisionBits = None,
    quantize_projector: ProjectorBits = None,
    quantize_embeddings: EmbeddingBits = None,
    calibrate: Calibrate = None,
    layout: Layout = "mlx",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the target if it holds a model.")
    ] = False,
    report: Report = False,
    questions: Questions = None,
    metric: ReportMetric = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    upload_repo: UploadRepo = None,
) -> None:
    """Turn a checkpoint in any layout into a folder to load or push, for MLX by default.

    fastvlm convert apple/FastVLM-0.5B fastvlm-0.5b-4bit --quantize 4 --quantize-vision 8
    """
    from tempfile import TemporaryDirectory

    parts = {
        "vision": quantize_vision,
        "projector": quantize_projector,
        "embeddings": quantize_embeddings,
    }
    chosen = quantize_flags(quantize, group_size, mode, parts)
    _check_output(target, report, upload_repo, questions, metric)
    with TemporaryDirectory() as temporary:
        # What calibration gains is measured on the folder that it wrote.
        written = target or (Path(temporary) / "calibrated" if calibrate else None)
        if written is not None:
            convert_checkpoint(
                source,
                written,
                revision=revision,
                dtype=dtype,
                quantize=chosen,
                calibrate=calibrate,
                layout=layout,
                overwrite=overwrite,
            )
        if report:
            name = f"{quantize} bits" if (quantize or "").isdigit() else quantize or "asked for"
            compared = None if chosen is None else {name: chosen}
            folders = {f"{name}, calibrated": written} if written and calibrate else {}
            rows = _report_rows(source, revision, compared, folders, questions, metric)
            _print_report(rows, metric, as_json)
    if target is None:
        return
    typer.echo(f"Wrote {target}.")
    if target.samefile("."):
        typer.echo("Note: the folder you are in was replaced; `cd .` leads to it.", err=True)
    if upload_repo is not None:
        push(target, upload_repo)


def _check_output(
    target: Path | None,
    report: bool,
    upload_repo: str | None,
    questions: Path | None,
    metric: str,
) -> None:
    """Say what can't become of a conversion before it starts."""
    from ..evaluate.items import read_items
    from ..evaluate.metrics import check_metrics

    if target is None and not report:
        raise ValueError("Name the folder to write, or ask for a --report.")
    if upload_repo is not None:
        if target is None:
            raise ValueError("--upload-repo needs the folder to write; name it after the source.")
        check_repo(upload_repo)
    if questions is not None:
        if not report:
            raise ValueError("--eval is part of a --report; ask for that too.")
        check_metrics(metric, {item.metric for item in read_items(questions)})


def quantize_flags(
    quantize: str | None, group_size: int | None, mode: str | None, parts: dict[str, str | None]
) -> dict[str, Any] | None:
    """The flags as `parse_quantize` takes them; None if nothing is to be quantized."""
    given = parse_quantize(quantize) if quantize is not None else {}
    if mode is not None:
        given["mode"] = mode
    for part, own in parts.items():
        if own == "none":
            given[part] = False
        elif own is not None:
            given[part] = parse_quantize(own) | ({"group_size": group_size} if group_size else {})
    if given and group_size is not None:
        given["group_size"] = group_size
    return given or None


def _report_rows(
    source: str,
    revision: str | None,
    compared: dict[str, Any] | None,
    folders: Mapping[str, Path],
    questions: Path | None,
    metric: str,
) -> list[Row]:
    """The rows of a precision report; each is named on standard error once it is measured."""
    from ..evaluate.precision import COMPARED, precision_report

    rows: list[Row] = []
    compared = COMPARED if compared is None else compared
    count = 1 + len(compared) + len(folders)
    for row in precision_report(
        source, compared, folders=folders, questions=questions, metric=metric, revision=revision
    ):
        rows.append(row)
        typer.echo(f"{len(rows)} of {count}: {row.name}", err=True)
    return rows


def _print_report(rows: list[Row], metric: str, as_json: bool) -> None:
    """Print a precision report as a table or as JSON."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluate.metrics import METRICS
    from ..evaluate.table import said

    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    tasks = list(rows[0].accuracy)
    table = Table(
        "Precision", "Size, MB", "Bits per weight", "Feature error", "Logit error", "Same tokens"
    )
    for task in tasks:
        table.add_column(f"{task}: {metric} [95 %]")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.size / 1e6:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.feature_error:.4f}",
            f"{row.logit_error:.4f}",
            f"{row.agreement:.1%}",
            *(said(row.accuracy[task], percent=METRICS[metric].percent) for task in tasks),
        )
    Console(width=100 + 24 * len(tasks)).print(table)
