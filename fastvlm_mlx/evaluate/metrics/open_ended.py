"""MMMU's rule for open questions: numbers and phrases that a longer answer arrives at."""

from __future__ import annotations

import re
from collections.abc import Sequence

LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
TRIVIAL = tuple(":,.!?;'")


def open_ended(answer: str, references: Sequence[str]) -> float:
    """1 if a conclusion of the answer has the reference in it, or is the same number to two
    decimals."""
    wanted = [form for reference in references for form in _forms(reference)]
    texts = [form for form in wanted if isinstance(form, str)]
    return float(
        any(
            any(text in said for text in texts) if isinstance(said, str) else said in wanted
            for said in conclusions(answer)
        )
    )


def conclusions(answer: str) -> set[str | float]:
    """What each line of an answer arrives at, and the numbers in it; otherwise the whole answer."""
    lines = answer.strip().strip(".").lower().split("\n")
    tails = [_tail(line, last=n == len(lines) - 1) for n, line in enumerate(lines)]
    found = [tail for tail in tails if tail and tail not in TRIVIAL] or ["\n".join(lines)]
    numbers = [n for tail in found for pattern in NUMBERS for n in re.findall(pattern, tail)]
    return {form for text in [*found, *numbers] for form in _forms(text)}


def _tail(line: str, *, last: bool) -> str:
    """The shortest text after words that lead to a result; an equation may end the last line."""
    shortest = ""
    for lead in (*LEADS, *("=",) * last):
        if lead in line:
            tail = line.split(lead)[-1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or a text in lower case; single letters must stand apart."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
