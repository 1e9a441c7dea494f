"""Answers that follow a JSON schema, a regular expression or a list of choices, through llguidance.

Before each token the grammar says which tokens may follow, as a bit for each. The processor works
that out while the device computes the logits, and the logits of all others become -inf, so that
whatever samples afterwards finds only what fits.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..checks import brief, shown
from ..processor import Processor
from ..text.tokenizer import Tokenizer
from .options import CONSTRAINTS, Options

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer

BITS = 32  # tokens in a word of the mask
GRAMMARS_KEPT = 32
LEXER_STATES = 100_000  # of about 2 kB each, that a grammar may have
# JSON on one line: a model that could put blanks anywhere might go on with them for ever.
# An escape such as \u0061 would spell the name of a property past what is asked of it.
FORM = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


class IncompleteAnswer(ValueError):
    """`max_tokens` ended an answer before it was what was asked for.

    Attributes:
        text: the answer as far as it came.
    """

    def __init__(self, text: str, max_tokens: int):
        super().__init__(
            f"The answer was cut off after {max_tokens} tokens, before it was complete; raise "
            f"max_tokens. It begins {shown(text)}."
        )
        self.text = text


class Constraint:
    """What a grammar allows next, for one sequence.

    Args:
        matcher: at the start of the answer.
        ends: the ids that end an answer.
        vocab_size: of the logits.
        forget: called if the grammar became too complex. Its copies share what they learn, and so
            the limit: it must be compiled again.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        ends: set[int],
        vocab_size: int,
        forget: Callable[[], object] = lambda: None,
    ):
        self._matcher = matcher
        self._forget = forget
        self._ends = ends
        self._ended = False
        self._mask = all_allowed(1, vocab_size)
        self._fill(self._mask, 0)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._ended or self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Add a token to the sequence; nothing happens after its end.

        Raises:
            ValueError: it is not allowed, or what follows is too complex to say.
        """
        if self._ended:
            return
        if token in self._ends and self._matcher.is_accepting():
            self._ended = True
            self._mask[:] = -1
            return
        if token in self._ends or not self._matcher.consume_token(token):
            raise ValueError(
                "No token that the schema, regex or choices allow had a finite logit, so the "
                "answer can't go on; look at logits_processor, or at the model."
            )
        self._fill(self._mask, 0)

    @property
    def mask(self) -> np.ndarray:
        """What may come next, [1, words] of bits; everything after the end."""
        return self._mask

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        """`mask`, and what may come after each token of a draft: [1 + len(draft), words].

        After a token that is not allowed, or that ends the answer, everything may.
        """
        masks = self._mask.repeat(1 + len(draft), axis=0)
        if self._ended:
            return masks
        masks[1:] = -1
        tried = 0
        for token in draft:
            if token in self._ends or not self._matcher.try_consume_tokens([token]):
                break
            tried += 1
            self._fill(masks, tried)
        if tried:
            self._matcher.rollback(tried)
        return masks

    def _fill(self, masks: np.ndarray, row: int) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, masks, row)
        if self._matcher.is_error():
            self._forget()
            raise ValueError(
                "The schema or regex became too complex within the answer "
                f"({said_by(self._matcher)})."
            )


class Grammars:
    """The grammars that were compiled for a tokenizer, the latest last.

    Args:
        tokenizer: the model's.
        vocab_size: of the logits, which may have room for more tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._vocab_size = vocab_size
        self._ends = {i for i in tokenizer.eos_token_ids if i < vocab_size}
        self._tokenizer = read_tokenizer(tokenizer, vocab_size, sorted(self._ends))
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def start(self, grammar: str, name: str) -> Constraint:
        """A constraint at the start of an answer; ValueError, with its name, if this can't be."""
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._tokenizer, grammar, name)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > GRAMMARS_KEPT:
                self._compiled.popitem(last=False)
        forget = partial(self._compiled.pop, grammar, None)
        return Constraint(matcher.deep_copy(), self._ends, self._vocab_size, forget)


_grammars: WeakKeyDictionary[Tokenizer, dict[int, Grammars]] = WeakKeyDictionary()
_lock = Lock()


