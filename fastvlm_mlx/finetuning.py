"""A model, a file of rows and a folder of images → a fine-tuned model, whatever interrupts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import ops
from .checkpoint import record
from .checkpoint.files import write_json
from .checkpoint.load import (
    inference_weights,
    load_for_training,
    load_processor,
    processor_folder,
    resolve_dtype,
)
from .checkpoint.record import DATA, LOG, OPTIONS, PLOT
from .checkpoint.target import atomic_folder
from .checkpoint.training_form import fresh_model
from .checks import is_litter, shown
from .config import load_config
from .convert import prepare as prepare_files
from .convert import write as write_files
from .fuse import fuse
from .hub.resolve import cache_folder, resolve
from .model.fastvlm import FastVLM
from .processor import Processor
from .train import adapters
from .train.augment import Augment
from .train.check import Check, check_data
from .train.examples import Example
from .train.features import FeatureCache, digest_weights
from .train.images import ImageReader
from .train.log import read_log
from .train.loop import NotFinite, Nothing, Result, Stopped, Trainer
from .train.memory import Memory, estimate, largest_arrays
from .train.parts import frozen, prepare
from .train.plot import draw_losses
from .train.ranks import Ranks
from .train.report import TENSORBOARD, WANDB, check_reporter
from .train.rows import find_rows
from .train.score import scorer
from .train.sets import Sets, batches_of, divide, held_out_batches, read_sets
from .train.settings import FULL, PACKED_LENGTH, TrainOptions
from .train.state import FOLDER, Checkpoints, step_of

ADAPTER, MODEL = "adapter", "model"
FEATURES = "features"  # in the cache's folder, for all runs
OWN = {ADAPTER, MODEL, FOLDER, WANDB, TENSORBOARD, OPTIONS, LOG, DATA, PLOT}  # in a run's folder
# Options that may change while a run goes on, since no weight depends on them.
FREE = ("keep", "save_every", "eval_samples", "max_tokens", "cache_features", "report_to")
WEIGHTS = (".safetensors", ".bin", ".pth")
HEAD = 2**16  # bytes of each file of weights that tell models apart


@dataclass
class Finetuned:
    """What a run left.

    Attributes:
        folder: an adapter to load with its base, or a whole model.
        result: how the run ended.
        rank: of this process among those that trained together.
    """

    folder: Path
    result: Result
    rank: int = 0


def finetune(
    model: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Finetuned:
    """Fine-tune a model; the same call goes on with a run that was interrupted.

    The folder `out` gets checkpoints, a log, a plot of the losses, and in the end `adapter`, or
    `model` where the decoder or the vision encoder was trained in full.

    Args:
        model: folder or Hub id; by default the bundled nano model.
        data: rows, as `train.rows.find_rows` takes them.
        out: the run's folder.
        images: the folder that paths of images start in.
        revision: of the model on the Hub.
        columns, question, subset, split: as for `train.rows.find_rows`.
        progress: show it.
        options: those of `train.settings.TrainOptions`.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option is out of range, rows can't be used, or the folder holds another run.
        FileNotFoundError, FileExistsError, OSError: a file or folder is missing, in the way, or
            can't be written.
        NotFinite, Nothing: a loss is no number, or stays 0.
        Stopped: a KeyboardInterrupt, after the step in progress was saved.
    """
    settings = _settings(options)
    out = Path(out).expanduser()
    check_out(out)
    folder = resolve(model, revision=revision)
    processor, config = load_processor(folder), load_config(processor_folder(folder))
    reading = _reading(images, columns, question, subset, split)
    sets = read_sets(_source(data), processor, config, settings, **reading)
    ranks = Ranks()
    run = describe(settings, folder, sets, ranks.size)
    check_same_run(out, run, settings.keep)
    check_fit(folder, processor, sets, settings, ranks)
    network = load_network(folder, settings)
    mx.random.seed(settings.seed)
    prepared = prepare(network, settings)
    trainer = make_trainer(network, processor, sets, settings, out, run, ranks, progress=progress)
    if ranks.rank == 0:
        write_record(out, settings, folder if model is None else model, data, sets)
    trainer.introduction = prepared.lines()
    last = Checkpoints(out, settings.keep).last()
    ranks.check_same(0 if last is None else step_of(last))
    try:
        result = trainer.train()
    except (Stopped, NotFinite, Nothing):  # which come in all processes
        ranks.close()
        raise
    if ranks.rank == 0:
        trainer.take_best()
        draw_losses(read_log(out / LOG), out / PLOT)
        if settings.from_scratch:
            write_new(network, folder, out)
        else:
            write_result(network, settings, model, revision, out)
    ranks.close()
    return Finetuned(result_folder(settings, out), result, ranks.rank)


@dataclass
class Checked:
    """What `check` found.

    Attributes:
        data: the rows, good and bad, and two of them as the model sees them.
        memory: that training will take; None if the rows can't be used.
        processor: the model's.
    """

    data: Check
    memory: Memory | None
    processor: Processor


def check(
    model: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    **options: Any,
) -> Checked:
    """Look at what `finetune` would train on and how much memory it would take; no weight is read.

    Args and errors are those of `finetune`; bad rows are listed and raise nothing.
    """
    settings = _settings(options)
    folder = resolve(model, revision=revision)
    processor, config = load_processor(folder), load_config(processor_folder(folder))
    reading = _reading(images, columns, question, subset, split)
    seeing = {
        "image_size": settings.image_size,
        "max_length": settings.max_length,
        "too_long": settings.too_long,
    }
    rows, held_out = divide(list(find_rows(_source(data), **reading)), settings, **reading)
    found = check_data(rows, processor, config, held_out=held_out, **seeing)
    memory = None
    if found.problem is None:
        try:
            memory = estimate_memory(folder, processor, found.examples.kept, settings)
        except ValueError as error:  # said behind the rows
            found = replace(found, obstacle=str(error))
    return Checked(found, memory, processor)


def estimate_memory(
    folder: Path, processor: Processor, examples: Sequence[Example], options: TrainOptions
) -> Memory:
    """What training on examples takes; the model's tensors have shapes and are not read."""
    network = load_network(folder, options, computed=False)
    prepare(network, options)
    side = options.image_size or processor.image_size
    reader = ImageReader(processor, options.image_size)
    pack = pack_length(options, processor)
    batches = batches_of(examples, reader, options, pack_length=pack)
    arrays = largest_arrays(
        batches, network, side, is_encoded=frozen(options, "vision"), packed=options.pack
    )
    return estimate(network, arrays, options, side)


