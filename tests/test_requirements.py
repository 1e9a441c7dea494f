"""The lowest versions that setup.py asks for are those that constraints/lowest.txt installs."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def required() -> dict[str, str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (listed,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    lines = (line for line in ast.literal_eval(listed) if ";" not in line)
    return dict(line.split(">=") for line in lines)


def pinned() -> dict[str, str]:
    text = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))


def padded(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_lowest_versions_stand_in_both_places() -> None:
    lowest = pinned()
    assert len(required()) >= 6
    for name, version in required().items():
        assert padded(version) == padded(lowest[name]), name
