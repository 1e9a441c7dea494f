"""Questions about a scene, and conversations made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from .brush import Thing
from .words import ALL, a, plural, sentence, there

if TYPE_CHECKING:
    from PIL import Image

CANNOT_SEE = "I can't see that."
LONGEST_CONVERSATION = 4


@dataclass(frozen=True)
class Ask:
    """A question and its answer."""

    task: str
    question: str
    answer: str
    group: str = ""
    then: tuple[str, str] | None = None
    """How both read right after another question of the same group, as in "And the dogs?"."""


@dataclass(frozen=True)
class Row:
    """One row of training data: a conversation of one or more turns."""

    task: str
    turns: tuple[tuple[str, str], ...]


@dataclass
class Scene:
    """Pictures, what is asked about them, and what was drawn."""

    task: str
    pictures: list[Image.Image]
    asks: list[Ask]
    things: list[Thing] = field(default_factory=list)
    text: str = ""


def choose_rows(scene: Scene, rng: Random, number: int) -> list[Row]:
    """So many different questions, one in four of them a conversation."""
    asks = _varied(scene.asks, rng)
    talks = min(number // 4, len(asks) // 2)
    singles = [Row(ask.task, ((ask.question, ask.answer),)) for ask in asks[: number - talks]]
    return singles + [conversation(scene.asks, rng) for _ in range(talks)]


def _varied(asks: list[Ask], rng: Random) -> list[Ask]:
    """Shuffled, without repetition, and each task in turn."""
    unique = list({ask.question: ask for ask in rng.sample(asks, len(asks))}.values())
    seen: dict[str, int] = {}
    order: list[tuple[float, int]] = []
    for ask in unique:
        seen[ask.task] = seen.get(ask.task, 0) + 1
        order.append((seen[ask.task] / (3 if ask.task == scene_task(unique) else 1), len(order)))
    return [ask for _, ask in sorted(zip(order, unique, strict=True), key=lambda pair: pair[0])]


def scene_task(asks: list[Ask]) -> str:
    """The task that most of the questions belong to."""
    tasks = [ask.task for ask in asks]
    return max(sorted(set(tasks)), key=tasks.count)


def conversation(asks: list[Ask], rng: Random) -> Row:
    """Two to four questions in turn, each after the first as one would ask it then."""
    different = list({ask.question: ask for ask in rng.sample(asks, len(asks))}.values())
    if rng.random() < 0.7:  # stay with one subject
        subject = different[0].group
        different.sort(key=lambda ask: not subject or ask.group != subject)
    chosen = different[: rng.randint(2, LONGEST_CONVERSATION)]
    turns, group = [], ""
    for ask in chosen:
        if ask.then and ask.group == group and rng.random() < 0.75:
            turns.append(ask.then)
        else:
            turns.append((ask.question, ask.answer))
        group = ask.group
    return Row("follow_up", tuple(turns))


def sampled(rng: Random, items: list[str], number: int) -> list[str]:
    return rng.sample(items, min(number, len(items)))


NAME_QUESTIONS = ["What is this?", "What does the image show?", "What is in the image?"]
OTHER_NAME_QUESTIONS = ["What do you see?", "What can you see?", "Name the object."]


def name_asks(task: str, what: str, questions: list[str]) -> list[Ask]:
    """What is in the picture, in a few wordings; `what` is as in "a cat" or "3 cats"."""
    it = ("What is it?", f"It is {what}.") if what.startswith("a") else None
    asks = [Ask(task, question, sentence(what), "it", it) for question in questions]
    return [*asks, Ask(task, "Describe the image.", f"The image shows {what}.", "it")]


def presence_asks(rng: Random, present: dict[str, int], others: list[str]) -> list[Ask]:
    """Is there one? As often yes as no."""
    asks = [_is_there(rng, name, present[name]) for name in sampled(rng, sorted(present), 2)]
    absent = [name for name in others if name not in present]
    return asks + [_is_there(rng, name, 0) for name in sampled(rng, absent, 2)]


def _is_there(rng: Random, name: str, number: int) -> Ask:
    if number > 1 or (not number and rng.random() < 0.3):
        question = rng.choice(["Are there any {}?", "Can you see any {}?"]).format(plural(name))
        answer = there(number, name)
        yes = "Yes, " if number else "No, "
        return Ask(
            "yes_no",
            question,
            yes + answer[0].lower() + answer[1:],
            "any",
            (f"Any {plural(name)}?", yes + answer[0].lower() + answer[1:]),
        )
    forms = ["Is there {}?", "Can you see {}?", "Is there {} in the image?"]
    answer = f"Yes, there is {a(name)}." if number else f"No, there is no {name}."
    return Ask(
        "yes_no", rng.choice(forms).format(a(name)), answer, "any", (f"And {a(name)}?", answer)
    )


def identity_asks(rng: Random, name: str, others: list[str]) -> list[Ask]:
    """Is it this or another?"""
    other = rng.choice([each for each in others if each != name])
    return [
        Ask(
            "yes_no",
            f"Is this {a(asked)}?",
            f"{yes}, it is {a(name)}.",
            "it",
            (f"Is it {a(asked)}?", f"{yes}, it is {a(name)}."),
        )
        for asked, yes in ((name, "Yes"), (other, "No"))
    ]


READ_ABSENT = ["Read the text.", "What is written here?", "What does the note say?"]
READ_ABSENT += ["Read the handwriting.", "What is the value of A?", "Which bar is the highest?"]


def absent_asks(rng: Random, present: dict[str, int], text: bool = False) -> list[Ask]:
    """Questions about what is not in the picture."""
    name = rng.choice([name for name in ALL if name not in present])
    asks = [Ask("not_there", f"Where is the {name}?", CANNOT_SEE)]
    asks.append(Ask("not_there", f"How many {plural(name)} are there?", there(0, name)))
    if not text:
        asks.append(Ask("not_there", rng.choice(READ_ABSENT), CANNOT_SEE))
    return asks


def background_asks(name: str | None) -> list[Ask]:
    if not name:
        return []
    forms = ["What color is the background?", "What is the background color?"]
    return [Ask("colors", form, f"The background is {name}.", "it") for form in forms]


def where_asks(thing: Thing, called: str, where: str | None) -> list[Ask]:
    if not where:
        return []
    then = ("Where is it?", f"It is {where}.")
    forms = [f"Where is the {called}?", f"Where in the image is the {called}?"]
    return [Ask("places", form, f"The {called} is {where}.", "it", then) for form in forms]


def count_yes_no(rng: Random, name: str, number: int) -> list[Ask]:
    """Is it so many, is it more?"""
    fact = there(number, name)
    fact = fact[0].lower() + fact[1:]
    wrong = rng.choice([n for n in range(1, 10) if n != number])
    least = rng.randint(1, 8)
    asks = [(f"Are there {n} {plural(name)}?", n == number) for n in (number, wrong) if n > 1]
    asks.append((f"Are there more than {least} {plural(name)}?", number > least))
    return [Ask("yes_no", q, f"{'Yes' if yes else 'No'}, {fact}", "they") for q, yes in asks]
