"""`fastvlm bench`: how fast a model runs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Bits, Dtype, ImageSize, Model, Revision

FLOORS = (
    "Each row is the median of warm runs of one answer, from the file to the last token. Its floor "
    "is the least time that the machine needs for it: the floating-point operations of matrix "
    "products, convolutions and attention at the rate of a large matrix product, or the bytes of "
    "weights and activations at the rate of a large copy, whichever takes longer. Small models and "
    "single tokens are bound by launches of GPU kernels instead; the last table counts them."
)


def bench(
    model: Model = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture. The default is one of 12 megapixels, as a JPEG in memory."),
    ] = None,
    image_size: ImageSize = None,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens beside the visual ones.")] = 32,
    tokens: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 32,
    runs: Annotated[
        int, typer.Option(help="How often everything is measured, after a run to warm up.")
    ] = 5,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every sample and count as one JSON object.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="An earlier output of --json, to say how many times better each stage is."
        ),
    ] = None,
) -> None:
    """Measure how fast a model runs here, stage by stage, and how far that is from the hardware.

    fastvlm bench --model apple/FastVLM-0.5B --quantize 4

    fastvlm bench --json > before.json

    fastvlm bench --compare before.json
    """
    from ..bench.bench import bench as measure
    from ..bench.table import differences, print_result, read_result, times_better

    earlier = None if compare is None else read_result(compare)
    result = measure(
        model,
        image=image,
        image_size=image_size,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        runs=runs,
        revision=revision,
        dtype=dtype,
        quantize=quantize,
        note=lambda line: typer.echo(line, err=True),
    )
    if not as_json:
        print_result(result, earlier)
        return
    if earlier is not None:
        result["times_better"] = times_better(result, earlier)
        result["differences"] = differences(result, earlier)
    typer.echo(json.dumps(result))
