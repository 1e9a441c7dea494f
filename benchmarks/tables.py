"""From the samples of `compare.py` to medians, ratios and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from worker import OURS

Samples = dict[str, dict[str, list[float]]]


class Figure(NamedTuple):
    """One thing that is measured; `more` says whether more of it is better."""

    title: str
    unit: str
    more: bool = False


FIGURES = {
    "encode": Figure("encoder and projector", "s"),
    "ttft": Figure("time to first token", "s"),
    "decode": Figure("decoding", "tokens/s", more=True),
    "load": Figure("loading", "s"),
    "resident": Figure("peak memory of the process", "GB"),
    "arrays": Figure("peak memory of arrays", "GB"),
}


def peers(result: dict[str, Any]) -> list[str]:
    """Who was measured beside this library."""
    return [side for side in result["versions"] if side != OURS]


def advantage(key: str, samples: Samples, peer: str) -> float | None:
    """How many times better this library is: the median over the rounds, each a pair.

    None where the peer has no such figure.
    """
    ours, theirs = samples[key][OURS], samples[key][peer]
    if not theirs or not ours:
        return None
    more = FIGURES[key].more
    return statistics.median(a / b if more else b / a for a, b in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the most in brackets; a dash for no values."""
    if not values:
        return "–"
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g}–{max(values):.3g})"


def header() -> tuple[str, ...]:
    """The table's columns: the side, then a figure each."""
    return ("", *(f"{figure.title}, {figure.unit}" for figure in FIGURES.values()))


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table without its header, a side a row; peers have how far this library is ahead."""
    return [
        (side, *(cell(key, result["samples"], side) for key in FIGURES))
        for side in result["versions"]
    ]


def cell(key: str, samples: Samples, side: str) -> str:
    found = spread(samples[key][side])
    ratio = None if side == OURS else advantage(key, samples, side)
    return found if ratio is None else f"{found}; {ratio:.2f}×"


def describe_setting(result: dict[str, Any]) -> list[str]:
    """What was measured, where and with what, a sentence a line."""
    model, settings = result["model"], result["settings"]
    return [
        f"Decoder of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, "
        f"{settings['dtype']}; images of {settings['image_size']} pixels square; a prompt of one "
        f"image and {settings['text_tokens']} text tokens; {settings['tokens']} greedy tokens.",
        describe_machine_in_words(result["machine"]),
        "; ".join(describe_versions(side, about) for side, about in result["versions"].items())
        + ".",
        f"Median of {settings['rounds']} rounds, least and most in brackets; memory from one run. "
        f"Last, how many times better {OURS} is: the median of the rounds' ratios.",
    ]


def describe_machine_in_words(machine: dict[str, Any]) -> str:
    preloaded = f", {machine['preloaded']} preloaded" if machine["preloaded"] else ""
    gpus = "".join(
        f"; {gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}"
        for gpu in machine["gpus"]
    )
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}{preloaded}{gpus}."


def describe_versions(side: str, about: dict[str, str]) -> str:
    below = [f"{name} {about[name]}" for name in ("mlx", "torch", "cuda") if name in about]
    return f"{side} {about['library']} with {' and '.join(below)} on {about['device']}"


def describe_outputs(outputs: dict[str, Any]) -> list[str]:
    """How the outputs compare with each peer's, a sentence a line."""
    lines = []
    for peer, found in outputs.items():
        said = (
            f"Beside {peer}, vision features differ by at most "
            f"{found['features_difference']:.1e} of their standard deviation"
        )
        step = found["first_difference"]
        if step is None:
            lines.append(f"{said}, and all {found['tokens']} greedy tokens are the same.")
            continue
        margins = found["margin"]
        apart = " and ".join(f"{m['margin']:+.1e} ({side})" for side, m in margins.items())
        lines.append(
            f"{said}. Greedy tokens differ first at step {step}, where the logits of the two "
            f"tokens lie {apart} apart, and all logits have a standard deviation of "
            f"{margins[OURS]['std']:.1e}."
        )
    return lines


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, whose columns after the first are set to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def markdown_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def comparison(result: dict[str, Any]) -> str:
    """A result of `compare.py` as Markdown, without a heading."""
    return "\n\n".join(
        (
            markdown_list(describe_setting(result)),
            markdown_table(header(), rows(result)),
            markdown_list(describe_outputs(result["outputs"])),
        )
    )
