"""Write RESULTS.md and its plots from the JSON files that the other scripts write.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import growth
import launches
import plots
import second_question
from machine import note
from random_checkpoint import SIZES
from tables import (
    FIGURES,
    advantage,
    comparison,
    describe_machine_in_words,
    describe_versions,
    markdown_list,
    markdown_table,
    spread,
)
from worker import OURS, PEER

BENCHMARKS = Path(__file__).resolve().parent
Result = dict[str, Any]

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
MOST_DRIFT = 0.02
MOST_OF_FIRST = 0.1
MOST_BYTES = 1.5e9

Goal = tuple[str, str, str]  # what, the goal, what was found


def size_of(model: Result) -> str:
    """The size of a model by its decoder's width; its own name if it is none of them."""
    sizes = {fields["hidden_size"]: size for size, fields in SIZES.items()}
    return sizes.get(model["hidden_size"]) or str(model["name"])


def place_of(device: str) -> str:
    return "CPU" if device == "CPU" else "GPU"


# --- one function a kind of result: its heading, its page, its goals ----------------------------


def compare_title(result: Result) -> str:
    settings, device = result["settings"], result["versions"][OURS]["device"]
    return (
        f"{size_of(result['model'])} on {device}: {settings['dtype']}, "
        f"{settings['image_size']} pixels"
    )


def compare_goals(result: Result) -> Iterable[Goal]:
    place = place_of(result["versions"][OURS]["device"])
    size = size_of(result["model"])
    whole_image = result["settings"]["image_size"] == (256 if size == "nano" else 1024)
    goals = COMPARE_GOALS.get((place, size), {}) if whole_image else {}
    for key, goal in goals.items():
        found = advantage(key, result["samples"], PEER)
        if found is not None:
            what = f"{FIGURES[key].title}, {compare_title(result)}: times better than {PEER}"
            yield what, f"≥ {goal:g}", f"{found:.2f}"


def launches_title(result: Result) -> str:
    return f"Kernel launches on Metal: {result['model']['name']}, {result['image_size']} pixels"


def launches_page(result: Result) -> str:
    versions = "; ".join(
        describe_versions(side, {**about, "device": "Metal, counted"})
        for side, about in result["versions"].items()
    )
    return f"{markdown_list([versions + '.'])}\n\n{launches.markdown(result)}"


def launches_goals(result: Result) -> Iterable[Goal]:
    for stage, what in (("encode", "an image"), ("decode", "a token")):
        found = launches.ratio(result, stage)
        yield (
            f"kernel launches of {what}, {result['model']['name']}, over those of {PEER}",
            f"≤ {MOST_LAUNCHES}",
            f"{found:.2f}",
        )


def growth_title(result: Result) -> str:
    return f"Growth of cost: {result['model']['name']} on {result['device']}"


def growth_page(result: Result) -> str:
    tables = [
        growth_table(result["encode"], "image, pixels square", "megapixel", lambda n: n * n / 1e6),
        growth_table(result["prefill"], "prompt, tokens", "thousand tokens", lambda n: n / 1e3),
    ]
    memory = result["memory"]
    last = ", ".join(f"{key} {memory[key][-1] / 1e6:.1f} MB" for key in ("process", "arrays"))
    after = f"After {memory['generation'][-1]} generations of the bundled model: {last}."
    setting = markdown_list([describe_machine_in_words(result["machine"]), after])
    return "\n\n".join((setting, *tables))


def growth_table(
    series: growth.Series, points: str, unit: str, units: Callable[[int], float]
) -> str:
    costs = growth.unit_costs(series, units)
    rows = [
        (point, spread(seconds), f"{cost:.3g}")
        for (point, seconds), cost in zip(series.items(), costs, strict=True)
    ]
    return markdown_table((points, "s", f"s a {unit}"), rows)


def growth_goals(result: Result) -> Iterable[Goal]:
    found = growth.summary(result)
    name = growth_title(result)
    yield (
        f"{name}: encoding, departure from proportional to pixels",
        f"≤ {MOST_DEPARTURE:.0%}",
        f"{found['encode']:.0%}",
    )
    yield (
        f"{name}: prefill, departure from proportional to tokens",
        f"≤ {MOST_DEPARTURE:.0%}",
        f"{found['prefill']:.0%}",
    )
    yield (
        f"memory of the process, growth over {result['memory']['generation'][-1]} generations",
        f"≤ {MOST_DRIFT:.0%}",
        f"{found['process']:+.1%}",
    )


def second_title(result: Result) -> str:
    return f"A second question: {result['model']['name']}, {result['image_size']} pixels"


def second_page(result: Result) -> str:
    rows = [(f"{name} question", spread(found)) for name, found in result["seconds"].items()]
    setting = markdown_list([describe_machine_in_words(result["machine"])])
    return f"{setting}\n\n{markdown_table(('', 'time to first token, s'), rows)}"


def second_goals(result: Result) -> Iterable[Goal]:
    what = f"time to first token of a second question, {result['model']['name']}, of the first's"
    yield what, f"≤ {MOST_OF_FIRST}", f"{second_question.ratio(result['seconds']):.3f}"


def memory_title(result: Result) -> str:
    return f"Memory beyond the weights: {result['size']}, {result['bits']} bits"


def memory_page(result: Result) -> str:
    whole = result["whole"]
    names = {"weights": "weights", "encoding": "while encoding", "answering": "while answering"}
    rows = [(what, f"{whole[key] / 1e9:.2f}") for key, what in names.items()]
    setting = markdown_list(
        [
            f"{result['dtype']} where not quantized, {result['image_size']} pixels; measured with "
            f"{result['layers']} layers on {result['device']}, weights and KV cache counted for "
            f"{SIZES[result['size']]['num_hidden_layers']}.",
            "The peaks are those of arrays, without the weights.",
        ]
    )
    return f"{setting}\n\n{markdown_table(('', 'GB'), rows)}"


