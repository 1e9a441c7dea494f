"""Tokens → text, with timings."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..processor import Processor
from ..text.tokenizer import Detokenizer
from .constrain import Constraint, IncompleteAnswer, is_constrained
from .options import Options
from .sampling import Logprobs


@dataclass
class Response:
    """A piece of an answer as it appears; times are in seconds, memory in GB (10⁹ bytes).

    Attributes:
        text: the new text; may be empty.
        token: the token that it came with.
        prompt_tokens, generation_tokens: so far.
        preprocess_time: reading and resizing the images.
        encode_time: encoder and projector.
        prefill_time: tokenizing the prompt and running the decoder over it to the first token.
        ttft: time to first token, from the call.
        generation_tps: tokens per second after the first.
        peak_memory: the most that MLX's arrays have taken.
        finish_reason: "stop" (the model or a stop text ended it) or "length"; None before the end.
        stop_text: the stop text that ended it.
        logprobs: of the token and the likeliest in its place, if asked for.
        queue_time: waiting for others in a batch.
        cached_tokens: of the prompt, that the decoder did not have to read again.
        cached_images: that were not encoded again.
    """

    text: str
    token: int
    prompt_tokens: int
    generation_tokens: int
    preprocess_time: float
    encode_time: float
    prefill_time: float
    ttft: float
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    stop_text: str | None = None
    logprobs: Logprobs | None = None
    queue_time: float = 0.0
    cached_tokens: int = 0
    cached_images: int = 0


def stream_responses(
    tokens: Iterator[int],
    processor: Processor,
    prompt_tokens: int,
    stop: Sequence[str],
    limit: int,
    times: tuple[float, float, float],
    constraint: Constraint | None = None,
    logprobs: deque[Logprobs] | None = None,
) -> Iterator[Response]:
    """Tokens → text, with timings.

    Args:
        tokens: from `generate_tokens`.
        processor: has the tokenizer.
        prompt_tokens: of the whole prompt.
        stop: texts that end the answer.
        limit: the most tokens to take.
        times: of the call, after the images were read, and after they were encoded.
        constraint: that the tokens follow: where nothing can follow, the limit cuts nothing off.
        logprobs: where those of each token are found when it is taken, if asked for.
    """
    start, preprocessed, encoded = times
    detokenizer = Detokenizer(processor.tokenizer)
    stopper = StopTexts(stop)
    first = 0.0
    for n, token in enumerate(tokens, 1):
        now = time.perf_counter()
        first = first or now
        ended = token in processor.tokenizer.eos_token_ids
        text = stopper.add("" if ended else detokenizer.add(token))
        if ended or (n == limit and not stopper.stopped):
            text += stopper.add(detokenizer.finish()) + stopper.finish()
        complete = n == limit and constraint is not None and constraint.complete
        stopped = ended or stopper.stopped or complete
        yield Response(
            text=text,
            token=token,
            prompt_tokens=prompt_tokens,
            generation_tokens=n,
            preprocess_time=preprocessed - start,
            encode_time=encoded - preprocessed,
            prefill_time=first - encoded,
            ttft=first - start,
            generation_tps=(n - 1) / (now - first) if n > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason="stop" if stopped else "length" if n == limit else None,
            stop_text=stopper.found,
            logprobs=logprobs.popleft() if logprobs else None,
        )
        if stopped:
            return


def whole_text(responses: Iterable[Response], options: Options) -> str:
    """The text of an answer; IncompleteAnswer if it breaks off amid what the options ask for."""
    text = ""
    for response in responses:
        text += response.text
        if response.finish_reason == "length" and is_constrained(options):
            raise IncompleteAnswer(text, response.generation_tokens)
    return text


class StopTexts:
    """Ends a stream of text before the first stop text, holding back what may begin one."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""
        self.found: str | None = None  # the one that ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found."""
        return self.found is not None

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop text."""
        self.held += text
        found = [(self.held.find(stop), stop) for stop in self.stop if stop in self.held]
        if found:
            at, self.found = min(found)
            return self._release(at)
        return self._release(len(self.held) - self._undecided())

    def finish(self) -> str:
        """The rest, once nothing more comes."""
        return "" if self.stopped else self._release(len(self.held))

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _undecided(self) -> int:
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)
