"""The lines of a run's log for Weights & Biases or TensorBoard, which are optional extras."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

WANDB, TENSORBOARD = REPORTERS = ("wandb", "tensorboard")
LIBRARIES = {WANDB: "wandb", TENSORBOARD: "tensorboardX"}
Report = Callable[[int, Mapping[str, float]], object]


def check_reporter(name: str | None) -> None:
    """ImportError if the library of a reporter is not installed."""
    try:
        if name is not None:
            import_module(LIBRARIES[name])
    except ImportError:
        said = f"report_to {name} needs a library: pip install 'fastvlm-mlx[{name}]'."
        raise ImportError(said) from None


def reporter(name: str | None, out: Path, settings: Mapping[str, Any]) -> Report | None:
    """What takes the numbers of a step; None if none is wanted.

    Args:
        name: one of REPORTERS.
        out: the run's folder, by which a resumed run is the same one there.
        settings: of the run.

    Raises:
        ImportError: its library is not installed.
    """
    check_reporter(name)
    if name is None:
        return None
    return _to_wandb(out, settings) if name == WANDB else _to_tensorboard(out)


def _to_wandb(out: Path, settings: Mapping[str, Any]) -> Report:
    import wandb

    path = out.resolve()
    own = blake2b(str(path).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    run = wandb.init(
        project="fastvlm",
        name=path.name,
        id=f"{re.sub('[^A-Za-z0-9_-]', '-', path.name)[:64]}-{own}",
        resume="allow",
        config=dict(settings),
        dir=str(out),
    )
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _to_tensorboard(out: Path) -> Report:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(out / TENSORBOARD))

    def report(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return report


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a log's line can be drawn."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }
