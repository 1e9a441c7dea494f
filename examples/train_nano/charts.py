"""Pictures of small bar, line and pie charts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import TYPE_CHECKING

from . import brush
from .rows import Ask, Scene, absent_asks, presence_asks
from .words import ALL, a, held_out

if TYPE_CHECKING:
    from PIL import Image

LABELS = "ABCDE"
HIGHEST = 9
PALETTE = ["red", "orange", "green", "blue", "purple", "pink", "brown", "gray"]
PARTS = {"bar": "bar", "line": "point", "pie": "slice"}
WORDS = {"bar": ("highest", "lowest", "higher"), "line": ("highest", "lowest", "higher")}
WORDS |= {"pie": ("biggest", "smallest", "bigger")}


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    form: str
    values: dict[str, int]
    colors: dict[str, str]
    numbered: bool
    """Whether the values are written, rather than to be read off the grid."""


def charts(rng: Random, size: int, evaluation: bool) -> Scene:
    """A small chart."""
    chart = any_chart(rng)
    while held_out(f"{chart.form} {chart.values}") != evaluation:
        chart = any_chart(rng)
    picture = brush.canvas(brush.paper(rng), size)
    {"bar": draw_bars, "line": draw_line, "pie": draw_pie}[chart.form](rng, picture, chart)
    return Scene("charts", [picture], chart_asks(rng, chart), text=str(chart))


def any_chart(rng: Random) -> Chart:
    form, number = rng.choice(["bar", "bar", "line", "pie"]), rng.randint(2, len(LABELS))
    colors = rng.sample(PALETTE, number)
    if form == "line":
        colors = colors[:1] * number
    values = rng.sample(range(1, HIGHEST + 1), number)
    if form == "pie":
        values = rng.sample([1, 2, 4, 7][: max(2, number)], min(4, number))
    labels = LABELS[: len(values)]
    return Chart(
        form,
        dict(zip(labels, values, strict=True)),
        dict(zip(labels, colors, strict=False)),
        rng.random() < 0.5,
    )


@dataclass(frozen=True)
class Frame:
    """Where the axes are, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def height(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / (HIGHEST + 1)


def draw_axes(rng: Random, picture: Image.Image, chart: Chart) -> tuple[Frame, list[float]]:
    """Draw axes and labels; (the frame, the middle of each column)."""
    from PIL import ImageDraw

    size, draw = picture.width, ImageDraw.Draw(picture)
    frame = Frame(
        size * rng.uniform(0.1, 0.16),
        size * rng.uniform(0.04, 0.1),
        size * rng.uniform(0.9, 0.97),
        size * rng.uniform(0.82, 0.88),
    )
    if not chart.numbered:
        for value in range(1, HIGHEST + 1):
            y = frame.height(value)
            draw.line((frame.left, y, frame.right, y), fill=(200, 200, 200))
            label(picture, str(value), frame.left - 0.05 * size, y, 0.07)
    ends = (frame.left, frame.top, frame.left, frame.bottom, frame.right, frame.bottom)
    draw.line(ends, fill=(40, 40, 40), width=max(1, size // 128))
    step = (frame.right - frame.left) / len(chart.values)
    middles = [frame.left + step * (i + 0.5) for i in range(len(chart.values))]
    for name, x in zip(chart.values, middles, strict=True):
        label(picture, name, x, frame.bottom + 0.06 * size)
    return frame, middles


def label(picture: Image.Image, text: str, x: float, y: float, height: float = 0.1) -> None:
    size = picture.width
    part = brush.cut_text(text, "inter-700", height * size, (20, 20, 20), 0.0)
    brush.paste(picture, part, x / size, y / size)


def draw_bars(rng: Random, picture: Image.Image, chart: Chart) -> None:
    from PIL import ImageDraw

    frame, middles = draw_axes(rng, picture, chart)
    half = (frame.right - frame.left) / len(middles) * rng.uniform(0.25, 0.42)
    for (name, value), x in zip(chart.values.items(), middles, strict=True):
        color = brush.named_color(rng, chart.colors[name])
        box = (x - half, frame.height(value), x + half, frame.bottom - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=color)
        if chart.numbered:
            label(picture, str(value), x, frame.height(value) - 0.055 * picture.width)


def draw_line(rng: Random, picture: Image.Image, chart: Chart) -> None:
    from PIL import ImageDraw

    frame, middles = draw_axes(rng, picture, chart)
    draw, width = ImageDraw.Draw(picture), max(2, picture.width // 80)
    color = brush.named_color(rng, chart.colors["A"])
    points = [(x, frame.height(v)) for x, v in zip(middles, chart.values.values(), strict=True)]
    draw.line(points, fill=color, width=width)
    for (x, y), value in zip(points, chart.values.values(), strict=True):
        draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=color)
        if chart.numbered:
            label(picture, str(value), x, y - 0.075 * picture.width)


def draw_pie(rng: Random, picture: Image.Image, chart: Chart) -> None:
    import math

    from PIL import ImageDraw

    size, total = picture.width, sum(chart.values.values())
    radius, draw = size * rng.uniform(0.32, 0.44), ImageDraw.Draw(picture)
    x, y = (rng.uniform(radius, size - radius) for _ in range(2))
    start = rng.uniform(0, 360)
    for name, value in chart.values.items():
        end = start + 360 * value / total
        color = brush.named_color(rng, chart.colors[name])
        draw.pieslice((x - radius, y - radius, x + radius, y + radius), start, end, fill=color)
        middle = math.radians((start + end) / 2)
        label(
            picture,
            name,
            x + 0.68 * radius * math.cos(middle),
            y + 0.68 * radius * math.sin(middle),
            0.085,
        )
        start = end


def chart_asks(rng: Random, chart: Chart) -> list[Ask]:
    kind, part = f"{chart.form} chart", PARTS[chart.form]
    names, number = list(chart.values), len(chart.values)
    asks = [
        Ask(
            "charts",
            "What is this?",
            f"{a(kind).capitalize()}.",
            "it",
            ("What is it?", f"It is {a(kind)}."),
        )
    ]
    asks.append(Ask("charts", "What kind of chart is this?", f"It is {a(kind)}.", "it"))
    asks.append(
        Ask("charts", "Describe the image.", f"The image shows {a(kind)} with {number} {part}s.")
    )
    asks.append(Ask("charts", f"How many {part}s are there?", f"There are {number} {part}s."))
    asks += extreme_asks(chart, part) + compare_asks(rng, chart)
    if chart.form != "pie":
        asks += [value_ask(name, chart.values[name]) for name in names] * 2
    if chart.form != "line":
        asks += [
            Ask(
                "colors",
                f"What color is {part} {name}?",
                f"{part.capitalize()} {name} is {chart.colors[name]}.",
                "color",
            )
            for name in names
        ]
    return asks + presence_asks(rng, {}, list(ALL))[:1] + chart_absent(rng, number)


def value_ask(name: str, value: int) -> Ask:
    fact = f"The value of {name} is {value}."
    return Ask("charts", f"What is the value of {name}?", fact, "value", (f"And {name}?", fact))


def extreme_asks(chart: Chart, part: str) -> list[Ask]:
    ordered = sorted(chart.values, key=lambda name: chart.values[name])
    most, least, _ = WORDS[chart.form]
    return [
        Ask(
            "charts",
            question,
            f"{name} is the {word}.",
            "extreme",
            (f"And the {word}?", f"{name} is the {word}."),
        )
        for name, word in ((ordered[-1], most), (ordered[0], least))
        for question in (f"Which is the {word}?", f"Which {part} is the {word}?")
    ]


def compare_asks(rng: Random, chart: Chart) -> list[Ask]:
    word = WORDS[chart.form][2]
    asks = []
    for one, other in rng.sample(list(permutations(chart.values, 2)), 2):
        more = one if chart.values[one] > chart.values[other] else other
        answer = f"{'Yes' if more == one else 'No'}, {more} is {word}."
        asks.append(Ask("yes_no", f"Is {one} {word} than {other}?", answer))
        asks.append(Ask("charts", f"Which is {word}, {one} or {other}?", f"{more} is {word}."))
    return asks


def chart_absent(rng: Random, number: int) -> list[Ask]:
    asks = absent_asks(rng, {}, text=True)
    if number < len(LABELS):
        beyond = rng.choice(LABELS[number:])
        asks.append(Ask("not_there", f"What is the value of {beyond}?", "I can't see that."))
    return asks
