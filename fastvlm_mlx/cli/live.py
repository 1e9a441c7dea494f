"""Answers in a terminal as they come, or as plain lines where there is none."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import Any

import typer

from ..live.records import local_time
from ..live.watch import Answer
from ..video.frame import timestamp

BETWEEN_DRAWINGS = 0.05  # seconds


class PlainLines:
    """A line per answer on standard output; notes go to standard error.

    Args:
        by_clock: whether a line begins with the time of day, rather than with the frame's own.
    """

    def __init__(self, by_clock: bool):
        self.by_clock = by_clock

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, text: str) -> None:
        """A piece of the answer that is being given."""

    def show(self, answer: Answer) -> None:
        """A whole answer; of a condition only what is new."""
        if answer.yes is None or answer.turned:
            typer.echo(self.line(answer))
            sys.stdout.flush()

    def note(self, said: Any) -> None:
        """Something that happened beside."""
        typer.echo(printable(str(said)), err=True)

    def line(self, answer: Answer) -> str:
        """When it was, and what was answered."""
        clock = f"{local_time(answer.at):%H:%M:%S}"
        when = clock if self.by_clock else timestamp(answer.time, tenths=True)
        return f"{when}  {printable(answer.text)}"


class LiveLines(PlainLines):
    """As `PlainLines`, with a last line that shows the answer as it is given.

    Only that line is drawn anew, in place, and only when it changes, so that nothing flickers.
    """

    def __init__(self, by_clock: bool):
        from rich.console import Console
        from rich.live import Live

        super().__init__(by_clock)
        self.console = Console(highlight=False)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._text, self._status = "", "waiting for a frame"
        self._drawn = 0.0

    def __enter__(self) -> LiveLines:
        self._live.start()
        self._draw()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def add(self, text: str) -> None:
        self._text += text
        if monotonic() - self._drawn > BETWEEN_DRAWINGS:  # the whole answer is drawn in any case
            self._draw()

    def show(self, answer: Answer) -> None:
        self._text, self._status = "", status(answer)
        if answer.yes is None or answer.turned:
            self.console.print(self._plain(self.line(answer)))
        self._draw()

    def note(self, said: Any) -> None:
        self.console.print(self._plain(printable(str(said)), "dim"))

    def _draw(self) -> None:
        from rich.console import Group

        shown = [self._plain(printable(self._text))] if self._text else []
        self._live.update(Group(*shown, self._plain(self._status, "dim")), refresh=True)
        self._drawn = monotonic()

    @staticmethod
    def _plain(text: str, style: str = "") -> Any:
        """Text that is not read as rich's markup."""
        from rich.text import Text

        return Text(text, style=style)


def status(answer: Answer) -> str:
    """The figures of an answer, as the line below shows them."""
    parts = [f"age {1000 * answer.age:.0f} ms"]
    if answer.yes is not None and answer.probability is not None:
        parts.insert(0, f"{'yes' if answer.yes else 'no'} ({answer.probability:.2f})")
    parts.append(f"first token {1000 * answer.ttft:.0f} ms")
    if answer.response is not None:
        parts.append(f"{answer.response.generation_tps:.0f} tokens/s")
    parts += [f"{answer.image_size} pixels", f"{answer.skipped} frames skipped"]
    return " · ".join(parts)


def printable(text: str) -> str:
    """Text on one line, without characters that would steer a terminal."""
    line = " ".join(text.split())
    return "".join(char for char in line if char.isprintable())
