"""Embeddings to tokens to text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .image import ImageSource
from .model import FastVLM
from .prompt import Detokenizer, Messages, Processor, build_prompt, check_marks

if TYPE_CHECKING:
    from .reuse import Reuse

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
KV_BITS = (2, 3, 4, 6, 8)
MIN_TEMPERATURE = 1e-6  # below it float32 has no room for the quotients, and sampling is greedy


@dataclass(frozen=True)
class Options:
    """How to generate; the names are mlx_lm's.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; above, logits are divided by it and sampled.
        top_p: sample from the most likely tokens whose probabilities add up to this.
        top_k: sample from this many most likely tokens; 0 is all.
        min_p: drop tokens less likely than this times the likeliest.
        repetition_penalty: divide (or multiply, if negative) the logits of the last 20 tokens.
        seed: of the sampling, for answers that can be repeated.
        stop: texts that end the answer, which then stops before them.
        max_kv_size: positions that the KV cache keeps; older ones are forgotten.
        kv_bits: bits of a quantized KV cache.
        prefill_step_size: tokens of the prompt that are processed at a time.
        logits_processor: called with the tokens so far [T] and the logits [1, vocab_size], and
            gives the logits to sample from.

    Raises:
        ValueError: a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    max_kv_size: int | None = None
    kv_bits: int | None = None
    prefill_step_size: int = 2048
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("max_tokens", "a whole number from 1", _is_int, lambda n: n >= 1)
        self._check("temperature", "a number from 0", _is_number, lambda t: t >= 0)
        self._check("top_p", "a number above 0 and at most 1", _is_number, lambda p: 0 < p <= 1)
        self._check("top_k", "a whole number from 0", _is_int, lambda k: k >= 0)
        self._check("min_p", "a number from 0 to 1", _is_number, lambda p: 0 <= p <= 1)
        self._check("prefill_step_size", "a whole number from 1", _is_int, lambda n: n >= 1)
        self._check("stop", "texts that are not empty", _is_texts, all)
        if self.repetition_penalty is not None:
            self._check("repetition_penalty", "a number above 0", _is_number, lambda p: p > 0)
        if self.seed is not None:
            self._check("seed", "a whole number from 0", _is_int, lambda n: 0 <= n < 2**64)
        if self.max_kv_size is not None:
            self._check("max_kv_size", "a whole number from 8", _is_int, lambda n: n >= 8)
        if self.kv_bits is not None:
            self._check("kv_bits", f"one of {KV_BITS}", _is_int, KV_BITS.__contains__)
        if self.logits_processor is not None:
            self._check("logits_processor", "a function", callable, callable)
        if self.kv_bits and self.max_kv_size:
            raise ValueError("kv_bits and max_kv_size can't be combined; choose one.")

    def _check(
        self,
        name: str,
        wanted: str,
        of_type: Callable[[Any], bool],
        in_range: Callable[[Any], bool],
    ) -> None:
        value = getattr(self, name)
        if not of_type(value) or not in_range(value):
            raise ValueError(f"{name} must be {wanted}, found {value!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


@dataclass
class Part:
    """A piece of an answer as it appears; times are in seconds, memory in GB (10⁹ bytes).

    Attributes:
        text: what is new; may be empty.
        token: the token that brought it.
        prompt_tokens, generation_tokens: so far.
        preprocess_time: reading and resizing the images.
        encode_time: encoder and projector.
        prefill_time: tokenizing the prompt and running the decoder over it to the first token.
        ttft: time to first token, from the call.
        generation_tps: tokens per second after the first.
        peak_memory: most that MLX's arrays took.
        finish_reason: "stop" (the model or a stop text ended it) or "length"; None before the end.
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


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[dict[str, str]],
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    system: str | None = None,
    image_size: int | None = None,
    conv_mode: str | None = None,
    fast: bool = False,
    reuse: Reuse | None = None,
    prompt_lookup: int | None = None,
    draft_model: tuple[FastVLM, Processor] | None = None,
    num_draft_tokens: int = 3,
    **options: Any,
) -> str:
    """Answer a prompt about any number of images; the whole text.

    Args:
        model, processor: from `load`.
        prompt: a question, in which `<image>` may mark the images' places, or a chat as a list of
            {"role", "content"}.
        image: one image or several: path, URL, bytes, PIL image or array.
        system: the system prompt, if not the model's own.
        image_size: side in pixels, a multiple of 64, if not the model's own; smaller is faster.
        conv_mode: a conversation template by name, if not the tokenizer's own.
        fast: decode large JPEGs at less than their full resolution, in half the time; the pixels
            differ slightly (`image.preprocess` says by how much).
        reuse: what earlier calls computed, so that an image asked about again is neither encoded
            nor read by the decoder again.
        prompt_lookup: speculative decoding: look in prompt and answer for what followed the last
            tokens before, and have up to this many tokens checked in one step. The answer stays
            the same; see `speculate`.
        draft_model: the same with a smaller model of the same family, from `load`, as drafter.
        num_draft_tokens: tokens that `draft_model` proposes at a time.
        **options: the fields of `Options`.

    Raises:
        ValueError: an option is out of range, an image can't be read, marks and images differ in
            number, or the prompt is longer than the model's limit.
        FileNotFoundError: no such image.
    """
    parts = stream_generate(
        model,
        processor,
        prompt,
        image=image,
        system=system,
        image_size=image_size,
        conv_mode=conv_mode,
        fast=fast,
        reuse=reuse,
        prompt_lookup=prompt_lookup,
        draft_model=draft_model,
        num_draft_tokens=num_draft_tokens,
        **options,
    )
    return "".join(part.text for part in parts)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[dict[str, str]],
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    system: str | None = None,
    image_size: int | None = None,
    conv_mode: str | None = None,
    fast: bool = False,
    reuse: Reuse | None = None,
    prompt_lookup: int | None = None,
    draft_model: tuple[FastVLM, Processor] | None = None,
    num_draft_tokens: int = 3,
    **options: Any,
) -> Iterator[Part]:
    """As `generate`, piece by piece; bad arguments raise on the call, not on the first piece."""
    start = time.perf_counter()
    chosen = Options(**options)
    images = list_images(image)
    check_marks(prompt, len(images))
    pixel_values, image_sizes = preprocess_images(processor, images, image_size, fast=fast)
    preprocessed = time.perf_counter()
    image_keys: list[bytes] = []
    if reuse is None:
        features = encode_images(model, pixel_values, image_sizes)
    else:
        features, image_keys = reuse.encode(model, pixel_values, image_sizes)
    encoded = time.perf_counter()
    input_ids = tokenize(model, processor, prompt, features, system=system, conv_mode=conv_mode)
    embeddings = model.embed_inputs(mx.array([input_ids]), image_features=features)
    limit = min(chosen.max_tokens, processor.max_length - len(input_ids))
    cache = make_kv_cache(model, chosen)
    keeps_prompt = reuse is not None and chosen.max_kv_size is None and chosen.kv_bits is None
    if reuse is not None and keeps_prompt:
        ids = reuse.mark(input_ids, features, image_keys)
        embeddings = embeddings[:, reuse.start(ids, cache) :]
    if prompt_lookup is None and draft_model is None:
        tokens = generate_tokens(model, input_ids, embeddings, cache, chosen, limit)
    else:
        from .speculate import make_drafter, speculate_tokens

        drafter = make_drafter(
            processor,
            prompt,
            input_ids,
            pixel_values,
            image_sizes,
            prompt_lookup=prompt_lookup,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            system=system,
            conv_mode=conv_mode,
        )
        tokens = speculate_tokens(model, input_ids, embeddings, cache, chosen, limit, drafter)
    if reuse is not None and keeps_prompt:
        tokens = keep_prompt(reuse, ids, cache, tokens)
    del features, pixel_values, embeddings
    times = (start, preprocessed, encoded)
    return stream_parts(tokens, processor, len(input_ids), chosen.stop, limit, times)


def list_images(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """One image, several or none, as a list."""
    if image is None:
        return []
    if isinstance(image, (list, tuple)):
        return list(image)
    return [cast(ImageSource, image)]


def preprocess_images(
    processor: Processor,
    images: Sequence[ImageSource],
    image_size: int | None = None,
    *,
    fast: bool = False,
) -> tuple[list[mx.array], list[tuple[int, int]]]:
    """Pixels, uint8 [n, S, S, 3], and original (width, height) of each image."""
    each = list(processor.preprocess_each(images, image_size, fast=fast, dtype=mx.uint8))
    return [pixels for pixels, _ in each], [size for _, size in each]


def keep_prompt(
    reuse: Reuse, ids: list[int], cache: list[Any], tokens: Iterator[int]
) -> Iterator[int]:
    """The tokens, and once the first shows that the prompt was read, it is remembered."""
    for n, token in enumerate(tokens):
        if n == 0:
            reuse.keep(ids, cache)
        yield token


def encode_images(
    model: FastVLM, pixel_values: list[mx.array], image_sizes: list[tuple[int, int]]
) -> list[mx.array]:
    """The visual tokens [n, hidden_size] of each image, computed."""
    features = model.encode_images(pixel_values, image_sizes) if pixel_values else []
    mx.eval(features)
    mx.clear_cache()  # of the encoder's activations, which the decoder has no use for
    return features


def tokenize(
    model: FastVLM,
    processor: Processor,
    prompt: Messages,
    features: Sequence[mx.array],
    *,
    system: str | None = None,
    conv_mode: str | None = None,
) -> list[int]:
    """Token ids of a prompt, with a place for each of the visual tokens in `features`.

    Raises:
        ValueError: as `prompt.build_prompt`, or the prompt leaves no room for an answer.
    """
    input_ids = build_prompt(
        processor.tokenizer,
        prompt,
        num_visual_tokens=[len(f) for f in features],
        system=system,
        image_token_index=model.config.image_token_index,
        conv_mode=conv_mode,
    )
    check_length(input_ids, processor.max_length)
    return input_ids


def check_length(input_ids: Sequence[int], max_length: int) -> None:
    """ValueError if a prompt leaves no room for an answer."""
    if len(input_ids) >= max_length:
        raise ValueError(
            f"The prompt has {len(input_ids)} tokens, and the model's limit is {max_length} with "
            "the answer; shorten it, or use fewer or smaller images."
        )


def make_kv_cache(model: FastVLM, options: Options) -> list[Any]:
    """An empty KV cache a layer, of the kind that the options ask for."""
    if options.max_kv_size is not None:
        from mlx_lm.models.cache import RotatingKVCache

        return [RotatingKVCache(max_size=options.max_kv_size, keep=4) for _ in model.layers]
    if options.kv_bits is not None:
        from mlx_lm.models.cache import QuantizedKVCache

        D = model.config.text.head_dim
        group_size = next((size for size in (64, 32) if D % size == 0), None)
        if group_size is None:
            raise ValueError(f"kv_bits needs heads in multiples of 32, and the model's are {D}.")
        return [QuantizedKVCache(group_size, options.kv_bits) for _ in model.layers]
    return model.make_kv_cache()


def generate_tokens(
    model: FastVLM,
    input_ids: Sequence[int],
    embeddings: mx.array,
    cache: list[Any],
    options: Options,
    limit: int,
) -> Iterator[int]:
    """Prefill, then one token after the other, each computed while the one before is read.

    Args:
        input_ids: the whole prompt.
        embeddings: [1, T, hidden_size] of what the cache does not hold of it.
        cache: updated in place.
        options: see `Options`.
        limit: tokens to generate at most.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    sample = make_sampler(options)
    process = make_logits_processor(options)
    seen = mx.array([i for i in input_ids if i >= 0])
    decoder = model.language_model

    def next_token(hidden_states: mx.array) -> mx.array:
        nonlocal seen
        logits = decoder.logits(hidden_states[:, -1])
        if process is not None:
            logits = process(seen, logits)
        token = sample(logits)
        if process is not None:
            seen = mx.concatenate([seen, token])
        return token

    while embeddings.shape[1] > options.prefill_step_size:
        decoder.hidden_states(None, cache, embeddings[:, : options.prefill_step_size])
        mx.eval([c.state for c in cache])
        embeddings = embeddings[:, options.prefill_step_size :]
    token = next_token(decoder.hidden_states(None, cache, embeddings))
    mx.async_eval(token)
    for _ in range(limit - 1):
        following = next_token(decoder.hidden_states(token[None], cache))
        mx.async_eval(following)
        yield int(token)
        token = following
    yield int(token)


def make_sampler(options: Options) -> Sampler:
    """Logits [B, vocab_size] → tokens [B]; filters come before the temperature, as in mlx_lm."""
    if options.temperature < MIN_TEMPERATURE:
        return lambda logits: mx.argmax(logits, axis=-1)
    if options.top_k or options.min_p:
        return _mlx_lm_sampler(options)

    def sample(logits: mx.array) -> mx.array:
        if options.top_p < 1:
            logits = keep_top_p(logits, options.top_p)
        # From the maximum and in float32, so that no temperature is too low.
        logits = (logits - logits.max(axis=-1, keepdims=True)).astype(mx.float32)
        return mx.random.categorical(logits / options.temperature)

    return sample


def _mlx_lm_sampler(options: Options) -> Sampler:
    from mlx_lm import sample_utils

    def sample(logits: mx.array) -> mx.array:
        sampler = sample_utils.make_sampler(
            temp=options.temperature,
            top_p=options.top_p,
            min_p=options.min_p,
            top_k=options.top_k if options.top_k < logits.shape[-1] else 0,
        )
        logits = logits.astype(mx.float32)
        return sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return sample


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """-inf for all but the most likely tokens whose probabilities first reach `top_p`."""
    order = mx.argsort(-logits, axis=-1)
    ordered = mx.take_along_axis(logits, order, axis=-1).astype(mx.float32)
    probabilities = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, before < top_p, axis=-1)
    return mx.where(kept, logits, -mx.inf)


