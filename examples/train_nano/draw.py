"""Scene number i of a seed: the same pictures and rows on every machine with the same fonts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from . import brush, charts, fonts, pairs, scenes, shapes, texts
from .rows import Row, Scene, choose_rows

ROWS_OF_A_SCENE = 10
NOISY = 0.85  # the share of pictures with noise
SCENES: dict[str, Callable[[Random, int, bool], Scene]] = {
    "emoji": scenes.emoji,
    "counting": scenes.counting,
    "handwriting": texts.handwriting,
    "kinds": scenes.kinds,
    "places": scenes.places,
    "shapes": shapes.shapes,
    "print": texts.printed,
    "charts": charts.charts,
    "pairs": pairs.pairs,
}
# Scenes for evaluation only.
UNSEEN_FONTS: dict[str, Callable[[Random, int, bool], Scene]] = {
    "handwriting_fonts": partial(texts.handwriting, families=fonts.HANDWRITING_HELD_OUT),
    "print_fonts": partial(texts.printed, families=fonts.PRINT_HELD_OUT),
}
# How often each is drawn. Today's tasks have most, since they must not get worse.
MIX = {"emoji": 16, "counting": 22, "handwriting": 28, "kinds": 7, "places": 7, "shapes": 8}
MIX |= {"print": 7, "charts": 5}
STRIP_TASKS = {"emoji", "handwriting", "print", "letters", "yes_no", "not_there"}
PAIRS_MIX = MIX | {"pairs": 12}


def draw_strip(seed: int, index: int, shape: tuple[int, int]) -> tuple[Scene, list[Row]]:
    """Draw a strip (height, width): one emoji or, mostly, a text; cheap to learn reading from."""
    rng = Random(f"strip {seed} {index}")
    scene = rng.choices([texts.handwriting, texts.printed, scenes.emoji], [6, 3, 3])[0](rng, shape)
    scene.asks = [ask for ask in scene.asks if ask.task in STRIP_TASKS]
    rows = choose_rows(scene, rng, ROWS_OF_A_SCENE)
    deviation = rng.uniform(0, brush.MOST_NOISE)
    scene.pictures = [brush.add_noise(picture, deviation, rng) for picture in scene.pictures]
    return scene, rows


def draw(
    seed: int,
    index: int,
    size: int,
    *,
    task: str | None = None,
    mix: dict[str, int] = MIX,
    evaluation: bool = False,
    noise: bool = True,
) -> tuple[Scene, list[Row]]:
    """Draw one scene.

    Args:
        seed, index: which; together with the other arguments they decide everything.
        size: of the square pictures, in pixels.
        task: what to draw; one by chance if None.
        mix: how often each task is drawn then.
        evaluation: draw only strings, places and combinations that training never sees.
        noise: add noise to the pixels.

    Returns:
        The scene, and as many rows as are asked of a scene in training.
    """
    rng = Random(f"{'evaluation' if evaluation else 'training'} {seed} {index}")
    task = task or rng.choices(list(mix), list(mix.values()))[0]
    scene = (SCENES | UNSEEN_FONTS)[task](rng, size, evaluation)
    rows = choose_rows(scene, rng, ROWS_OF_A_SCENE)
    if noise and rng.random() < NOISY:
        deviation = rng.uniform(0, brush.MOST_NOISE)
        scene.pictures = [brush.add_noise(picture, deviation, rng) for picture in scene.pictures]
    return scene, rows
