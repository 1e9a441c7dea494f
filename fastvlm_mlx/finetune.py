"""A model, a file of rows and a folder of images → a fine-tuned model, whatever interrupts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import ops
from .checkpoint.files import weight_files, write_json
from .checkpoint.load import load_for_training, load_processor, resolve_dtype
from .checkpoint.record import DATA, LOG, OPTIONS, PLOT
from .checks import is_litter, shown
from .config import load_config
from .fuse import fuse
from .hub.resolve import resolve
from .model.fastvlm import FastVLM
from .processor import Processor
from .train import adapters
from .train.augment import Augment
from .train.features import FeatureCache, digest_weights
from .train.images import ImageReader
from .train.log import read_log
from .train.loop import Result, Trainer
from .train.parts import frozen, prepare
from .train.plot import draw_losses
from .train.ranks import Ranks
from .train.score import scorer
from .train.sets import Sets, batches_of, held_out_batches, read_sets
from .train.settings import FULL, TrainOptions
from .train.state import FOLDER, Checkpoints

ADAPTER, MODEL, FEATURES = "adapter", "model", "features"
OWN = {ADAPTER, MODEL, FEATURES, FOLDER, OPTIONS, LOG, DATA, PLOT}  # in a run's folder
# Options that may change while a run goes on, since no weight depends on them.
FREE = ("keep", "save_every", "eval_samples", "max_tokens", "cache_features")
HEAD = 2**16  # bytes of each file of weights that tell models apart


@dataclass
class Finetuned:
    """What a run left.

    Attributes:
        folder: an adapter to load with its base, or a whole model.
        result: how the run ended.
    """

    folder: Path
    result: Result


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
        KeyboardInterrupt: after the step in progress was saved.
    """
    settings = TrainOptions.of(options)
    check_dtype(settings.dtype)
    out = Path(out).expanduser()
    check_out(out)
    folder = resolve(model, revision=revision)
    processor = load_processor(folder)
    reading = {"images": images, "columns": columns, "subset": subset, "split": split}
    reading |= {} if question is None else {"question": question}
    sets = read_sets(
        Path(data) if Path(data).exists() else data,
        processor,
        load_config(folder),
        settings,
        **reading,
    )
    ranks = Ranks()
    run = describe(settings, folder, sets, ranks.size)
    check_same_run(out, run, settings.keep)
    network = load_for_training(folder, dtype=settings.dtype, quantize=settings.quantize)
    mx.random.seed(settings.seed)
    prepared = prepare(network, settings)
    trainer = make_trainer(network, processor, sets, settings, out, run, ranks, progress=progress)
    if ranks.rank == 0:
        write_record(out, settings, folder if model is None else model, data, sets)
    trainer.introduction = prepared.lines()
    result = trainer.train()
    trainer.take_best()
    if ranks.rank == 0:
        draw_losses(read_log(out / LOG), out / PLOT)
        written = write_result(network, settings, model, revision, out)
    ranks.close()
    return Finetuned(written if ranks.rank == 0 else out, result)


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
    reader = image_reader(model, processor, options, out)
    plain = reader if not options.augment else ImageReader(processor, options.image_size)
    pack = (options.max_length or processor.max_length) if options.pack else None
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
        is_writer=ranks.rank == 0,
        progress=progress,
    )


def image_reader(
    model: FastVLM, processor: Processor, options: TrainOptions, out: Path
) -> ImageReader:
    """What reads images: with a frozen encoder, once each."""
    if options.augment or not frozen(options, "vision") or not options.cache_features:
        augment = Augment() if options.augment else None
        return ImageReader(processor, options.image_size, augment=augment)

    def encode(pixels: mx.array) -> mx.array:
        return mx.stop_gradient(model.vision_tower(pixels))

    weights = digest_weights(model.vision_tower)
    cache = FeatureCache(out / FEATURES, encode, weights, mode=processor.mode)
    return ImageReader(processor, options.image_size, features=cache)


def write_result(
    model: FastVLM,
    options: TrainOptions,
    base: str | os.PathLike[str] | None,
    revision: str | None,
    out: Path,
) -> Path:
    """Write what was trained: an adapter, or a whole model where a large part is new."""
    target = out / ADAPTER
    adapters.write(model, target, base, revision=revision, overwrite=True)
    if FULL not in (options.vision, options.decoder):
        return target
    fused = fuse(base, target, out / MODEL, revision=revision, overwrite=True, progress=False)
    shutil.rmtree(target)
    return fused.folder


def describe(options: TrainOptions, folder: Path, sets: Sets, processes: int) -> dict[str, Any]:
    """What makes a run this one: options, model, rows and the number of processes."""
    settings = {name: v for name, v in options.as_dict().items() if name not in FREE}
    found = blake2b(digest_size=8)
    for file in weight_files(folder):
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
    """ValueError for half precision where it is unusable."""
    if dtype is not None and ops.fast_dtype(resolve_dtype(dtype)) != resolve_dtype(dtype):
        raise ValueError(
            f"Training in {dtype} is not usable on this device: leave dtype out, which trains in "
            f"{str(ops.fast_dtype(resolve_dtype(dtype))).removeprefix('mlx.core.')}."
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
