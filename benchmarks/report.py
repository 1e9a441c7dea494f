"""Write RESULTS.md and its plots from the JSON files that the measurements write."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fastvlm_mlx.bench.machine import machine_in_words

from . import plots
from .random_checkpoint import SIZES
from .tables import (
    FIGURES,
    MOST_DRIFT,
    Result,
    Samples,
    Series,
    advantage,
    departure,
    drift,
    in_short,
    kernels_of,
    markdown_list,
    markdown_table,
    ratio,
    spread,
    unit_costs,
)
from .turns import note
from .worker import OURS, PEER

BENCHMARKS = Path(__file__).resolve().parent
OPTIONS: dict[str, dict[str, Any]] = {
    "--results": {
        "type": Path,
        "default": BENCHMARKS / "results",
        "metavar": "FOLDER",
        "help": "of JSON files",
    },
    "--target": {
        "type": Path,
        "default": BENCHMARKS,
        "metavar": "FOLDER",
        "help": "for RESULTS.md and plots",
    },
}

# How many times better than mlx-vlm this library means to be, by device and size of the model.
FASTER_ON_CPU = {"encode": 3.5, "ttft": 3.0, "decode": 1.0, "resident": 1.11}
FASTER_ON_GPU = {"encode": 2.0, "ttft": 2.0, "decode": 1.3}
COMPARE_GOALS = {
    ("CPU", "0.5b"): FASTER_ON_CPU,
    ("CPU", "nano"): {"ttft": 3.0, "decode": 1.5},
    ("GPU", "0.5b"): FASTER_ON_GPU,
    ("GPU", "7b"): FASTER_ON_GPU,
}
MOST_LAUNCHES = 0.6
LEAST_THROUGHPUT = 3.0
MOST_DEPARTURE = 0.25
MOST_OF_FIRST = 0.1
MOST_BYTES = 1.5e9

Goal = tuple[str, str, str]  # what, the goal, what was measured


class Section(NamedTuple):
    """What a result is in RESULTS.md."""

    title: str
    body: str
    goals: list[Goal]


def compare(result: Result) -> Section:
    """Every side's figures; peers' with how many times better this library is."""
    samples, settings = result["samples"], result["settings"]
    size, device = size_of(result["model"]), result["versions"][OURS]["device"]
    title = f"{size} on {device}: {settings['dtype']}, {settings['image_size']} pixels"
    title += kernels_of(result["machine"])
    header = ["", *(f"{figure.title}, {figure.unit}" for figure in FIGURES.values())]
    rows = [
        [side, *(compare_cell(key, samples, side) for key in FIGURES)]
        for side in result["versions"]
    ]
    body = [
        markdown_list(*compare_setting(result)),
        markdown_table(header, rows),
        markdown_list(*(outputs_in_words(*item) for item in result["outputs"].items())),
    ]
    place = "CPU" if device == "CPU" else "GPU"
    whole_image = settings["image_size"] == (256 if size == "nano" else 1024)
    goals = COMPARE_GOALS.get((place, size), {}) if whole_image else {}
    found = {key: advantage(key, samples, PEER) for key in goals}
    return Section(
        title,
        "\n\n".join(body),
        [
            (f"{FIGURES[key].title}, {title}: times better than {PEER}", f"≥ {goal:g}", f"{a:.2f}")
            for key, goal in goals.items()
            if (a := found[key]) is not None
        ],
    )


def size_of(model: Result) -> str:
    """The size of a model by its decoder's width; its own name if it is none of them."""
    sizes = {fields["hidden_size"]: size for size, fields in SIZES.items()}
    return sizes.get(model["hidden_size"]) or str(model["name"])


def compare_cell(key: str, samples: Samples, side: str) -> str:
    found = spread(samples[key][side])
    better = None if side == OURS else advantage(key, samples, side)
    return found if better is None else f"{found}; {better:.2f}×"


def compare_setting(result: Result) -> list[str]:
    """What was measured, where and with what, a sentence a line."""
    model, settings, machine = result["model"], result["settings"], result["machine"]
    lines = [
        f"Decoder of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, "
        f"{settings['dtype']}; images of {settings['image_size']} pixels square; a prompt of one "
        f"image and {settings['text_tokens']} text tokens; {settings['tokens']} greedy tokens.",
        f"{machine_in_words(machine)}.",
        versions_in_words(result["versions"]),
        f"Median of {settings['rounds']} rounds, least and most in brackets; memory from one run. "
        f"Last, how many times better {OURS} is: the median of the rounds' ratios.",
    ]
    if kernels_of(machine):
        lines.append(
            "The kernels decide these times: by default OpenBLAS chooses them by the processor it "
            "finds, and the variable OPENBLAS_CORETYPE forces others."
        )
    return lines


