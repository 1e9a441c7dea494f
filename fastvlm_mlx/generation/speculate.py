"""Speculative decoding: draft several tokens cheaply and let the model check them in one step.

Where reading the weights takes most of the time, a step of the decoder over a few tokens takes
hardly longer than over one. So a drafter proposes what may come next, the model computes its own
choice at every proposed position at once, and drafts are kept up to the first that differs
(Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"). Every token of
the answer is the model's own choice; drafts only decide how many of them one step yields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx

from ..model.fastvlm import FastVLM
from ..ops import most_queries, wired
from ..processor import Processor
from ..text.messages import Messages
from ..text.tokenizer import Tokenizer
from .constrain import Constraint, mask_logits
from .decode import generate_tokens
from .drafters import Drafter, DraftModel, PromptLookup, trim
from .inputs import Inputs, tokenize
from .options import LogitsProcessor, Options
from .sampling import Sampler, make_logits_processor, make_sampler

TOKENS_COMPARED = 1000


@wired
def speculate_tokens(
    model: FastVLM,
    input_ids: Sequence[int],
    embeddings: mx.array,
    cache: list[Any],
    options: Options,
    limit: int,
    drafter: Drafter,
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """As `generate_tokens`, but several tokens per step where drafts are right.

    Greedy answers are those of `generate_tokens` up to rounding: a step over several tokens may
    sum in another order, and so pick the other of two tokens that are almost equally likely.
    Sampled answers have the same distribution, but not the same tokens for a seed.

    Args:
        input_ids: the whole prompt.
        embeddings: [1, T, hidden_size] of the part that the cache does not hold.
        cache: updated in place; whenever a token is yielded, the cache holds everything before the
            last known token, and nothing that was rejected.
        options: see `Options`, without `max_kv_size`. The `logits_processor` is called once for
            every token of the answer, in order, but perhaps also for some after one that ends it.
        limit: the most tokens to generate.
        drafter: for the same prompt, unused so far; it counts its drafts.
        constraint: rules tokens out; see `generate_tokens`.
    """
    decoder = model.language_model
    sample = make_sampler(options)
    process = make_logits_processor(options)
    choose = _make_chooser(input_ids, sample, process, constraint)
    first = generate_tokens(
        model, input_ids, embeddings, cache, options, 1, sample, process, constraint
    )
    answer = list(first)
    yield answer[0]
    most = _most_drafts(model, cache)
    while len(answer) < limit:
        # The model adds one token to those it agrees with, which must not exceed the limit.
        count = min(drafter.num_draft_tokens, limit - len(answer) - 1, most)
        draft = drafter.propose(answer, count)
        tokens = mx.concatenate([mx.array(answer[-1:], mx.uint32), draft])
        logits = decoder.logits(decoder.hidden_states(tokens[None], cache)[0])
        if constraint is not None:
            mx.async_eval(logits)  # while the grammar reads the draft
        drafted = read(draft)
        agreed = agree(choose(answer, logits, drafted), drafted)
        drafter.drafted += draft.size
        drafter.accepted += len(agreed) - 1
        trim(cache, len(tokens) - len(agreed))
        answer += agreed
        if constraint is not None:
            for token in agreed:
                constraint.accept(token)
        yield from agreed


def _most_drafts(model: FastVLM, cache: list[Any]) -> int:
    """The most drafts that are worth checking at once: more need slower attention."""
    text = model.config.text
    if hasattr(cache[0], "bits"):  # not read by the kernel in question
        return sys.maxsize
    queries = most_queries(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    return max(1, queries - 1)


def _make_chooser(
    input_ids: Sequence[int],
    sample: Sampler,
    process: LogitsProcessor | None,
    constraint: Constraint | None,
) -> Callable[[list[int], mx.array, list[int]], Iterable[int]]:
    """A function that chooses k tokens.

    It takes the answer so far, the logits [k, vocab_size] after it, and the k - 1 drafted tokens.
    """

    def choose_together(answer: list[int], logits: mx.array, drafted: list[int]) -> list[int]:
        if constraint is not None:
            logits = mask_logits(logits, constraint.masks(drafted))
        return read(sample(logits))

    if process is None:
        return choose_together
    prompt = mx.array([i for i in input_ids if i >= 0])

    def choose(answer: list[int], logits: mx.array, drafted: list[int]) -> Iterator[int]:
        # One at a time, so that a processor never sees a token that is not part of the answer.
        seen = mx.concatenate([prompt, mx.array(answer, mx.uint32)])
        masks = None if constraint is None else constraint.masks(drafted)
        for i, row in enumerate(logits):
            processed = process(seen, row[None])
            if masks is not None:
                processed = mask_logits(processed, masks[i : i + 1])
            token = sample(processed)
            seen = mx.concatenate([seen, token])
            yield from read(token)

    return choose


def agree(chosen: Iterable[int], draft: Sequence[int]) -> list[int]:
    """The chosen tokens, one more than drafted, up to the first that differs from its draft."""
    agreed = []
    for token, drafted in zip(chosen, [*draft, None], strict=False):
        agreed.append(token)
        if token != drafted:
            break
    return agreed


def read(tokens: mx.array) -> list[int]:
    """The ids of tokens [k], once they are computed."""
    return cast(list[int], tokens.tolist())


def make_drafter(
    processor: Processor, prompt: Messages, inputs: Inputs, options: Options
) -> Drafter | None:
    """The drafter that the options ask for, if any; a draft model computes nothing yet.

    Args:
        processor, prompt, inputs: of the model that answers. A draft model sees the same pixels
            and makes its own visual tokens of them.
        options: `prompt_lookup`, or a `draft_model` of the same vocabulary with its processor.

    Raises:
        ValueError: the models' vocabularies differ, or the prompt is too long for the draft model.
    """
    if options.prompt_lookup is not None:
        return PromptLookup(inputs.input_ids, options.prompt_lookup)
    if options.draft_model is None:
        return None
    model, draft_processor = options.draft_model
    check_vocabularies(processor.tokenizer, draft_processor.tokenizer)
    pixel_values, sizes = inputs.pixel_values, inputs.image_sizes
    counts = list(map(model.num_visual_tokens, pixel_values, sizes))
    draft_ids = tokenize(model, draft_processor, prompt, counts, options)

    def embed() -> mx.array:
        visual_tokens = model.encode_images(pixel_values, sizes) if pixel_values else []
        return model.embed_inputs(mx.array([draft_ids]), visual_tokens=visual_tokens)

    vocab_size = processor.tokenizer.vocab_size
    return DraftModel(model, embed, options.num_draft_tokens, vocab_size)


def check_vocabularies(tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    """ValueError if tokens with the same id differ.

    One vocabulary may have more tokens than the other, since conversions add some at its end. About
    a thousand tokens are compared: a mistake would cost speed, but never change an answer.
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
