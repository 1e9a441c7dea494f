"""Multiple choice: the letter that an answer names, and open questions of such benchmarks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

from .score import Score, mean_score
from .text import caseless

LETTERS = ascii_uppercase[:8]  # where the choices are not known
# Letters that are words too: they name a choice only where nothing goes on in that sentence.
WORDS = "AI"
MARKUP = re.compile(r"[*_`#]|\\boxed|\\text|[{}$]")
NAMED = re.compile(
    r"(?P<no>\b(?:not|isn't|never)\s+(?:\w+\s+)?)?"
    r"\b(?P<lead>answer|option|choice|letter)\b(?:\s+(?:is|would be|should be))?\s*[:=]?\s*"
    r"(?:(?:option|choice|letter)\s*)?"
    r"[(\[\"']?(?P<letter>[A-Za-z])(?P<end>[)\]\"']?)(?![\w'’])(?P<rest>\s+\w)?",
    re.IGNORECASE,
)
SEVERAL = r"\W?\s*(?:or|and|,|/|&)\s*\W?(?P<other>[A-Z])(?![\w'’])"
OTHER = re.compile(SEVERAL)
JOINED = re.compile(rf"(?<![\w'’])(?P<one>[A-Z]){SEVERAL}")
JOINED_LAST = re.compile(rf"{JOINED.pattern}\W*$")


def mcq(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the answer names the right choice; see `score_choice`."""
    return score_choice(answer, references, choices).value


def score_choice(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> Score:
    """Whether an answer names the right choice, by letter or by its text.

    An answer that names none, or several, is counted as unparsed, and as wrong. Where there are no
    choices and the reference is no letter, the question is open, and its answer is compared as
    text.

    Args:
        answer: what the model said.
        references: letters or texts of right choices.
        choices: the texts of A, B, C and so on.
    """
    wanted = {named_by(reference, choices) for reference in references} - {None}
    if not wanted and not choices:
        return mean_score(caseless(answer, references))
    said = parse_choice(answer, choices)
    return mean_score(float(said in wanted), said, unparsed=said is None)


def named_by(reference: str, choices: Sequence[str]) -> str | None:
    """The letter of a right choice, given as a letter, as its text, or as both ("B. cat")."""
    letters = ascii_uppercase[: len(choices)] or LETTERS
    letter = reference.strip().strip("().").upper()
    if len(letter) == 1 and letter in letters:
        return letter
    return parse_choice(reference, choices) if choices else None


def parse_choice(answer: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the choice that an answer names; None if it names none, or several.

    Args:
        answer: what the model said: "B", "b)", "(C) a cat", "B. Note that A …", "The answer is D",
            or the text of a choice.
        choices: the texts of A, B, C and so on; without them, letters up to H are known.
    """
    letters = ascii_uppercase[: len(choices)] or LETTERS
    text = MARKUP.sub(" ", unicodedata.normalize("NFKC", answer))
    first_line = text.strip().partition("\n")[0]
    if found := _alone(first_line, letters, choices):
        return found
    text = " ".join(text.split())
    if _names_several(re.fullmatch(JOINED_LAST, text), letters):
        return None
    for find in (_text_of_one, _label, _named, _last, _only):
        found = find(text, letters, choices)
        if found is not None:
            return found
    return None


def _alone(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """A letter and nothing else, at least on the first line."""
    return _known(re.fullmatch(r"\W*([A-Za-z])\W*", text), letters)


def _text_of_one(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The text of a choice and nothing else; signs count where they part two choices."""
    for form in (_bare, _plain):
        wanted = form(text)
        same = [letter for letter, c in zip(letters, choices, strict=False) if form(c) == wanted]
        if wanted and same:
            return same[0] if len(same) == 1 else None
    return None


def _label(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """A letter before all else: "B. Note", "(C) dog", "b) cat", "D: it", "B because"."""
    bracketed = re.match(r"[(\[]\s?([A-Za-z])\s?[)\]]", text)
    marked = re.match(r"([A-Za-z])\s?(?:[.):,;]|\s[-–—])(?=\s|$|[A-Z]{2}|[A-Z]?[a-z]|\d)", text)
    if found := _known(bracketed or marked, letters):
        return found
    bare = re.match(r"([A-Z])(?=\s)", text)
    return None if bare and bare[1] in WORDS else _known(bare, letters)


def _named(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """What follows "the answer is" or "option", last."""
    found = None
    for match in NAMED.finditer(text):
        letter = match["letter"]
        several = OTHER.match(text, match.end("end")) is not None
        is_word = letter in "ai" and match["rest"] and match["lead"].lower() == "answer"
        if not match["no"] and not is_word and not several and letter.upper() in letters:
            found = letter.upper()
    return found


def _last(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """A capital letter that ends the text: "so it must be C."."""
    if _names_several(JOINED_LAST.search(text), letters):
        return None
    return _known(re.search(r"(?:^|[\s(\[:])([A-Z])\W*$", text), letters)


def _names_several(match: re.Match[str] | None, letters: str) -> bool:
    """Whether what was matched, as in "A or B", are two choices."""
    return match is not None and match["one"] in letters and match["other"] in letters


def _only(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The one choice that is named anywhere, by a letter in brackets, its text or a letter."""
    bracketed = set(re.findall(r"[(\[]([A-Z])[)\]]", text)) & set(letters)
    single = set(re.findall(r"(?<![\w'’])([A-Z])(?![\w'’])", text)) & set(letters) - set(WORDS)
    if _names_several(JOINED.search(text), letters):
        return None
    for found in (bracketed, _texts_in(text, letters, choices), single):
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _texts_in(text: str, letters: str, choices: Sequence[str]) -> set[str]:
    """The choices whose texts stand in a text; "red" does not where "dark red" does."""
    said, found = f" {_plain(text)} ", set[str]()
    named: dict[str, str] = {}  # the letters of all choices that read alike
    for letter, c in zip(letters, choices, strict=False):
        named[_plain(c)] = named.get(_plain(c), "") + letter
    for c in sorted(filter(None, named), key=len, reverse=True):
        if f" {c} " in said:
            said = said.replace(f" {c} ", " \0 ")
            found.update(named[c])
    return found


def _known(match: re.Match[str] | None, letters: str) -> str | None:
    letter = match[1].upper() if match else ""
    return letter if letter and letter in letters else None


def _bare(text: str) -> str:
    text = MARKUP.sub(" ", unicodedata.normalize("NFKC", text))
    return " ".join(text.lower().split()).rstrip(".")


def _plain(text: str) -> str:
    """The words and numbers, these with their signs."""
    lower = unicodedata.normalize("NFKC", text).lower().replace("\u2212", "-")
    return " ".join(re.findall(r"(?:(?<![\w)])-(?=\d))?\w+(?:[.,]\d+)*", lower))
