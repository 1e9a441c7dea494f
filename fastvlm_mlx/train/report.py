"""The lines of a run's log for Weights & Biases or TensorBoard, which are optional extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WANDB, TENSORBOARD = REPORTERS = ("wandb", "tensorboard")
Report = Callable[[int, Mapping[str, float]], object]


def reporter(name: str | None, out: Path, settings: Mapping[str, Any]) -> Report | None:
    """What takes the numbers of a step; None if none is wanted.

    Args:
        name: one of REPORTERS.
        out: the run's folder, by which a resumed run is the same one there.
        settings: of the run.

    Raises:
        ImportError: its library is not installed.
    """
    if name is None:
        return None
    return _to_wandb(out, settings) if name == WANDB else _to_tensorboard(out)


def _to_wandb(out: Path, settings: Mapping[str, Any]) -> Report:
    try:
        import wandb
    except ImportError:
        raise ImportError(_missing(WANDB)) from None
    name = out.resolve().name
    run = wandb.init(
        project="fastvlm", name=name, id=name, resume="allow", config=dict(settings), dir=str(out)
    )
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _to_tensorboard(out: Path) -> Report:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(_missing(TENSORBOARD)) from None
    writer = SummaryWriter(str(out / TENSORBOARD))

    def report(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return report


def _missing(name: str) -> str:
    return f"report_to {name} needs a library: pip install 'fastvlm-mlx[{name}]'."


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a log's line can be drawn."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }
