"""`fastvlm fuse`: a base and an adapter as one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoint.upload import check_repo
from ..fuse import base_named_by
from ..fuse import fuse as fuse_models
from .arguments import Revision
from .convert import BitsOrPreset, Layout, SourceDtype, UploadRepo, quantize_flags
from .upload import push

if TYPE_CHECKING:
    from ..fuse import Fused


def fuse(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] ADAPTER",
            help="Folder or Hub id of the base, and of the adapter; an adapter alone names its "
            "base.",
        ),
    ],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    revision: Revision = None,
    dtype: SourceDtype = None,
    quantize: BitsOrPreset = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Expand a quantized base, as layouts other than mlx need."
        ),
    ] = False,
    layout: Layout = "mlx",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the target if it holds a model.")
    ] = False,
    upload_repo: UploadRepo = None,
) -> None:
    """Merge an adapter (LoRA, DoRA, a trained projector) into its base, in any layout.

    fastvlm fuse apple/FastVLM-0.5B run/adapter --to fastvlm-0.5b-clocks
    """
    if len(sources) > 2:
        raise ValueError("Give the base and one adapter; fuse others into the result, one by one.")
    if upload_repo is not None:
        check_repo(upload_repo)
    adapter = sources[-1]
    if len(sources) == 1:
        base, revision = base_named_by(adapter)
    else:
        base = sources[0]
    done = fuse_models(
        base,
        adapter,
        to,
        revision=revision,
        layout=layout,
        dtype=dtype,
        quantize=quantize_flags(quantize, None, None, {}),
        dequantize=dequantize,
        overwrite=overwrite,
    )
    _say(done)
    if upload_repo is not None:
        push(to, upload_repo)


def _say(done: Fused) -> None:
    """What was fused, and what packing anew has cost."""
    for layer in done.wider:
        bits = "float" if layer.bits is None else f"{layer.bits} bits"
        typer.echo(
            f"Kept wider: {layer.name} in {bits}; packed as before it would agree to "
            f"{layer.before:.1%} with the unfused layer.",
            err=True,
        )
    if done.layers:
        lowest = min(done.layers, key=lambda layer: layer.agreement)
        typer.echo(
            f"Packed {len(done.layers)} quantized layers anew; they agree to at least "
            f"{lowest.agreement:.2%} with the unfused ones ({lowest.name}).",
            err=True,
        )
    if done.same_tokens is not None:
        typer.echo(
            f"On sample images, {done.same_tokens:.1%} of the tokens are those of the unfused "
            "model.",
            err=True,
        )
    typer.echo(f"Wrote {done.folder}.")
