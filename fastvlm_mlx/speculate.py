"""Speculative decoding: guess several tokens cheaply, and let the model check them in one step.

A step of the decoder over a few tokens takes hardly longer than over one where reading its weights
is what takes the time. So a drafter proposes what may come next, the model computes its own choice
at every proposed place at once, and as many proposals are kept as it agrees with (Leviathan et al.
2023, "Fast inference from transformers via speculative decoding"). Every token of the answer is
the model's own choice; drafts only decide how many of them one step brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx

from .decode import generate_tokens
from .inputs import Inputs, tokenize
from .model import FastVLM
from .options import Options
from .prompt import Messages, Processor, Tokenizer
from .sampling import make_logits_processor, make_sampler

NUM_DRAFT_TOKENS = 3
MAX_NGRAM_SIZE = 3
TOKENS_COMPARED = 1000


class Drafter:
    """Guesses how an answer goes on.

    Attributes:
        num_draft_tokens: most tokens that are proposed at a time.
        drafted, accepted: tokens proposed so far, and those that the model agreed with.

    Raises:
        ValueError: `num_draft_tokens` is not a whole number from 1.
    """

    def __init__(self, num_draft_tokens: int):
        whole = isinstance(num_draft_tokens, int) and not isinstance(num_draft_tokens, bool)
        if not whole or num_draft_tokens < 1:
            raise ValueError(
                f"The number of draft tokens must be a whole number from 1, "
                f"found {num_draft_tokens!r}."
            )
        self.num_draft_tokens = num_draft_tokens
        self.drafted = 0
        self.accepted = 0

    def propose(self, answer: list[int], count: int) -> mx.array:
        """What may follow.

        Args:
            answer: the tokens so far, at least one; those of the call before and more.
            count: most tokens to propose, from 0.

        Returns:
            [k] token ids, k ≤ count; they need not be computed yet.
        """
        raise NotImplementedError


class PromptLookup(Drafter):
    """Proposes what followed the last tokens where they stood before, in prompt or answer.

    The longest run of last tokens that stood before decides, and its latest place (prompt lookup
    decoding, Saxena 2023, but for the latest where that takes the first). What is copied may run
    into itself, so that a short loop is continued at any length.

    Args:
        input_ids: the whole prompt; visual tokens are negative, and match nothing.
        num_draft_tokens: most tokens to propose (`prompt_lookup_num_tokens` in transformers).
        max_ngram_size: most last tokens to look for (`max_matching_ngram_size` there).
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        num_draft_tokens: int,
        max_ngram_size: int = MAX_NGRAM_SIZE,
    ):
        super().__init__(num_draft_tokens)
        self.max_ngram_size = max_ngram_size
        self._prompt_tokens = len(input_ids)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram → the place after its latest one
        self._add(input_ids)

    def propose(self, answer: list[int], count: int) -> mx.array:
        self._add(answer[len(self._tokens) - self._prompt_tokens :])
        places = (self._next[ngram] for ngram in self._last_ngrams() if ngram in self._next)
        return mx.array(self._copy(next(places, len(self._tokens)), count), mx.uint32)

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._next.update(dict.fromkeys(self._last_ngrams(), len(self._tokens)))
            self._tokens.append(token)

    def _last_ngrams(self) -> Iterator[tuple[int, ...]]:
        """The last tokens, longest run first."""
        last = tuple(self._tokens[-self.max_ngram_size :])
        runs = (last[start:] for start in range(len(last)))
        return (run for run in runs if min(run) >= 0)

    def _copy(self, start: int, count: int) -> list[int]:
        """The tokens from a place on, as far as they are text."""
        end = len(self._tokens)
        copied: list[int] = []
        for place in range(start, start + count if start < end else start):
            token = self._tokens[place] if place < end else copied[place - end]
            if token < 0:
                break
            copied.append(token)
        return copied