def load_network(folder: Path, options: TrainOptions, *, computed: bool = True) -> FastVLM:
    """The model to train: of the folder, or a new one of its geometry."""
    if options.from_scratch:
        config = replace(load_config(folder), quantization={})
        return fresh_model(config, options.seed, dtype=options.dtype, computed=computed)
    return load_for_training(
        folder, dtype=options.dtype, quantize=options.quantize, computed=computed
    )


def pack_length(options: TrainOptions, processor: Processor) -> int | None:
    """Tokens of a row that holds several examples; None if none does."""
    if not options.pack:
        return None
    return options.max_length or min(PACKED_LENGTH, processor.max_length)


def keeps_features(options: TrainOptions) -> bool:
    """Whether the encoder's features are kept: it is frozen, and images stay as they are."""
    return options.cache_features and frozen(options, "vision") and not options.augment


def _settings(options: Mapping[str, Any]) -> TrainOptions:
    settings = TrainOptions.of(options)
    check_dtype(settings.dtype)
    check_reporter(settings.report_to)
    return settings


def _reading(
    images: str | os.PathLike[str] | None,
    columns: Mapping[str, str] | None,
    question: str | None,
    subset: str | None,
    split: str | None,
) -> dict[str, Any]:
    """The arguments of `find_rows`, which has the default question."""
    found = {"images": images, "columns": columns, "subset": subset, "split": split}
    return found if question is None else found | {"question": question}


def _source(data: str | os.PathLike[str]) -> str | Path:
    """A file or folder as a path, and a name on the Hub as a text."""
    path = Path(data).expanduser()
    return path if path.exists() or not isinstance(data, str) else data


def make_trainer(
    model: FastVLM,
    processor: Processor,
    sets: Sets,
    options: TrainOptions,
    out: Path,
    run: dict[str, Any],
    ranks: Ranks,
    *,
    progress: bool = True,
) -> Trainer:
    """A run's trainer, with its batches and what is held out."""
    reader = image_reader(model, processor, options)
    plain = reader if not options.augment else ImageReader(processor, options.image_size)
    pack = pack_length(options, processor)
    place = {"rank": ranks.rank, "ranks": ranks.size}
    return Trainer(
        model,
        options,
        batches_of(sets.training.kept, reader, options, pack_length=pack, **place),
        out,
        run=run,
        held_out=held_out_batches(sets.held_out, plain, options, **place),
        score=scorer(
            processor,
            sets.questions,
            options.eval_samples,
            image_size=options.image_size,
            max_tokens=options.max_tokens,
        ),
        reduce=ranks.add,
        any_asked=ranks.any,
        rank=ranks.rank,
        progress=progress,
    )


