"""Caption many images: what is done stays done, whatever ends the run."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import brief, reason, shown
from ..generation.constrain import is_constrained
from ..generation.scheduler import MAX_BATCH, batch_options
from ..model.fastvlm import FastVLM
from ..model.fingerprint import fingerprint
from ..processor import Processor
from ..progress import progress_bar
from .answers import Answering, Known, Task, said_options
from .appended import AppendedTable
from .items import PROMPT, Item
from .job import APPEND, PREPEND, SKIP, Job
from .manifest import ANSWERED, FAILED, WRITTEN, Entry, Manifest
from .open import SIZE, check_out, is_with_images, manifest_of, open_output
from .outputs import Fields, Row, fields_of
from .quality import judge
from .shards import SHARD_SIZE
from .share import Share
from .sources import Source, all_items, find_sources

POLL = 0.1  # seconds between two looks for what other processes have answered


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        written: images whose captions were written.
        kept: images that had captions.
        repeated: those of `written` that were not asked about, since the same pixels had been.
        failed: (image, what is wrong) of those that have no caption.
        failed_before: images that failed in an earlier run and were passed over.
        flags: how often each flag was given.
        seconds: of the whole run.
        busy, idle: of these, how long the model computed, and how long it did not while images
            were left.
        rank: of this process, where several share the work; the first one, 0, writes and counts.
    """

    written: int = 0
    kept: int = 0
    repeated: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    failed_before: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: float = 0.0
    idle: float = 0.0
    rank: int = 0