class DraftModel(Drafter):
    """Proposes what a smaller model would say, which sees the same images with its own encoder.

    Args:
        model: the smaller model.
        embeddings: [1, T, hidden_size] of the prompt, made by the smaller model; computed only
            when the first draft is.
        num_draft_tokens: tokens to propose.
        vocab_size: propose only tokens below; the models' tables may differ in padding.
        prefill_step_size: tokens of the prompt that are processed at a time.
    """

    def __init__(
        self,
        model: FastVLM,
        embeddings: mx.array,
        num_draft_tokens: int,
        vocab_size: int,
        prefill_step_size: int = 2048,
    ):
        super().__init__(num_draft_tokens)
        self._decoder = model.language_model
        self._vocab_size = vocab_size
        self._cache = model.make_kv_cache()
        self._prompt_tokens = embeddings.shape[1]
        for start in range(0, self._prompt_tokens, prefill_step_size):
            chunk = embeddings[:, start : start + prefill_step_size]
            self._decoder.hidden_states(None, self._cache, chunk)

    def propose(self, answer: list[int], count: int) -> mx.array:
        held = self._cache[0].offset - self._prompt_tokens
        kept = min(held, len(answer) - 1)  # of the draft before, what the model agreed with
        trim(self._cache, held - kept)
        tokens = mx.array(answer[kept:], mx.uint32)
        draft = [mx.array([], mx.uint32)]
        for _ in range(count):
            tokens = mx.minimum(tokens, self._decoder.config.vocab_size - 1)
            hidden_states = self._decoder.hidden_states(tokens[None], self._cache)
            logits = self._decoder.logits(hidden_states[:, -1])
            tokens = mx.argmax(logits[:, : self._vocab_size], axis=-1)
            mx.async_eval(tokens)
            draft.append(tokens)
        return mx.concatenate(draft)


def speculate_tokens(
    model: FastVLM,
    input_ids: Sequence[int],
    embeddings: mx.array,
    cache: list[Any],
    options: Options,
    limit: int,
    drafter: Drafter,
) -> Iterator[int]:
    """As `generate_tokens`, several tokens a step where the drafter guesses right.

    Greedy answers are those of `generate_tokens`, but for rounding: a step over several tokens
    may sum in another order, and so choose otherwise between two tokens that are all but equally
    likely. Sampled answers have the same distribution, though not the same tokens for a seed.

    Args:
        input_ids: the whole prompt.
        embeddings: [1, T, hidden_size] of what the cache does not hold of it.
        cache: updated in place; when a token is given out, the cache holds what comes before the
            last token that is known, and nothing that was rejected.
        options: see `Options`. Its `logits_processor` is called once for every token of the
            answer, in order, but perhaps also for some after one that ends it.
        limit: tokens to generate at most.
        drafter: knows the same prompt and has not been used; counts what it drafts.

    Raises:
        ValueError: `max_kv_size` is set.
    """
    if options.max_kv_size is not None:
        raise ValueError(
            "Speculative decoding takes back what was guessed wrong, which a KV cache limited by "
            "max_kv_size can't: leave out max_kv_size, or the drafts."
        )
    return _speculate(model, input_ids, embeddings, cache, options, limit, drafter)


def _speculate(
    model: FastVLM,
    input_ids: Sequence[int],
    embeddings: mx.array,
    cache: list[Any],
    options: Options,
    limit: int,
    drafter: Drafter,
) -> Iterator[int]:
    decoder = model.language_model
    choose = _make_chooser(input_ids, options)
    answer = list(generate_tokens(model, input_ids, embeddings, cache, options, limit=1))
    yield answer[0]
    while len(answer) < limit:
        # The model adds a token to those it agrees with, and that one must not pass the limit.
        count = min(drafter.num_draft_tokens, limit - len(answer) - 1)
        draft = drafter.propose(answer, count)
        tokens = mx.concatenate([mx.array(answer[-1:], mx.uint32), draft])
        logits = decoder.logits(decoder.hidden_states(tokens[None], cache)[0])
        agreed = agree(choose(answer, logits), read(draft))
        drafter.drafted += draft.size
        drafter.accepted += len(agreed) - 1
        trim(cache, len(tokens) - len(agreed))
        answer += agreed
        yield from agreed


