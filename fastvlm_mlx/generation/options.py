"""How to read and answer a prompt, in one value that every way of answering takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import mlx.core as mx

from ..checks import check_whole_number, is_number, is_whole_number, shown
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.tokenizer import SURROGATES
from .json_schema import read_schema

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
KV_BITS = (2, 3, 4, 6, 8)
# The smallest value of each whole number
WHOLE_NUMBERS = {
    "max_tokens": 1,
    "top_k": 0,
    "seed": 0,
    "max_kv_size": 8,
    "prefill_step_size": 1,
    "prompt_lookup": 1,
    "num_draft_tokens": 1,
    "num_beams": 1,
    "logprobs": 0,
}
NEVER_NONE = ("max_tokens", "top_k", "prefill_step_size", "num_draft_tokens", "num_beams")
CONSTRAINTS = ("schema", "regex", "choices")
MOST_BYTES = {"regex": 2**16, "choices": 2**20}  # so that a grammar is compiled in a second
# Options that exclude each other. A KV cache of limited size can't take rejected drafts back.
EXCLUSIVE = (
    ("kv_bits", "max_kv_size"),
    ("prompt_lookup", "draft_model"),
    ("prompt_lookup", "max_kv_size"),
    ("draft_model", "max_kv_size"),
    ("schema", "regex"),
    ("schema", "choices"),
    ("regex", "choices"),
    *((name, "stop") for name in CONSTRAINTS),
    ("prompt_lookup", "logprobs"),
    ("draft_model", "logprobs"),
)
CACHE_KINDS = ("max_kv_size", "kv_bits")
DRAFTS = ("prompt_lookup", "draft_model")
MOST_LOGPROBS = 20  # alternatives of a token
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", *PENALTIES, "logits_processor")
# What transformers, mlx-vlm and other libraries have under another name, or elsewhere
OTHER_NAMES = {
    "temp": "temperature",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "do_sample": "temperature",
    "resize_shape": "image_size",
    "system_prompt": "system",
    "stop_strings": "stop",
    "repeat_penalty": "repetition_penalty",
    "max_kv_cache_size": "max_kv_size",
    "logits_processors": "logits_processor",
    "prompt_lookup_num_tokens": "prompt_lookup",
    "assistant_model": "draft_model",
    "images": "image",
}
ELSEWHERE = {
    "verbose": "each response of stream_generate has its timings",
    "stream": "stream_generate answers piece by piece",
    "streamer": "stream_generate answers piece by piece",
    "num_return_sequences": "ask several times, or with batch_generate",
    "image": "it goes with the question",
    "prompt_cache": "only generate and stream_generate take one",
    "video": "only generate and stream_generate take one",
    "frames": "only generate and stream_generate take a video",
}


@dataclass(frozen=True)
class Options:
    """How to read and answer a prompt: the keyword arguments of `generate`; the names are mlx_lm's.

    Attributes:
        system: the system prompt; the model's own by default.
        conv_mode: name of a conversation template; the tokenizer's own by default.
        image_size: side in pixels, a multiple of 64; the model's own by default, smaller is faster.
        fast: decode large JPEGs at less than their full resolution, in half the time; the pixels
            differ slightly (`image.preprocess` says by how much).
        max_tokens: the most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it and sampled.
        top_p: sample only from the likeliest tokens whose probabilities add up to this.
        top_k: sample only from this many of the likeliest tokens; 0 means all.
        min_p: drop tokens less likely than this times the likeliest one.
        repetition_penalty: divide (or multiply, if negative) the logits of the last 20 tokens.
        frequency_penalty: take this from a token's logit for each time that the answer has it; from
            -2 to 2, as OpenAI's. The prompt does not count.
        presence_penalty: take this from it once if the answer has it at all; from -2 to 2.
        seed: of the sampling, to make an answer repeatable.
        stop: texts that end the answer; they are not part of it.
        max_kv_size: positions that the KV cache keeps; older ones are dropped.
        kv_bits: bits per value of a quantized KV cache.
        prefill_step_size: prompt tokens processed at a time.
        logits_processor: a function of the tokens so far [T] and the logits [1, vocab_size] that
            returns the logits to sample from.
        prompt_lookup: speculative decoding by look-up: up to this many tokens that followed the
            last ones earlier in prompt or answer are checked per step. The answer stays the same;
            see `speculate`.
        draft_model: speculative decoding with drafts of a smaller model of the same family, as
            `load` returns it.
        num_draft_tokens: tokens that `draft_model` proposes at a time.
        logprobs: report the log probability of each token and of up to 20 of the likeliest in its
            place, so many: of the model's own distribution, before temperature, penalties and
            `logits_processor`. Not with drafts or beams.
        num_beams: above 1, beam search: this many answers are followed at once and the likeliest
            one wins. It does not sample, and its text arrives all at once.
        schema: the answer is JSON that is valid against this JSON schema: a dict, its text, the
            path of a file, or a pydantic model class; "json" for any JSON, "json_object" for any
            object. Kept as text. Its properties come in the schema's order.
        regex: the whole answer matches this regular expression, in Rust's syntax.
        choices: the answer is one of these texts.

    Numbers may be numpy's.

    Raises:
        ValueError: a value is out of its range.
    """

    system: str | None = None
    conv_mode: str | None = None
    image_size: int | None = None
    fast: bool = False
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    max_kv_size: int | None = None
    kv_bits: int | None = None
    prefill_step_size: int = 2048
    logits_processor: LogitsProcessor | None = None
    prompt_lookup: int | None = None
    draft_model: tuple[FastVLM, Processor] | None = None
    num_draft_tokens: int = 3
    num_beams: int = 1
    schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    logprobs: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """From keyword arguments; TypeError, with the right name, for one that is no option."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"There is no option {shown(name)} here{_hint(name, names)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
                object.__setattr__(self, field.name, value.item())
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, least in WHOLE_NUMBERS.items():
            if getattr(self, name) is not None or name in NEVER_NONE:
                check_whole_number(name, getattr(self, name), least)
        self._check("temperature", "a number from 0", is_number, lambda t: t >= 0)
        self._check("top_p", "a number above 0 and at most 1", is_number, lambda p: 0 < p <= 1)
        self._check("min_p", "a number from 0 to 1", is_number, lambda p: 0 <= p <= 1)
        self._check("stop", "texts that are not empty", _is_texts, all)
        if self.repetition_penalty is not None:
            self._check("repetition_penalty", "a number above 0", is_number, lambda p: p > 0)
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(name, "a number from -2 to 2", is_number, lambda p: -2 <= p <= 2)
        for name in ("system", "conv_mode"):
            if getattr(self, name) is not None:
                self._check(name, "a text", lambda text: isinstance(text, str))
        if self.logprobs is not None:
            wanted = f"a whole number from 0 to {MOST_LOGPROBS}"
            self._check("logprobs", wanted, is_number, lambda n: n <= MOST_LOGPROBS)
        if self.kv_bits is not None:
            self._check("kv_bits", f"one of {KV_BITS}", is_whole_number, KV_BITS.__contains__)
        if self.logits_processor is not None:
            self._check("logits_processor", "a function", callable)
        if self.draft_model is not None:
            self._check("draft_model", "a model and its processor, as `load` gives them", _is_pair)
        self._read_constraint()
        for one, other in EXCLUSIVE:
            if all(getattr(self, name) not in (None, (), []) for name in (one, other)):
                raise ValueError(f"Give {one} or {other}, not both.")
        if self.num_beams > 1:
            others = *DRAFTS, *CACHE_KINDS, *CONSTRAINTS, "logprobs"
            refuse(self, "beam search", *SAMPLING, *others)

    def _read_constraint(self) -> None:
        if self.schema is not None:
            object.__setattr__(self, "schema", read_schema(self.schema))
        if self.regex is not None:
            self._check("regex", "a text that is not empty", _is_encodable, bool)
        if self.choices is not None:
            self._check("choices", "a list of texts that are not empty", _is_texts, bool)
            self._check("choices", "a list of texts that are not empty", _is_texts, all)
            self._check("choices", "texts without surrogates", lambda c: all(map(_is_encodable, c)))
            object.__setattr__(self, "choices", tuple(self.choices))
        for name, most in MOST_BYTES.items():
            size = sum(len(text.encode()) for text in getattr(self, name) or ())
            if size > most:
                raise ValueError(f"{name} has {size} bytes; at most {most} are allowed.")

    def _check(
        self,
        name: str,
        wanted: str,
        of_type: Callable[[Any], bool],
        in_range: Callable[[Any], bool] = lambda value: True,
    ) -> None:
        value = getattr(self, name)
        if not of_type(value) or not in_range(value):
            raise ValueError(f"{name} must be {wanted}, found {shown(value)}.")


def refuse(options: Options, way: str, *names: str) -> None:
    """Reject options that one way of answering does not support.

    Args:
        options: what was asked for.
        way: of answering, for the message ("a batch").
        names: the options that it does not support.

    Raises:
        ValueError: one of them is set; the message names it.
    """
    defaults = {field.name: field.default for field in fields(Options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise ValueError(f"{name} does not go with {way}; leave it out.")


def _hint(name: str, names: Sequence[str]) -> str:
    """What to write instead of a name that is no option."""
    if name in ELSEWHERE:
        return f"; {ELSEWHERE[name]}."
    known = OTHER_NAMES.get(name)
    near = [known] if known else get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _is_encodable(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATES.search(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2
