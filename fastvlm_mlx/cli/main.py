"""The `fastvlm` command: one small function a subcommand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from ..hub.resolve import NANO
from ..version import __version__

app = typer.Typer(
    name="fastvlm",
    help="FastVLM, the vision language model, native in MLX.",
    epilog="Start with `fastvlm generate`: it describes a bundled image with the bundled model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SAMPLE_IMAGE = NANO / "images" / "penguins.png"
DESCRIBE = "Describe the image."
CHAT_HELP = """\
/image PATH  show an image (a path or URL) with the next question
/reset       forget the conversation
/help        this list
/quit        leave, as Ctrl-D does; Ctrl-C stops an answer"""
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder, Hub id, or 0.5b, 1.5b or 7b for Apple's models. "
        "By default the bundled nano model, which only names emoji, counts and reads handwriting."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16; by default the checkpoint's own, float32 on the CPU."
    ),
]
QuantizeBits = Annotated[int | None, typer.Option(help="Bits a weight: 2, 3, 4, 5, 6 or 8.")]
Images = Annotated[
    list[str] | None,
    typer.Option(help="Path, URL or data: URI. Repeat it for several images."),
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Side in pixels, a multiple of 64; smaller is faster and coarser."),
]
Fast = Annotated[bool, typer.Option("--fast", help="Decode large JPEGs coarser, in half the time.")]
System = Annotated[str | None, typer.Option(help="System prompt, if not the model's own.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above, answers vary.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total.")]
TopK = Annotated[int, typer.Option(help="Sample from this many tokens; 0 is all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the best.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 makes recent tokens less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the answer. Repeat it for several.")
]
MaxKvSize = Annotated[int | None, typer.Option(help="Positions that the KV cache keeps.")]
KvBits = Annotated[int | None, typer.Option(help="Bits of a quantized KV cache: 2 to 8.")]
PrefillStepSize = Annotated[int, typer.Option(help="Prompt tokens processed at a time.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: Model = None,
    image: Images = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The question; `<image>` in it marks an image's place, which is otherwise first. "
            f'By default "{DESCRIBE}"'
        ),
    ] = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    image_size: ImageSize = None,
    fast: Fast = False,
    max_kv_size: MaxKvSize = None,
    kv_bits: KvBits = None,
    prefill_step_size: PrefillStepSize = 2048,
    conv_mode: Annotated[
        str | None, typer.Option(help="Conversation template, such as qwen_2 or plain.")
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(help="Check up to this many tokens a step that stood in the prompt before."),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(help="A smaller model (as --model) that proposes tokens, checked in a step."),
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(help="Tokens that --draft-model proposes at a time.")
    ] = 3,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: QuantizeBits = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer and timings as one JSON object.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option(help="Print a table of timings after the answer.")
    ] = False,
) -> None:
    """Answer a question about images; with nothing else, describe a bundled one.

    fastvlm generate --model apple/FastVLM-0.5B --image photo.jpg --prompt "What is this?"
    """
    from ..checkpoint.load import load
    from ..generation.generate import stream_generate
    from ..generation.options import Options

    images = list(image or [])
    options = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        prefill_step_size=prefill_step_size,
        system=system,
        image_size=image_size,
        conv_mode=conv_mode,
        fast=fast,
        prompt_lookup=prompt_lookup,
        num_draft_tokens=num_draft_tokens,
    )
    loaded, processor = load(model, revision=revision, dtype=dtype, quantize=quantize)
    if draft_model is not None:
        options = replace(options, draft_model=load(draft_model, dtype=dtype))
    if not images and prompt is None:
        images = [str(SAMPLE_IMAGE)]
        typer.echo(f"No --image and no --prompt: describing {SAMPLE_IMAGE}.", err=True)
    responses = stream_generate(
        loaded,
        processor,
        DESCRIBE if prompt is None else prompt,
        image=images,
        **vars(options),
    )
    text, last = show(responses, quiet=as_json)
    if as_json:
        result = {**asdict(last), "text": text}
        del result["token"]
        typer.echo(json.dumps(result, ensure_ascii=False))
    elif verbose:
        print_timings(last)


def show(responses: Iterator[Any], *, quiet: bool = False) -> tuple[str, Any]:
    """Print an answer as it appears; the whole text and the last response."""
    text = ""
    for response in responses:  # there is always one, since max_tokens is at least 1
        text += response.text
        if not quiet:
            typer.echo(response.text, nl=False)
            sys.stdout.flush()
    if not quiet:
        typer.echo()
    return text, response


def print_timings(response: Any) -> None:
    """A table of where the time of an answer went, on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, seconds in (
        ("Read and resize", response.preprocess_time),
        ("Encode image", response.encode_time),
        ("Prefill", response.prefill_time),
        ("Time to first token", response.ttft),
    ):
        table.add_row(name, f"{1000 * seconds:.1f} ms")
    table.add_row("Prompt", f"{response.prompt_tokens} tokens")
    table.add_row(
        "Answer", f"{response.generation_tokens} tokens, {response.generation_tps:.1f} a second"
    )
    table.add_row("Peak memory", f"{response.peak_memory:.3f} GB")
    table.add_row("Ended by", str(response.finish_reason))
    Console(stderr=True).print(table)


