"""The VQA accuracy: agreement with ten people, after the official normalization of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
# Each is also written without one of its apostrophes.
# fmt: off
CONTRACTIONS = (
    "'ow's'at", "'twas", "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've",
    "didn't", "doesn't", "don't", "hadn't", "hadn't've", "hasn't", "haven't", "he'd",
    "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd", "it'd've", "it'll",
    "ma'am", "might've", "mightn't", "mightn't've", "must've", "mustn't", "needn't", "not've",
    "o'clock", "oughtn't", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll",
    "someone's", "something'd", "something'd've", "something'll", "that's", "there'd",
    "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're",
    "they've", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's",
    "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll",
    "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't",
    "wouldn't've", "y'all", "y'all'd've", "y'all'll", "you'd", "you'd've", "you'll", "you're",
    "you've",
)
# fmt: on
WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it
AGREEING = 3  # of the other people, for full accuracy


def vqa(answer: str, references: Sequence[str]) -> float:
    """The accuracy of an answer against those of ten people: for each of them, a third for every
    other one who gave it, at most 1; then the mean.

    Fewer than four references can't show that three others agree: then an answer is right if it is
    one of them.
    """
    return agreement(normalized(answer), [normalized(reference) for reference in references])


def textvqa(answer: str, references: Sequence[str]) -> float:
    """As `vqa`, with the tokens of TextVQA's own scorer: commas and question marks fall away first,
    and a possessive is a word of its own."""
    return vqa(_tokenized(answer), [_tokenized(reference) for reference in references])


def agreement(answer: str, references: Sequence[str]) -> float:
    """The VQA accuracy of texts that are normalized."""
    same, people = list(references).count(answer), len(references)
    if people <= AGREEING:
        return float(same > 0)
    # Those who gave the answer leave one of it out, themselves; all others leave none.
    among = min(1.0, (same - 1) / AGREEING) if same else 0.0
    return (same * among + (people - same) * min(1.0, same / AGREEING)) / people


def normalized(text: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, number words as digits, no articles,
    no periods but decimal ones, contractions with their apostrophe, punctuation away or a space."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = _without_punctuation(text).lower().split()
    digits = [NUMBERS.get(word, word) for word in words]
    kept = [word for word in digits if word not in ARTICLES]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in kept)


def _without_punctuation(text: str) -> str:
    """Each mark away where one stands beside a space, or in a number with commas; otherwise a
    space, since it may be all that parts two words."""
    in_number = COMMA_IN_NUMBER.search(text) is not None
    apart = {mark: in_number or f"{mark} " in text or f" {mark}" in text for mark in PUNCTUATION}
    return PERIOD.sub("", text.translate({ord(m): "" if apart[m] else " " for m in PUNCTUATION}))


def _tokenized(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
