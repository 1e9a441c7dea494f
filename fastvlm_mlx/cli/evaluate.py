"""`fastvlm eval`: how well a model answers questions, and whether another one does better."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluate.metrics import METRICS
from ..generation.options import Options
from ..generation.scheduler import MAX_BATCH
from .arguments import Adapter, Bits, Dtype, Model, Revision, option_flags
from .printing import print_nano_note

if TYPE_CHECKING:
    from ..evaluate.items import Items
    from ..evaluate.presets import Preset
    from ..evaluate.results import Result

FOLDER = Path("fastvlm-eval")
EXAMPLE = (
    'A line of --data is an object such as {"image": "cat.jpg", "question": "What is this?", '
    '"answer": "a cat"}; "answers" holds several right ones, "choices" the texts of A, B, C, '
    '"task" what it is counted under. Several questions of one image stand in "questions". '
    "docs/evaluate.md says what each metric counts."
)

Data = Annotated[
    Path | None,
    typer.Option(
        help="A .jsonl of questions; with --preset, a Parquet file or a folder of them instead "
        "of the Hub's."
    ),
]
PresetName = Annotated[str | None, typer.Option(help="A published benchmark; --list names them.")]
MetricName = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(METRICS)}. The default is the preset's; otherwise mcq if all questions "
        "have choices, and exact if not."
    ),
]
Compare = Annotated[
    str | None, typer.Option(help="A second model, named as for --model, to test against.")
]
CompareBits = Annotated[
    int | None,
    typer.Option(
        help="Quantize the second model to so many bits; without --compare it is the first."
    ),
]
CompareAdapter = Annotated[
    str | None,
    typer.Option(
        help="An adapter on the second model, as for --adapter; without --compare that is the "
        "first without its own."
    ),
]
Suffix = Annotated[
    str,
    typer.Option(help='What every question of --data ends with, such as "Answer in a word."'),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask only the first so many.")]
Out = Annotated[Path, typer.Option(help="The folder for answers, figures and pages of mistakes.")]
LogFile = Annotated[
    Path | None,
    typer.Option(
        help="The file of answers that a run goes on from, instead of one in --out that is "
        "named after the data, the model and its options."
    ),
]
Html = Annotated[bool, typer.Option(help="Write the page of mistakes.")]
MaxBatch = Annotated[
    int, typer.Option(help="Answers decoded together; 1 times them as for one person.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of tokens of an answer. The default is "
        f"{Options.max_tokens}, or the preset's."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")]
ListPresets = Annotated[
    bool,
    typer.Option(
        "--list", help="List the presets, with published figures and what --out has measured."
    ),
]


@option_flags("system", "conv_mode", "image_size", "temperature", "top_p", "seed", "stop")
def evaluate(
    model: Model = None,
    adapter: Adapter = None,
    data: Data = None,
    preset: PresetName = None,
    metric: MetricName = None,
    compare: Compare = None,
    compare_quantize: CompareBits = None,
    compare_adapter: CompareAdapter = None,
    suffix: Suffix = "",
    limit: Limit = None,
    out: Out = FOLDER,
    log: LogFile = None,
    html: Html = True,
    max_batch: MaxBatch = MAX_BATCH,
    max_tokens: MaxTokens = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    as_json: AsJson = False,
    list_presets: ListPresets = False,
    **options: Any,
) -> None:
    """Measure how well a model answers questions about images, with 95 % intervals.

    fastvlm eval --data questions.jsonl --metric anls

    fastvlm eval --model 0.5b --preset chartqa --limit 200

    fastvlm eval --model 0.5b --data questions.jsonl --compare-adapter run/adapter

    An interrupted run goes on where it was when the same command is given again.
    """
    from ..checkpoint.load import check_loading

    if list_presets:
        _list_presets(out)
        return
    chosen, name, items = _questions(data, preset, suffix, limit)
    metric = metric or (chosen.metric if chosen else _usual_metric(items))
    second: dict[str, Any] = {"quantize": compare_quantize, "adapter": compare_adapter}
    two = compare is not None or any(value is not None for value in second.values())
    _check(metric, chosen, items)
    if two and log is not None:
        raise ValueError("--log holds the answers of one model; leave it out to compare two.")
    first: dict[str, Any] = {"revision": revision, "dtype": dtype}
    second = first | second | ({"revision": None} if compare is not None else {})
    if two:
        check_loading(compare or model, **second)  # before the first one has answered everything
    if max_tokens is None:
        max_tokens = chosen.max_tokens if chosen else Options.max_tokens
    options |= {"max_tokens": max_tokens, "stop": tuple(options["stop"])}
    asked = _Asked(name, items, metric, chosen, out, log, html, max_batch, options)
    results = [asked.ask(model, first | {"quantize": quantize, "adapter": adapter})]
    if two:
        results.append(asked.ask(compare or model, second))
    _report(results, as_json)
    if model is None:
        print_nano_note()
    if any(result.failed for result in results):
        sys.exit(1)


def _questions(
    data: Path | None, preset: str | None, suffix: str, limit: int | None
) -> tuple[Preset | None, str, Items]:
    """What is to be asked, read before a model is."""
    from ..evaluate.items import first_items, read_items
    from ..evaluate.presets import PRESETS, PresetItems, find_preset

    if preset is not None:
        if suffix:
            raise ValueError("A preset's questions have a suffix of their own; leave out --suffix.")
        chosen = find_preset(preset)
        return chosen, preset, first_items(PresetItems(chosen, data), limit)
    if data is None:
        raise ValueError("Name a .jsonl of questions with --data, or a benchmark with --preset.")
    name = data.name if data.stem in PRESETS else data.stem  # which --list shows as measured
    return None, name, first_items(read_items(data, suffix=suffix), limit)


def _usual_metric(items: Items) -> str:
    return "mcq" if all(item.choices for item in items) else "exact"


def _check(metric: str, chosen: Preset | None, items: Items) -> None:
    """Say what can't become of an evaluation before a model is loaded."""
    from ..evaluate.metrics import check_metrics
    from ..evaluate.metrics.captions import check_images

    check_metrics(metric, chosen.own_metrics if chosen else {item.metric for item in items})
    if metric == "cider" and chosen is None:
        check_images(len({item.images for item in items}))


