"""Metrics beside values worked out by hand, brute force, and the scorers of lmms-eval."""

import itertools
import math
import random
from statistics import mean

import pytest

from fastvlm_mlx.evaluate.metrics import METRICS, figures, find_metric, score_answers
from fastvlm_mlx.evaluate.metrics.choices import mcq, parse_choice, score_choice
from fastvlm_mlx.evaluate.metrics.open_ended import open_ended
from fastvlm_mlx.evaluate.metrics.text import (
    anls,
    caseless,
    cer,
    contains,
    edit_distance,
    exact,
    formula,
    parse_yes_no,
    relaxed,
    relaxed_strict_years,
    yesno,
)
from fastvlm_mlx.evaluate.metrics.vqa import normalized, textvqa, vqa


def test_exact_is_to_the_letter():
    assert exact(" a cat\n", ["a dog", "a cat "]) == 1
    assert exact("A cat", ["a cat"]) == 0 and exact("a cat.", ["a cat"]) == 0
    assert exact("", []) == 0
    assert caseless("A  cat.", ["a cat"]) == 1 and caseless("a cats", ["a cat"]) == 0


# VQA

NORMALIZED = {
    "The dog": "dog",
    "two dogs": "2 dogs",
    "None": "0",
    "1,000": "1000",
    "1,000 people": "1000 people",
    "3.5": "3.5",
    "U.S.A.": "usa",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "red/blue": "red blue",
    "red / blue": "red  blue".replace("  ", " "),
    "e-mail": "e mail",
    "what?": "what",  # the last mark becomes a space
    "10:30": "10:30",
    "dog's": "dog's",
    "line\nbreak\tand tab": "line break and tab",
    "日本": "日本",
    "": "",
}


@pytest.mark.parametrize("text", NORMALIZED)
def test_vqa_answers_are_normalized(text):
    assert normalized(text) == NORMALIZED[text]


def test_vqa_is_the_mean_over_people_left_out_one_by_one():
    random.seed(0)
    for _ in range(200):
        people = random.choices("abcd", k=random.randint(4, 10))
        for answer in "abcde":
            left = [people[:i] + people[i + 1 :] for i in range(len(people))]
            expected = mean(
                min(1, others.count(f"x{answer}") / 3)
                for others in [[f"x{o}" for o in rest] for rest in left]
            )
            assert vqa(f"x{answer}", [f"x{p}" for p in people]) == pytest.approx(expected)


def test_vqa_of_few_references_is_one_of_them():
    assert vqa("two", ["2"]) == 1 and vqa("3", ["2", "three"]) == 1 and vqa("4", ["2", "3"]) == 0
    assert vqa("2", []) == 0


def test_textvqa_takes_possessives_apart():
    assert textvqa("Macy's, 5?", ["macy 's 5"]) == 1
    assert vqa("Macy's", ["macy 's"]) == 0


# ANLS


def test_edit_distance_is_the_least_number_of_changes():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        same = slow(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, 1 + slow(a[1:], b), 1 + slow(a, b[1:]))

    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    assert all(edit_distance(a, b) == slow(a, b) for a in words for b in words)


def test_anls_has_a_cut_off_and_takes_the_best_reference():
    assert anls("abcd", ["abcx"]) == 0.75
    assert anls("abcd", ["abxx"]) == 0.5  # from the cut-off on
    assert anls("abcde", ["abxxx"]) == 0  # below it
    assert anls("abcd", ["zzzz", "abcd", "abcx"]) == 1
    assert anls("ABCD", ["abcd"]) == 1
    assert anls("", [""]) == 1 and anls("", ["a"]) == 0 and anls("a", []) == 0


def test_anls_lengths_are_those_of_the_normalized_texts():
    assert anls("  ab   cd ", ["ab cx"]) == 1 - 1 / 5


# ChartQA

RELAXED = {
    ("5.25", "5"): 1,  # 5 % of the reference
    ("4.75", "5"): 1,
    ("5.26", "5"): 0,
    ("100", "95"): 0,  # 5.3 % of the reference, although 5 % of the answer
    ("95", "100"): 1,
    ("-5.2", "-5"): 1,
    ("5", "-5"): 0,
    ("0", "0"): 1,
    ("0.0", "0"): 0,  # a reference of 0 is to be met as written
    ("5%", "0.05"): 1,
    ("5", "5%"): 0,
    ("Yes", "yes"): 1,
    ("yes.", "yes"): 0,
    ("1,000", "1000"): 0,  # no number to ChartQA's scorer
    ("nan", "5"): 0,
    ("2010", "2015"): 1,
}


