"""What the pictures show, by name: emoji, shapes, colours, places."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32


@dataclass(frozen=True)
class Kind:
    """One kind of thing, drawn as an emoji."""

    name: str
    emoji: str
    plural: str


def kinds(table: str) -> dict[str, Kind]:
    """Kinds from lines of `emoji name` or `emoji name, plural`."""
    rows = (line.split(" ", 1) for line in table.strip().splitlines())
    named = ((emoji, *text.split(", ")) for emoji, text in rows)
    return {name: Kind(name, emoji, *plural or [f"{name}s"]) for emoji, name, *plural in named}


# Those that nano has always counted.
COUNTED = kinds("""
🍎 red apple
⚽ soccer ball
🍌 banana
🦋 butterfly, butterflies
🥕 carrot
🐱 cat
🍪 cookie
🐶 dog
🍩 donut
🐸 frog
❤️ red heart
🐞 ladybug
🍄 mushroom
🐧 penguin
🚀 rocket
🐌 snail
⭐ yellow star
🍓 strawberry, strawberries
🌻 sunflower
🐢 turtle
""")
# With those above, the 66 that nano has always named.
NAMED = COUNTED | kinds("""
✈️ airplane
⏰ alarm clock
🎈 balloon
🏀 basketball
🔔 bell
🚲 bicycle
🎂 birthday cake
💙 blue heart
🌵 cactus, cactuses
📷 camera
🚗 red car
👑 crown
😀 smiling face
🔥 flame
🎁 gift box, gift boxes
👻 ghost
💚 green heart
🎸 guitar
🍔 hamburger
🐝 honeybee
🏠 house
🍦 ice cream cone
🔑 key
🐨 koala
🍋 lemon
💡 light bulb
🦁 lion
🐵 monkey
🐭 mouse, mice
🐙 octopus, octopuses
🦉 owl
🌴 palm tree
🐼 panda
🐷 pig
🌲 pine tree
🍍 pineapple
🍕 pizza slice
🐰 rabbit
🌈 rainbow
🎾 tennis racket
🤖 robot
🌹 rose
⛵ sailboat
🐯 tiger
🍉 watermelon
🐳 whale
""")
ALL = NAMED | kinds("""
🍐 pear
🍊 orange
🦆 duck
🐘 elephant
🐟 fish, fish
☂️ umbrella
🚌 bus, buses
📕 book
""")

COLORS = {
    "red": (0xE0, 0x20, 0x20),
    "orange": (0xFF, 0x8C, 0x1A),
    "yellow": (0xFF, 0xDD, 0x22),
    "green": (0x22, 0xA8, 0x3C),
    "blue": (0x24, 0x58, 0xE0),
    "purple": (0x8A, 0x2B, 0xC8),
    "pink": (0xFF, 0x8A, 0xC4),
    "brown": (0x8A, 0x50, 0x22),
    "black": (0x14, 0x14, 0x14),
    "white": (0xFA, 0xFA, 0xFA),
    "gray": (0x8C, 0x8C, 0x8C),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def a(name: str) -> str:
    """The name with its article."""
    return f"an {name}" if name[0] in "aeio" or name == "umbrella" else f"a {name}"


def plural(name: str) -> str:
    """Several of what is named."""
    if name in ALL:
        return ALL[name].plural
    return f"{name}es" if name.endswith("s") else f"{name}s"


def counted(number: int, name: str) -> str:
    """`a cat`, or `3 cats`."""
    return a(name) if number == 1 else f"{number} {plural(name)}"


def there(number: int, name: str) -> str:
    """That so many of them are in the picture."""
    if number == 0:
        return f"There are no {plural(name)}."
    if number == 1:
        return f"There is 1 {name}."
    return f"There are {number} {plural(name)}."


def listed(parts: list[str]) -> str:
    """`a cat`, `a cat and a dog`, `a bell, a cat and a dog`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def place(x: float, y: float) -> str | None:
    """Where a point of the unit square lies, in words; none near a border between two places."""
    column, row = _third(x), _third(y)
    if column is None or row is None:
        return None
    if row == column == 1:
        return "in the middle"
    if row == 1:
        return f"on the {COLUMNS[column]}"
    side = f" {COLUMNS[column]}" if column != 1 else ""
    return f"at the {ROWS[row]}{side}"


def _third(at: float) -> int | None:
    bounds = ((0.0, 0.3), (0.38, 0.62), (0.7, 1.0))
    return next((i for i, (low, high) in enumerate(bounds) if low <= at <= high), None)


def relation(x: float, y: float, margin: float = 0.14) -> list[str]:
    """How a thing stands to another that is (x, y) away from it, where that is clear."""
    across = ["right of"] * (x < -margin) + ["left of"] * (x > margin)
    return across + ["below"] * (y < -margin) + ["above"] * (y > margin)


def held_out(key: str) -> bool:
    """Whether a string, a place or a combination is of the tenth that training never sees."""
    return crc32(key.encode()) % 10 == 0
