"""A LoRA run of this library and of mlx-vlm on the same rows, each as its own users start it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

IMAGE = -200
RANK, SCALE, RATE, NORM = 16, 2.0, 1e-4, 1.0


@dataclass(frozen=True)
class Rows:
    """Random rows, each of an image and then text, whose second half is supervised."""

    count: int
    image_size: int
    text_tokens: int
    vocab_size: int

    def ids(self) -> np.ndarray:
        """[count, text_tokens]."""
        random = np.random.default_rng(0)
        return random.integers(1, self.vocab_size - 1, (self.count, self.text_tokens))

    def pixels(self, row: int) -> np.ndarray:
        """[S, S, 3], 0 to 255."""
        shape = (self.image_size, self.image_size, 3)
        return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8)


class OurRun:
    """This library's trainer."""

    def __init__(self, folder: Path, dtype: str):
        from fastvlm_mlx.checkpoint.load import load_for_training
        from fastvlm_mlx.train.parts import prepare
        from fastvlm_mlx.train.settings import TrainOptions

        self.options = TrainOptions(
            projector="frozen", rank=RANK, scale=SCALE, learning_rate=RATE, clip=NORM
        )
        self.model = load_for_training(folder, dtype=dtype)
        prepare(self.model, self.options)
        self._features: list[mx.array] = []

    def train(self, rows: Rows, batch_size: int, *, epoch: int) -> float:
        """Seconds of a step; from the second epoch on, the encoder's features are known."""
        from fastvlm_mlx.train.loop import Trainer

        batches = [
            self._batch(rows, range(start, start + batch_size), known=epoch > 1)
            for start in range(0, rows.count, batch_size)
        ]
        data = _Batches(batches)
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(self.model, self.options, data, Path(out), progress=False)
            start = time.perf_counter()
            trainer.train()
            return (time.perf_counter() - start) / len(batches)

    def _batch(self, rows: Rows, numbers: range, *, known: bool) -> Any:
        places = (rows.image_size // self.model.config.vision.patch_size) ** 2
        length = places + rows.text_tokens
        ids = np.zeros((len(numbers), length), np.int32)
        ids[:, places:] = rows.ids()[list(numbers)]
        weights = np.zeros(ids.shape, np.float32)
        weights[:, length - rows.text_tokens // 2 - 1 : length - 1] = 1
        at = np.arange(len(numbers))[:, None] * length + np.arange(places)
        pixels = mx.array(np.stack([rows.pixels(n) for n in numbers]))
        shown = {"features" if known else "pixel_values": pixels}
        if known:
            self.model.vision_tower.eval()
            shown["features"] = self.model.vision_tower(pixels)
        mx.eval(shown)
        return SimpleNamespace(
            ids=list(map(str, numbers)),
            input_ids=mx.array(ids),
            targets=mx.array(np.roll(ids, -1, axis=1)),
            weights=mx.array(weights),
            places=mx.array(at.reshape(-1).astype(np.int32)),
            **shown,
        )


@dataclass
class _Batches:
    """Batches that are there already."""

    found: list[Any]

    def count(self, epoch: int) -> int:
        return len(self.found)

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        return iter(self.found[start:])


class MlxVlmRun:
    """mlx-vlm's `train`."""

    def __init__(self, model: Any):
        from mlx_vlm.trainer import get_peft_model

        self.model = get_peft_model(
            model, rank=RANK, alpha=RANK * SCALE, dropout=0.0, verbose=False
        )

    def train(self, rows: Rows, batch_size: int, *, epoch: int) -> float:
        """Seconds of a step, which encodes its images in every epoch."""
        import mlx.optimizers as optim
        from mlx_vlm.trainer import TrainingArgs, train

        steps = rows.count // batch_size
        data = [self._row(rows, number) for number in range(rows.count)]
        with tempfile.TemporaryDirectory() as out, redirect_stdout(StringIO()):
            arguments = TrainingArgs(
                batch_size=batch_size,
                iters=steps,
                steps_per_report=steps,
                grad_clip=NORM,
                adapter_file=str(Path(out, "adapters.safetensors")),
            )
            optimizer = optim.AdamW(RATE, bias_correction=True)
            start = time.perf_counter()
            train(self.model, optimizer, data, args=arguments, train_on_completions=True)
            return (time.perf_counter() - start) / steps

    def _row(self, rows: Rows, number: int) -> dict[str, mx.array]:
        ids = np.array([IMAGE, *rows.ids()[number]], np.int32)
        learned = np.arange(len(ids)) >= len(ids) - rows.text_tokens // 2
        pixels = (rows.pixels(number).astype(np.float32) / 255).transpose(2, 0, 1)
        return {
            "input_ids": mx.array(ids),
            "attention_mask": mx.ones(len(ids), mx.int32),
            "completion_mask": mx.array(learned.astype(np.int32)),
            "pixel_values": mx.array(pixels),
        }
