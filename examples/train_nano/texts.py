"""Pictures of written and printed text."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from . import brush, fonts
from .rows import Ask, Scene, absent_asks, background_asks, presence_asks
from .words import ALL, held_out, there

if TYPE_CHECKING:
    from PIL import Image

LONGEST_NOTE, LONGEST_PRINT = 6, 12
MOST_TURNED = 7  # degrees
MARGIN = 0.01  # of the width
READ_QUESTIONS = ["What is written here?", "Read the handwriting.", "Read the text."]
READ_QUESTIONS += ["What does the note say?"]


def until(choose: Callable[[Random], str], rng: Random, evaluation: bool) -> str:
    """A string that is held out, or one that is not."""
    while held_out(text := choose(rng)) != evaluation:
        pass
    return text


def note_string(rng: Random) -> str:
    """A dictionary word, random letters or digits, of 2 to 6 characters."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(fonts.dictionary(LONGEST_NOTE))
    letters = string.ascii_lowercase if kind < 0.8 else string.digits
    return "".join(rng.choices(letters, k=rng.randint(2, LONGEST_NOTE)))


def print_string(rng: Random) -> str:
    """A word, a number, a price, a time or a code, of up to 12 characters."""
    kind = rng.random()
    if kind < 0.55:
        word = rng.choice(fonts.dictionary(LONGEST_PRINT))
        return rng.choice([word, word, word.upper(), word.capitalize()])
    if kind < 0.75:
        return str(rng.randrange(10 ** rng.randint(1, LONGEST_PRINT)))
    if kind < 0.85:
        return "".join(rng.choices(string.ascii_uppercase + string.digits, k=rng.randint(3, 8)))
    forms = ["{}.{:02}", "${}.{:02}", "{}:{:02}", "{}%", "{}-{}", "{}/{}"]
    return rng.choice(forms).format(rng.randint(0, 99), rng.randint(0, 59))


def handwriting(
    rng: Random,
    size: int | brush.Shape,
    evaluation: bool = False,
    families: Sequence[str] = fonts.HANDWRITING,
) -> Scene:
    """A short note."""
    text = until(note_string, rng, evaluation)
    ground = brush.paper(rng)
    ink = brush.from_hsv(rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.05, 0.5))
    picture = brush.canvas(ground, size)
    if rng.random() < 0.4:
        rule(picture, rng, ground.top)
    write(rng, picture, text, rng.choice(families), ink)
    asks = read_asks(rng, "handwriting", text, "note") + about_asks(rng, text)
    return Scene("handwriting", [picture], asks + background_asks(ground.name), text=text)


def printed(
    rng: Random,
    size: int | brush.Shape,
    evaluation: bool = False,
    families: Sequence[str] = fonts.PRINT,
) -> Scene:
    """A printed word or number, plain or on a sign."""
    text = until(print_string, rng, evaluation)
    noun = rng.choice(["sign", "label"])
    ink_name, ground = ink_and_ground(rng)
    picture = brush.canvas(ground, size)
    write(rng, picture, text, rng.choice(families), brush.named_color(rng, ink_name))
    asks = read_asks(rng, "print", text, noun) + about_asks(rng, text)
    then = ("What color is it?", f"The text is {ink_name}.")
    asks.append(Ask("colors", "What color is the text?", then[1], "it", then))
    return Scene("print", [picture], asks + background_asks(ground.name), text=text)


def ink_and_ground(rng: Random) -> tuple[str, brush.Background]:
    """Dark on pale, or pale on dark."""
    if rng.random() < 0.7:
        return rng.choice(["black", "blue", "red", "green", "purple", "brown"]), brush.paper(rng)
    dark = brush.named_color(rng, rng.choice(["black", "blue", "red", "green", "purple", "brown"]))
    return rng.choice(["white", "yellow"]), brush.Background(dark, dark)


def rule(picture: Image.Image, rng: Random, paper: brush.Color) -> None:
    """The lines of writing paper."""
    from PIL import ImageDraw

    color = tuple(int(part * rng.uniform(0.78, 0.92)) for part in paper)
    step, y = rng.uniform(0.09, 0.2) * picture.height, rng.uniform(0, 0.1) * picture.height
    while y < picture.height:
        ImageDraw.Draw(picture).line((0, y, picture.width, y), fill=color)
        y += step


def write(rng: Random, picture: Image.Image, text: str, font: str, ink: brush.Color) -> None:
    """Write the text somewhere, as large as fits at most."""
    height = rng.uniform(0.12, 0.3) * picture.width
    angle = rng.uniform(-MOST_TURNED, MOST_TURNED) if rng.random() < 0.8 else 0.0
    part = brush.cut_text(text, font, height, ink, angle)
    margin = MARGIN * picture.width
    room = picture.width - 2 * margin, picture.height - 2 * margin
    if part.width > room[0] or part.height > room[1]:
        scale = min(room[0] / part.width, room[1] / part.height)
        part = brush.cut_text(text, font, height * scale, ink, angle)
    left = margin + rng.random() * max(0.0, room[0] - part.width)
    top = margin + rng.random() * max(0.0, room[1] - part.height)
    picture.paste(part, (round(left), round(top)), part)


def read_asks(rng: Random, task: str, text: str, noun: str) -> list[Ask]:
    """What it says, in several wordings, and whether it says this or that."""
    says, then = f'The note says "{text}".', ("What does it say?", f'It says "{text}".')
    questions = [q for q in READ_QUESTIONS if task == "handwriting" or "hand" not in q]
    asks = [Ask(task, question, says, "it", then) for question in questions]
    asks.append(
        Ask(task, "Describe the image.", f'The image shows a note that says "{text}".', "it")
    )
    if noun != "note":
        asks.append(
            Ask(task, f"What does the {noun} say?", f'The {noun} says "{text}".', "it", then)
        )
    for asked, yes in ((text, "Yes"), (mistaken(rng, text), "No")):
        question, fact = f'Does the note say "{asked}"?', f'{yes}, the note says "{text}".'
        asks.append(
            Ask(
                "yes_no",
                question,
                fact,
                "it",
                (f'Does it say "{asked}"?', f'{yes}, it says "{text}".'),
            )
        )
    return asks


def mistaken(rng: Random, text: str) -> str:
    """The same with one character changed."""
    at = rng.randrange(len(text))
    alphabet = string.digits if text[at].isdigit() else string.ascii_lowercase
    alphabet = alphabet.upper() if text[at].isupper() else alphabet
    return text[:at] + rng.choice([c for c in alphabet if c != text[at]]) + text[at + 1 :]


def about_asks(rng: Random, text: str) -> list[Ask]:
    asks = [
        Ask(
            "letters",
            f"What is the {which} character?",
            f'The {which} character is "{character}".',
            "character",
            (f"And the {which}?", f'The {which} character is "{character}".'),
        )
        for which, character in (("first", text[0]), ("last", text[-1]))
    ]
    asks.append(Ask("letters", "How many characters are there?", there(len(text), "character")))
    absent = presence_asks(rng, {}, list(ALL))[:1]
    return asks + absent + absent_asks(rng, {}, text=True)