def make_constraint(processor: Processor, vocab_size: int, options: Options) -> Constraint | None:
    """What the options ask of an answer, at its start; None if they ask for nothing.

    What was compiled is kept, so that another answer of the same kind costs nothing.

    Args:
        processor: has the tokenizer.
        vocab_size: of the model's logits.
        options: `schema`, `regex` or `choices`.

    Raises:
        ValueError: nothing can follow it, or it is too complex.
        ImportError: llguidance is not installed.
    """
    grammar = write_grammar(options)
    if grammar is None:
        return None
    with _lock:
        known = _grammars.setdefault(processor.tokenizer, {})
        if vocab_size not in known:
            known[vocab_size] = Grammars(processor.tokenizer, vocab_size)
    name = next(name for name in CONSTRAINTS if getattr(options, name) is not None)
    return known[vocab_size].start(grammar, name)


def is_constrained(options: Options) -> bool:
    """Whether the options ask for answers of a certain form."""
    return any(getattr(options, name) is not None for name in CONSTRAINTS)


def write_grammar(options: Options) -> str | None:
    """The grammar of what the options ask for, as llguidance reads it; None for nothing."""
    if not is_constrained(options):
        return None
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ImportError(
            "llguidance is needed for schema, regex and choices: pip install 'fastvlm-mlx[schema]'."
        ) from None
    if options.schema is not None:
        form: Any = FORM
        return LLMatcher.grammar_from_json_schema(options.schema, overrides=form)
    if options.regex is not None:
        return LLMatcher.grammar_from_regex(options.regex)
    assert options.choices is not None
    texts = (json.dumps(text, ensure_ascii=False) for text in options.choices)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))


def read_tokenizer(tokenizer: Tokenizer, vocab_size: int, ends: list[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer, in which no text spells a control token.

    Where only one text can follow, it asks this tokenizer for the tokens, which must then be those
    of the text as it stands: no control tokens, and no other form of Unicode.
    """
    from llguidance import LLTokenizer

    settings = json.loads(tokenizer.bpe.to_str()) | {"normalizer": None}
    for token in settings["added_tokens"]:
        token["content"] = f"\uffff{token['id']}\uffff"  # U+FFFF is no character
    vocab = settings["model"]["vocab"]
    settings["model"]["vocab"] = {t: i for t, i in vocab.items() if t not in tokenizer.controls}
    text = json.dumps(settings, ensure_ascii=False)
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=ends)


def compile_grammar(tokenizer: LLTokenizer, grammar: str, name: str) -> LLMatcher:
    """A matcher at the grammar's start; ValueError with the reason if it can't be used."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    started = matcher.deep_copy()
    started.compute_bitmask()
    if started.get_error().startswith("NoExtension"):
        raise ValueError(f"{name} can't be used: no answer fits it.")
    if started.is_error():
        raise ValueError(f"{name} can't be used: {said_by(started)}.")
    return matcher


def said_by(matcher: LLMatcher) -> str:
    """What is wrong, in brief."""
    said = matcher.get_error().replace("<non-verbose/>", "")
    if "coerce_one_of" in said:
        return "oneOf is supported where no value can fit two of its schemas; write anyOf"
    inmost = re.search(r"^error: (.+)", said, re.MULTILINE)  # of a regular expression
    return brief(inmost[1] if inmost else re.sub(r"^at \d+\(\d+\): ", "", said)).rstrip(".")


def all_allowed(rows: int, vocab_size: int) -> np.ndarray:
    """Masks [rows, words] that rule out nothing."""
    from llguidance.numpy import allocate_token_bitmask

    return allocate_token_bitmask(rows, vocab_size)


def constrain_logits(logits: mx.array, constraints: Sequence[Constraint | None]) -> mx.array:
    """-inf for the tokens [B, vocab_size] that the constraint of a row, if any, rules out."""
    if not any(constraints):
        return logits
    masks = all_allowed(*logits.shape)
    for i, constraint in enumerate(constraints):
        if constraint is not None:
            masks[i] = constraint.mask
    return mask_logits(logits, masks)


def mask_logits(logits: mx.array, masks: np.ndarray) -> mx.array:
    """-inf for the tokens [B, vocab_size] whose bit is not set in the masks [B, words].

    Only the bits are moved to the device.
    """
    B, V = logits.shape
    W = masks.shape[1]
    if V < W * BITS:
        logits = mx.pad(logits, [(0, 0), (0, W * BITS - V)])
    words = mx.array(masks.view("uint32"))[:, :, None]
    places = mx.array([*range(BITS)], mx.uint32)  # as data, which need no kernel
    masked = _where_set(logits.reshape(B, W, BITS), words, places)
    return masked.reshape(B, W * BITS)[:, :V]


@partial(mx.compile, shapeless=True)
def _where_set(logits: mx.array, words: mx.array, places: mx.array) -> mx.array:
    return mx.where((words >> places) & 1, logits, -mx.inf)
