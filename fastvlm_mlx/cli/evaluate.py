"""`fastvlm eval`: how well a model answers questions, and whether another one does better."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generation.options import Options
from ..generation.scheduler import MAX_BATCH
from .arguments import Bits, Dtype, Model, Revision, option_flags
from .printing import print_nano_note

if TYPE_CHECKING:
    from ..evaluate.items import Items
    from ..evaluate.presets import Preset
    from ..evaluate.results import Result
    from ..evaluate.statistics import Difference

FOLDER = Path("fastvlm-eval")
EXAMPLE = (
    'A line of --data is an object such as {"image": "cat.jpg", "question": "What is this?", '
    '"answer": "a cat"}; "answers" holds several right ones, "choices" the texts of A, B, C, '
    '"task" what it is counted under. Several questions of one image stand in "questions". '
    "docs/evaluate.md says what each metric counts."
)


@option_flags("system", "conv_mode", "image_size", "temperature", "top_p", "seed", "stop")
def evaluate(
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl of questions; with --preset, a Parquet file or a folder of them instead "
            "of the Hub's."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published benchmark; --list names them.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact, caseless, vqa, textvqa, anls, relaxed, mcq, open, yesno, contains, "
            "formula, cer, bleu or cider. The default is exact, or the preset's."
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second model, named as for --model, to test against.")
    ] = None,
    compare_quantize: Annotated[
        int | None,
        typer.Option(
            help="Quantize the second model to so many bits; without --compare it is the first."
        ),
    ] = None,
    suffix: Annotated[
        str,
        typer.Option(help='What every question of --data ends with, such as "Answer in a word."'),
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many.")] = None,
    out: Annotated[
        Path, typer.Option(help="The folder for answers, figures and pages of mistakes.")
    ] = FOLDER,
    log: Annotated[
        Path | None,
        typer.Option(
            help="The file of answers that a run goes on from, instead of one in --out that is "
            "named after the data, the model and its options."
        ),
    ] = None,
    html: Annotated[bool, typer.Option(help="Write the page of mistakes.")] = True,
    max_batch: Annotated[
        int, typer.Option(help="Answers decoded together; 1 times them as for one person.")
    ] = MAX_BATCH,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of an answer. The default is "
            f"{Options.max_tokens}, or the preset's."
        ),
    ] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object.")
    ] = False,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list", help="List the presets, with published figures and what --out has measured."
        ),
    ] = False,
    **options: Any,
) -> None:
    """Measure how well a model answers questions about images, with 95 % intervals.

    fastvlm eval --data questions.jsonl --metric anls

    fastvlm eval --model 0.5b --preset chartqa --limit 200

    fastvlm eval --model 0.5b --data questions.jsonl --compare-quantize 4

    An interrupted run goes on where it was when the same command is given again.
    """
    from ..evaluate.results import compare as find_differences
    from ..evaluate.table import difference_lines, result_lines, result_table

    if list_presets:
        _list_presets(out)
        return
    chosen, name, items = _questions(data, preset, suffix, limit)
    metric = metric or (chosen.metric if chosen else "exact")
    _check(metric, items, compare is not None or compare_quantize is not None, log)
    if max_tokens is None:
        max_tokens = chosen.max_tokens if chosen else Options.max_tokens
    options |= {"max_tokens": max_tokens, "stop": tuple(options["stop"])}
    asked = _Asked(name, items, metric, chosen, out, log, html, max_batch, options)
    loading = {"revision": revision, "dtype": dtype}
    results = [asked.ask(model, loading | {"quantize": quantize})]
    if compare is not None or compare_quantize is not None:
        other = loading | {"quantize": compare_quantize}
        if compare is not None:
            other["revision"] = None
        results.append(asked.ask(compare or model, other))
    differences = find_differences(*results) if len(results) == 2 else {}
    if as_json:
        _print_json(results, differences)
    else:
        for result in results:
            _print(result_table(result), result_lines(result))
        if differences:
            _print(None, difference_lines(*results, differences))
    if model is None:
        print_nano_note()
    if any(result.failed for result in results):
        sys.exit(1)


def _questions(
    data: Path | None, preset: str | None, suffix: str, limit: int | None
) -> tuple[Preset | None, str, Items]:
    """What is to be asked, read before a model is."""
    from ..evaluate.items import first_items, read_items
    from ..evaluate.presets import PresetItems, find_preset

    if preset is not None:
        if suffix:
            raise ValueError("A preset's questions have a suffix of their own; leave out --suffix.")
        chosen = find_preset(preset)
        return chosen, preset, first_items(PresetItems(chosen, data), limit)
    if data is None:
        raise ValueError("Name a .jsonl of questions with --data, or a benchmark with --preset.")
    return None, data.stem, first_items(read_items(data, suffix=suffix), limit)


def _check(metric: str, items: Items, two: bool, log: Path | None) -> None:
    """Say what can't become of an evaluation before a model is loaded."""
    from ..evaluate.metrics import score_answers

    score_answers(metric, ["a", "b"], [["a"], ["b"]])  # its library is there
    if metric == "cider" and len(items) < 2:
        score_answers(metric, ["a"], [["a"]])  # says why
    if two and log is not None:
        raise ValueError("--log holds the answers of one model; leave it out to compare two.")


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
        label = Path(name).name if name else "nano"
        label += f"-{loading['quantize']}bit" if loading["quantize"] else ""
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


def _print(table: Any, lines: list[str]) -> None:
    from rich.console import Console

    if table is not None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for line in lines:
        typer.echo(line)


def _print_json(results: list[Result], differences: Mapping[str, Difference]) -> None:
    from ..evaluate.results import as_json

    found = [as_json(result) for result in results]
    said = {name: asdict(difference) for name, difference in differences.items()}
    typer.echo(json.dumps(found[0] if len(found) == 1 else {"models": found, "difference": said}))


def _list_presets(out: Path) -> None:
    from ..evaluate.presets import PRESETS
    from ..evaluate.results import measured
    from ..evaluate.table import preset_table

    _print(preset_table(PRESETS, measured(out)), [])
    for name, preset in PRESETS.items():
        if preset.note:
            typer.echo(f"{name}: {preset.note}")