@pytest.mark.parametrize("pair", RELAXED)
def test_relaxed_accuracy(pair):
    answer, reference = pair
    assert relaxed(answer, [reference]) == RELAXED[pair]
    assert relaxed(f" {answer}\n", ["never", reference]) == RELAXED[pair]


def test_a_year_is_strict_in_a_figure_beside():
    assert relaxed_strict_years("2010", ["2015"]) == 0 and relaxed_strict_years("2015", ["2015"])
    assert relaxed_strict_years("2015.0", ["2015"]) == 1
    assert relaxed_strict_years("3010", ["3015"]) == 1 and relaxed_strict_years("5.2", ["5"]) == 1
    scores = score_answers("relaxed", ["2010", "5"], [["2015"], ["5.2"]])
    assert figures("relaxed", scores) == {"relaxed": 1, "strict years": 0.5}


# Multiple choice

CHOICES = ["dog", "cat", "red", "dark red"]
CHOSEN = {
    "B": "B",
    "b": "B",
    " b) ": "B",
    "B.": "B",
    "(C)": "C",
    "[C]": "C",
    "**C**": "C",
    r"\boxed{C}": "C",
    "（Ｂ）": "B",
    "B. Note that A is wrong": "B",
    "B: since A is not": "B",
    "(d) because": "D",
    "c) red": "C",
    "B\nThe picture shows A": "B",
    "B because of that": "B",
    "B.cat": "B",
    "C - red": "C",
    "A, since": "A",
    "The answer is D": "D",
    "the answer is d.": "D",
    "The correct answer is (B).": "B",
    "Answer: C": "C",
    "The answer is A because B is wrong": "A",
    "The answer is not B, it is C": "C",
    "The best option is C, not B": "C",
    "Not option B but option C": "C",
    "option b": "B",
    "I choose D": "D",
    "Let me think. It must be C.": "C",
    "dog": "A",
    "Dark red.": "D",
    "It is a cat": "B",
    "The answer is a cat": "B",
    "It is dark red": "D",
    "A cat": "B",  # an article
    "E": None,
    "i": None,
    "": None,
    "none of these": None,
    "It is a dog or a cat": None,
    "A or B": None,
    "The answer is B or C": None,
    "Both A and C": None,
    "catalogue": None,
    "Perhaps (A), perhaps (B), who knows": None,
}


@pytest.mark.parametrize("answer", CHOSEN)
def test_the_letter_of_an_answer(answer):
    assert parse_choice(answer, CHOICES) == CHOSEN[answer]


SIGNED = {
    "-5": "B",
    "−5.": "B",
    "5": "A",
    "The answer is -5": "B",
    "x = -5, since": "B",
    "It is 5": "A",
    ">": "D",
    "<": "C",
    "D": "D",
}


@pytest.mark.parametrize("answer", SIGNED)
def test_signs_part_choices(answer):
    choices = ["5", "-5", "<", ">"]
    assert parse_choice(answer, choices) == SIGNED[answer]
    assert [mcq(c, [c], choices) for c in choices] == [1] * 4
    assert mcq("A", ["-5"], choices) == mcq("C", [">"], choices) == 0


def test_what_names_no_choice_is_unparsed_and_wrong():
    score = score_choice("I can't say", ["B"], CHOICES)
    assert (score.value, score.unparsed, score.parsed) == (0, True, None)
    score = score_choice("cat", ["(B)"], CHOICES)
    assert (score.value, score.unparsed, score.parsed) == (1, False, "B")


def test_a_reference_is_a_letter_or_a_choice():
    assert mcq("b", ["cat"], CHOICES) == 1 and mcq("b", ["Cat."], CHOICES) == 1
    assert mcq("b", ["B. cat"], CHOICES) == 1 and mcq("a", ["B. cat"], CHOICES) == 0
    assert mcq("H", ["H"]) == 1 and mcq("Z", ["H"]) == 0
    assert mcq("e", ["E"], [*CHOICES, "blue"]) == 1
    assert mcq("cat", ["B"], ["cat", "cat"]) == 0  # both say so
    assert mcq("It is a cat", ["A"], ["cat", "cat", "dog"]) == 0


def test_an_open_question_is_scored_openly():
    score = score_choice("Downhill.", ["downhill"])
    assert score.value == 1 and not score.unparsed
    assert score_choice("uphill", ["downhill"]).value == 0


OPEN = {
    ("The value is 3.14159", "3.14"): 1,
    ("so x = 2\ntherefore y is 4", "4"): 1,
    ("it is 12,345 in all", "12345"): 1,
    ("Paris", "paris"): 1,
    ("it could be Paris", "London"): 0,
    ("1e5", "100000"): 1,
    ("a cat", "a"): 1,
    ("cat", "a"): 0,  # single letters stand apart
    ("", "1"): 0,
}


