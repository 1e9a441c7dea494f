"""One conversation: the KV cache is kept between turns, and each image is encoded once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, overload

import mlx.core as mx

from ..image.load import ImageSource
from ..model.fastvlm import FastVLM
from ..model.kv_cache import common_prefix
from ..processor import Processor
from ..text.prompt import IMAGE_MARK, check_marks
from .decode import generate_tokens, make_kv_cache
from .inputs import encode_images, list_images, preprocess_images, tokenize
from .options import Options
from .response import Response, stream_responses

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"


class Chat:
    """A conversation about any number of images.

    Each answer starts from the KV cache of the turns before, so that only what was added is
    computed.

    Args:
        model, processor: from `load`.
        **options: fields of `generate.Options`, for every turn.

    Attributes:
        messages: the turns so far, as {"role", "content"}.
    """

    def __init__(self, model: FastVLM, processor: Processor, **options: Any):
        self.model = model
        self.processor = processor
        self.options = options
        Options(**options)
        self._running: Iterator[Response] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.stop()
        self.messages: list[dict[str, str]] = []
        self._features: list[mx.array] = []
        self._cached_ids: list[int] = []
        self._cache: list[Any] = []
        self._cache_kind: tuple[int | None, int | None] | None = None

    @overload
    def ask(
        self, prompt: str, *, image: Images = None, stream: Literal[False] = False, **options: Any
    ) -> str: ...

    @overload
    def ask(
        self, prompt: str, *, image: Images = None, stream: Literal[True], **options: Any
    ) -> Iterator[Response]: ...

    def ask(
        self, prompt: str, *, image: Images = None, stream: bool = False, **options: Any
    ) -> str | Iterator[Response]:
        """Answer the next question.

        Args:
            prompt: the question; `<image>` in it marks the places of this turn's images.
            image: images that are new in this turn.
            stream: give `Response`s as they appear instead of the whole text. An answer that is not
                read to its end before the next question counts as far as it was read.
            **options: fields of `generate.Options`, over those of the chat.

        Raises:
            ValueError, FileNotFoundError: as `generate`; the conversation is then as before.
        """
        chosen = Options(**{**self.options, **options})
        self.stop()
        self._running = responses = self._answer(prompt, list_images(image), chosen)
        return responses if stream else "".join(response.text for response in responses)

    def stop(self) -> None:
        """End a streamed answer that was not read to its end; it counts as far as it was read."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def _answer(
        self, prompt: str, images: list[ImageSource], options: Options
    ) -> Iterator[Response]:
        start = time.perf_counter()
        check_marks(prompt, len(images))
        pixel_values, sizes = preprocess_images(
            self.processor, images, options.image_size, fast=options.fast
        )
        preprocessed = time.perf_counter()
        features = self._features + encode_images(self.model, pixel_values, sizes)
        encoded = time.perf_counter()
        marks = "" if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n" * len(images)
        messages = [*self.messages, {"role": "user", "content": marks + prompt}]
        input_ids = tokenize(self.model, self.processor, messages, features, options)
        embeddings = self.model.embed_inputs(mx.array([input_ids]), visual_tokens=features)
        known = self._rewind(input_ids, options)
        limit = min(options.max_tokens, self.processor.max_length - len(input_ids))
        tokens = self._remember(
            input_ids,
            generate_tokens(
                self.model, input_ids, embeddings[:, known:], self._cache, options, limit
            ),
        )
        times = (start, preprocessed, encoded)
        responses = stream_responses(
            tokens, self.processor, len(input_ids), options.stop, limit, times
        )
        return self._record(messages, features, responses)

    def _rewind(self, input_ids: list[int], options: Options) -> int:
        """Trim the cache to what it shares with the prompt, and say how many tokens that is."""
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
        """Keep count of what the cache holds while tokens pass."""
        given = list(input_ids)
        self._cached_ids = []
        try:
            for token in tokens:
                given.append(token)
                yield token
        except GeneratorExit:
            raise
        except BaseException:  # an interrupt amid the layers leaves some of them ahead
            self._cache = []
            raise
        finally:
            if self._cache:
                self._cached_ids = given[: self._cache[0].offset]

    def _record(
        self,
        messages: list[dict[str, str]],
        features: list[mx.array],
        responses: Iterator[Response],
    ) -> Iterator[Response]:
        answer = ""
        try:
            for response in responses:
                answer += response.text
                yield response
        finally:
            responses.close()  # type: ignore[attr-defined]
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self._features = features
