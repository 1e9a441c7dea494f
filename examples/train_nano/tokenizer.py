"""The tokenizer: byte-level BPE with Qwen2's normalizer, pre-tokenizer and special tokens.

Every word of the questions and answers becomes one token, by merges from left to right. What is
read in a picture stands in quotes, where no space precedes it, so that its letters stay single.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.hub.resolve import NANO

from .draw import SCENES, draw
from .words import ALL, SHAPES, a, plural, sentence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SYSTEM = "You are a helpful assistant."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS_SCENES = 120  # of each task; enough for every word
ROUND = 64  # embedding rows are a multiple of it
# The template's own words have no space before them either; they grow from the pair that is rarest
# in words. "user" has none that is rare, and stays four letters.
ROLES = {"assistant": "ss", "system": "ys"}


def corpus() -> list[str]:
    """Questions and answers of many scenes, without what is read in them."""
    texts = [SYSTEM, *(f"How many {plural(n)}? {sentence(a(n))}" for n in (*ALL, *SHAPES))]
    for task in SCENES:
        for index in range(CORPUS_SCENES):
            scene, _ = draw(0, index, 32, task=task, noise=False)
            for ask in scene.asks:
                texts += [ask.question, ask.answer, *(ask.then or ())]
    return list(dict.fromkeys(re.sub(r'"[^"]+"', '"x"', text) for text in texts))


def pieces(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """The words as the pre-tokenizer cuts them, most frequent first."""
    counts: dict[str, int] = {}
    for text in texts:
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            counts[piece] = counts.get(piece, 0) + 1
    words = [p for p in counts if len(p) > 1 and re.fullmatch(r'(Ġ["\w]|[A-Z"])[\w]*\.?', p)]
    return sorted(words, key=lambda piece: (-counts[piece], piece))


def merges_for(words: Iterable[str], vocabulary: set[str]) -> list[tuple[str, str]]:
    """Merges from left to right that make each word one token, without those that exist."""
    merges = []
    grown = [(word[: end - 1], word[end - 1]) for word in words for end in range(2, len(word) + 1)]
    for left, right in [*grown, *role_merges()]:
        if left + right not in vocabulary:
            vocabulary.add(left + right)
            merges.append((left, right))
    return merges


def role_merges() -> list[tuple[str, str]]:
    """Merges of the template's words: the rare pair, one letter more, the start, the rest."""
    merges = []
    for word, pair in ROLES.items():
        at = word.index(pair)
        whole = word[: at + 3]
        merges += [(pair[0], pair[1]), (pair, word[at + 2]), (word[:at], word[at : at + 3])]
        merges += [(word[:end], word[end]) for end in range(len(whole), len(word))]
    return merges


def empty() -> Tokenizer:
    """Bytes and special tokens only."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


def build(base: Path | None, texts: Iterable[str]) -> dict[str, Any]:
    """tokenizer.json with the words of these texts, from nothing or added to those of `base`."""
    tokenizer = empty()
    written = json.loads(tokenizer.to_str())
    if base is not None:
        written = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    model = written["model"]
    vocabulary = model["vocab"]
    new = merges_for(pieces(texts, tokenizer), set(vocabulary))
    if base is not None:
        # Only a token of the vocabulary keeps its id where others come after it.
        vocabulary |= {token["content"]: token["id"] for token in written["added_tokens"]}
    for number, (left, right) in enumerate(new, max(vocabulary.values()) + 1):
        vocabulary[left + right] = number
    model["merges"] += [list(pair) for pair in new]
    if base is None:
        for number, token in enumerate(written["added_tokens"], len(vocabulary)):
            token["id"] = number
    return written


def write(folder: Path, base: Path | None) -> int:
    """Write tokenizer.json and tokenizer_config.json; the number of embedding rows it needs."""
    written = build(base, corpus())
    ids = {token["content"]: token["id"] for token in written["added_tokens"]}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = settings["added_tokens_decoder"].values()
    settings["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in added}
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    highest = max([*ids.values(), *written["model"]["vocab"].values()])
    return -(-(highest + 1) // ROUND) * ROUND
