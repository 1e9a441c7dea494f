"""An answer → a caption within its bounds, flagged where it looks wrong."""

from __future__ import annotations

import re

from ..checks import shown
from .job import CaptionJob

TRUNCATED, LOOP, CUT = "truncated", "loop", "cut"
LONGEST_LOOP = 24  # words that are repeated
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(?=\s|$)|[。！？]")


class UnfitError(ValueError):
    """A caption that is not to be written."""


def judge(
    text: str, finish_reason: str, job: CaptionJob, *, constrained: bool = False
) -> tuple[str, list[str]]:
    """A caption as it is to be written, and its flags.

    With `constrained`, it had to follow a schema, which half an answer doesn't.

    Flags: "truncated" (`max_tokens` ended it), "loop" (its end says the same again and again),
    "cut" (to `max_words`).

    Raises:
        UnfitError: it is empty, incomplete, too short, or has a banned word.
    """
    text = text.strip()
    if not text:
        raise UnfitError("the caption is empty")
    if constrained and finish_reason == "length":
        raise UnfitError(f"max_tokens ended the caption before it was complete: {shown(text)}")
    flags = [TRUNCATED] if finish_reason == "length" else []
    if loops(text):
        flags.append(LOOP)
    if job.max_words is not None and len(text.split()) > job.max_words:
        text = shorten(text, job.max_words)
        flags.append(CUT)
    count = len(text.split())
    if count < job.min_words:
        raise UnfitError(
            f"the caption has {count} word(s), fewer than {job.min_words}: {shown(text)}"
        )
    for word in job.banned:
        if has_word(text, word):
            raise UnfitError(f"the caption has the banned word {shown(word)}")
    if job.trigger and not has_word(text, job.trigger):
        text = f"{job.trigger}, {text}"
    return text, flags


def loops(text: str) -> bool:
    """Whether a text ends in the same words or characters at least three times in a row.

    Few repetitions of few words are speech ("very, very, very"): together they must make at least
    eight words, or of writing without spaces sixteen characters.
    """
    words = re.findall(r"\w+", text.lower())
    return _repeats(words, 8) or (len(words) < 8 and _repeats(list(text.strip()), 16))


def _repeats(parts: list[str], least: int) -> bool:
    for length in range(1, min(LONGEST_LOOP, len(parts) // 3) + 1):
        times = max(3, -(-least // length))
        # The last repetition may have been broken off.
        for broken_off in range(length):
            end = len(parts) - broken_off
            unit = parts[end - length : end]
            whole = end >= times * length and parts[end - times * length : end] == unit * times
            if whole and parts[end:] == unit[:broken_off]:
                return True
    return False


def shorten(text: str, max_words: int) -> str:
    """The whole sentences within so many words; the words where there is no whole sentence."""
    end = [word.end() for word in re.finditer(r"\S+", text)][max_words - 1]
    ends = [found.end() for found in SENTENCE_END.finditer(text) if found.end() <= end]
    return text[: ends[-1]] if ends else text[:end].rstrip(" ,;:-–—")


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word or phrase, not as a part of a longer word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
