"""The training loop: steps, evaluations and checkpoints until a run is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from .. import ops
from ..checks import brief
from ..model.fastvlm import FastVLM
from .interrupts import stop_asked
from .log import LOG, Log, Progress
from .loss import Arrays, arrays_of, encoded, loss
from .optimizer import Optimizer, schedule_factor
from .parts import train_mode
from .report import reporter
from .score import Scored
from .settings import FROZEN, TrainOptions
from .state import Checkpoint, Checkpoints, Position
from .step import Loss, Step, Sums, add, checkpoint_activations, layers_of

MOST_ZEROS = 3  # steps with a loss of 0 before the run stops
MOST_NAMED = 8  # rows in an error


class Data(Protocol):
    """The batches of a run, the same whenever they are asked for."""

    def count(self, epoch: int) -> int:
        """How many batches an epoch has."""

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from one on."""


class NotFinite(ArithmeticError):
    """A loss or a gradient is no number; nothing of it was saved."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did so after a step that is saved."""


class Nothing(ValueError):
    """The loss stays 0: there is nothing to learn."""


@dataclass
class Result:
    """How a run ended.

    Attributes:
        steps: optimizer steps that were taken, in all processes that worked on it.
        loss: of the last step, per supervised token.
        best: the lowest validation loss, if there was an evaluation.
        best_step: the step that it was reached at.
        stopped_early: whether `patience` ended it.
    """

    steps: int
    loss: float
    best: float | None
    best_step: int | None
    stopped_early: bool = False