def versions_in_words(versions: dict[str, dict[str, str]], device: str = "") -> str:
    """Each side with its libraries and the device that computes."""
    sides = []
    for side, about in versions.items():
        below = [f"{name} {about[name]}" for name in ("mlx", "torch", "cuda") if name in about]
        libraries = " and ".join(below)
        sides.append(f"{side} {about['library']} with {libraries} on {device or about['device']}")
    return f"{'; '.join(sides)}."


def outputs_in_words(peer: str, found: dict[str, Any]) -> str:
    """How the outputs compare with a peer's."""
    said = (
        f"Beside {peer}, visual features differ by at most "
        f"{found['features_difference']:.1e} of their standard deviation"
    )
    step = found["first_difference"]
    if step is None:
        return f"{said}, and all {found['tokens']} greedy tokens are the same."
    margins = found["margin"]
    apart = " and ".join(f"{m['margin']:+.1e} ({side})" for side, m in margins.items())
    return (
        f"{said}. Greedy tokens differ first at step {step}, where the logits of the two "
        f"tokens lie {apart} apart, and all logits have a standard deviation of "
        f"{margins[OURS]['std']:.1e}."
    )


def launches(result: Result) -> Section:
    """The launches, and the primitives by name."""
    name, counts, versions = result["model"]["name"], result["counts"], result["versions"]
    rows, goals = [], []
    for stage, one, what in (
        ("encode", "one image", "an image"),
        ("decode", "one token", "a token"),
        ("batch", "one step of 16 sequences", "a step of 16 sequences"),
    ):
        if stage not in counts[OURS]:  # of a result from before it was counted
            continue
        found = {side: counts[side][stage]["launches"] for side in counts}
        share = f"{found[OURS] / found[PEER]:.2f}"
        rows.append((one, *map(str, found.values()), share))
        goal = f"kernel launches of {what}, {name}, over those of {PEER}"
        goals.append((goal, f"≤ {MOST_LAUNCHES}", share))
    said = [versions_in_words(versions, "Metal, counted")]
    if "bytes" in result:  # not in a result from before they were counted
        said.append(bytes_in_words(result["bytes"]))
    body = (
        f"{markdown_list(*said)}\n\n"
        f"{markdown_table(('kernel launches', *counts, 'ratio'), rows)}\n\n"
        "<details><summary>Primitives by name</summary>\n\n"
        f"{primitives_table(counts)}\n\n</details>"
    )
    title = f"Kernel launches on Metal: {name}, {result['image_size']} pixels"
    return Section(title, body, goals)


def bytes_in_words(traffic: dict[str, int]) -> str:
    moved, floor = (traffic[key] / 1e9 for key in ("moved", "floor"))
    return (
        f"For an image in float16, the kernels of {OURS} read and write {moved:.3g} GB, counted "
        f"from the graph without caches: {moved / floor:.2f} times the {floor:.3g} GB that its "
        "products, convolutions and attention need, with all that comes between them fused."
    )


def primitives_table(counts: dict[str, Any]) -> str:
    columns = {
        f"{stage}, {side}": Counter(counts[side][stage]["primitives"])
        for stage in counts[OURS]
        for side in counts
    }
    names = [name for name, _ in sum(columns.values(), Counter()).most_common()]
    rows = [(name, *(str(column[name]) for column in columns.values())) for name in names]
    return markdown_table(("primitive", *columns), rows)


def second_question(result: Result) -> Section:
    name, seconds = result["model"]["name"], result["seconds"]
    rows = [(f"{which} question", spread(found)) for which, found in seconds.items()]
    what = f"time to first token of a second question, {name}{on_gpu(result)}, of the first's"
    return Section(
        f"A second question: {name}, {result['image_size']} pixels{on_gpu(result)}",
        f"{setting(result)}\n\n{markdown_table(('', 'time to first token, s'), rows)}",
        [(what, f"≤ {MOST_OF_FIRST}", f"{ratio(seconds['second'], seconds['first']):.3f}")],
    )


def on_gpu(result: Result) -> str:
    """For a title: the GPU, if there was one."""
    gpus = result["machine"]["gpus"]
    return f", on {gpus[0]['name']}" if gpus else ""


def same_picture(result: Result) -> Section:
    name, (first, *others) = result["model"]["name"], result["seconds"].items()
    rows = [(which, spread(found)) for which, found in (first, *others)]
    what = f"time to first token in the server, {name}, of the first question's"
    return Section(
        f"A picture that was asked about before: {name}, {result['image_size']} pixels",
        f"{setting(result)}\n\n{markdown_table(('', 'time to first token, s'), rows)}",
        [
            (f"{what}: {which}", f"≤ {MOST_OF_FIRST}", f"{ratio(found, first[1]):.3f}")
            for which, found in others
        ],
    )


def setting(result: Result, *lines: str) -> str:
    """The machine's line, and others."""
    return markdown_list(f"{machine_in_words(result['machine'])}.", *lines)


def growth(result: Result) -> Section:
    """The cost of encoding and prefill by size, and of memory by generations."""
    title = f"Growth of cost: {result['model']['name']} on {result['device']}"
    memory = result["memory"]
    generations = memory["generation"][-1]
    last = ", ".join(f"{key} {memory[key][-1] / 1e6:.1f} MB" for key in ("process", "arrays"))
    after = f"After {generations} generations of the bundled model: {last}."
    encode = unit_costs(result["encode"], lambda size: size**2 / 1e6)
    prefill = unit_costs(result["prefill"], lambda tokens: tokens / 1e3)
    body = (
        setting(result, after),
        growth_table(result["encode"], "image, pixels square", "s per megapixel", encode),
        growth_table(result["prefill"], "prompt, tokens", "s per thousand tokens", prefill),
    )
    drifted = f"memory of the process, growth over {generations} generations{on_gpu(result)}"
    most = f"≤ {MOST_DEPARTURE:.0%}"
    goals = [
        (f"{title}: encoding, departure from proportional to pixels", most, departure(encode)),
        (f"{title}: prefill, departure from proportional to tokens", most, departure(prefill)),
    ]
    return Section(
        title,
        "\n\n".join(body),
        [
            *((what, goal, f"{found:.0%}") for what, goal, found in goals),
            (drifted, f"≤ {MOST_DRIFT:.0%}", f"{drift(memory['process']):+.1%}"),
        ],
    )


def growth_table(series: Series, points: str, unit: str, costs: list[float]) -> str:
    rows = [
        (point, spread(seconds), f"{cost:.3g}")
        for (point, seconds), cost in zip(series.items(), costs, strict=True)
    ]
    return markdown_table((points, "s", unit), rows)


def memory(result: Result) -> Section:
    """Peaks of arrays for the whole depth."""
    size, whole = result["size"], result["whole"]
    names = {"weights": "weights", "encoding": "while encoding", "answering": "while answering"}
    rows = [(what, f"{whole[key] / 1e9:.2f}") for key, what in names.items()]
    lines = markdown_list(
        f"{result['dtype']} where not quantized, {result['image_size']} pixels; measured with "
        f"{result['layers']} layers on {result['device']}, weights and KV cache counted for "
        f"{SIZES[size]['num_hidden_layers']}.",
        "The peaks are those of arrays, without the weights.",
    )
    title = f"Memory beyond the weights: {size}, {result['bits']} bits{on_gpu(result)}"
    pixels = f"{result['image_size']} pixels{on_gpu(result)}"
    what = f"{size}, {result['bits']} bits, {pixels}: GB at most"
    peak = max(whole["encoding"], whole["answering"])
    goal = (f"{what} beyond the weights", f"≤ {MOST_BYTES / 1e9}", f"{peak / 1e9:.2f}")
    return Section(title, f"{lines}\n\n{markdown_table(('', 'GB'), rows)}", [goal])


