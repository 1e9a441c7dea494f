"""Metrics of short answers: each compares a text with references, of which the best one counts."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from .score import Score, best

ANLS_CUT_OFF = 0.5
RELAXED = 0.05  # of the reference
YEARS = range(1500, 2101)
YES_NO = re.compile(r"(?<![\w'’])(yes|no)(?![\w'’])")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Full-width ASCII and the ideographic space, as CJK texts have them.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference to the letter, but for spaces around it."""
    return float(answer.strip() in [reference.strip() for reference in references])


def caseless(answer: str, references: Sequence[str]) -> float:
    """As `exact`, without case and ASCII punctuation."""
    return exact(_plain(answer), [_plain(reference) for reference in references])


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(PUNCTUATION).split())


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer, whatever the case: OCRBench's rule."""
    said = _folded(answer)
    return float(any(_folded(reference) in said for reference in references))


def _folded(text: str) -> str:
    return text.translate(FULL_WIDTH).lower().strip().replace("\n", " ")


def formula(answer: str, references: Sequence[str]) -> float:
    """As `contains`, without spaces and with case: OCRBench's rule for handwritten formulas."""
    said = "".join(re.split("[ \n]", answer))
    return float(any("".join(re.split("[ \n]", r.strip())) in said for r in references))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions of characters that turn one text into the other."""
    if len(a) < len(b):
        a, b = b, a
    before = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            changed = before[j - 1] + (left != right)
            row.append(min(changed, before[j] + 1, row[-1] + 1))
        before = row
    return before[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one answer: 1 − edits / length of the longer
    text, both in lower case with single spaces, and 0 below the cut-off of one half."""
    said = _spaced(answer)
    found = best([_similarity(said, _spaced(reference)) for reference in references])
    return found if found >= ANLS_CUT_OFF else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer, shorter = max(len(a), len(b)), min(len(a), len(b))
    if longer == 0:
        return 1.0
    if shorter < ANLS_CUT_OFF * longer:  # more edits than that, whatever the letters
        return 0.0
    return 1 - edit_distance(a, b) / longer


def cer(answer: str, references: Sequence[str]) -> float:
    """Character error rate: edits per character of the nearest reference; above 1 is possible."""
    edits, length = _edits(answer, references)
    return edits / length


def score_cer(answer: str, references: Sequence[str]) -> Score:
    """`cer`, of which many make one rate: all edits over all characters."""
    edits, length = _edits(answer, references)
    return Score(edits / length, (float(edits), float(length)))


def _edits(answer: str, references: Sequence[str]) -> tuple[int, int]:
    """Edits to the reference that gives the lowest rate, and its length, at least 1."""
    said = _composed(answer)
    texts = [_composed(reference) for reference in references] or [""]
    found = [(edit_distance(said, text), max(1, len(text))) for text in texts]
    return min(found, key=lambda pair: pair[0] / pair[1])


def _composed(text: str) -> str:
    """A text whose letters are one character each, however they were typed."""
    return unicodedata.normalize("NFC", text.strip())


def relaxed(answer: str, references: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: a number may differ from the reference by 5 % of the reference
    (not of the answer), anything else must be equal but for case. 12% is 0.12; a reference of 0
    must be met as written."""
    return best([float(_is_near(answer.strip(), r.strip())) for r in references])


def relaxed_strict_years(answer: str, references: Sequence[str]) -> float:
    """As `relaxed`, but a reference that is a year must be met exactly: 5 % are a century."""
    kept = [float(_is_near(answer.strip(), r.strip(), strict_years=True)) for r in references]
    return best(kept)


def score_relaxed(answer: str, references: Sequence[str]) -> Score:
    """`relaxed` beside `relaxed_strict_years`."""
    value = relaxed(answer, references)
    return Score(value, (value, 1.0, relaxed_strict_years(answer, references)))


def _is_near(answer: str, reference: str, *, strict_years: bool = False) -> bool:
    said, wanted = _number(answer), _number(reference)
    if said is None or not wanted:
        return answer.lower() == reference.lower()
    if strict_years and re.fullmatch("[0-9]{4}", reference) and int(reference) in YEARS:
        return said == wanted
    return abs(said - wanted) / abs(wanted) <= RELAXED


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def parse_yes_no(answer: str) -> str | None:
    """Yes or no, found as a word: the first word, or the only one of the two that is said."""
    said = YES_NO.findall(answer.lower())
    first = re.match(r"\W*(yes|no)(?![\w'’])", answer.lower())
    if first:
        return first[1]
    return said[0] if len(set(said)) == 1 else None


def score_yes_no(answer: str, references: Sequence[str]) -> Score:
    """Whether yes or no was meant; true and false positives give F1."""
    said = parse_yes_no(answer)
    wanted = {parse_yes_no(reference) for reference in references} - {None}
    right = float(said in wanted)
    yes = "yes" in wanted
    counts = float(said == "yes" and yes), float(said == "yes" and not yes), float(yes)
    return Score(right, (right, 1.0, *counts), said, said is None)


def yesno(answer: str, references: Sequence[str]) -> float:
    """1 if the answer says the yes or no that a reference says, as a word of its own."""
    return score_yes_no(answer, references).value
