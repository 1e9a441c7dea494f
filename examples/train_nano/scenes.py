"""Pictures of emoji: one, several of a kind, several kinds, and where they are."""

from __future__ import annotations

from itertools import permutations
from random import Random

from . import brush
from .brush import Thing
from .rows import (
    NAME_QUESTIONS,
    OTHER_NAME_QUESTIONS,
    Ask,
    Scene,
    absent_asks,
    background_asks,
    count_yes_no,
    identity_asks,
    name_asks,
    presence_asks,
    where_asks,
)
from .words import (
    ALL,
    COUNTED,
    NAMED,
    OPPOSITE,
    a,
    counted,
    held_out,
    listed,
    place,
    plural,
    relation,
    sentence,
    there,
)

CELLS = 8  # places are held out by cells of a grid of so many rows and columns
BIGGER = 1.4  # times as large, for "bigger" to be clear


def at_cell(name: str, x: float, y: float) -> str:
    """A thing's place in words for `held_out`."""
    return f"{name}@{int(CELLS * x)},{int(CELLS * y)}"


def turned(rng: Random) -> float:
    return rng.uniform(-20, 20)


def emoji(rng: Random, size: int | brush.Shape, evaluation: bool = False) -> Scene:
    """One emoji, to be named."""
    aspect = size[0] / size[1] if isinstance(size, tuple) else 1.0
    largest = min(0.62, 0.95 * aspect)
    name = rng.choice(list(NAMED if rng.random() < 0.85 else ALL))
    while True:
        side = rng.uniform(largest / 3, largest)
        x, y = (rng.uniform(half, 1 - half) for half in (side / 2, side / aspect / 2))
        if held_out(at_cell(name, x, y)) == evaluation:
            break
    thing, ground = Thing(name, x, y, side, turned(rng)), brush.any_background(rng)
    picture = brush.canvas(ground, size)
    brush.draw_thing(picture, thing)
    return Scene("emoji", [picture], emoji_asks(rng, thing, ground.name), [thing])


def emoji_asks(rng: Random, thing: Thing, ground: str | None) -> list[Ask]:
    name, present = thing.name, {thing.name: 1}
    questions = [*NAME_QUESTIONS, "Which emoji is this?", *OTHER_NAME_QUESTIONS]
    asks = name_asks("emoji", a(name), questions)
    asks += presence_asks(rng, present, list(ALL)) + identity_asks(rng, name, list(ALL))
    asks += absent_asks(rng, present) + background_asks(ground)
    asks += where_asks(thing, name, place(thing.x, thing.y))
    # As often as `absent_asks` asks for what is not there, or one of a kind would be none.
    for question in ("How many are there?", f"How many {plural(name)} are there?"):
        asks.append(Ask("counting", question, there(1, name), "it"))
    if not 0.32 < thing.size < 0.48:
        how = "small" if thing.size < 0.4 else "big"
        then = ("Is it big or small?", f"It is {how}.")
        asks.append(
            Ask("places", f"Is the {name} big or small?", f"The {name} is {how}.", "it", then)
        )
    return asks


def counting(rng: Random, size: int, evaluation: bool) -> Scene:
    """One to nine of a kind."""
    names = list(COUNTED if rng.random() < 0.85 else ALL)
    things = several(rng, [rng.choice(names)] * rng.randint(1, 9))
    ground = brush.any_background(rng)
    picture = brush.canvas(ground, size)
    for thing in things:
        brush.draw_thing(picture, thing)
    asks = counting_asks(rng, things[0].name, len(things), ground.name)
    return Scene("counting", [picture], asks, things)


def several(rng: Random, names: list[str]) -> list[Thing]:
    """Things of about one size, apart from each other."""
    side = rng.uniform(0.13, min(0.32, 0.72 / len(names) ** 0.5))
    while True:
        sizes = [side * rng.uniform(0.88, 1.12) for _ in names]
        if (places := brush.scattered(rng, sizes)) is not None:
            pairs = zip(names, places, sizes, strict=True)
            return [Thing(name, x, y, s, turned(rng)) for name, (x, y), s in pairs]
        side *= 0.9