@dataclass
class _Asked:
    """An evaluation without its model."""

    name: str
    items: Items
    metric: str
    preset: Preset | None
    out: Path
    log: Path | None
    html: bool
    max_batch: int
    options: dict[str, Any]

    def ask(self, name: str | None, loading: dict[str, Any]) -> Result:
        """Load a model, ask it, and write its reports."""
        from ..checkpoint.load import load
        from ..evaluate.evaluate import evaluate as measure
        from ..evaluate.evaluate import files_of, write_reports

        model, processor = load(name, **loading)
        label = "/".join(Path(name).parts[-2:]) if name else "nano"
        label += f"-{loading['quantize']}bit" if loading["quantize"] else ""
        label += f"+{'/'.join(Path(loading['adapter']).parts[-2:])}" if loading["adapter"] else ""
        files = files_of(self.out, self.name, label, model, processor, **self.options)
        log = self.log or files.log
        try:
            result = measure(
                model,
                processor,
                self.items,
                self.metric,
                name=self.name,
                label=label,
                log=log,
                published=self.preset.published if self.preset else None,
                max_batch=self.max_batch,
                progress=True,
                **self.options,
            )
        except KeyboardInterrupt:
            typer.echo("Stopped; the same command goes on from here.", err=True)
            sys.exit(130)
        write_reports(result, self.items, files, page=self.html)
        written = [log, files.result, *([files.page] if self.html else [])]
        typer.echo(f"Wrote {', '.join(map(str, written))}.", err=True)
        return result


def _report(results: list[Result], as_json: bool) -> None:
    """Print what was measured, and how the second model differs from the first."""
    from ..evaluate.results import as_json as in_json
    from ..evaluate.results import compare
    from ..evaluate.table import difference_lines, result_lines, result_table

    differences = compare(results[0], results[1]) if len(results) > 1 else {}
    if as_json:
        found = [in_json(result) for result in results]
        said = {name: asdict(difference) for name, difference in differences.items()}
        both = {"models": found, "difference": said}
        typer.echo(json.dumps(both if len(results) > 1 else found[0]))
        return
    for result in results:
        _print(result_table(result), result_lines(result))
    _print(None, difference_lines(results[0], results[-1], differences))


def _print(table: Any, lines: list[str]) -> None:
    from rich.console import Console

    if table is not None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for line in lines:
        typer.echo(line)


def _list_presets(out: Path) -> None:
    from ..evaluate.presets import PRESETS
    from ..evaluate.results import measured
    from ..evaluate.table import preset_table

    _print(preset_table(PRESETS, measured(out)), [])
    for name, preset in PRESETS.items():
        if preset.note:
            typer.echo(f"{name}: {preset.note}")
