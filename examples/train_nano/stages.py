"""The stages of both recipes: pictures, what is trained, learning rates, lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastvlm_mlx.train.settings import FROZEN, FULL

from .draw import MIX
from .store import Settings

TODAY = {name: MIX[name] for name in ("emoji", "counting", "handwriting")}
# For the last stage: conversations, refusals and comparisons need every kind of scene.
EVERYTHING = dict.fromkeys(MIX, 10) | {"pairs": 20}


@dataclass(frozen=True)
class Stage:
    """One run of the trainer.

    Attributes:
        pictures: the store that it reads.
        steps: optimizer steps.
        scenes: of a batch.
        singles, talks: questions and conversations of each scene in a step.
        vision: frozen or full; frozen features are computed once.
        rate, vision_rate: the highest learning rates, of the decoder and of the encoder.
        helper: the weight of the helper heads at the start and at the end.
    """

    name: str
    pictures: Settings
    steps: int
    scenes: int = 24
    singles: int = 4
    talks: int = 0
    vision: str = FULL
    rate: float = 1e-3
    vision_rate: float = 1e-3
    helper: tuple[float, float] = (0.0, 0.0)


# From nothing: strips to learn reading, small pictures, then pictures of 256 pixels.
SCRATCH = [
    Stage(
        "strips",
        Settings(40_000, 256, seed=11, strips=True),
        3300,
        64,
        2,
        helper=(1.0, 0.3),
        rate=2e-3,
        vision_rate=2e-3,
    ),
    Stage("small", Settings(40_000, 192, seed=12, mix=TODAY), 3000, 32, 3, helper=(0.5, 0.1)),
    Stage("large", Settings(40_000, 256, seed=13, mix=TODAY), 3000, 32, 3, helper=(0.1, 0.0)),
]
# The one to ship: grown from the model of before, which names, counts and reads already.
SHIP = [
    Stage("decoder", Settings(16_000, 256, seed=21), 1500, 32, 4, 1, vision=FROZEN, rate=5e-4),
    Stage("small", Settings(60_000, 192, seed=22), 4000, 24, 4, 1, rate=5e-4, vision_rate=5e-4),
    Stage("large", Settings(60_000, 256, seed=23), 5000, 24, 4, 1, rate=5e-4, vision_rate=5e-4),
    Stage("larger", Settings(8_000, 320, seed=24), 500, 16, 4, 1, rate=2e-4, vision_rate=2e-4),
    Stage("largest", Settings(8_000, 384, seed=25), 500, 12, 4, 1, rate=2e-4, vision_rate=2e-4),
    Stage("again", Settings(60_000, 256, seed=23), 1000, 24, 4, 1, rate=1e-4, vision_rate=1e-4),
    Stage(
        "talk",
        Settings(30_000, 256, seed=26, mix=EVERYTHING),
        3000,
        24,
        4,
        2,
        vision=FROZEN,
        rate=3e-4,
    ),
]
RECIPES = {"scratch": SCRATCH, "ship": SHIP}


def scaled(stages: list[Stage], share: float) -> list[Stage]:
    """The same recipe with a share of the steps and of the pictures."""

    def of(number: int) -> int:
        return max(1, round(number * share))

    return [
        replace(
            stage,
            steps=of(stage.steps),
            pictures=replace(stage.pictures, scenes=max(stage.scenes, of(stage.pictures.scenes))),
        )
        for stage in stages
    ]


def store_name(settings: Settings) -> str:
    """The folder of a store."""
    return f"{'strips' if settings.strips else settings.size}-{settings.seed}"