def memory_goals(result: Result) -> Iterable[Goal]:
    peak = max(result["whole"]["encoding"], result["whole"]["answering"])
    what = f"{result['size']}, {result['bits']} bits, {result['image_size']} pixels: GB at most"
    yield f"{what} beyond the weights", f"≤ {MOST_BYTES / 1e9}", f"{peak / 1e9:.2f}"


def batch_title(result: Result) -> str:
    return f"{result['requests']} requests together, {result['model']}, {answers_of(result)}"


def answers_of(result: Result) -> str:
    return f"answers of {result['tokens'] / result['requests']:.0f} tokens"


def batch_page(result: Result) -> str:
    """Throughput one by one and together."""
    rows = [
        [name, f"{seconds:.3g}", f"{result['tokens'] / seconds:.3g}"]
        for name, seconds in result["seconds (median)"].items()
    ]
    least, most = result["times faster (least and most)"]
    return (
        f"{markdown_list([describe_machine_in_words(result['machine'])])}\n\n"
        f"{markdown_table(['', 's', 'tokens/s'], rows)}\n\n"
        f"- {result['times faster (median)']:.2f} times as fast ({least:.2f}–{most:.2f}); "
        f"{result['same answers']} of {result['requests']} answers are the same token for token."
    )


def batch_goals(result: Result) -> Iterable[Goal]:
    what = f"throughput of {batch_title(result)}"
    yield what, f"≥ {LEAST_THROUGHPUT:g}", f"{result['times faster (median)']:.2f}"


def table_title(result: Result) -> str:
    return str(result["title"])


def table_page(result: Result) -> str:
    """Whatever has its `results` in rows of the same fields."""
    first, *_ = rows = result["results"]
    fields = [name for name, value in first.items() if not isinstance(value, (list, dict))]
    cells = [[in_short(row[name]) for name in fields] for row in rows]
    return markdown_table([name.replace("_", " ") for name in fields], cells)


def table_goals(result: Result) -> Iterable[Goal]:
    return ()


def in_short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


KINDS: dict[str, tuple[Callable, Callable, Callable]] = {
    "compare": (compare_title, comparison, compare_goals),
    "launches": (launches_title, launches_page, launches_goals),
    "second-question": (second_title, second_page, second_goals),
    "growth": (growth_title, growth_page, growth_goals),
    "memory": (memory_title, memory_page, memory_goals),
    "batch": (batch_title, batch_page, batch_goals),
    "table": (table_title, table_page, table_goals),
}

# --- the page -----------------------------------------------------------------------------------


def page(results: dict[str, Result], plotted: Iterable[str] = ()) -> str:
    """RESULTS.md.

    Args:
        results: by name of their file, of known kinds.
        plotted: names of those with a plot, plots/NAME.png.
    """
    ordered = sorted(results.items(), key=lambda item: (list(KINDS).index(item[1]["kind"]), item))
    goals, sections = [], []
    for name, result in ordered:
        title, body, goals_of = KINDS[result["kind"]]
        goals += list(goals_of(result))
        image = f"![{title(result)}](plots/{name}.png)\n\n" if name in plotted else ""
        command = f"`{result['command']}`\n\n" if "command" in result else ""
        sections.append(f"## {title(result)}\n\n{command}{image}{body(result)}")
    introduction = (
        "# Results\n\nWritten by `python benchmarks/report.py` from the samples in "
        "[results](results); [README.md](README.md) says how they were taken and what the words "
        "mean. PATH and MODEL stand for places on the machine."
    )
    overview = f"## Goals\n\n{markdown_table(('', 'goal', 'measured'), goals)}"
    if not any(is_on_gpu(result) for result in results.values()):
        overview += (
            "\n\nNothing here was measured on a GPU. On a machine that has one, "
            "`python benchmarks/run_all.py` takes all of it in one command."
        )
    return "\n\n".join((introduction, overview, *sections)) + "\n"


def is_on_gpu(result: Result) -> bool:
    """Whether it is a comparison whose figures are a GPU's."""
    return result["kind"] == "compare" and place_of(result["versions"][OURS]["device"]) == "GPU"


def read_results(folder: Path) -> dict[str, Result]:
    """The results in a folder, by name of file; what names no kind is a table.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is of no known kind.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        result = {"kind": "table", "title": file.stem, **json.loads(file.read_text())}
        if result["kind"] not in KINDS or (result["kind"] == "table" and "results" not in result):
            raise ValueError(f"{file} is no result of these scripts; move it elsewhere.")
        found[file.stem] = result
    if not found:
        raise FileNotFoundError(f"There are no results in {folder}; run the scripts with --json.")
    return found


def draw_plots(results: dict[str, Result], folder: Path) -> list[str]:
    """Write the plots; the names of the results that have one."""
    if importlib.util.find_spec("matplotlib") is None:
        note("No plots without matplotlib: pip install 'fastvlm-mlx[benchmark]'.")
        return []
    return [name for name, found in results.items() if plots.draw(found, folder / f"{name}.png")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write RESULTS.md and its plots from results in JSON."
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=BENCHMARKS / "results",
        metavar="FOLDER",
        help="of JSON files; default: results beside this script",
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=BENCHMARKS,
        metavar="FOLDER",
        help="for RESULTS.md and plots; default: this script's",
    )
    args = parser.parse_args()
    try:
        results = read_results(args.results)
        plotted = draw_plots(results, args.target / "plots")
        (args.target / "RESULTS.md").write_text(page(results, plotted), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
