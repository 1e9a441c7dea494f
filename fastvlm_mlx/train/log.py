"""What a run says while it trains: a JSONL log on disk, and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checks import reason
from ..fields import CheckpointError
from .report import Report, numbers_of

LOG = "log.jsonl"
ESCAPED = "backslashreplace"  # halves of surrogate pairs, which JSON then reads as they were
SAY_EVERY = 20.0  # seconds between lines where there is no terminal
RECENT = 20  # steps over which speeds are averaged


class Log:
    """The lines of a run, one per step and one per evaluation.

    Args:
        file: JSONL; written on, after what a resumed run keeps.
        step: lines of later steps are dropped: they will come again.
        report: takes the numbers of each new line, too.
    """

    def __init__(self, file: Path, step: int = 0, report: Report | None = None):
        self._report = report
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(file) if line.get("step", 0) <= step]
        partial = file.with_name(f".{file.name}.partial")
        with partial.open("w", encoding="utf-8", errors=ESCAPED) as stream:
            stream.writelines(_as_line(line) for line in kept)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        self._stream = file.open("a", encoding="utf-8", errors=ESCAPED)

    def write(self, **values: Any) -> None:
        """Add a line; OSError if there is no room for it."""
        with self._named_errors():
            self._stream.write(_as_line(values))
            self._stream.flush()
        if self._report is not None:
            self._report(values["step"], numbers_of(values))

    def sync(self) -> None:
        """What was written is on the disk, whatever happens to the system."""
        with self._named_errors():
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Nothing is written any more."""
        with suppress(OSError):  # of a line that `write` told of
            self._stream.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"The log {self._stream.name} can't be written ({reason(error)}); the same command "
                "goes on from the last checkpoint once there is room."
            ) from None


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def read_log(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; none if there is no file.

    Raises:
        CheckpointError: a line that is not the last is broken.
    """
    if not file.is_file():
        return []
    # Not `splitlines`, which also splits at what may stand within a text, such as U+2028.
    lines = file.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise CheckpointError(f"{file}, line {number}, is not valid JSON.") from None
    return found


class Progress:
    """A bar on a terminal, otherwise a line now and then: loss, speeds, memory, time left.

    Args:
        total: optimizer steps of the run.
        done: of them before this process.
        shown: False for nothing.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True):
        self._total, self._shown, self._bar = total, shown, None
        self._times = [time.perf_counter()]
        self._counts: list[tuple[int, int]] = []
        self._said = -SAY_EVERY
        if shown and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task("Training", total=total, completed=done, said="")
            self._bar.start()

    def step(self, step: int, loss: float, tokens: int, images: int, memory: int) -> dict[str, Any]:
        """Show a step that is over; its speeds and the memory, as the log has them."""
        self._times = [*self._times, time.perf_counter()][-RECENT - 1 :]
        self._counts = [*self._counts, (tokens, images)][-RECENT:]
        seconds = max(self._times[-1] - self._times[0], 1e-9)
        speeds = [sum(each) / seconds for each in zip(*self._counts, strict=True)]
        left = (self._total - step) * seconds / len(self._counts)
        said = (
            f"loss {loss:.4f}, {speeds[0]:,.0f} tokens/s, {speeds[1]:.1f} images/s, "
            f"{memory / 1e9:.2f} GB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=said)
        elif self._shown and (step == self._total or self._is_time()):
            self.say(f"Step {step} of {self._total}: {said}, {duration(left)} left.")
        found = {"tokens_per_second": speeds[0], "images_per_second": speeds[1]}
        return {name: round(value, 2) for name, value in found.items()} | {"memory": memory}

    def _is_time(self) -> bool:
        now = time.perf_counter()
        if now - self._said < SAY_EVERY:
            return False
        self._said = now
        return True

    def say(self, line: str) -> None:
        """A line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def restart_clock(self) -> None:
        """What came since the last step (an evaluation, say) was no training."""
        self._times, self._counts = [time.perf_counter()], []

    def close(self) -> None:
        """The run is over."""
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def duration(seconds: float) -> str:
    """A time in words, to two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