@pytest.mark.parametrize("pair", OPEN)
def test_open_questions_of_mmmu(pair):
    answer, reference = pair
    assert open_ended(answer, ["never", reference]) == OPEN[pair]


# Yes and no

SAID = {
    "Yes": "yes",
    "no.": "no",
    "**No**, there is not": "no",
    "Yes, there is no doubt": "yes",
    "The answer is yes": "yes",
    "There is no dog": "no",
    "Norway": None,
    "eyes": None,
    "yesterday": None,
    "nothing": None,
    "It may be yes or no": None,
    "no-one": "no",
    "": None,
}


@pytest.mark.parametrize("answer", SAID)
def test_yes_and_no_are_words(answer):
    assert parse_yes_no(answer) == SAID[answer]


def test_yes_and_no_have_f1():
    answers = ["yes", "yes", "no", "no", "eyes"]
    scores = score_answers("yesno", answers, [["yes"], ["no"], ["no"], ["yes"], ["yes"]])
    # one true positive, one false positive, three positives
    assert figures("yesno", scores) == {"yesno": 0.4, "F1 of yes": 2 / (2 * 1 + 1 + 2)}
    assert [score.unparsed for score in scores] == [False] * 4 + [True]
    assert yesno("Yes!", ["yes"]) == 1


# Text within text, and errors of characters


def test_contains_is_without_case():
    assert contains("It says EXIT\nnow", ["exit now"]) == 1 and contains("exi", ["exit"]) == 0
    assert contains("ＡＢＣ１", ["abc1"]) == 1
    assert formula("x ^ 2 + Y", ["x^2+Y"]) == 1 and formula("x^2+y", ["x^2+Y"]) == 0


def test_character_errors_are_counted_per_character_of_the_nearest_reference():
    assert cer("abcd", ["abcx"]) == 0.25 and cer("abcdefgh", ["ab"]) == 3
    assert cer("ab", ["abcd", "abc"]) == 1 / 3
    assert cer("", [""]) == 0 and cer("ab", [""]) == 2 and cer("ab", []) == 2
    assert cer("e\u0301", ["\u00e9"]) == 0
    scores = score_answers("cer", ["abcd", "x"], [["abcx"], ["yz"]])
    assert figures("cer", scores) == {"cer": 3 / 6}  # of all characters, not a mean of rates


# Captions


def test_cider_of_captions_worked_out_by_hand():
    # "red" is in one image's references of two (weight log 2), "a" in both (weight 0).
    scores = score_answers("cider", ["a red", "a blue"], [["a red"], ["a green"]])
    # The first agrees in "red" and in "a red", of four orders; the second in "a" only.
    assert scores[0].value == pytest.approx(10 * 2 / 4) and scores[1].value == 0
    longer = score_answers("cider", ["red red red", "x"], [["red"], ["y"]])
    # Three times is clipped to once: w·w / (3w·w); two more pairs of words.
    assert longer[0].value == pytest.approx(10 / 4 / 3 * math.exp(-(2**2) / 72))


def test_cider_needs_two_images():
    with pytest.raises(ValueError, match="two or more, not 1"):
        score_answers("cider", ["a"], [["a"]])


@pytest.mark.needs("sacrebleu")
def test_bleu_from_sums_is_the_corpus_score():
    import sacrebleu

    answers = ["the cat sat on the mat", "a dog", "red, blue and 5.5 green"]
    references = [["the cat sat on a mat", "a cat sat"], ["a dog runs", "dogs"], ["red, blue"] * 2]
    scores = score_answers("bleu", answers, references)
    expected = sacrebleu.corpus_bleu(answers, list(zip(*references, strict=True))).score
    assert figures("bleu", scores)["bleu"] == pytest.approx(expected, rel=1e-12)


def test_bleu_without_its_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"fastvlm-mlx\[eval\]"):
        score_answers("bleu", ["a"], [["a"]])


# The table


def test_an_unknown_metric_is_told_the_names():
    with pytest.raises(ValueError, match="'accuracy'; there are exact, caseless"):
        find_metric("accuracy")


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("bleu", "cider")])
def test_what_equals_its_reference_is_no_mistake(name):
    answer = {"mcq": "B", "yesno": "no", "relaxed": "7"}.get(name, "seven apples")
    (score,) = score_answers(name, [answer], [[answer]])
    assert not METRICS[name].is_mistake(score)
    (score,) = score_answers(name, ["wrong"], [[answer]])
    assert METRICS[name].is_mistake(score)
    assert figures(name, []) == {}