@dataclass
class Trainer:
    """A model, its data and all that a run needs; `train` does the work.

    Args:
        model: prepared by `parts.prepare`.
        options: how to train.
        data: what to train on.
        out: the run's folder: log and checkpoints.
        run: describes settings, model and data, so that a checkpoint of another run is refused.
        held_out: what to evaluate on.
        score: answers questions that are held out, as `score.scorer` makes it.
        reduce: adds up the sums of all processes.
        any_asked: whether any of them was asked to stop.
        rank: of this process among those that train together; the first one writes.
        introduction: what is said first.
        progress: show it.
        arrays_of, loss: what a step computes on of a batch, and its loss; an example of others is
            `examples/train_nano`.
    """

    model: FastVLM
    options: TrainOptions
    data: Data
    out: Path
    run: dict[str, Any] = field(default_factory=dict)
    held_out: Data | None = None
    score: Callable[[FastVLM], Scored] | None = None
    reduce: Callable[[Sums], Sums] = lambda sums: sums
    any_asked: Callable[[bool], bool] = bool
    rank: int = 0
    introduction: Sequence[str] = ()
    progress: bool = True
    arrays_of: Callable[[Any], Arrays] = arrays_of
    loss: Loss = loss

    def __post_init__(self) -> None:
        options = self.options
        self.position = Position()
        self.checkpoints = Checkpoints(self.out, options.keep)
        self.optimizer = Optimizer(self.parameters(), options)
        if options.gradient_checkpointing:
            checkpoint_activations(self.model.language_model.layers)
            if options.vision != FROZEN:
                checkpoint_activations(layers_of(self.model.vision_tower))
        self.step = Step(
            self.model, self.optimizer, options.clip, compiled=options.compiled, loss=self.loss
        )
        self.total = options.steps or steps_of(self.data, options)

    @property
    def is_writer(self) -> bool:
        """Whether this process writes to `out`."""
        return self.rank == 0

    def parameters(self) -> dict[str, mx.array]:
        """The trained parameters by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def train(self) -> Result:
        """Go on from the last checkpoint, or begin, until the last step.

        Raises:
            NotFinite: a loss or a gradient is NaN or infinite; names the rows.
            Nothing: the loss was 0 for three steps in a row.
            ValueError: the checkpoint is another run's.
            OSError: a checkpoint or the log can't be written.
            Stopped: it was asked to (Ctrl-C, SIGTERM); the step that was in progress is saved.
        """
        self._resume()
        self._log = self._open_log() if self.is_writer else None
        self._bar = Progress(self.total, self.position.step, shown=self.progress and self.is_writer)
        for line in self.introduction:
            self._bar.say(line)
        result = Result(self.position.step, math.nan, self.position.best, self.position.best_step)
        try:
            with ops.wired_memory(), stop_asked(said=self.progress and self.is_writer) as is_asked:
                for value in self._steps():
                    result.loss = value
                    result.stopped_early = self._between_steps(is_asked)
                    if result.stopped_early:
                        break
        finally:
            self._bar.close()
            if self._log is not None:
                self._log.close()
        result.steps, result.best = self.position.step, self.position.best
        result.best_step = self.position.best_step
        return result

    def _open_log(self) -> Log:
        report = reporter(self.options.report_to, self.out, self.options.as_dict())
        return Log(self.out / LOG, self.position.step, report)

    def _resume(self) -> None:
        folder = self.checkpoints.last()
        if folder is None:
            return
        checkpoint = self.checkpoints.load(folder, self.run)
        self.position = checkpoint.position
        self._take(checkpoint.tensors["weights"])
        self.optimizer.load(checkpoint.tensors["optimizer"])

    def _take(self, weights: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(weights.items())))

    def _steps(self) -> Iterator[float]:
        """Take step after step; the loss of each."""
        while self.position.step < self.total and not self._is_over():
            epoch, start = self.position.epoch, self.position.batch
            batches = iter(self.data.batches(epoch, start))
            while window := list(islice(batches, self.options.accumulation)):
                value = self._take_step(window)
                if self.position.batch >= self.data.count(epoch):
                    self.position.epoch, self.position.batch = epoch + 1, 0
                yield value
                if self.position.step >= self.total:
                    return

    def _take_step(self, window: Sequence[Any]) -> float:
        # Of its own for each step and process, so that dropout is the same after a resume.
        mx.random.seed(seed_of(self.options.seed, self.position.step, self.rank))
        sums, losses = None, []
        for batch in window:
            found = self.step.compute(self.arrays_of(batch))
            losses.append(found.loss)
            sums = add(sums, found)
            mx.eval(sums)
        assert sums is not None
        sums = self.reduce(sums)
        norm = self.step.apply(sums, schedule_factor(self.position.step, self.total, self.options))
        total, count = sums.loss, sums.tokens
        del sums, found  # so that the optimizer may overwrite the gradients
        mx.eval(norm, total, count, self.model.state, self.optimizer.state)
        ops.clear_large_cache()
        self._check_finite(total, norm, losses, window)
        return self._note(window, number_of(total), int(number_of(count)), number_of(norm))

    def _check_finite(
        self, total: mx.array, norm: mx.array, losses: list[mx.array], window: Sequence[Any]
    ) -> None:
        loss_is_finite = math.isfinite(number_of(total))
        if loss_is_finite and math.isfinite(number_of(norm)):
            return
        wrong = [b for b, value in zip(window, losses, strict=True) if not mx.isfinite(value)]
        names = [name for batch in (window if loss_is_finite else wrong) for name in batch.ids]
        what = "gradient" if loss_is_finite else "loss"
        raise not_finite(f"The {what} of step {self.position.step + 1}", names, self.model)

    def _note(self, window: Sequence[Any], total: float, count: int, norm: float) -> float:
        position = self.position
        value = total / max(1, count)
        position.zeros = 0 if value else position.zeros + 1
        if position.zeros >= MOST_ZEROS:
            raise Nothing(
                f"The loss was 0 for {MOST_ZEROS} steps: no token of the rows is supervised, or "
                "all are predicted already. `fastvlm train --check` shows the rows."
            )
        factor = schedule_factor(position.step, self.total, self.options)
        position.step += 1
        position.batch += len(window)
        position.tokens += count
        speeds = self._bar.step(
            position.step,
            value,
            sum(_tokens(batch) for batch in window),
            sum(_images(batch) for batch in window),
            mx.get_peak_memory(),
        )
        if self._log is not None:
            self._log.write(
                step=position.step,
                epoch=position.epoch,
                loss=value,
                supervised=count,
                norm=norm,
                rate_factor=factor,
                rows=[name for batch in window for name in batch.ids],
                **speeds,
            )
        return value

    def _between_steps(self, is_asked: Callable[[], bool]) -> bool:
        """Evaluate and save where it is time; whether to stop early."""
        position, options = self.position, self.options
        is_last, epoch_over = position.step >= self.total, position.batch == 0
        asked = self.any_asked(is_asked())
        stop = False
        if self.held_out is not None:  # even if asked: otherwise it would not come again
            every = options.eval_every
            if is_last or (position.step % every == 0 if every else epoch_over):
                stop = self._evaluate()
        if is_last or stop or asked or self._is_time_to_save():
            self._save()
        if asked:
            raise Stopped
        return stop

    def _is_time_to_save(self) -> bool:
        position, every = self.position, self.options.save_every
        is_time = position.step % every == 0 if every else position.batch == 0
        return is_time or position.best_step == position.step

    def _evaluate(self) -> bool:
        assert self.held_out is not None
        position = self.position
        value = evaluate(self.model, self.held_out, self.reduce, self.arrays_of, self.loss)
        scored = Scored({}, [])
        if self.score is not None and self.is_writer:
            scored = self.score(self.model)
        if position.best is None or value < position.best:
            position.best, position.best_step, position.worse = value, position.step, 0
        else:
            position.worse += 1
        said = "".join(f", {name} {score:.3f}" for name, score in scored.scores.items())
        self._bar.say(f"Step {position.step}: validation loss {value:.4f}{said}.")
        if self._log is not None:
            samples = {"samples": scored.samples} if scored.samples else {}
            found = {"validation_loss": value, **scored.scores, **samples}
            self._log.write(step=position.step, **found)
        self._bar.restart_clock()
        return self._is_over()

    def _is_over(self) -> bool:
        """Whether `patience` has come to its end."""
        return self.options.patience is not None and self.position.worse >= self.options.patience

    def _save(self) -> None:
        if self._log is not None:  # and so the writer
            self._log.sync()  # a checkpoint never knows of steps that the log does not
            tensors = {"weights": saved_tensors(self.model), "optimizer": self.optimizer.tensors()}
            self.checkpoints.save(Checkpoint(self.position, self.run, tensors))
        self._bar.restart_clock()

    def take_best(self) -> None:
        """Give the model the weights of the best evaluation, if there was one."""
        if self.position.best_step is not None:
            folder = self.checkpoints.at(self.position.best_step)
            self._take(self.checkpoints.load(folder, self.run).tensors["weights"])


def evaluate(
    model: FastVLM,
    data: Data,
    reduce: Callable[[Sums], Sums] = lambda sums: sums,
    arrays_of: Callable[[Any], Arrays] = arrays_of,
    loss: Loss = loss,
) -> float:
    """The loss per supervised token over all batches; dropout is off meanwhile.

    Raises:
        NotFinite: it is no number; names the rows.
    """
    model.eval()
    total, count = mx.array(0.0), mx.array(0.0)
    wrong: list[str] = []
    try:
        for batch in data.batches(0, 0):
            found = loss(model, encoded(model, arrays_of(batch)))
            total, count = total + found[0], count + found[1]
            mx.eval(total, count, found)
            wrong += [] if math.isfinite(number_of(found[0])) else batch.ids
    finally:
        train_mode(model)
    sums = reduce(Sums(total, count, {}))
    if not math.isfinite(number_of(sums.loss)):
        raise not_finite("The validation loss", wrong, model)
    return number_of(sums.loss) / max(1.0, number_of(sums.tokens))


def not_finite(what: str, names: Sequence[str], model: FastVLM) -> NotFinite:
    """The error of a number that is none, with the rows of this process that it comes from."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    shown = ", ".join(brief(name, 40) for name in names[:MOST_NAMED])
    whose = f"its rows are {shown}{more}" if names else "another process names its rows"
    advice = "lower the learning rate, or look at the rows"
    if model.language_model.norm.weight.dtype == mx.float16:
        advice = f"train in bfloat16 or float32, which reach further than float16, {advice}"
    return NotFinite(f"{what} is no finite number; {whose}. Nothing of it was saved: {advice}.")


