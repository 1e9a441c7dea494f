"""The stages of both recipes: pictures, what is trained, learning rates, lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from fastvlm_mlx.train.settings import FROZEN, FULL

from .draw import MIX
from .store import Settings

TODAY = {name: MIX[name] for name in ("emoji", "counting", "handwriting")}
# For the last stage: conversations, refusals and comparisons need every kind of scene, and today's
# tasks more than half, since a decoder that learns the others only would read and name worse.
TALKED = {"emoji": 15, "counting": 16, "handwriting": 28, "kinds": 7, "places": 7, "shapes": 7}
TALKED |= {"print": 7, "charts": 4, "pairs": 9}


@dataclass(frozen=True)
class Stage:
    """One run of the trainer.

    Attributes:
        pictures: the stores that it reads.
        steps: optimizer steps.
        scenes: of a batch of pictures of 256 pixels; of larger ones there are fewer.
        singles, talks: questions and conversations of each scene in a step.
        vision: frozen or full; frozen features are computed once.
        rate, vision_rate: the highest learning rates, of the decoder and of the encoder.
        helper: the weight of the helper heads at the start and at the end.
    """

    name: str
    pictures: tuple[Settings, ...]
    steps: int
    scenes: int = 24
    singles: int = 3
    talks: int = 0
    vision: str = FULL
    rate: float = 5e-4
    vision_rate: float = 5e-4
    helper: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> int:
        """The side of the pictures that most are of, in pixels."""
        scenes: Counter[int] = Counter()
        for each in self.pictures:
            scenes[each.size] += each.scenes
        return scenes.most_common(1)[0][0]

    def scenes_of(self, pictures: Settings) -> int:
        """Scenes of a batch of these pictures."""
        return self.scenes if pictures.strips else max(1, self.scenes * 256 // pictures.size)


# From nothing: strips to learn reading, small pictures, then pictures of 256 pixels.
SCRATCH = [
    Stage(
        "strips",
        (Settings(30_000, 256, seed=11, strips=True),),
        steps=3300,
        scenes=64,
        singles=2,
        rate=1e-3,
        vision_rate=2e-3,
        helper=(1.0, 0.3),
    ),
    Stage(
        "small",
        (Settings(24_000, 192, seed=12, mix=TODAY),),
        steps=2500,
        rate=1e-3,
        vision_rate=1e-3,
        helper=(0.5, 0.1),
    ),
    Stage("large", (Settings(24_000, 256, seed=13, mix=TODAY),), steps=3000, helper=(0.1, 0.0)),
]
# The one to ship: grown from the model of before, which names, counts and reads already. Several
# stores of a size, so that several processes can draw; few sizes, since a GPU prepares for each.
SMALL = tuple(Settings(5_000, 192, seed=100 + i) for i in range(16))
SIZES = (
    *(Settings(4_000, 192, seed=200 + i) for i in range(4)),
    *(Settings(4_000, 256, seed=220 + i) for i in range(14)),
)
TALKS = (
    *(Settings(2_000, 192, seed=400 + i, mix=TALKED) for i in range(1)),
    *(Settings(2_000, 256, seed=420 + i, mix=TALKED) for i in range(12)),
    *(Settings(2_000, 320, seed=440 + i, mix=TALKED) for i in range(1)),
    *(Settings(2_000, 384, seed=460 + i, mix=TALKED) for i in range(1)),
)
# For a short stage at the end, with today's tasks more often still.
COUNTED = {"emoji": 24, "counting": 24, "handwriting": 22, "kinds": 5, "places": 5, "shapes": 5}
COUNTED |= {"print": 5, "charts": 4, "pairs": 6}
COUNTS = (
    Settings(900, 192, seed=500, mix=COUNTED),
    *(Settings(1_200, 256, seed=520 + i, mix=COUNTED) for i in range(4)),
    Settings(600, 384, seed=540, mix=COUNTED),
)
SHIP = [
    Stage(
        "decoder", (Settings(8_000, 256, seed=21),), steps=300, scenes=48, singles=4, vision=FROZEN
    ),
    Stage("small", SMALL, steps=2200, scenes=64, singles=4, rate=7e-4, vision_rate=7e-4),
    Stage("large", SIZES, steps=2300, scenes=64, singles=4),
    Stage("talk", TALKS, steps=800, scenes=32, singles=4, talks=1, vision=FROZEN, rate=3e-4),
    Stage("counts", COUNTS, steps=180, scenes=32, singles=4, talks=1, vision=FROZEN, rate=2e-4),
]
RECIPES = {"scratch": SCRATCH, "ship": SHIP}


def scaled(stages: list[Stage], share: float) -> list[Stage]:
    """The same recipe with a share of the steps and of the pictures."""
    found = []
    for stage in stages:
        pictures = tuple(
            replace(each, scenes=max(2 * stage.scenes_of(each), round(share * each.scenes)))
            for each in stage.pictures
        )
        steps = max(1, round(share * stage.steps))
        found.append(replace(stage, steps=steps, pictures=pictures))
    return found


def store_name(settings: Settings) -> str:
    """The folder of a store."""
    return f"{'strips' if settings.strips else settings.size}-{settings.seed}"