@app.command()
def chat(
    model: Model = None,
    image: Images = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    image_size: ImageSize = None,
    fast: Fast = False,
    max_kv_size: MaxKvSize = None,
    kv_bits: KvBits = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: QuantizeBits = None,
) -> None:
    """Talk about images, turn by turn.

    Commands in the chat: /image PATH, /reset, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from ..checkpoint.load import load
    from ..generation.chat import Chat

    loaded, processor = load(model, revision=revision, dtype=dtype, quantize=quantize)
    conversation = Chat(
        loaded,
        processor,
        system=system,
        image_size=image_size,
        fast=fast,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
    )
    pending = [check_image(path) for path in image or []]
    typer.echo("Ask away; /help lists the commands.", err=True)
    while (line := read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        elif command == "/help":
            typer.echo(CHAT_HELP)
        elif command == "/reset":
            conversation.reset()
            pending.clear()
        elif command == "/image":
            add_image(pending, argument.strip())
        elif line.startswith("/"):
            typer.echo(f"There is no command {command}; /help lists those there are.", err=True)
        elif line:
            answer(conversation, line, pending)


def read_line() -> str | None:
    """A line typed in the chat, without spaces around it; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D or /quit leaves.", err=True)


def check_image(path: str) -> str:
    """The path itself, if an image can be read there; else the error that says why not."""
    from ..image.load import load_image

    load_image(path)
    return path


def add_image(pending: list[str], path: str) -> None:
    """Put an image before the next question, or say why it can't be."""
    if not path:
        typer.echo("Name an image: /image PATH.", err=True)
        return
    try:
        pending.append(check_image(path))
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {describe(error)}", err=True)


def answer(conversation: Any, question: str, pending: list[str]) -> None:
    """Print the answer to a question about the pending images, which are then used up."""
    turns = len(conversation.messages)
    try:
        show(conversation.ask(question, image=list(pending), stream=True))
    except KeyboardInterrupt:
        typer.echo(" [stopped]")
        conversation.stop()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {describe(error)}", err=True)
    if len(conversation.messages) > turns:
        pending.clear()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint, in any layout.")],
    target: Annotated[
        Path | None, typer.Argument(help="The folder to write; not needed with --report.")
    ] = None,
    revision: Revision = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16; by default the checkpoint's own."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Bits a weight (8, 6, 5, 4, 3, 2), or mixed-2-6, -3-4, -3-6, -4-6."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4; the last three fix the bits.")
    ] = None,
    quantize_vision: Annotated[
        str | None, typer.Option(help="Bits of the encoder, which is otherwise not quantized.")
    ] = None,
    quantize_projector: Annotated[
        str | None, typer.Option(help="Bits of the projector, or none.")
    ] = None,
    quantize_embeddings: Annotated[
        str | None, typer.Option(help="Bits of embeddings and output layer, or none.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images, and .jsonl of image and question if there is one, on which "
            "a decoder below 8 bits learns to answer as the source does."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="mlx, llava, transformers or apple-export (needs coremltools).")
    ] = "mlx",
    overwrite: Annotated[bool, typer.Option(help="Replace the target if it exists.")] = False,
    report: Annotated[
        bool,
        typer.Option(help="Print size and error of this precision; without one, of many."),
    ] = False,
    questions: Annotated[
        Path | None,
        typer.Option("--eval", help="With --report: .jsonl of image, question, answer, task."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    upload_repo: Annotated[
        str | None, typer.Option(help="Also upload the folder to this repository, user/name.")
    ] = None,
) -> None:
    """Turn a checkpoint in any layout into a folder to load or push, by default for MLX.

    fastvlm convert apple/FastVLM-0.5B fastvlm-0.5b-4bit --quantize 4 --quantize-vision 8
    """
    from tempfile import TemporaryDirectory

    from ..convert import convert as run

    parts = {
        "vision": quantize_vision,
        "projector": quantize_projector,
        "embeddings": quantize_embeddings,
    }
    settings = quantize_settings(quantize, group_size, mode, parts)
    if target is None and not report:
        raise ValueError("Name the folder to write, or ask for a --report.")
    with TemporaryDirectory() as temporary:
        # What calibration gains is measured on the folder that it wrote.
        written = target or (Path(temporary) / "calibrated" if calibrate else None)
        if written is not None:
            run(
                source,
                written,
                revision=revision,
                dtype=dtype,
                quantize=settings,
                calibrate=calibrate,
                layout=layout,
                overwrite=overwrite,
            )
        if report:
            name = f"{quantize} bits" if (quantize or "").isdigit() else quantize or "asked for"
            compared = None if settings is None else {name: settings}
            folders = {f"{name}, calibrated": written} if written and calibrate else {}
            print_report(source, revision, compared, folders, questions, as_json)
    if target is None:
        return
    typer.echo(f"Wrote {target}.")
    if upload_repo is not None:
        upload(target, upload_repo)


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="0.5b, 1.5b or 7b, or a Hub id.")],
    stage: Annotated[
        int | None, typer.Option(help="Training stage, 2 or 3; 2 is in the original's archives.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="hub, pytorch, apple-silicon or mlx: whose files.")
    ] = None,
    revision: Revision = None,
    to: Annotated[
        Path | None, typer.Option(help="A folder of your own, instead of the cache.")
    ] = None,
) -> None:
    """Fetch a published model, or go on with an interrupted download, and print its folder.

    fastvlm download 0.5b
    """
    from ..hub.resolve import download_model

    typer.echo(download_model(model, stage=stage, variant=variant, revision=revision, to=to))


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A folder that `fastvlm convert` wrote.")],
    repo: Annotated[str, typer.Option(help="Where to: user/name.")],
    private: Annotated[bool, typer.Option(help="Show it to nobody else.")] = False,
) -> None:
    """Push a model to the Hub, with its card; a folder that does not load is refused.

    fastvlm upload fastvlm-0.5b-4bit --repo user/FastVLM-0.5B-4bit
    """
    import warnings

    from ..checkpoint.upload import upload as run

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        url = run(folder, repo, private=private)
    for note in notes:
        typer.echo(f"Note: {note.message}", err=True)
    typer.echo(url)