def how_many(name: str, number: int, group: str = "they") -> Ask:
    then = (f"And {plural(name)}?" if group == "count" else "How many?", there(number, name))
    return Ask("counting", f"How many {plural(name)} are there?", there(number, name), group, then)


def counting_asks(rng: Random, name: str, number: int, ground: str | None) -> list[Ask]:
    what, present = counted(number, name), {name: number}
    asks = [how_many(name, number)]
    general = ["How many are there?", "How many objects are in the image?"]
    general += [f"Count the {plural(name)}.", f"How many {plural(name)} do you see?"]
    asks += [Ask("counting", q, there(number, name), "they") for q in general]
    asks.append(Ask("counting", "Describe the image.", f"The image shows {what}.", "they"))
    asks += [Ask("counting", q, sentence(what), "they") for q in NAME_QUESTIONS[1:]]
    if number > 1:
        then = ("What are they?", f"They are {plural(name)}.")
        asks.append(Ask("emoji", "What are these?", f"They are {plural(name)}.", "they", then))
    asks += count_yes_no(rng, name, number) + presence_asks(rng, present, list(ALL))
    return asks + absent_asks(rng, present) + background_asks(ground)


def kinds(rng: Random, size: int, evaluation: bool) -> Scene:
    """Two or three kinds in one picture, up to nine together."""
    while True:
        names = rng.sample(list(COUNTED if rng.random() < 0.6 else ALL), rng.choice([2, 2, 3]))
        if held_out("+".join(sorted(names))) == evaluation:
            break
    numbers = {name: rng.randint(1, 9 // len(names)) for name in names}
    order = [name for name in names for _ in range(numbers[name])]
    things, ground = several(rng, order), brush.any_background(rng)
    picture = brush.canvas(ground, size)
    for thing in things:
        brush.draw_thing(picture, thing)
    return Scene("kinds", [picture], kinds_asks(rng, numbers, ground.name), things)


def kinds_asks(rng: Random, numbers: dict[str, int], ground: str | None) -> list[Ask]:
    asks = []
    for name, number in numbers.items():
        plain = how_many(name, number, "count")
        asks += [Ask("kinds", plain.question, plain.answer, "count", plain.then)] * 2
    together = sum(numbers.values())
    what = listed([counted(numbers[name], name) for name in sorted(numbers)])
    asks.append(
        Ask("kinds", "How many objects are in the image?", f"There are {together} objects.")
    )
    asks.append(Ask("kinds", "Describe the image.", f"The image shows {what}."))
    asks += [Ask("kinds", q, sentence(what)) for q in NAME_QUESTIONS[1:]]
    asks += [ask for pair in permutations(sorted(numbers), 2) for ask in more_asks(*pair, numbers)]
    asks += presence_asks(rng, numbers, list(ALL)) + absent_asks(rng, numbers)
    return asks + background_asks(ground)


def more_asks(one: str, other: str, numbers: dict[str, int]) -> list[Ask]:
    """Which of two kinds has more."""
    difference = numbers[one] - numbers[other]
    fact = "There are as many." if not difference else ""
    fact = fact or f"There are more {plural(one if difference > 0 else other)}."
    yes = "Yes" if difference > 0 else "No"
    names = f"{plural(one)} or {plural(other)}"
    return [
        Ask("kinds", f"Are there more {names}?", fact),
        Ask(
            "yes_no",
            f"Are there more {plural(one)} than {plural(other)}?",
            f"{yes}, {fact[0].lower()}{fact[1:]}",
        ),
    ]


def places(rng: Random, size: int, evaluation: bool) -> Scene:
    """Two to four different things: which is where, and which is bigger."""
    while True:
        names = rng.sample(list(ALL), rng.choice([2, 2, 3, 4]))
        if held_out("+".join(sorted(names))) == evaluation:
            break
    found = None
    while found is None:
        sizes = [rng.uniform(0.16, 0.5 if len(names) == 2 else 0.36) for _ in names]
        found = brush.scattered(rng, sizes)
    things = [
        Thing(name, x, y, side, turned(rng))
        for name, (x, y), side in zip(names, found, sizes, strict=True)
    ]
    ground = brush.any_background(rng)
    picture = brush.canvas(ground, size)
    for thing in things:
        brush.draw_thing(picture, thing)
    asks = places_asks(rng, things, {thing.name: thing.name for thing in things})
    present = {thing.name: 1 for thing in things}
    asks += presence_asks(rng, present, list(ALL)) + absent_asks(rng, present)
    what = listed([a(name) for name in sorted(names)])
    asks += [Ask("kinds", q, sentence(what)) for q in NAME_QUESTIONS[1:]]
    asks.append(Ask("kinds", "Describe the image.", f"The image shows {what}."))
    asks.append(
        Ask("kinds", "How many objects are in the image?", f"There are {len(things)} objects.")
    )
    return Scene("places", [picture], asks + background_asks(ground.name), things)


def places_asks(rng: Random, things: list[Thing], called: dict[str, str]) -> list[Ask]:
    """Where things are; `called` has those that can be told apart, with what to call them."""
    asks = []
    for thing in things:
        if thing.name not in called:
            continue
        name, where = called[thing.name], place(thing.x, thing.y)
        for ask in where_asks(thing, name, where):
            then = (f"And the {name}?", ask.answer)
            asks.append(Ask("places", ask.question, ask.answer, "where", then))
        if where and [place(t.x, t.y) for t in things].count(where) == 1:
            asks.append(Ask("places", f"What is {where}?", sentence(a(thing.name))))
    pairs = [(t, u) for t, u in permutations(things, 2) if {t.name, u.name} <= called.keys()]
    return asks + [
        ask
        for t, u in rng.sample(pairs, min(4, len(pairs)))
        for ask in pair_asks(rng, t, u, called, things)
    ]


def pair_asks(
    rng: Random, one: Thing, other: Thing, called: dict[str, str], things: list[Thing]
) -> list[Ask]:
    """How one thing stands to another."""
    first, second = called[one.name], called[other.name]
    asks = []
    for side in relation(other.x - one.x, other.y - one.y):
        question, fact = (
            f"Is the {first} {{}} the {second}?",
            f"the {first} is {side} the {second}.",
        )
        asks.append(Ask("places", question.format(side), f"Yes, {fact}"))
        asks.append(Ask("places", question.format(OPPOSITE[side]), f"No, {fact}"))
        if only_one(one, other, side, things):
            asks.append(Ask("places", f"What is {side} the {second}?", sentence(a(one.name))))
    if one.size > BIGGER * other.size:
        names = [f"the {first}", f"the {second}"]
        rng.shuffle(names)
        for word, bigger in (("bigger", first), ("smaller", second)):
            asks.append(
                Ask(
                    "places",
                    f"Which is {word}, {names[0]} or {names[1]}?",
                    f"The {bigger} is {word}.",
                )
            )
    return [Ask("places", q, answer) for q, answer in sampled_pairs(rng, asks, 3)]


def sampled_pairs(rng: Random, asks: list[Ask], number: int) -> list[tuple[str, str]]:
    chosen = rng.sample(asks, min(number, len(asks)))
    return [(ask.question, ask.answer) for ask in chosen]


def only_one(one: Thing, other: Thing, side: str, things: list[Thing]) -> bool:
    """Whether no other thing is on that side of it, not even by a little."""
    rest = [t for t in things if t not in (one, other)]
    return not any(side in relation(other.x - t.x, other.y - t.y, 0.0) for t in rest)
