"""Plots of results, as PNG; needs matplotlib (`pip install 'fastvlm-mlx[benchmark]'`)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .tables import Result, Series, kernels_of
from .worker import COMPILED, EAGER, OURS, PEER

COLOURS = {OURS: "#1b6ca8", PEER: "#e08e0b", EAGER: "#7a7a7a", COMPILED: "#b0b0b0"}
WIDTH, DPI = 8.0, 100  # inches, and pixels per inch: 800 pixels wide


def draw(result: Result, file: Path) -> bool:
    """Write the plot of a result; False for a kind that has none."""
    drawings = {"compare": _stages, "growth": _growth}
    kind = result["kind"]
    if kind not in drawings:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = drawings[kind](plt, result)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
    return True


def _stages(plt: Any, result: Result) -> Any:
    """A bar per side: the time to the first token in its two parts, that of a token, and memory."""
    samples, sides = result["samples"], list(result["versions"])
    medians = {
        key: [statistics.median(found[side]) for side in sides]
        for key, found in samples.items()
        if key in ("encode", "ttft", "decode", "resident")
    }
    # In a noisy run the encoder may have taken longer than it did together with the prompt.
    encode = [min(pair) for pair in zip(medians["encode"], medians["ttft"], strict=True)]
    rest = [whole - part for whole, part in zip(medians["ttft"], encode, strict=True)]
    settings = result["settings"]
    figure, panels = plt.subplots(
        1, 3, figsize=(WIDTH, 1.7 + 0.35 * len(sides)), sharey=True, layout="constrained"
    )
    figure.suptitle(
        f"{result['model']['name']}, {settings['dtype']}, {settings['image_size']} pixels, "
        f"{result['versions'][OURS]['device']}{kernels_of(result['machine'])}",
        fontsize=11,
    )
    colours = [COLOURS[side] for side in sides]
    first, token, memory = panels
    first.barh(sides, encode, color=colours)
    prompt = first.barh(sides, rest, left=encode, color=colours, alpha=0.45)
    _label(first, prompt, medians["ttft"])
    handles = [plt.Rectangle((0, 0), 1, 1, color="#555555", alpha=alpha) for alpha in (1, 0.45)]
    figure.legend(
        handles,
        ["encoder and projector", "prompt to first token"],
        loc="outside lower left",
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    _panel(first, "Time to first token", "seconds")
    per_token = [1000 / rate for rate in medians["decode"]]
    _label(token, token.barh(sides, per_token, color=colours), per_token)
    _panel(token, "Each further token", "milliseconds")
    _label(memory, memory.barh(sides, medians["resident"], color=colours), medians["resident"])
    _panel(memory, "Peak memory of the process", "GB")
    first.invert_yaxis()
    return figure


def _label(panel: Any, bars: Any, values: list[float]) -> None:
    panel.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)


def _panel(panel: Any, title: str, unit: str) -> None:
    panel.margins(x=0.25)
    _axes(panel, title, unit)


def _growth(plt: Any, result: Result) -> Any:
    """Encoding over pixels, prefill over tokens, memory over generations."""
    figure, (encode, prefill, memory) = plt.subplots(
        1, 3, figsize=(WIDTH, 3.0), layout="constrained"
    )
    figure.suptitle(
        f"Growth of cost: {result['model']['name']} on {result['device']}; "
        "memory: the bundled model",
        fontsize=11,
    )
    megapixels = {str(int(size) ** 2 / 1e6): v for size, v in result["encode"].items()}
    _proportional(encode, megapixels)
    _axes(encode, "Encoding an image", "megapixels", "seconds")
    _proportional(prefill, result["prefill"])
    _axes(prefill, "Prefill", "tokens", "seconds")
    names = {"process": "process", "arrays": "arrays", "cached": "kept for reuse"}
    for name, label in names.items():
        megabytes = [value / 1e6 for value in result["memory"][name]]
        memory.plot(result["memory"]["generation"], megabytes, label=label)
    _axes(memory, "Memory", "generations", "MB")
    for panel in (encode, prefill, memory):
        panel.legend(fontsize=8, frameon=False)
    return figure


def _proportional(panel: Any, series: Series) -> None:
    """Medians with their spread, and the line of proportional growth through the median cost."""
    xs = [float(x) for x in series]
    medians = [statistics.median(values) for values in series.values()]
    below = [m - min(v) for m, v in zip(medians, series.values(), strict=True)]
    above = [max(v) - m for m, v in zip(medians, series.values(), strict=True)]
    slope = statistics.median(m / x for m, x in zip(medians, xs, strict=True))
    panel.plot([0, max(xs)], [0, slope * max(xs)], color="#bbbbbb", label="proportional")
    panel.errorbar(
        xs, medians, (below, above), fmt="o", color=COLOURS[OURS], capsize=3, label="measured"
    )


def _axes(panel: Any, title: str, x: str, y: str = "") -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.set_xlim(left=0)
    if y:
        panel.set_ylabel(y, fontsize=9)
        panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
