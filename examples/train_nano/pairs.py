"""Two pictures to compare."""

from __future__ import annotations

from random import Random

from . import brush
from .rows import Ask, Scene
from .scenes import several
from .words import ALL, COUNTED, a, counted, held_out, plural, sentence

ORDINALS = ("first", "second")
SAME = "Yes, they are the same."
NOT_SAME = "No, they are not the same."


def pairs(rng: Random, size: int, evaluation: bool) -> Scene:
    """Two pictures, each with one to nine of a kind; they often share the kind or the number."""
    one = other = any_group(rng)
    while held_out(f"{one} | {other}") != evaluation:
        one = any_group(rng)
        other = any_other(rng, one)
    groups = [several(rng, [name] * number) for name, number in (one, other)]
    pictures = []
    for group in groups:
        picture = brush.canvas(brush.any_background(rng), size)
        for thing in group:
            brush.draw_thing(picture, thing)
        pictures.append(picture)
    things = [thing for group in groups for thing in group]
    return Scene("pairs", pictures, pair_asks(rng, one, other), things)


Group = tuple[str, int]


def any_group(rng: Random) -> Group:
    single = rng.random() < 0.4
    return rng.choice(list(ALL if single else COUNTED)), 1 if single else rng.randint(1, 9)


def any_other(rng: Random, group: Group) -> Group:
    kind = rng.random()
    if kind < 0.3:
        return group
    if kind < 0.75:
        return group[0], rng.randint(1, 9)
    return any_group(rng)


def pair_asks(rng: Random, one: Group, other: Group) -> list[Ask]:
    answer = SAME if one == other else NOT_SAME
    forms = ["Are they the same?", "Are the two pictures the same?"]
    forms.append("Do both pictures show the same?")
    asks = [Ask("pairs", form, answer) for form in forms]
    for which, (name, number) in zip(ORDINALS, (one, other), strict=True):
        what = counted(number, name)
        then = (f"And in the {which} picture?", sentence(what))
        asks.append(Ask("pairs", f"What is in the {which} picture?", sentence(what), "what", then))
        fact = f"The {which} picture shows {what}."
        asks.append(
            Ask(
                "pairs",
                f"Describe the {which} picture.",
                fact,
                "describe",
                (f"And the {which}?", fact),
            )
        )
    for name in sorted({one[0], other[0]}):
        numbers = [number if kind == name else 0 for kind, number in (one, other)]
        asks += more_asks(name, numbers)
    return asks + both_asks(rng, one, other)


def more_asks(name: str, numbers: list[int]) -> list[Ask]:
    """Which picture has more of a kind?"""
    question = f"Which picture has more {plural(name)}?"
    if numbers[0] == numbers[1]:
        return [Ask("pairs", question, f"Both have {numbers[0]}.")]
    which = ORDINALS[numbers[1] > numbers[0]]
    asks = [Ask("pairs", question, f"The {which} picture has more {plural(name)}.")]
    if 0 in numbers:
        fact = (
            f"The {which} picture shows {a(name)}."
            if max(numbers) == 1
            else f"The {which} picture shows {plural(name)}."
        )
        asks.append(
            Ask(
                "pairs",
                f"Which picture shows {a(name) if max(numbers) == 1 else plural(name)}?",
                fact,
            )
        )
    return asks


def both_asks(rng: Random, one: Group, other: Group) -> list[Ask]:
    name = rng.choice([one[0], other[0], rng.choice(list(ALL))])
    shown = [group[0] == name for group in (one, other)]
    yes = "Yes" if all(shown) else "No"
    if all(shown):
        fact = f"both show {plural(name)}." if one[1] + other[1] > 2 else f"both show {a(name)}."
    elif any(shown):
        fact = f"only the {ORDINALS[shown[1]]} does."
    else:
        fact = "neither does."
    return [Ask("yes_no", f"Do both pictures show {plural(name)}?", f"{yes}, {fact}")]