def batch(result: Result) -> Section:
    """Throughput one by one and together."""
    requests, tokens, faster = (
        result[key] for key in ("requests", "tokens", "times faster (median)")
    )
    least, most = result["times faster (least and most)"]
    rows = [
        [name, f"{seconds:.3g}", f"{tokens / seconds:.3g}"]
        for name, seconds in result["seconds (median)"].items()
    ]
    answers = f"answers of {tokens / requests:.0f} tokens"
    title = f"{requests} requests together, {result['model']}, {answers}{on_gpu(result)}"
    body = (
        f"{setting(result)}\n\n{markdown_table(['', 's', 'tokens/s'], rows)}\n\n"
        f"- {faster:.2f} times as fast ({least:.2f}–{most:.2f}); "
        f"{result['same answers']} of {requests} answers are the same token for token."
    )
    goal = (f"throughput of {title}", f"≥ {LEAST_THROUGHPUT:g}", f"{faster:.2f}")
    return Section(title, body, [goal])


def table(result: Result) -> Section:
    """Whatever has its `results` in rows of the same fields."""
    first, *_ = rows = result["results"]
    fields = [name for name, value in first.items() if not isinstance(value, (list, dict))]
    cells = [[in_short(row[name]) for name in fields] for row in rows]
    body = markdown_table([name.replace("_", " ") for name in fields], cells)
    if "machine" in result:
        body = f"{setting(result, *result.get('notes', ()))}\n\n{body}"
    goals = [(f"{result['title']}: {what}", *rest) for what, *rest in result.get("goals", ())]
    return Section(result["title"], body, goals)


KINDS: dict[str, Callable[[Result], Section]] = {
    "compare": compare,
    "launches": launches,
    "second-question": second_question,
    "same-picture": same_picture,
    "growth": growth,
    "memory": memory,
    "batch": batch,
    "table": table,
}


def section(result: Result) -> Section:
    """A result's section, of the kind that it names."""
    return KINDS[result["kind"]](result)


def page(results: dict[str, Result], plotted: Iterable[str] = ()) -> str:
    """RESULTS.md.

    Args:
        results: by name of their file, of known kinds.
        plotted: names of those with a plot, plots/NAME.png.
    """
    kinds = list(KINDS)
    ordered = sorted(results.items(), key=lambda item: (kinds.index(item[1]["kind"]), item[0]))
    goals, texts = [], []
    for name, result in ordered:
        title, body, own_goals = section(result)
        goals += own_goals
        image = f"![{title}](plots/{name}.png)\n\n" if name in plotted else ""
        command = f"`{result['command']}`\n\n" if "command" in result else ""
        texts.append(f"## {title}\n\n{command}{image}{body}")
    introduction = (
        "# Results\n\nWritten by `python -m benchmarks report` from the samples in "
        "[results](results); [README.md](README.md) says how they were taken and what the words "
        "mean. PATH and MODEL stand for places on the machine."
    )
    overview = f"## Goals\n\n{goals_table(goals)}"
    if not any(is_on_gpu(result) for result in results.values()):
        overview += (
            "\n\nNothing here was measured on a GPU. On a machine that has one, "
            "`python -m benchmarks all` takes every measurement in one command."
        )
    return "\n\n".join((introduction, overview, *texts)) + "\n"


def goals_table(goals: list[Goal]) -> str:
    return markdown_table(("", "goal", "measured"), goals)


def is_on_gpu(result: Result) -> bool:
    """Whether it is a comparison whose figures are a GPU's."""
    return result["kind"] == "compare" and result["versions"][OURS]["device"] != "CPU"


def read_results(folder: Path) -> dict[str, Result]:
    """The results in a folder, by name of file; one that names no kind is a table.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is of no known kind.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        result = {"kind": "table", "title": file.stem, **json.loads(file.read_text())}
        if result["kind"] not in KINDS or (result["kind"] == "table" and "results" not in result):
            raise ValueError(f"{file} is no result of a measurement; move it elsewhere.")
        found[file.stem] = result
    if not found:
        raise FileNotFoundError(f"There are no results in {folder}; measure with --json first.")
    return found


def draw_plots(results: dict[str, Result], folder: Path) -> list[str]:
    """Write the plots; the names of the results that have one."""
    if importlib.util.find_spec("matplotlib") is None:
        note("No plots without matplotlib: pip install 'fastvlm-mlx[benchmark]'.")
        return []
    return [name for name, found in results.items() if plots.draw(found, folder / f"{name}.png")]


def write_report(args: argparse.Namespace) -> None:
    """Write RESULTS.md and the plots."""
    results = read_results(args.results)
    plotted = draw_plots(results, args.target / "plots")
    (args.target / "RESULTS.md").write_text(page(results, plotted), encoding="utf-8")