def image_reader(model: FastVLM, processor: Processor, options: TrainOptions) -> ImageReader:
    """What reads images: with a frozen encoder, once each."""
    if not keeps_features(options):
        augment = Augment() if options.augment else None
        return ImageReader(processor, options.image_size, augment=augment)

    def encode(pixels: mx.array) -> mx.array:
        return mx.stop_gradient(model.vision_tower(pixels))

    weights = digest_weights(model.vision_tower)
    cache = FeatureCache(cache_folder() / FEATURES, encode, weights, mode=processor.mode)
    return ImageReader(processor, options.image_size, features=cache)


def result_folder(options: TrainOptions, out: Path) -> Path:
    """Where a run's result is: a whole model where a large part of it is new."""
    return out / (MODEL if FULL in (options.vision, options.decoder) else ADAPTER)


def write_result(
    model: FastVLM,
    options: TrainOptions,
    base: str | os.PathLike[str] | None,
    revision: str | None,
    out: Path,
) -> None:
    """Write what was trained: an adapter, or a whole model."""
    adapter, target = out / ADAPTER, result_folder(options, out)
    adapters.write(model, adapter, base, revision=revision, overwrite=True)
    if target != adapter:
        fuse(base, adapter, target, revision=revision, overwrite=True, progress=False)
        shutil.rmtree(adapter)


def write_new(model: FastVLM, source: Path, out: Path) -> None:
    """Write a model that was made from nothing, folded; it has no base to name in a card.

    Args:
        model: that was trained.
        source: whose tokenizer it has.
        out: the run's folder.
    """
    weights = inference_weights(model)
    folder = processor_folder(source)
    checkpoint = prepare_files(folder, model.config, weights, "mlx", None, None, shown=False)
    with atomic_folder(out / MODEL, overwrite=True) as temporary:
        record.write_record(record.read_run(out), temporary)
        write_files(checkpoint, temporary, "mlx", "float32", shown=False)


def describe(options: TrainOptions, folder: Path, sets: Sets, processes: int) -> dict[str, Any]:
    """What makes a run this one: options, model, rows and the number of processes."""
    settings = {name: v for name, v in options.as_dict().items() if name not in FREE}
    found = blake2b(digest_size=8)
    files = [path for path in folder.rglob("*") if path.suffix in WEIGHTS]
    for file in [folder / "config.json"] if options.from_scratch else sorted(files):
        found.update(str(file.stat().st_size).encode())
        with file.open("rb") as stream:
            found.update(stream.read(HEAD))
    return {
        "settings": settings,
        "model": found.hexdigest(),
        "data": sets.digest(),
        "processes": processes,
    }


def check_dtype(dtype: str | None) -> None:
    """ValueError for half precision on a device that is slow at it."""
    if dtype is None:
        return
    wanted = resolve_dtype(dtype)
    if ops.fast_dtype(wanted, for_training=True) != wanted:
        raise ValueError(
            f"Training in {dtype} is too slow to be usable on the CPU: leave dtype out, which "
            "trains in float32."
        )


def check_out(out: Path) -> None:
    """Raise an OSError unless a folder is a run's, empty, or not there yet."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {shown(str(out))} is a file; name a folder.")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(n for n in names - OWN if not is_litter(n) and not n.startswith("."))
    if foreign:
        raise FileExistsError(
            f"{out} holds {foreign[0]}, which is no part of a training run: name another folder."
        )


def check_fit(
    folder: Path, processor: Processor, sets: Sets, options: TrainOptions, ranks: Ranks
) -> None:
    """Raise the errors of `parts.prepare` and of too few rows, before a weight is read."""
    reader, pack = ImageReader(processor, options.image_size), pack_length(options, processor)
    place = {"rank": ranks.rank, "ranks": ranks.size}
    batches_of(sets.training.kept, reader, options, pack_length=pack, **place).count(0)
    prepare(load_network(folder, options, computed=False), options)


def check_same_run(out: Path, run: dict[str, Any], keep: int) -> None:
    """Raise a ValueError if a folder holds another run, before time is spent."""
    last = Checkpoints(out, keep).last()
    if last is not None:
        Checkpoints(out, keep).check(last, run)


def write_record(
    out: Path, options: TrainOptions, model: str | os.PathLike[str], data: Any, sets: Sets
) -> None:
    """Write what a card says of a run: its options and data."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / OPTIONS, {"model": os.fspath(model)} | options.as_dict())
    write_json(out / DATA, {"data": os.fspath(data)} | sets.summary())