def number_of(array: mx.array) -> float:
    """The number in an array of one."""
    value: Any = array.item()
    return float(value)


def seed_of(*numbers: int) -> int:
    """A seed that depends on numbers, each of which changes it."""
    digest = blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def saved_tensors(model: FastVLM) -> dict[str, mx.array]:
    """What of a model training changes: trained parameters, and what BatchNorms have seen."""
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    everything: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    seen = {
        name: value
        for name, value in everything.items()
        if name.endswith((".running_mean", ".running_var"))
    }
    return trained | seen


def steps_of(data: Data, options: TrainOptions) -> int:
    """Optimizer steps of so many epochs; a last window of fewer batches counts as one."""
    whole, rest = divmod(options.epochs, 1)
    windows = [
        math.ceil(data.count(e) / options.accumulation) for e in range(math.ceil(whole + rest))
    ]
    if rest:
        windows[-1] = math.ceil(windows[-1] * rest)
    return max(1, sum(windows))


def _tokens(batch: Any) -> int:
    return int(batch.tokens if hasattr(batch, "tokens") else batch.input_ids.size)


def _images(batch: Any) -> int:
    pixels = getattr(batch, "pixel_values", None)
    found = pixels if pixels is not None else getattr(batch, "features", None)
    return 0 if found is None else len(found)
