"""The stages that `bench` measures, and its results as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .machine import machine_in_words


class Stage(NamedTuple):
    """A figure that is measured; `more` says whether more of it is better."""

    title: str
    unit: str
    more: bool = False


STAGES = {
    "load": Stage("Load", "s"),
    "preprocess": Stage("Read and resize", "s"),
    "encode": Stage("Encode", "s"),
    "prefill": Stage("Prefill", "s"),
    "ttft": Stage("Time to first token", "s"),
    "decode": Stage("Decode", "tokens/s", more=True),
    "total": Stage("End to end", "s"),
    "memory": Stage("Peak memory", "GB"),
}


def differences(result: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """What makes two results hard to compare, a sentence each."""
    sentences = []
    for part in ("settings", "machine"):
        for name, value in result[part].items():
            before = earlier[part].get(name, value)  # what was not recorded can't differ
            if before != value and name not in ("runs", "fastvlm-mlx"):
                sentences.append(f"{name.replace('_', ' ')} is {value}, and was {before}.")
    return sentences


def times_better(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, float]:
    """How many times better each stage is than in an earlier result."""
    better: dict[str, float] = {}
    for name, stage in STAGES.items():
        now, before = (r["stages"][name]["median"] for r in (result, earlier))
        better[name] = now / before if stage.more else before / now
    return better


def read_result(file: Path) -> dict[str, Any]:
    """A result that `--json` printed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    import json

    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for name in STAGES:
            float(result["stages"][name]["median"])
        dict(result["settings"]), dict(result["machine"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is not a result of `fastvlm bench --json`.") from None
    return result


def print_result(result: dict[str, Any], earlier: dict[str, Any] | None = None) -> None:
    """Print what was measured, a table of the stages and one of the counts."""
    from rich.console import Console
    from rich.table import Table

    titles = ["Before"] if earlier else []
    titles += ["Median", "Least", "Most", "Floor", "Times floor"]
    titles += ["Times better"] if earlier else []
    table = Table("Stage", "")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    better = times_better(result, earlier) if earlier else {}
    for name, stage in STAGES.items():
        row = result["stages"][name]
        cells = [
            format_figure(row[key], stage.unit) for key in ("median", "least", "most", "floor")
        ]
        cells.append(f"{row['ratio']:.1f}")
        if earlier:
            before = format_figure(earlier["stages"][name]["median"], stage.unit)
            cells = [before, *cells, f"{better[name]:.2f}"]
        table.add_row(stage.title, "ms" if stage.unit == "s" else stage.unit, *cells)
    counts = Table("On a GPU")
    for title in ("Primitives", "Kernel launches, at least"):
        counts.add_column(title, justify="right")
    for name, title in (("encode", "Encode"), ("prefill", "Prefill"), ("decode", "One token")):
        found = result["graph"][name]
        counts.add_row(title, str(sum(found["primitives"].values())), str(found["launches"]))
    console = Console(width=max(100, Console().width), soft_wrap=True, highlight=False)
    console.print(*summary(result), sep="\n")
    console.print(table)
    console.print(counts)
    for sentence in differences(result, earlier) if earlier else ():
        console.print(f"Not the same as before: {sentence}")


def summary(result: dict[str, Any]) -> list[str]:
    """What was measured, on what machine, and what the floors come from; a sentence each."""
    settings, machine, rates = result["settings"], result["machine"], result["rates"]
    bits = f", quantized to {settings['quantize']} bits" if settings["quantize"] else ""
    width, height = settings["image"]
    products = ", ".join(f"{kind}: {rate / 1e9:.3g}" for kind, rate in rates["products"].items())
    return [
        f"{settings['model']}, {settings['dtype']}{bits}: a picture of {width} x {height} pixels "
        f"as {settings['image_size']} x {settings['image_size']}, a prompt of "
        f"{settings['visual_tokens']} visual and {settings['prompt_tokens']} text tokens, "
        f"{settings['tokens']} tokens generated, {settings['runs']} runs.",
        f"{machine['device']}: {machine_in_words(machine)}; mlx {machine['mlx']}.",
        f"Floors: {rates['flops'] / 1e9:.3g} GFLOP/s, the best of large matrix products "
        f"({products}), and {rates['bytes'] / 1e9:.3g} GB/s, read and written by a large copy.",
    ]


def format_figure(value: float, unit: str) -> str:
    """Three significant digits; seconds become milliseconds."""
    if unit == "s":
        value = 1000 * value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