@app.command(
    epilog="Each row is the median of warm runs of one answer, from the file to the last token. "
    "Its floor is the least that the machine needs for it: the floating-point operations of matrix "
    "products, convolutions and attention at the rate of a large matrix product, or the bytes of "
    "weights and activations at the rate of a large copy, whichever takes longer. Small models "
    "and single tokens are bound by the launches of GPU kernels instead; they are counted below."
)
def bench(
    model: Model = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture; by default one of 12 megapixels, as a JPEG in memory."),
    ] = None,
    image_size: ImageSize = None,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens beside the image's.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    runs: Annotated[int, typer.Option(help="Of everything, after one that does not count.")] = 5,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: QuantizeBits = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every sample and count as one JSON object.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="What --json printed before: say how many times better each stage is."),
    ] = None,
) -> None:
    """Measure how fast a model runs here, stage by stage, and how far that is from the hardware.

    fastvlm bench --model apple/FastVLM-0.5B --quantize 4

    fastvlm bench --json > before.json

    fastvlm bench --compare before.json
    """
    from ..bench.bench import bench as run
    from ..bench.table import differences, print_result, read_result, times_better

    earlier = None if compare is None else read_result(compare)
    result = run(
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


def print_report(
    source: str,
    revision: str | None,
    compared: dict[str, Any] | None,
    folders: dict[str, Path],
    questions: Path | None,
    as_json: bool,
) -> None:
    """Print a precision report as a table or as JSON."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluate.precision import COMPARED, precision_report

    rows: list[Any] = []
    settings = COMPARED if compared is None else compared
    count = 1 + len(settings) + len(folders)
    report = precision_report(
        source, settings, folders=folders, questions=questions, revision=revision
    )
    for row in report:
        typer.echo(f"{len(rows) + 1} of {count}: {row.name}", err=True)
        rows.append(row)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    tasks = list(rows[0].accuracy)
    table = Table(
        "Precision", "Size, MB", "Bits a weight", "Feature error", "Logit error", "Same tokens"
    )
    for task in tasks:
        table.add_column(f"{task} right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.size / 1e6:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.feature_error:.4f}",
            f"{row.logit_error:.4f}",
            f"{row.agreement:.1%}",
            *(f"{row.accuracy[task]:.1%}" for task in tasks),
        )
    Console(width=max(100, 100 + 12 * len(tasks))).print(table)


def quantize_settings(
    quantize: str | None, group_size: int | None, mode: str | None, parts: dict[str, str | None]
) -> dict[str, Any] | None:
    """The flags as `quantize.settings` takes them; None if nothing is to be quantized."""
    from ..checkpoint.quantize import settings

    given = settings(quantize) if quantize is not None else {}
    if mode is not None:
        given["mode"] = mode
    for part, own in parts.items():
        if own == "none":
            given[part] = False
        elif own is not None:
            given[part] = settings(own) | ({"group_size": group_size} if group_size else {})
    if given and group_size is not None:
        given["group_size"] = group_size
    return given or None


def describe(error: BaseException) -> str:
    """An error as one sentence; the system's own errors name their file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def main() -> None:
    """Run the command; bad input ends it with a sentence and exit code 2."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may lack letters of an answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {describe(error)}", err=True)
        sys.exit(2)
