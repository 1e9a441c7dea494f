"""One conversation: the KV cache is kept between turns, and each image is encoded once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from threading import RLock, get_ident
from threading import enumerate as enumerate_threads
from typing import Any, Literal, overload

import mlx.core as mx

from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.messages import Messages, read_question
from .constrain import make_constraint
from .decode import generate_tokens, make_kv_cache
from .inputs import ImageSources, answer_limit, list_images, read_inputs
from .options import DRAFTS, Options, refuse
from .prefix import common_prefix
from .response import Response, stream_responses, whole_text
from .sampling import Logprobs


class Chat:
    """A conversation about any number of images.

    Each answer starts from the KV cache of the previous turns, so only what was added is computed.
    Threads may share a conversation: a question waits for the answer before it, but a streamed
    answer that another thread has not read to its end is an error.

    Args:
        model, processor: from `load`.
        **options: fields of `Options`, for every turn; drafts and beams are not for conversations.

    Attributes:
        messages: the turns so far, as {"role", "content"}; of images only the places are kept.
    """

    def __init__(self, model: FastVLM, processor: Processor, **options: Any):
        self.model = model
        self.processor = processor
        self.options = options
        self._chosen({})
        self._lock = RLock()  # of a turn, or of a step of a streamed one
        self._running: Generator[Response, None, None] | None = None
        self._reader = 0  # the thread that reads the streamed answer
        self._unread: tuple[list[dict[str, Any]], list[mx.array]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.stop()
        self.messages: list[dict[str, Any]] = []
        self._visual_tokens: list[mx.array] = []
        self._cached_ids: list[int] = []
        self._cache: list[Any] = []
        self._cache_kind: tuple[int | None, int | None] | None = None

    @overload
    def ask(
        self,
        prompt: Messages,
        *,
        image: ImageSources = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> str: ...

    @overload
    def ask(
        self, prompt: Messages, *, image: ImageSources = None, stream: Literal[True], **options: Any
    ) -> Iterator[Response]: ...

    def ask(
        self, prompt: Messages, *, image: ImageSources = None, stream: bool = False, **options: Any
    ) -> str | Iterator[Response]:
        """Answer the next question.

        Args:
            prompt: the question, a text or a list of parts; `<image>` in the text marks the places
                of this turn's images.
            image: images that are new in this turn.
            stream: yield a `Response` per token instead of returning the whole text. An answer that
                is not read to its end before the next question counts as far as it was read.
            **options: fields of `Options` that replace the chat's for this turn.

        Raises:
            ValueError, FileNotFoundError: as `generate`; the conversation is then as before.
            IncompleteAnswer: as `generate`; the answer counts as far as it came.
            RuntimeError: another thread has not read its streamed answer to the end.
        """
        with self._lock:
            chosen = self._chosen(options)
            if self._running is not None and self._is_read_elsewhere():
                raise RuntimeError(
                    "This conversation is still answering in another thread; read that answer to "
                    "its end, or call stop()."
                )
            self.stop()
            self._running = responses = self._answer(prompt, image, chosen)
            self._reader = get_ident()
            if stream:
                return self._steps(responses)
            try:
                return whole_text(responses, chosen)
            finally:
                self.stop()

    def _chosen(self, options: dict[str, Any]) -> Options:
        """The options of a turn; ValueError if one is out of range or not for conversations."""
        chosen = Options.of({**self.options, **options})
        refuse(chosen, "a conversation", *DRAFTS, "num_beams")
        return chosen

    def stop(self) -> None:
        """End a streamed answer that was not read to its end; it counts as far as it was read."""
        with self._lock:
            if self._running is None:
                return
            self._running.close()
            self._running = None
            if self._unread is not None:  # a generator that never began records nothing
                self._end_turn(*self._unread, "")

    def _is_read_elsewhere(self) -> bool:
        others = (thread.ident for thread in enumerate_threads())
        return self._reader != get_ident() and self._reader in others

    def _steps(self, responses: Generator[Response, None, None]) -> Iterator[Response]:
        """The responses of a streamed answer; the conversation is locked for each."""
        try:
            while True:
                with self._lock:
                    self._reader = get_ident()
                    response = next(responses, None)
                if response is None:
                    return
                yield response
        finally:
            with self._lock:
                responses.close()
                if self._running is responses:
                    self._running = None

    def _answer(
        self, prompt: Messages, image: ImageSources, options: Options
    ) -> Generator[Response, None, None]:
        content, images = read_question(prompt, list_images(image))
        messages = [*self.messages, {"role": "user", "content": content}]
        constraint = make_constraint(self.processor, self.model.config.text.vocab_size, options)
        inputs = read_inputs(
            self.model, self.processor, messages, images, options, earlier=self._visual_tokens
        )
        input_ids, visual_tokens = inputs.input_ids, inputs.visual_tokens
        known = self._rewind(input_ids, options)
        limit = answer_limit(input_ids, options, self.processor)
        unknown = inputs.embeddings[:, known:]
        mx.eval(unknown)  # another thread may read the answer
        logprobs: deque[Logprobs] | None = None if options.logprobs is None else deque()
        asked = self.model, input_ids, unknown, self._cache, options, limit
        tokens = generate_tokens(*asked, constraint=constraint, logprobs=logprobs)
        responses = stream_responses(
            self._remember(input_ids, tokens),
            self.processor,
            len(input_ids),
            options.stop,
            limit,
            inputs.times,
            constraint,
            logprobs,
        )
        self._unread = messages, visual_tokens
        return self._record(messages, visual_tokens, responses)

    def _rewind(self, input_ids: list[int], options: Options) -> int:
        """Trim the KV cache to what it shares with the prompt; returns that many tokens."""
        kind = (options.max_kv_size, options.kv_bits)
        known = common_prefix(self._cached_ids, input_ids[:-1])
        surplus = self._cache[0].offset - known if self._cache else 0
        trimmable = surplus == 0 or all(c.is_trimmable() for c in self._cache)
        if not self._cache or not trimmable or kind != self._cache_kind:
            self._cache, self._cache_kind = make_kv_cache(self.model, options), kind
            self._cached_ids = []
            return 0
        for layer_cache in self._cache:
            layer_cache.trim(surplus)
        self._cached_ids = self._cached_ids[:known]
        return known

    def _remember(self, input_ids: list[int], tokens: Iterator[int]) -> Iterator[int]:
        """Pass tokens on, and keep track of what the KV cache holds."""
        given = list(input_ids)
        self._cached_ids = []
        try:
            for token in tokens:
                given.append(token)
                yield token
        except GeneratorExit:
            raise
        except BaseException:  # an interrupt between layers leaves some ahead of others
            self._cache = []
            raise
        finally:
            if self._cache:
                self._cached_ids = given[: self._cache[0].offset]

    def _record(
        self,
        messages: list[dict[str, Any]],
        visual_tokens: list[mx.array],
        responses: Iterator[Response],
    ) -> Generator[Response, None, None]:
        self._unread = None
        answer = ""
        try:
            for response in responses:
                answer += response.text
                yield response
        finally:
            responses.close()  # type: ignore[attr-defined]
            self._end_turn(messages, visual_tokens, answer)

    def _end_turn(
        self, messages: list[dict[str, Any]], visual_tokens: list[mx.array], answer: str
    ) -> None:
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._visual_tokens = visual_tokens
        self._unread = None