def make_logits_processor(options: Options) -> LogitsProcessor | None:
    """The repetition penalty and the caller's own processor, in this order."""
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty not in (None, 1.0):
        from mlx_lm.sample_utils import make_logits_processors

        processors += make_logits_processors(repetition_penalty=options.repetition_penalty)
    if options.logits_processor is not None:
        processors.append(options.logits_processor)
    if not processors:
        return None

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        for processor in processors:
            logits = processor(tokens, logits)
        return logits

    return process


def stream_parts(
    tokens: Iterator[int],
    processor: Processor,
    prompt_tokens: int,
    stop: Sequence[str],
    limit: int,
    times: tuple[float, float, float],
) -> Iterator[Part]:
    """Tokens to text, with the timings.

    Args:
        tokens: from `generate_tokens`.
        processor: has the tokenizer.
        prompt_tokens: of the whole prompt.
        stop: texts that end the answer.
        limit: tokens to take at most.
        times: of the call, after reading images, and after encoding them.
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
        stopped = ended or stopper.stopped
        yield Part(
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
        )
        if stopped:
            return


class StopTexts:
    """Ends a stream of text before any of some texts, holding back what may begin one."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop text."""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self.held) - self._undecided())

    def finish(self) -> str:
        """The rest, when nothing more comes."""
        return "" if self.stopped else self._release(len(self.held))

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _undecided(self) -> int:
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)
