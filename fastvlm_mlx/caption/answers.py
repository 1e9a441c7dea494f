"""Images and what is asked about them → answers: read ahead, encoded together, decoded together."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from ..checks import reason, shown
from ..generation.options import Options
from ..generation.requests import encode_together
from ..generation.scheduler import MAX_BATCH, Batch, RequestError
from ..model.fastvlm import FastVLM
from ..processor import Processor
from .items import Item
from .job import digest
from .manifest import Answer

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

MAX_READERS = 8  # threads
READ_AHEAD = 3  # groups of images that are encoded together


class Read(NamedTuple):
    """An image as the model sees it."""

    pixels: mx.array
    size: tuple[int, int]
    key: str


@dataclass(eq=False)
class Task:
    """An image, what to ask about it, and what came of it: either all answers, or an error."""

    item: Item
    prompts: list[str]
    pixels: str | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    repeated: bool = False
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or len(self.answers) == len(self.prompts)


class Known(NamedTuple):
    """Where answers are kept: by the image's pixels and the question's key."""

    get: Callable[[str, str], Answer | None]
    add: Callable[[str, str, Answer], None]


class Answering:
    """Answers tasks as they come.

    Each image is read, in threads, and encoded once, however many questions there are. A question
    that was answered about the same pixels before, in this run or an earlier one, is not asked
    again.

    Args:
        model, processor: from `load`.
        options: of `generate`.
        identity: of the model.
        known: where answers are kept.
        max_batch: sequences decoded at a time.

    Attributes:
        busy: seconds in which the model computed.
        idle: seconds of `run` in which it did not.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        options: Options,
        identity: str,
        known: Known,
        *,
        max_batch: int = MAX_BATCH,
    ):
        self.model, self.processor, self.options, self.known = model, processor, options, known
        self.busy = self.idle = 0.0
        self._identity = digest([identity, said_options(options)])
        self._batch = Batch(model, processor, max_batch=max_batch)
        self._reading: deque[tuple[Task, Future[Read]]] = deque()
        self._asked: dict[int, tuple[str, str]] = {}  # what each request of the batch is about
        self._texts: dict[int, str] = {}
        self._waiting: dict[tuple[str, str], list[tuple[Task, int]]] = {}
        self._finished: list[Task] = []

    def question_key(self, prompt: str) -> str:
        """What a question's answer depends on besides the image."""
        return digest([self._identity, prompt])

    def run(self, tasks: Iterator[Task]) -> Iterator[list[Task]]:
        """Those that are finished, some at a time, until all are."""
        from concurrent.futures import ThreadPoolExecutor

        threads = ThreadPoolExecutor(min(MAX_READERS, (os.cpu_count() or 1) + 1))
        more, start, busy = True, time.perf_counter(), self.busy
        try:
            while more or self._batch:
                while more and len(self._batch) < self._batch.max_batch:
                    group = self._take(tasks, threads)
                    self._enter(group)
                    more = bool(group)
                if self._batch:
                    self._step()
                found, self._finished = self._finished, []
                yield found
        finally:
            self.idle += time.perf_counter() - start - (self.busy - busy)
            threads.shutdown(cancel_futures=True)

    def _take(
        self, tasks: Iterator[Task], threads: ThreadPoolExecutor
    ) -> list[tuple[Task, Future[Read]]]:
        """The next few images, which are being read; others are read ahead meanwhile."""
        size = self._batch.encode_batch
        while len(self._reading) < READ_AHEAD * size and (task := next(tasks, None)) is not None:
            self._reading.append((task, threads.submit(self._read, task.item)))
        return [self._reading.popleft() for _ in range(min(size, len(self._reading)))]

    def _read(self, item: Item) -> Read:
        if isinstance(item.image, ValueError):
            raise item.image
        o = self.options
        ((pixels, size),) = self.processor.preprocess_each(
            [item.image], o.image_size, fast=o.fast, dtype=mx.uint8
        )
        return Read(pixels, size, _pixel_key(pixels, size))

    def _enter(self, group: list[tuple[Task, Future[Read]]]) -> None:
        """Encode those images about which something is to be asked, and ask it."""
        wanted: dict[str, tuple[Read, list[str]]] = {}
        for task, future in group:
            try:
                read = future.result()
            except (ValueError, OSError) as error:
                self._fail(task, error)
                continue
            task.pixels = read.key
            prompts = self._unknown(task, read.key)
            if prompts:
                wanted.setdefault(read.key, (read, []))[1].extend(prompts)
        if wanted:
            start = time.perf_counter()
            self._ask(wanted)
            self.busy += time.perf_counter() - start

    def _unknown(self, task: Task, pixels: str) -> list[str]:
        """The task's prompts that are to be asked; it waits for those that others asked."""
        unknown = []
        for place, prompt in enumerate(task.prompts):
            about = pixels, self.question_key(prompt)
            if (answer := self.known.get(*about)) is not None:
                task.answers[place] = answer
                task.repeated = True
                continue
            if about in self._waiting:
                task.repeated = True
            else:
                unknown.append(prompt)
            self._waiting.setdefault(about, []).append((task, place))
        if task.finished:
            self._finished.append(task)
        return unknown

    def _ask(self, wanted: Mapping[str, tuple[Read, list[str]]]) -> None:
        pictures = [(read.pixels, read.size) for read, _ in wanted.values()]
        encoded = encode_together(self.model, pictures, self._batch.encode_batch)
        for (pixels, (_, prompts)), visual_tokens in zip(wanted.items(), encoded, strict=True):
            for prompt in prompts:
                about = pixels, self.question_key(prompt)
                try:
                    id = self._batch.insert_encoded(prompt, [visual_tokens], self.options)
                    self._asked[id] = about
                except ValueError as error:  # marks that don't fit, or too long
                    for task, _ in self._waiting.pop(about):
                        self._fail(task, error)

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            responses = self._batch.step()
        except RequestError as error:  # nothing could follow what was said
            self._texts.pop(error.id, None)
            for task, _ in self._waiting.pop(self._asked.pop(error.id)):
                self._fail(task, error.error)
            return
        finally:
            self.busy += time.perf_counter() - start
        for id, response in responses:
            self._texts[id] = self._texts.get(id, "") + response.text
            if response.finish_reason is not None:
                answer = Answer(self._texts.pop(id), response.finish_reason)
                self._answered(self._asked.pop(id), answer)

    def _answered(self, about: tuple[str, str], answer: Answer) -> None:
        self.known.add(*about, answer)
        for task, place in self._waiting.pop(about):
            task.answers[place] = answer
            if len(task.answers) == len(task.prompts) and task.error is None:
                self._finished.append(task)

    def _fail(self, task: Task, error: Exception) -> None:
        if task.error is None:
            named = f"Cannot read {shown(task.item.image)}: "
            task.error = reason(error).removeprefix(named)
            self._finished.append(task)


def _pixel_key(pixels: mx.array, size: tuple[int, int]) -> str:
    """A hash of what the model sees of an image."""
    import numpy as np

    found = hashlib.blake2b(repr((pixels.shape, size)).encode(), digest_size=16)
    found.update(np.asarray(pixels).data)
    return found.hexdigest()


def said_options(options: Options) -> dict[str, str]:
    """The options that are not the default, as JSON can hold them."""
    defaults = vars(Options())
    return {k: repr(v) for k, v in vars(options).items() if v != defaults[k]}
