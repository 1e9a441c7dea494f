"""Items → answers: batched, each image encoded once, and kept in a log as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import reason, shown
from ..generation.options import Options
from ..generation.prompt_cache import PromptCache
from ..generation.requests import RequestError, batch_options
from ..generation.scheduler import MAX_BATCH, Batch
from ..model.fastvlm import FastVLM
from ..model.fingerprint import fingerprint
from ..processor import Processor
from ..progress import progress_bar
from .items import Item, Items, by_images
from .log import Answer, Log, digest


@dataclass(frozen=True)
class Record:
    """An item and its answer; the images themselves are left out.

    Attributes:
        group: of the images: answers about the same ones are not independent. A question without
            images is a group of its own.
        error: why there is no answer.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    choices: tuple[str, ...]
    task: str
    metric: str | None
    group: str
    answer: Answer | None = None
    error: str | None = None


@dataclass
class _Asked:
    record: Record
    key: str
    has_images: bool
    text: str = ""


def recipe_of(model: FastVLM, processor: Processor, options: Options) -> dict[str, Any]:
    """What answers depend on besides the questions: weights (an adapter's are among them), image
    size, template and options."""
    defaults = vars(Options())
    said = {k: repr(v) for k, v in vars(options).items() if v != defaults[k]}
    return {
        "weights": fingerprint(model),
        "image size": options.image_size or processor.image_size,
        "template": digest(processor.tokenizer.chat_template or ""),
        **{f"option {name}": value for name, value in sorted(said.items())},
    }


def answer_items(
    model: FastVLM,
    processor: Processor,
    items: Items,
    log: str | Path | None = None,
    *,
    max_batch: int = MAX_BATCH,
    progress: bool = False,
    **options: Any,
) -> list[Record]:
    """Ask a model every item, or take the answer that the log has; one record per item, in order.

    Items in a list are asked image by image, so that each is encoded once however they are mixed.

    Args:
        model, processor: from `load`.
        items: from `read_items` or a preset.
        log: a file that a run goes on from if it is cut short; none is kept by default.
        max_batch: answers that are decoded together.
        progress: show a bar on stderr.
        **options: the fields of `Options` that batches take; greedy by default.

    Raises:
        ValueError: an option is out of range, the log belongs to other weights or options, or two
            items have one id. What else is wrong with an item stands in its record.
        OSError: the log can't be written.
    """
    run = _Run(model, processor, batch_options(options), max_batch)
    run.log = None if log is None else Log(Path(log), recipe_of(model, processor, run.options))
    with progress_bar(len(items), "Answering", unit="question", shown=progress) as run.bar:
        try:
            run.ask(by_images(items) if isinstance(items, list) else iter(items))
        finally:
            if run.log is not None:
                run.log.close()
    if isinstance(items, list):
        return [run.records[item.id] for item in items]
    return list(run.records.values())


@dataclass
class _Run:
    model: FastVLM
    processor: Processor
    options: Options
    max_batch: int
    log: Log | None = None
    bar: Any = None
    records: dict[str, Record] = field(default_factory=dict)
    asked: dict[int, _Asked] = field(default_factory=dict)

    def ask(self, items: Iterator[Item]) -> None:
        """Keep a batch supplied until all items have an answer or an error."""
        cache = PromptCache(self.model)
        alone = 1 if self.max_batch == 1 else None  # timed as for one person
        batch = Batch(
            self.model,
            self.processor,
            max_batch=self.max_batch,
            encode_batch=alone,
            cache=cache,
        )
        while True:
            while batch.wants_more and (item := next(items, None)) is not None:
                self._enter(batch, item)
            if not batch:
                return
            try:
                self._take(batch.step())
            except RequestError as error:
                self._fail(self.asked.pop(error.id).record, error.error)

    def _enter(self, batch: Batch, item: Item) -> None:
        if item.id in self.records:
            raise ValueError(f"Two questions have the id {shown(item.id)}.")
        record = _record(item)
        self.records[item.id] = record  # keeps their order
        try:
            images = [_read(image) for image in item.images]
        except OSError as error:
            self._fail(record, error)
            return
        group = digest(*images) if images else item.id
        key = digest(item.prompt, *images)
        self.records[item.id] = record = _record(item, group)
        known = self.log.answers.get(item.id) if self.log is not None else None
        if known is not None and known.key == key:
            self._keep(record, known)
            return
        try:
            id = batch.insert(item.prompt, images, **vars(self.options))
        except ValueError as error:
            self._fail(record, error)
        else:
            self.asked[id] = _Asked(record, key, bool(images))

    def _take(self, responses: list[tuple[int, Any]]) -> None:
        finished = []
        for id, response in responses:
            self.asked[id].text += response.text
            if response.finish_reason is None:
                continue
            asked = self.asked.pop(id)
            answer = Answer(
                id=asked.record.id,
                key=asked.key,
                text=asked.text,
                finish_reason=response.finish_reason,
                tokens=response.generation_tokens,
                ttft=response.ttft - response.queue_time,
                encoded=asked.has_images and response.cached_images == 0,
            )
            finished.append((asked.record, answer))
        if self.log is not None:
            self.log.add(answer for _, answer in finished)
        for record, answer in finished:
            self._keep(record, answer)

    def _keep(self, record: Record, answer: Answer) -> None:
        self.records[record.id] = _with(record, answer=answer)
        self.bar.update()

    def _fail(self, record: Record, error: Exception) -> None:
        self.records[record.id] = _with(record, error=reason(error))
        self.bar.update()


def _record(item: Item, group: str = "") -> Record:
    common = {name: getattr(item, name) for name in ("id", "prompt", "references", "choices")}
    return Record(**common, task=item.task, metric=item.metric, group=group)


def _with(record: Record, **changes: Any) -> Record:
    values: Mapping[str, Any] = {**vars(record), **changes}
    return Record(**values)


def _read(image: str | bytes) -> str | bytes:
    """The bytes of a file, by which it is known again; a URL stays as it is."""
    if isinstance(image, bytes) or "://" in image or image.startswith("data:"):
        return image
    path = Path(image).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"Cannot read {shown(image)}: {reason(error)}") from None
