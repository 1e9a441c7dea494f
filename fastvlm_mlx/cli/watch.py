"""`fastvlm watch`: answers about what a camera, stream, screen, folder or video shows now."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..image.load import dragged_path
from ..live.actions import Actions
from ..live.records import JsonLines, Subtitles
from ..live.watch import Answer
from ..live.watch import watch as watch_source
from ..video.folder import FolderSource
from ..video.open import open_source
from ..video.screen import ScreenSource
from ..video.source import Source
from .arguments import Adapter, Bits, Dtype, Model, Revision, option_flags
from .live import LiveLines, PlainLines
from .printing import print_nano_note

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

SourceName = Annotated[
    str | None,
    typer.Argument(
        help="The URL of a stream (rtsp://user:password@host/path), a video file, a folder, or - "
        "for JPEG and PNG pictures on standard input."
    ),
]
Camera = Annotated[int | None, typer.Option(help="The number of a camera, from 0.")]
VideoFile = Annotated[Path | None, typer.Option(help="A video file.")]
Screen = Annotated[bool, typer.Option("--screen", help="What this screen shows.")]
Monitor = Annotated[int, typer.Option(help="Which screen, from 1; 0 is all of them as one.")]
Folder = Annotated[
    Path | None, typer.Option(help="A folder: each new picture in it, as it appears.")
]
Prompt = Annotated[
    str | None,
    typer.Option(help="The question; a description by default, and with --when nothing."),
]
Every = Annotated[str | None, typer.Option(help="The least time between answers: 2s, 500ms, 1m.")]
Fps = Annotated[
    float | None,
    typer.Option(help="Answers a second, held by a smaller image size where it must be."),
]
OnChange = Annotated[
    bool,
    typer.Option("--on-change", help="Pass over frames that look like the last answered one."),
]
When = Annotated[
    str | None,
    typer.Option(help="A yes-or-no question; --prompt and --do wait until it turns to yes."),
]
Do = Annotated[
    str | None,
    typer.Option(
        help="A program to run for each answer. It gets the answer on standard input and as "
        "FASTVLM_TEXT in its environment; no shell is involved."
    ),
]
Webhook = Annotated[str | None, typer.Option(help="A URL to which each answer is posted as JSON.")]
Realtime = Annotated[
    bool,
    typer.Option(
        help="Play a video file at its own speed, and drop pictures that come too fast; without, "
        "go from frame to frame as answers come, and --every counts in a file's own time."
    ),
]
Jsonl = Annotated[
    Path | None, typer.Option(help="A file to append each answer to, as a line of JSON.")
]
Thumbnails = Annotated[
    bool, typer.Option("--thumbnails", help="Put a small picture into each line of --jsonl.")
]
Srt = Annotated[Path | None, typer.Option(help="A new file for the answers as subtitles.")]


@option_flags(
    "system",
    "image_size",
    "fast",
    "max_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop",
)
def watch(
    source: SourceName = None,
    camera: Camera = None,
    video: VideoFile = None,
    screen: Screen = False,
    monitor: Monitor = 1,
    folder: Folder = None,
    prompt: Prompt = None,
    every: Every = None,
    fps: Fps = None,
    on_change: OnChange = False,
    when: When = None,
    do: Do = None,
    webhook: Webhook = None,
    realtime: Realtime = True,
    jsonl: Jsonl = None,
    thumbnails: Thumbnails = False,
    srt: Srt = None,
    model: Model = None,
    adapter: Adapter = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    **options: Any,
) -> None:
    """Answer about the newest frame of a source, again and again, until it ends or Ctrl-C.

    fastvlm watch --camera 0 --model 0.5b --prompt "What is the person holding?"

    fastvlm watch rtsp://user:password@192.168.1.20/stream --on-change --jsonl log.jsonl

    fastvlm watch --camera 0 --when "Is there a person?" --do "say someone is here"

    fastvlm watch --video talk.mp4 --no-realtime --every 5s --srt talk.srt
    """
    if thumbnails and jsonl is None:
        raise ValueError("--thumbnails are part of the lines of --jsonl FILE: give that too.")
    chosen = _source(source, camera, video, monitor if screen else None, folder)
    interval = None if every is None else seconds_of(every)
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        stack.enter_context(_terminated_as_interrupted())
        lines = LiveLines if sys.stdout.isatty() else PlainLines
        display = lines(chosen.live or not chosen.timed)
        takers = _takers(jsonl, thumbnails, srt, do, webhook, display)
        for taker in takers:
            stack.callback(taker.close)
        loaded = _load(model, adapter, revision, dtype, quantize)
        answers = watch_source(
            chosen,
            prompt,
            model=loaded,
            every=interval,
            fps=fps,
            on_change=on_change,
            when=when,
            realtime=realtime,
            note=display.note,
            on_text=display.add,
            **options,
        )
        stack.enter_context(display)
        stack.enter_context(closing(answers))  # type: ignore[type-var]
        _hand_on(answers, display, takers)


def _load(
    model: str | None,
    adapter: str | None,
    revision: str | None,
    dtype: str | None,
    bits: int | None,
) -> Any:
    from ..checkpoint.load import load

    loaded = load(model, revision=revision, dtype=dtype, quantize=bits, adapter=adapter)
    if model is None:
        print_nano_note()
    return loaded


def _takers(
    jsonl: Path | None,
    thumbnails: bool,
    srt: Path | None,
    do: str | None,
    webhook: str | None,
    display: PlainLines,
) -> list[Any]:
    """What keeps answers or acts on them; opened before a model is loaded."""
    takers: list[Any] = [] if jsonl is None else [JsonLines(jsonl, thumbnails=thumbnails)]
    takers += [] if srt is None else [Subtitles(srt)]
    if do is not None or webhook is not None:
        takers.append(Actions(do, webhook, display.note))
    return takers


def _hand_on(answers: Iterator[Answer], display: PlainLines, takers: list[Any]) -> None:
    """Give each answer to those that keep it or act on it, and show it: what is shown is kept."""
    for answer in answers:
        for taker in takers:
            if not isinstance(taker, Actions):
                taker.write(answer)
            elif answer.yes is None or (answer.yes and answer.turned):
                taker.act(answer)
        display.show(answer)


def _source(
    named: str | None,
    camera: int | None,
    video: Path | None,
    monitor: int | None,
    folder: Path | None,
) -> Source:
    """The one source that is named."""
    given = [value for value in (named, camera, video, monitor, folder) if value is not None]
    if len(given) != 1:
        found = "none was given" if not given else f"{len(given)} were given"
        raise ValueError(
            "Name one source: --camera 0, --video FILE, --screen, --folder DIR, the URL of a "
            f"stream, or - for pictures on standard input; {found}."
        )
    if monitor is not None:
        return ScreenSource(monitor)
    if folder is not None:
        path = dragged_path(str(folder))
        if not Path(path).is_dir():
            raise FileNotFoundError(f"There is no folder {path}.")
        return FolderSource(path)
    if camera is not None:
        if camera < 0:
            raise ValueError(f"--camera must be a number from 0, found {camera}.")
        return open_source(camera)
    name = str(video or named)
    return open_source(name if name == "-" or "://" in name else dragged_path(name))


def seconds_of(text: str) -> float:
    """A time such as 2s, 500ms, 1.5m or 2 in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    unit = match and UNITS.get(match.group(2) or "s")
    if not match or unit is None or not float(match.group(1)):
        raise ValueError(f"--every must be a time such as 2s, 500ms or 1m, found {text!r}.")
    return float(match.group(1)) * unit


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that files are closed and the camera is let go."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
