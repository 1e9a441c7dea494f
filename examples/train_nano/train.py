"""A recipe stage by stage; the same command goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

import fastvlm_mlx as fv
from fastvlm_mlx.train.log import LOG, read_log
from fastvlm_mlx.train.loop import Trainer
from fastvlm_mlx.train.parts import prepare, train_mode
from fastvlm_mlx.train.plot import draw_losses
from fastvlm_mlx.train.score import Scored
from fastvlm_mlx.train.settings import FROZEN, FULL, TrainOptions

from .batches import Encoder, Mixed, StoreData
from .evaluate import evaluate, read_set
from .features import Features
from .learn import Heads, loss
from .models import load_trainable, write_model
from .sets import write_set
from .stages import Stage, store_name
from .store import Settings, Store, fill

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM, Processor

CURVE_TASKS = ("emoji", "counting", "handwriting", "follow_up", "kinds", "places", "print")
CURVE_ROWS = 40  # of each task, in the learning curve
SEED = 1
VALIDATION_SEED, VALIDATION_SCENES = 9, 192
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def train(work: Path, recipe: str, stages: Sequence[Stage], *, every: int) -> Path:
    """Run all stages that are not done; the folder of the last model.

    Args:
        work: holds the stores, `<recipe>/start` (the model to begin with) and what is made.
        recipe: its name.
        stages: in order.
        every: steps between points of the learning curve.
    """
    folder = work / recipe
    model = folder / "start"
    for number, stage in enumerate(stages):
        done = folder / f"{number}-{stage.name}" / "model"
        if not (done / "config.json").is_file():
            run_stage(work, model, done.parent, stage, every=every)
        model = done
        draw_curve(folder, stages[: number + 1])
    return model


def run_stage(work: Path, base: Path, out: Path, stage: Stage, *, every: int) -> None:
    """Train one stage from the model in `base`; its model is written when it is over."""
    options = TrainOptions(
        vision=stage.vision, projector=FULL, decoder=FULL, learning_rate=stage.rate,
        vision_learning_rate=stage.vision_rate, weight_decay=0.05, beta2=0.98, warmup=0.05,
        final_rate=0.02, steps=stage.steps, seed=SEED, eval_every=every,
        save_every=min(every, 200), keep=1,
    )  # fmt: skip
    model = load_trainable(base)
    prepare(model, options)
    processor = fv.load(base)[1]
    data = Mixed(
        [data_of(work / store_name(p), stage, model, processor, out, p) for p in stage.pictures]
    )
    if any(stage.helper):
        mx.random.seed(SEED)
        model.heads = Heads(model.config.mm_hidden_size, data.parts[0].visual_tokens)
    trainer = Trainer(
        model, options, data, out, run={"stage": json.loads(json.dumps(asdict(stage)))},
        held_out=validation(work, stage, model, processor, out),
        score=curve_scorer(work, processor, stage), arrays_of=lambda batch: batch.arrays, loss=loss,
    )  # fmt: skip
    trainer.train()
    if any(stage.helper):
        del model["heads"]
    model.eval()
    partial = out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(base / name, partial)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_model(partial, model, config)
    partial.rename(out / "model")


def data_of(
    folder: Path, stage: Stage, model: FastVLM, processor: Processor, out: Path, pictures: Settings
) -> StoreData:
    """The batches of the store in a folder, in a stage."""
    store = Store(folder)
    if store.settings != pictures:
        raise ValueError(f"{store.folder} holds pictures of other settings than {stage.name} has.")
    height, width = pictures.shape
    visual_tokens = (height // 64) * (width // 64)
    features = None
    if stage.vision == FROZEN:
        file = out / f"features-{folder.name}.f32"
        features = Features(file, model, store, visual_tokens)
    return StoreData(
        store,
        Encoder(processor.tokenizer),
        stage.scenes_of(pictures),
        stage.singles,
        stage.talks,
        visual_tokens,
        SEED,
        features,
        stage.helper,
        stage.steps,
    )


def validation(work: Path, stage: Stage, model: FastVLM, processor: Processor, out: Path) -> Mixed:
    """A small store of the same kind and another seed; without helper heads."""
    most = max(stage.pictures, key=lambda each: each.scenes)
    settings = replace(most, scenes=VALIDATION_SCENES, seed=VALIDATION_SEED)
    folder = work / f"validation-{store_name(most)}"
    for _ in fill(folder, settings):
        pass
    plain = replace(stage, helper=(0.0, 0.0))
    return Mixed([data_of(folder, plain, model, processor, out, settings)])


def curve_scorer(
    work: Path, processor: Processor, stage: Stage
) -> Callable[[FastVLM], Scored] | None:
    """Answers a few held-out questions of each task; nothing for strips, which have no such set."""
    if stage.pictures[0].strips:
        return None
    size = stage.size
    folder = work / f"curve-{size}"
    for task in CURVE_TASKS:
        if not (folder / f"{task}.jsonl").is_file():
            write_set(folder, task, CURVE_ROWS, size)
    rows = read_set(folder)

    def score(model: FastVLM) -> Scored:
        model.eval()
        try:
            found = evaluate(model, processor, rows, image_size=size)
        finally:
            train_mode(model)
        return Scored({t: right / n for t, (right, n) in found["tasks"].items()}, [])

    return score


def draw_curve(folder: Path, stages: Sequence[Stage]) -> None:
    """curve.jsonl and curve.png: the logs of all stages, one after the other."""
    lines: list[dict[str, Any]] = []
    before = 0
    for number, stage in enumerate(stages):
        for line in read_log(folder / f"{number}-{stage.name}" / LOG):
            kept = {key: value for key, value in line.items() if key != "rows"}
            lines.append(kept | {"step": before + line["step"], "stage": stage.name})
        before += stage.steps
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "curve.jsonl").write_text(text, encoding="utf-8")
    draw_losses(lines, folder / "curve.png")
