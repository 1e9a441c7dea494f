"""Pictures of coloured shapes."""

from __future__ import annotations

from collections import Counter
from random import Random

from . import brush
from .brush import Thing
from .rows import CANNOT_SEE, NAME_QUESTIONS, Ask, Scene, background_asks, name_asks, presence_asks
from .scenes import at_cell, places_asks
from .words import COLORS, SHAPES, a, counted, held_out, listed, plural, sentence, there


def shapes(rng: Random, size: int, evaluation: bool) -> Scene:
    """One to five shapes."""
    things: list[Thing] = []
    while not things or held_out(_key(things)) != evaluation:
        things = any_shapes(rng)
    ground = contrasting(rng, {thing.color for thing in things})
    picture = brush.canvas(ground, size)
    for thing in things:
        brush.draw_thing(picture, thing, brush.named_color(rng, thing.color))
    return Scene("shapes", [picture], shapes_asks(rng, things, ground.name), things)


def _key(things: list[Thing]) -> str:
    if len(things) == 1:
        return at_cell(things[0].name, things[0].x, things[0].y)
    return "+".join(sorted(thing.name for thing in things))


def any_shapes(rng: Random) -> list[Thing]:
    number, found = rng.choice([1, 2, 2, 3, 3, 4, 5]), None
    while found is None:
        largest = 0.6 if number == 1 else 0.5 / number**0.3
        sizes = [rng.uniform(0.14, largest) for _ in range(number)]
        found = brush.scattered(rng, sizes)
    palette = rng.sample(list(COLORS), rng.randint(1, number))
    forms = rng.sample(SHAPES, rng.randint(1, min(number, len(SHAPES))))
    return [
        _shape(rng, rng.choice(palette), rng.choice(forms), x, y, side)
        for (x, y), side in zip(found, sizes, strict=True)
    ]


def _shape(rng: Random, color: str, form: str, x: float, y: float, side: float) -> Thing:
    angle = rng.uniform(-12, 12)
    return Thing(f"{color} {form}", x, y, side, angle, color=color, shape=form)


CLOSE = [{"red", "orange"}, {"orange", "yellow"}, {"red", "pink"}, {"red", "brown"}]
CLOSE += [{"orange", "brown"}, {"blue", "purple"}, {"pink", "purple"}, {"black", "brown"}]
CLOSE += [{"white", "yellow"}, {"gray", "white"}, {"gray", "brown"}, {"purple", "black"}]


def contrasting(rng: Random, colors: set[str]) -> brush.Background:
    """A background on which every one of these colours shows."""
    if rng.random() < 0.4 and not colors & {"white", "yellow", "gray", "pink"}:
        return brush.paper(rng)
    clear = [
        name
        for name in COLORS
        if not any(name == color or {name, color} in CLOSE for color in colors)
    ]
    name = rng.choice(clear or ["white"])
    color = brush.named_color(rng, name)
    return brush.Background(color, color)


def shapes_asks(rng: Random, things: list[Thing], ground: str | None) -> list[Ask]:
    forms, colors = Counter(t.shape for t in things), Counter(t.color for t in things)
    names = Counter(t.name for t in things)
    called = {
        t.name: t.shape if forms[t.shape] == 1 else t.name for t in things if names[t.name] == 1
    }
    asks = places_asks(rng, things, called) + count_asks(rng, forms, colors)
    for thing in things:
        asks += color_asks(thing, forms, colors)
    asks += presence_asks(rng, names, [f"{c} {s}" for c in COLORS for s in SHAPES])
    asks += presence_asks(rng, forms, list(SHAPES)) + absent(rng, forms)
    what = listed([counted(names[name], name) for name in sorted(names)])
    if len(things) == 1:
        asks += name_asks("shapes", a(things[0].name), [*NAME_QUESTIONS, "What shape is this?"])
    elif len(things) <= 3:
        asks.append(Ask("shapes", "Describe the image.", f"The image shows {what}."))
        asks += [Ask("shapes", q, sentence(what)) for q in NAME_QUESTIONS[1:]]
    return asks + background_asks(ground)


def color_asks(thing: Thing, forms: Counter[str], colors: Counter[str]) -> list[Ask]:
    """The colour of a shape that is the only one, the shape of a colour that is the only one."""
    asks = []
    if forms[thing.shape] == 1:
        then = (f"And the {thing.shape}?", f"The {thing.shape} is {thing.color}.")
        asks.append(Ask("colors", f"What color is the {thing.shape}?", then[1], "color", then))
    if colors[thing.color] == 1:
        fact = f"The {thing.color} shape is {a(thing.shape)}."
        asks.append(
            Ask(
                "shapes",
                f"What shape is {thing.color}?",
                fact,
                "shape",
                (f"And {thing.color}?", fact),
            )
        )
    return asks


def count_asks(rng: Random, forms: Counter[str], colors: Counter[str]) -> list[Ask]:
    total, asks = forms.total(), []
    for question in ("How many shapes are there?", "How many objects are in the image?"):
        word = question.split()[2]
        asks.append(Ask("shapes", question, there(total, word.removesuffix("s"))))
    for form, number in forms.items():
        then = (f"And {plural(form)}?", there(number, form))
        asks.append(Ask("shapes", f"How many {plural(form)} are there?", then[1], "count", then))
    for color, number in colors.items():
        fact = there(number, f"{color} shape")
        asks.append(Ask("shapes", f"How many {color} shapes are there?", fact))
    return asks


def absent(rng: Random, forms: Counter[str]) -> list[Ask]:
    form = rng.choice([form for form in SHAPES if form not in forms])
    question = rng.choice(["Where is the {}?", "What color is the {}?", "Is the {} big or small?"])
    none = Ask("not_there", f"How many {plural(form)} are there?", there(0, form))
    return [Ask("not_there", question.format(form), CANNOT_SEE), none]
