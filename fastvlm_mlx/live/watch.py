"""Answers about the newest frame of a source, again and again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint.load import load
from ..checks import is_number, reason, shown
from ..evaluate.questions import DEFAULT_QUESTION
from ..generation.generate import stream_generate
from ..generation.options import Options
from ..generation.prompt_cache import PromptCache
from ..generation.response import Response
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..video.changes import Changes
from ..video.frame import Frame
from ..video.newest import Newest
from ..video.open import AnySource, open_source
from ..video.source import Source
from .condition import Hysteresis, YesNo
from .pace import Pace

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

LoadedOrName: TypeAlias = (
    "tuple[FastVLM, Processor] | Callable[[], tuple[FastVLM, Processor]] | str | None"
)
CACHE = 64 * 2**20  # bytes: two questions about one frame need no more
READING = ("system", "conv_mode", "image_size", "fast")


@dataclass
class Answer:
    """What was answered about a frame.

    Attributes:
        text: the answer; of a condition by itself, "yes" or "no".
        image: the frame.
        time: of the frame, in seconds since the source's first.
        at: when the frame was read, in seconds since 1970.
        age: how many seconds old it was when its answer was begun.
        seconds: that the answer took.
        image_size: side of the square that the encoder saw.
        skipped: frames since the one before that were dropped or looked like it.
        response: the last response of the answer, with its timings; None for a condition by itself.
        probability: of yes, with `when`.
        yes: whether the condition holds, with `when`.
        turned: whether that is new with this frame.
    """

    text: str
    image: PILImage
    time: float
    at: float
    age: float
    seconds: float
    image_size: int
    skipped: int = 0
    response: Response | None = None
    probability: float | None = None
    yes: bool | None = None
    turned: bool = False

    @property
    def ttft(self) -> float:
        """Time to first token, which is all that a condition takes."""
        return self.seconds if self.response is None else self.response.ttft


def watch(
    source: AnySource,
    prompt: str | None = None,
    *,
    model: LoadedOrName = None,
    every: float | None = None,
    fps: float | None = None,
    on_change: bool = False,
    when: str | None = None,
    realtime: bool = True,
    note: Callable[[str], None] = warnings.warn,
    on_text: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Iterator[Answer]:
    """Answer a question about the newest frame of a source, again and again until it ends.

        for answer in fv.watch(0, "What is the person doing?", model="apple/FastVLM-0.5B"):
            print(answer.text)

    Frames that come during an answer are dropped, so that each answer is about what is there now.

    Args:
        source: the number of a camera, the URL of a stream (rtsp://user:password@host/path), a
            video file, a folder (new pictures as they appear, each of them), "screen", "-" (JPEG
            and PNG pictures on standard input), or pictures themselves, each of which is answered.
        prompt: the question; for a description by default, with `when` for none.
        model: what `load` returns, the name that it takes, or a function that returns the first,
            which is called once the source is open.
        every: the least seconds from one answer to the next.
        fps: answers a second, instead; held by a smaller image size where it must be, which
            `note` is told.
        on_change: pass over frames that look like the last that was answered.
        when: a question that yes or no answers, asked of every frame; `prompt` is then asked only
            when it turns to yes.
        realtime: play a video file at its own speed, as a camera would, and drop pictures on
            standard input that were not answered in time; otherwise go from frame to frame as the
            answers allow, and `every` and `fps` are of a file's own time.
        note: is told what happens beside: a stream that broke off, a picture that can't be read.
        on_text: is given each piece of an answer as it comes.
        **options: the fields of `Options`.

    Raises:
        ValueError: an option is out of range, or the source is none or no longer to be read.
        OSError: the source can't be opened, or read further.
        ImportError: it needs the extra `video`.
    """
    Options.of(options)  # what is wrong there is said before a model is loaded
    check_rates(every, fps)
    frames = open_source(source)

    def answers() -> Iterator[Any]:
        with _opened(frames, note) as newest:
            watcher = Watcher(
                *(frames, prompt, *_loaded(model)),
                when=when,
                note=note,
                on_text=on_text,
                options=options,
            )
            watcher.choose(every=every, fps=fps, on_change=on_change, realtime=realtime)
            yield None
            yield from watcher.answers(newest)

    begun = answers()
    next(begun)  # what is wrong with source or model is said now; closing it lets the source go
    return begun


def _loaded(model: LoadedOrName) -> tuple[FastVLM, Processor]:
    if model is None or isinstance(model, str):
        return load(model)
    return model() if callable(model) else model


@contextmanager
def _opened(source: Source, note: Callable[[str], None]) -> Iterator[Newest | None]:
    """The reader of a source that soon has a frame, once it has one; None for others."""
    if not source.ready:
        yield None
        return
    with closing(Newest(source, note)) as newest:
        newest.wait()
        yield newest


def check_rates(every: float | None, fps: float | None) -> None:
    """ValueError unless at most one of both is given, and is a number above 0."""
    for name, value in (("every", every), ("fps", fps)):
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0, found {shown(value)}.")
    if every is not None and fps is not None:
        raise ValueError("Give every or fps, not both.")


class Watcher:
    """Takes frames of a source, and asks about each; the arguments are those of `watch`."""

    def __init__(
        self,
        source: Source,
        prompt: str | None,
        model: FastVLM,
        processor: Processor,
        *,
        when: str | None,
        note: Callable[[str], None],
        on_text: Callable[[str], None],
        options: dict[str, Any],
    ):
        self.source, self.model, self.processor, self.options = source, model, processor, options
        self.prompt = DEFAULT_QUESTION if prompt is None and when is None else prompt
        self.condition = None if when is None else YesNo(model, processor, when)
        self.note, self.on_text = note, on_text
        both = self.condition is not None and self.prompt is not None
        self.cache = PromptCache(model, CACHE) if both else None
        self.state = Hysteresis()
        self.image_size: int = options.get("image_size") or processor.image_size
        processor.num_visual_tokens(self.image_size)

    def choose(
        self, *, every: float | None, fps: float | None, on_change: bool, realtime: bool
    ) -> None:
        """Which frames are taken."""
        by_itself = self.source.live or self.source.timed
        self.by_clock = self.source.reconnects or (by_itself and realtime)
        self.interval = every or (1 / fps if fps else 0.0)
        self.changes = Changes() if on_change else None
        self.pace = None
        if fps and self.by_clock:
            self.pace = Pace(fps, self.image_size, self.processor.patch_size)

    def answers(self, newest: Newest | None = None) -> Iterator[Answer]:
        """An answer for each frame that is taken; `newest` reads the source if it is open."""
        taken = self._newest(newest) if newest or self.by_clock else self._in_order()
        with closing(taken):  # type: ignore[type-var]
            for frame, skipped in taken:
                answer = self._answer(frame)
                answer.skipped = skipped
                if self.pace is not None and self.pace.took(answer.seconds):
                    self._adapt(self.pace)
                yield answer

    def _newest(self, newest: Newest | None) -> Iterator[tuple[Frame, int]]:
        """The frames to ask about, each the newest, with how many were skipped before it."""
        due, alike = 0.0, 0
        with closing(newest or Newest(self.source, self.note)) as newest:
            dropped = newest.dropped
            while True:
                time.sleep(max(0.0, due - time.monotonic()))
                if (frame := next(newest, None)) is None:
                    return
                if not self._is_wanted(frame):
                    alike += 1
                    continue
                due = time.monotonic() + self.interval
                skipped = newest.dropped - dropped + alike
                dropped, alike = newest.dropped, 0
                yield frame, skipped

    def _in_order(self) -> Iterator[tuple[Frame, int]]:
        """As `_newest`, of a source that waits for its reader."""
        due, skipped = 0.0, 0
        for frame in self.source.frames():
            early = due - (frame.time if self.source.timed else time.monotonic())
            if self.source.timed and early > 1e-6:
                skipped += 1
                continue
            if not self._is_wanted(frame):
                skipped += 1
                continue
            if not self.source.timed:
                time.sleep(max(0.0, early))
            due = (frame.time if self.source.timed else time.monotonic()) + self.interval
            yield frame, skipped
            skipped = 0

    def _is_wanted(self, frame: Frame) -> bool:
        """Whether a frame can be read, and shows something new where that is asked for."""
        try:
            image = frame.image
        except (ValueError, OSError) as error:
            self.note(f"A frame is left out: {reason(error)}.")
            return False
        return self.changes is None or self.changes.is_new(image)

    def _answer(self, frame: Frame) -> Answer:
        start, age = time.monotonic(), frame.age()
        at = time.time() - age
        image, size = frame.image, self.image_size
        answer = Answer("", image, frame.time, at, age, 0.0, size)
        if self.condition is not None:
            self._decide(answer)
        if self.prompt is not None and (answer.yes is None or (answer.turned and answer.yes)):
            self._ask(answer, self.prompt)
        answer.seconds = time.monotonic() - start
        return answer

    def _decide(self, answer: Answer) -> None:
        assert self.condition is not None
        reading = {name: self.options[name] for name in READING if name in self.options}
        reading["image_size"] = answer.image_size
        answer.probability = self.condition.probability(
            answer.image, prompt_cache=self.cache, **reading
        )
        answer.turned = self.state.turns(answer.probability)
        answer.yes = self.state.yes
        answer.text = "yes" if answer.yes else "no"

    def _ask(self, answer: Answer, prompt: str) -> None:
        answer.text = ""
        options = self.options | {"image_size": answer.image_size}
        for response in stream_generate(
            self.model,
            self.processor,
            prompt,
            image=answer.image,
            prompt_cache=self.cache,
            **options,
        ):
            answer.text += response.text
            answer.response = response
            self.on_text(response.text)

    def _adapt(self, pace: Pace) -> None:
        """Take the pace's image size, and say so."""
        if pace.behind:
            self.note(
                f"{1 / pace.target:g} answers a second can't be held even at {pace.size} pixels: "
                "shorter answers (max_tokens) or a smaller model are what is left."
            )
        elif pace.size != self.image_size:
            why = "to hold" if pace.size < self.image_size else "which still holds"
            self.image_size = pace.size
            self.note(f"The image size is now {pace.size}, {why} {1 / pace.target:g} a second.")