def caption_images(
    model: FastVLM,
    processor: Processor,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Source],
    out: str | os.PathLike[str],
    job: Job | None = None,
    *,
    manifest: str | os.PathLike[str] | None = None,
    max_batch: int = MAX_BATCH,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Caption images and write the captions, each exactly once however often a run is cut short.

    Args:
        model, processor: from `load`.
        sources: see `find_sources`.
        out: a .jsonl, .csv, .tsv, .parquet or .tar file (captions-%06d.tar for several), or a
            suffix: `.txt` for text files beside the images, `.xmp` for XMP ones; or `xmp` for
            descriptions within JPEG, PNG and WebP images themselves.
        job: what is asked; by default for a description.
        manifest: the SQLite file that a run goes on from; beside `out` by default.
        max_batch: captions that are decoded together.
        shard_size: samples in each tar, if there are several.
        progress: show a bar, and list what failed, on stderr.
        **options: the fields of `Options` that batches take.

    Raises:
        ValueError, OSError, ImportError: the sources, the output or an option are no good, or the
            output can't be written. An image that is no good is listed in the summary instead.
    """
    names = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    found = find_sources(names)
    run = _Run(job or Job(), found, os.fspath(out), progress)
    return run(model, processor, manifest, max_batch, shard_size, options)


@dataclass(eq=False)
class _Pending:
    """An image whose turn to be written comes.

    Attributes:
        base: captions that it had.
        row: what is to be written as it is.
        task: its questions and answers.
        owner: the process that answers.
        before: what the manifest said when the run began.
    """

    item: Item
    base: Fields | None = None
    row: Row | None = None
    task: Task | None = None
    owner: int = 0
    before: Entry | None = None


class _Run:
    """One run over all images: plans, has answers made, writes in the order of the sources."""

    def __init__(self, job: Job, sources: Sequence[Source], out: str, progress: bool):
        check_out(out, sources, job)
        self.job, self.sources, self.out, self.progress = job, sources, out, progress
        self.summary = Summary()
        self._order: deque[_Pending] = deque()
        self._unmarked: list[tuple[str, Entry]] = []

    def __call__(
        self,
        model: FastVLM,
        processor: Processor,
        manifest: str | os.PathLike[str] | None,
        max_batch: int,
        shard_size: int,
        options: dict[str, Any],
    ) -> Summary:
        start = time.perf_counter()
        chosen = batch_options(options)
        processor.num_visual_tokens(chosen.image_size)
        self.seed, self.constrained = chosen.seed or 0, is_constrained(chosen)
        if chosen.schema is not None:
            self.job.check_json()
        identity = fingerprint(model)
        self.recipe = self.job.recipe(identity, said_options(chosen))
        total = sum(source.count() for source in self.sources)
        if not total:
            names = ", ".join(shown(source.name) for source in self.sources)
            raise ValueError(f"There are no images in {names}.")
        with ExitStack() as stack:
            self._open(stack, Path(manifest or manifest_of(self.out, self.sources)), shard_size)
            shows = self.progress and self.share.rank == 0
            self.bar = progress_bar(total, "Captioning", unit="image", shown=shows)
            stack.callback(self.bar.close)
            known = Known(self.manifest.answer, self.manifest.add_answer)
            self.answering = Answering(
                model, processor, chosen, identity, known, max_batch=max_batch
            )
            self._work()
        self.summary.busy, self.summary.idle = self.answering.busy, self.answering.idle
        self.summary.seconds = time.perf_counter() - start
        return self.summary

    def _open(self, stack: ExitStack, manifest: Path, shard_size: int) -> None:
        self.share = Share(manifest)
        stack.callback(self.share.close)
        self.summary.rank = self.share.rank
        first = self.share.rank == 0
        try:  # the first process mends what the last run left, before others read it
            self.manifest = Manifest(manifest, shared=self.share.size > 1)
            stack.callback(self.manifest.close)
            self._failed = self.manifest.failed()  # before another process of this run adds some
            if first:
                self.output = open_output(self.out, self.job, self.manifest, shard_size=shard_size)
                self._note_size()
                self.manifest.commit()
        finally:
            self.share.wait()
        if not first:
            self.output = open_output(self.out, self.job, self.manifest, writing=False)
        stack.callback(self.output.close)
        stack.callback(self._flush, now=True)

    def _work(self) -> None:
        self._answer(self._tasks())
        while self._order:  # what other processes answer
            alone = not self.share.lives(self._order[0].owner)
            self._write_ready()
            if self._order and alone:
                dead = self._order[0].owner
                left = [pending for pending in self._order if pending.owner == dead]
                self._answer(task for pending in left if (task := self._own(pending)) is not None)
            elif self._order:
                time.sleep(POLL)

    def _answer(self, tasks: Iterator[Task]) -> None:
        for finished in self.answering.run(tasks):
            for task in finished:
                self._note_answered(task)
            self._write_ready()

    def _note_answered(self, task: Task) -> None:
        self.summary.repeated += task.repeated and task.error is None
        state = ANSWERED if task.error is None else FAILED
        self._note(task.item, state, pixels=task.pixels, error=task.error)

    # Planning

    def _tasks(self) -> Iterator[Task]:
        """What is to be asked by this process, in the order of the sources."""
        for place, item in enumerate(all_items(self.sources)):
            try:
                pending = self._plan(item)
            except ValueError as error:
                self._fail(item, reason(error))
                continue
            if pending is None:
                self._skip()
                continue
            if pending.task and not pending.task.finished:
                pending.owner = self.share.owner(place)
            if self.share.rank == 0:
                self._order.append(pending)
            if pending.task and not pending.task.finished and pending.owner == self.share.rank:
                yield pending.task
            elif len(self._order) > 1000:
                self._write_ready()

    def _plan(self, item: Item) -> _Pending | None:
        """What is to be done about an image; None for nothing."""
        entry = self.manifest.entry(item.ids[0])
        ours = entry if entry and (entry.recipe, entry.stamp) == self._mark(item) else None
        failed = item.ids[0] in self._failed
        if entry is not None and entry.state == FAILED and not failed:
            entry = ours = None  # it has failed in this run: its turn to be listed comes
        again = failed and self.job.retry_errors
        existing = None if failed and ours and not again else self.output.existing(item)
        if failed and not again and (ours or existing):
            self.summary.failed_before += 1
            return None
        done = existing and (self.job.existing == SKIP or (ours and ours.state == WRITTEN))
        if done and not again:
            self.summary.kept += 1
            return None
        if ours and ours.planned and existing and ours.planned == repr(sorted(existing.items())):
            self._note(item, WRITTEN)
            self.summary.written += 1
            return None
        return self._plan_answers(item, existing, entry, ours)

    def _plan_answers(
        self, item: Item, existing: Fields | None, entry: Entry | None, ours: Entry | None
    ) -> _Pending:
        had = existing or fields_of(item.row, self.job.fields)
        if had and not existing and self.job.existing == SKIP:
            self.summary.kept += 1
            return _Pending(item, row=Row(item, had, item.row.get(PROMPT)))
        task = Task(item, self.job.ask(item, self.seed))
        if ours and ours.pixels:
            self._recall(task, ours.pixels)
        return _Pending(item, had, task=task, before=entry)

    def _recall(self, task: Task, pixels: str) -> None:
        """Give a task the answers that are known."""
        task.pixels = pixels
        for place, prompt in enumerate(task.prompts):
            answer = self.manifest.answer(pixels, self.answering.question_key(prompt))
            if answer is not None:
                task.answers[place] = answer

    # Writing

    def _write_ready(self) -> None:
        """Write what has its answers, up to the first image that still waits for some."""
        while self._order and self._is_ready(self._order[0]):
            pending = self._order.popleft()
            self._write(pending)
            self.bar.update()
        self._note_size()
        self.manifest.commit()
        self._flush()

    def _is_ready(self, pending: _Pending) -> bool:
        if pending.task is None or pending.task.finished:
            return True
        return pending.owner != self.share.rank and self._own(pending) is None

    def _own(self, pending: _Pending) -> Task | None:
        """A task of another process that is not answered there; None once it is."""
        task, entry = pending.task, self.manifest.entry(pending.item.ids[0])
        assert task is not None
        if (
            entry
            and entry != pending.before
            and (entry.recipe, entry.stamp) == self._mark(task.item)
        ):
            task.error = entry.error
            if entry.pixels:
                self._recall(task, entry.pixels)
        return None if task.finished else task

    def _write(self, pending: _Pending) -> None:
        item, row = pending.item, pending.row
        if pending.task is not None:
            row = self._row(pending.task, pending.base)
        if row is None:
            return
        entry = Entry(*self._mark(item), WRITTEN, pending.task.pixels if pending.task else None)
        if self.job.existing in (APPEND, PREPEND) and pending.task:
            # So that a run that ends right after the caption was written won't add it twice
            planned = repr(sorted(row.fields.items()))
            self.manifest.set_entry(item.ids[0], entry._replace(state=ANSWERED, planned=planned))
            self.manifest.commit()
        try:
            self.output.write(row)
        except ValueError as error:
            return self._fail(item, reason(error))
        self.summary.written += pending.task is not None
        if pending.task is not None:
            self._unmarked.append((item.ids[0], entry._replace(flags=" ".join(row.flags) or None)))

    def _row(self, task: Task, base: Fields | None) -> Row | None:
        """What is written about an image; None if it has failed."""
        if task.error is not None:
            self._fail(task.item, task.error, task.pixels)
            return None
        fields, flags = {}, []
        try:
            for place, name in enumerate(self.job.fields):
                fields[name], found = judge(
                    *task.answers[place], self.job, constrained=self.constrained
                )
                flags += [flag for flag in found if flag not in flags]
        except ValueError as error:
            assert task.pixels is not None
            questions = map(self.answering.question_key, task.prompts)
            self.manifest.forget(task.pixels, questions)
            self._fail(task.item, reason(error))
            return None
        self.summary.flags.update(flags)
        if flags and is_with_images(self.out):  # where no row says so
            self._say(f"Look at {brief(task.item.key)}: {', '.join(flags)}")
        if base and self.job.existing in (APPEND, PREPEND):
            fields = {name: self._joined(base[name], text) for name, text in fields.items()}
        prompt = task.prompts[0] if self.job.prompts else None
        return Row(task.item, fields, prompt, flags)

    def _joined(self, old: str, new: str) -> str:
        parts = (old, new) if self.job.existing == APPEND else (new, old)
        return self.job.separator.join(parts)

    def _flush(self, *, now: bool = False) -> None:
        """Mark as done what the output has."""
        if self.share.rank == 0 and self.output.flush(now=now):
            for key, entry in self._unmarked:
                self.manifest.set_entry(key, entry)
            self._unmarked.clear()
            self._note_size()
            self.manifest.commit()

    # Notes

    def _note_size(self) -> None:
        if isinstance(self.output, AppendedTable) and self.share.rank == 0:
            size = str(self.output.size)
            if self.manifest.fact(SIZE) != size:
                self.manifest.set_fact(SIZE, size)

    def _mark(self, item: Item) -> tuple[str, str]:
        return self.recipe, "" if self.output.changes_images else item.stamp

    def _note(
        self, item: Item, state: str, *, pixels: str | None = None, error: str | None = None
    ) -> None:
        entry = Entry(*self._mark(item), state, pixels, error=error)
        self.manifest.set_entry(item.ids[0], entry)

    def _fail(self, item: Item, error: str, pixels: str | None = None) -> None:
        self._note(item, FAILED, pixels=pixels, error=error)
        self.summary.failed.append((item.key, error))
        self._say(f"Left out {brief(item.key)}: {error}")

    def _say(self, line: str) -> None:
        if self.progress and self.share.rank == 0:
            self.bar.write(line, file=sys.stderr)

    def _skip(self) -> None:
        """Count an image as done without letting it speed up the rate."""
        bar = self.bar
        if bar.disable:
            return
        bar.initial, bar.n, bar.last_print_n = bar.initial + 1, bar.n + 1, bar.last_print_n + 1