def _make_chooser(
    input_ids: Sequence[int], options: Options
) -> Callable[[list[int], mx.array], Iterable[int]]:
    """Answer so far and logits [k, vocab_size] after it → the k tokens that `options` choose."""
    sample = make_sampler(options)
    process = make_logits_processor(options)
    if process is None:
        return lambda answer, logits: read(sample(logits))
    prompt = mx.array([i for i in input_ids if i >= 0])

    def choose(answer: list[int], logits: mx.array) -> Iterator[int]:
        # One at a time, so that a processor never sees a token that is not part of the answer.
        seen = mx.concatenate([prompt, mx.array(answer, mx.uint32)])
        for row in logits:
            token = sample(process(seen, row[None]))
            seen = mx.concatenate([seen, token])
            yield from read(token)

    return choose


def agree(chosen: Iterable[int], draft: Sequence[int]) -> list[int]:
    """The chosen tokens up to the first that was not guessed; one more is chosen than drafted."""
    agreed = []
    for token, guess in zip(chosen, [*draft, None], strict=False):
        agreed.append(token)
        if token != guess:
            break
    return agreed


def read(tokens: mx.array) -> list[int]:
    """Wait for tokens [k], and give their ids."""
    return cast(list[int], tokens.tolist())


def trim(cache: Sequence[Any], count: int) -> None:
    """Forget the last tokens in every layer."""
    for layer_cache in cache:
        layer_cache.trim(count)


def make_drafter(
    processor: Processor, prompt: Messages, inputs: Inputs, options: Options
) -> Drafter | None:
    """The drafter that the options ask for, if any; a draft model computes nothing yet.

    Args:
        processor, prompt, inputs: of the model that answers. A draft model sees the same pixels
            and makes its own visual tokens of them.
        options: `prompt_lookup`, or a `draft_model` of the same vocabulary with its processor.

    Raises:
        ValueError: both are given, a number of tokens is below 1, the models' vocabularies
            differ, or the prompt is too long for the draft model.
    """
    if options.prompt_lookup is None and options.draft_model is None:
        return None
    if options.prompt_lookup is not None and options.draft_model is not None:
        raise ValueError("Give prompt_lookup or draft_model, not both.")
    if options.draft_model is None:
        return PromptLookup(inputs.input_ids, cast(int, options.prompt_lookup))
    if not isinstance(options.draft_model, tuple) or len(options.draft_model) != 2:
        raise ValueError("draft_model must be a model and its processor, as `load` gives them.")
    model, draft_processor = options.draft_model
    check_vocabularies(processor.tokenizer, draft_processor.tokenizer)
    pixel_values = inputs.pixel_values
    features = model.encode_images(pixel_values, inputs.image_sizes) if pixel_values else []
    draft_ids = tokenize(model, draft_processor, prompt, features, options)
    embeddings = model.embed_inputs(mx.array([draft_ids]), image_features=features)
    vocab_size = processor.tokenizer.vocab_size
    return DraftModel(model, embeddings, options.num_draft_tokens, vocab_size)


def check_vocabularies(tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    """ValueError if tokens of the same id differ.

    One vocabulary may have more tokens than the other: conversions add some at its end. A thousand
    tokens are compared, since a mistake could cost speed but never change an answer.
    """
    common = min(tokenizer.vocab_size, draft_tokenizer.vocab_size)
    spread = range(0, common, max(1, common // TOKENS_COMPARED))
    controls = {*tokenizer.controls.values(), *draft_tokenizer.controls.values()}
    for token in sorted({*spread, *(i for i in controls if i < common)}):
        ours, theirs = (
            t.token_bytes(token, skip_special_tokens=False) for t in (tokenizer, draft_tokenizer)
        )
        if ours != theirs:
            raise ValueError(
                f"The draft model has another vocabulary: token {token} is {theirs!r} there and "
                f"{ours!r} here. Choose a draft model of the same family."
            )
