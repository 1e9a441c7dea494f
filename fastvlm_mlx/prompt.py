"""Chat turns → token ids, with the places where images go."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fastvlm_mlx.config import IMAGE_TOKEN_INDEX, CheckpointError, read_json

if TYPE_CHECKING:
    import jinja2
    import tokenizers

IMAGE_MARK = "<image>"
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Lone surrogates are no characters: `encode` drops them, so some of them can mark a text for us.
SURROGATES = re.compile("[\ud800-\udfff]")
GUARD, IMAGE_PLACE, PROBE = "\ud800", "\ud801", "\ud802"

Messages = str | Sequence[Mapping[str, str]]


class Tokenizer:
    """Qwen2's byte-level BPE, which turns text into control ids only where it is told to.

    Attributes:
        controls: every added token (`<|im_end|>`, …) and its id.
        special_tokens: `bos_token`, `eos_token`, `pad_token` as texts, where the folder names them.
        eos_token_ids: the ids that end an answer.
        chat_template: the folder's own template, in Jinja.
        vocab_size: number of tokens, the added ones included.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_token_ids: int | Iterable[int] | None = None,
    ):
        from tokenizers import AddedToken

        settings = settings or {}
        added = bpe.get_added_tokens_decoder()
        self.controls = {token.content: i for i, token in added.items()}
        self._special_ids = {i for i, token in added.items() if token.special}
        # `encode_special_tokens` makes plain text of special tokens alone: mark all as special.
        bpe.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.controls]
        )
        bpe.encode_special_tokens = True
        self._bpe = bpe
        longest_first = sorted(self.controls, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

        self.vocab_size = bpe.get_vocab_size()
        self.chat_template = chat_template
        named = {
            name: _text_of(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        self.special_tokens = {name: text for name, text in named.items() if text is not None}
        self.bos_token_id = self._id(named["bos_token"])
        extra = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids or ()
        ends = (self._id(named["eos_token"]), self._id("<|im_end|>"), self._id("<|endoftext|>"))
        self.eos_token_ids: set[int] = {i for i in (*ends, *extra) if i is not None}
        pads = (self._id(named["pad_token"]), self._id("<|endoftext|>"), *self.eos_token_ids, 0)
        self.pad_token_id: int = next(i for i in pads if i is not None)

    @classmethod
    def from_folder(
        cls, path: str | Path, eos_token_ids: int | Iterable[int] | None = None
    ) -> Tokenizer:
        """Read a model folder's tokenizer.json, or its vocab.json and merges.txt.

        Args:
            path: the folder.
            eos_token_ids: more ids that end an answer, as config.json or generation_config.json
                has them.

        Raises:
            CheckpointError: there is no tokenizer, a file is broken, or it is not a byte-level BPE.
        """
        folder = Path(path)
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        if (folder / "tokenizer.json").is_file():
            bpe = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            bpe = _read_vocab_and_merges(folder, settings)
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt."
            )
        return cls(bpe, settings, _read_chat_template(folder, settings), eos_token_ids)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; nothing is put before or after it.

        Args:
            text: any text; lone surrogates are dropped.
            allow_special: whether a literal `<|im_end|>` (or another added token) becomes its
                control id. By default it is spelled out like any other text.
        """
        if not allow_special:
            return self._bpe.encode(SURROGATES.sub("", text), add_special_tokens=False).ids
        ids = []
        for part in self._control.split(text):
            ids += [self.controls[part]] if part in self.controls else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD, ids without a token become nothing."""
        parts = (self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids)
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token: int, *, skip_special_tokens: bool = True) -> bytes:
        """UTF-8 bytes of one token: possibly part of a character."""
        if token < 0 or (skip_special_tokens and token in self._special_ids):
            return b""
        text = self._bpe.id_to_token(token) or ""
        alphabet = _byte_alphabet()
        # An added token may hold characters that stand for no byte: it stands for itself.
        known = all(char in alphabet for char in text)
        return bytes(alphabet[char] for char in text) if known else text.encode()

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._bpe.token_to_id(text)


class Detokenizer:
    """Text of a stream of tokens, given out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        token_bytes = self._tokenizer.token_bytes(token, skip_special_tokens=self._skip)
        return self._utf8.decode(token_bytes)

    def finish(self) -> str:
        """What is held back: U+FFFD if the stream ended within a character."""
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class ConvMode:
    """How a conversation is written: what opens and what ends a turn of each role."""

    system_prompt: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt's text; the mode's own system prompt comes first if the messages have none."""
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        turns = dict(zip(ROLES, (self.system, self.user, self.assistant), strict=True))
        text = "".join(message["content"].join(turns[message["role"]]) for message in messages)
        return text + self.assistant[0].rstrip(" ") if add_generation_prompt else text


def _chatml(system_prompt: str, end: str) -> ConvMode:
    opened = (f"<|im_start|>{role}\n" for role in ROLES)
    return ConvMode(system_prompt, *((start, end) for start in opened))


def _vicuna(person: str) -> ConvMode:
    system_prompt = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    return ConvMode(system_prompt, ("", " "), ("USER: ", " "), ("ASSISTANT: ", "</s>"))


# The modes of ml-fastvlm's llava/conversation.py that fit this form. FastVLM learned `qwen_2`.
CONV_MODES = {
    "qwen_2": _chatml(DEFAULT_SYSTEM, "<|im_end|>\n"),
    "chatml_direct": _chatml("Answer the questions.", "<|im_end|>"),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
        "<|im_end|>",
    ),
    "v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "plain": ConvMode("", ("", ""), ("", "\n"), ("", "\n")),
}


def apply_chat_template(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    conv_mode: str | None = None,
) -> str:
    """Chat turns as the one text that the model reads.

    Args:
        tokenizer: whose own chat template is used; Qwen2's ChatML, which FastVLM learned, if it
            has none or one that does not show texts (transformers' FastVLM has one for lists of
            parts).
        messages: turns `{"role": "system" | "user" | "assistant", "content": text}`; a string is
            one user turn.
        add_generation_prompt: whether to open the assistant's turn at the end.
        conv_mode: one of `CONV_MODES`, instead of the template.

    Raises:
        ValueError: a malformed message, an unknown mode, or a template that rejects the messages.
    """
    messages = _checked(messages)
    if conv_mode is not None:
        if conv_mode not in CONV_MODES:
            known = ", ".join(CONV_MODES)
            raise ValueError(f"Unknown conversation mode {conv_mode!r}: known are {known}.")
        return CONV_MODES[conv_mode].render(messages, add_generation_prompt)
    if tokenizer.chat_template is not None:
        probe = [{**message, "content": PROBE} for message in messages]
        if _render(tokenizer, probe, add_generation_prompt).count(PROBE) == len(messages):
            return _render(tokenizer, messages, add_generation_prompt)
    return CONV_MODES["qwen_2"].render(messages, add_generation_prompt)


def build_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    num_visual_tokens: Sequence[int],
    system: str | None = None,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    conv_mode: str | None = None,
) -> list[int]:
    """Token ids of a chat, up to where the assistant's answer begins.

    Images go where user turns say `<image>`; without such a mark all go before the first user
    turn, each with a newline after it, as in `predict.py` of the original. Control tokens come
    from the template alone: in a turn, `<|im_end|>` is text, and so is `<image>` in a turn that
    is not the user's.

    Args:
        tokenizer: the model's.
        messages: as in `apply_chat_template`.
        num_visual_tokens: for each image, in order, how many visual tokens it has.
        system: the system prompt, if not the template's own.
        image_token_index: the id that holds each visual token's place.
        conv_mode: one of `CONV_MODES`, instead of the tokenizer's chat template.

    Raises:
        ValueError: as in `apply_chat_template`; also if there are marks, but not one an image, or
            no user turn for the images, or two system prompts.
    """
    turns = _checked(messages)
    if system is not None:
        if turns[0]["role"] == "system":
            raise ValueError("The system prompt is given twice: as `system` and as a message.")
        turns = [{"role": "system", "content": system}, *turns]
    turns = _place_images(turns, len(num_visual_tokens))
    turns = [{**turn, "content": _guard(tokenizer, turn["content"])} for turn in turns]
    text = apply_chat_template(tokenizer, turns, conv_mode=conv_mode)
    pieces = text.split(IMAGE_PLACE)
    return _join(
        tokenizer,
        pieces,
        num_visual_tokens,
        allow_special=True,
        image_token_index=image_token_index,
    )


def check_marks(messages: Messages, images: int) -> None:
    """ValueError if user turns have image marks, but not one an image."""
    users = [turn["content"] for turn in _checked(messages) if turn["role"] == "user"]
    marks = sum(content.count(IMAGE_MARK) for content in users)
    if marks not in (0, images):
        raise _marks_differ(marks, images)


def encode_with_images(
    tokenizer: Tokenizer,
    text: str,
    num_visual_tokens: Sequence[int],
    *,
    allow_special: bool = False,
    image_token_index: int = IMAGE_TOKEN_INDEX,
) -> list[int]:
    """Token ids of a text as it stands, with images at its `<image>` marks.

    The original's `tokenizer_image_token`, with one id for each visual token instead of one for
    each image.

    Raises:
        ValueError: the text has more or fewer marks than there are images.
    """
    pieces = text.split(IMAGE_MARK)
    return _join(
        tokenizer,
        pieces,
        num_visual_tokens,
        allow_special=allow_special,
        image_token_index=image_token_index,
    )


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[mx.array, list[int]]:
    """Left-pad token ids to int32 [B, T]; also gives the left padding of each sequence."""
    length = max(map(len, sequences), default=0)
    padding = [length - len(ids) for ids in sequences]
    rows = [[pad_id] * n + list(ids) for n, ids in zip(padding, sequences, strict=True)]
    return mx.array(rows, dtype=mx.int32).reshape(len(rows), length), padding


@dataclass
class Processor:
    """What a model must know to read images and prompts.

    Attributes:
        tokenizer: the model's.
        image_size: side of the square, in pixels, that an image becomes.
        mode: how it does: "pad", "square" or "anyres".
        grid_pinpoints: widths and heights, in pixels, that "anyres" may choose from.
        patch_size: side, in pixels, of a visual token's patch.
        max_length: most tokens that the decoder has positions for.
    """

    tokenizer: Tokenizer
    image_size: int
    mode: str = "pad"
    grid_pinpoints: Sequence[tuple[int, int]] | None = None
    patch_size: int = 64
    max_length: int = 8192

    def preprocess(
        self,
        image: Any,
        image_size: int | None = None,
        *,
        fast: bool = False,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """Pixels [N, S, S, 3] of an image, by default at the model's own size.

        `fast` and `dtype` are those of `fastvlm_mlx.preprocess`.
        """
        from fastvlm_mlx.image import preprocess

        size = self.image_size if image_size is None else image_size
        return preprocess(image, size, self.mode, self.grid_pinpoints, fast=fast, dtype=dtype)

    def preprocess_each(
        self,
        images: Sequence[Any],
        image_size: int | None = None,
        *,
        fast: bool = False,
        dtype: mx.Dtype = mx.float32,
    ) -> Iterator[tuple[mx.array, tuple[int, int]]]:
        """Pixels and upright (width, height) of each image; threads decode those that follow.

        As `fastvlm_mlx.image.preprocess_each`, by default at the model's own size.
        """
        from fastvlm_mlx.image import preprocess_each

        size = self.image_size if image_size is None else image_size
        return preprocess_each(images, size, self.mode, self.grid_pinpoints, fast=fast, dtype=dtype)

    def num_visual_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one square of S = `image_size` pixels: (S / patch_size)².

        Raises:
            ValueError: the size is not a multiple of `patch_size`.
        """
        size = self.image_size if image_size is None else image_size
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, found {size}.")
        return (size // self.patch_size) ** 2


def _checked(messages: Messages) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"A prompt must be a text or a list of messages, found {messages!r}.")
    for message in messages:
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise ValueError(
                "A message must have a role (system, user or assistant) and a text as content, "
                f"found {message!r}."
            )
    if not messages:
        raise ValueError("There are no messages: give at least a user's.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _place_images(messages: list[dict[str, str]], images: int) -> list[dict[str, str]]:
    """Put IMAGE_PLACE for the user's marks, or before the first question if there are none."""
    turns = [{**turn, "content": SURROGATES.sub("", turn["content"])} for turn in messages]
    questions = [turn for turn in turns if turn["role"] == "user"]
    if images and not questions:
        raise ValueError("There is no user message for the images to go into.")
    if not any(IMAGE_MARK in turn["content"] for turn in questions):
        for turn in questions[:1]:
            turn["content"] = f"{IMAGE_MARK}\n" * images + turn["content"]
    for turn in questions:
        turn["content"] = turn["content"].replace(IMAGE_MARK, IMAGE_PLACE)
    return turns


def _guard(tokenizer: Tokenizer, content: str) -> str:
    """Set off every character that begins or ends a control token.

    After rendering, only the template's own control tokens are whole, whatever it did to the
    content (trim, conditions), and `encode` drops the guards before it cuts text into tokens. So
    text on both sides of a seam is still cut as one, as the original does.
    """
    edges = {char for token in tokenizer.controls for char in (token[0], token[-1])}
    return content.translate({ord(char): f"{GUARD}{char}{GUARD}" for char in edges})


def _marks_differ(marks: int, images: int) -> ValueError:
    return ValueError(
        f"The prompt has {marks} {IMAGE_MARK} mark(s) for {images} image(s): "
        "write one mark for each image."
    )


def _join(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    num_visual_tokens: Sequence[int],
    *,
    allow_special: bool,
    image_token_index: int,
) -> list[int]:
    marks, images = len(pieces) - 1, len(num_visual_tokens)
    if marks != images:
        raise _marks_differ(marks, images)
    ids = tokenizer.encode(pieces[0], allow_special=allow_special)
    for count, piece in zip(num_visual_tokens, pieces[1:], strict=True):
        ids += [image_token_index] * count + tokenizer.encode(piece, allow_special=allow_special)
    return ids


def _render(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    try:
        return _compiled(tokenizer.chat_template or "").render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"The chat template fails on these messages: {error}") from None


@cache
def _compiled(template: str) -> jinja2.Template:
    """A chat template in the environment that transformers gives it."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    GPT-2's table: a printable Latin-1 character is its own byte, and the other bytes are counted
    up from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    counted = {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | counted


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        bpe = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower type
        raise CheckpointError(f"{path} is not a valid tokenizer ({error}).") from None
    if type(bpe.decoder).__name__ != "ByteLevel":
        raise CheckpointError(f"{path} is not a byte-level BPE tokenizer, as Qwen2's is.")
    return bpe


def _read_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer in the older form, which the released checkpoints have."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    added = _added_tokens(folder, settings)
    if not added:
        raise CheckpointError(
            f"{folder} names no control tokens: tokenizer_config.json needs added_tokens_decoder."
        )
    # Added tokens keep the ids they are given only if the vocabulary has them already.
    vocab = read_json(folder / "vocab.json") | {token.content: i for i, token in added.items()}
    try:
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        rules = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        bpe = Tokenizer(BPE(vocab, [(left, right) for left, right in rules]))
    except Exception as error:  # the package raises no narrower type
        raise CheckpointError(
            f"{folder / 'merges.txt'} and vocab.json make no tokenizer ({error})."
        ) from None
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([added[i] for i in sorted(added)])
    return bpe


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    from tokenizers import AddedToken

    listed = folder / "added_tokens.json"
    ids = read_json(listed) if listed.is_file() else {}
    try:
        added = {
            int(i): AddedToken(text, special=True, normalized=False) for text, i in ids.items()
        }
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            special = bool(token.get("special"))
            added[int(i)] = AddedToken(token["content"], special=special, normalized=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} or added_tokens.json lists its added tokens "
            f"in an unknown form ({error!r})."
        ) from None
    return added


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8", errors="replace")
    path, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        path = folder / "chat_template.json"
        template = read_json(path).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template must be a text, found {template!r}.")
    return template


def _text_of(token: Any) -> str | None:
    """A special token's text: tokenizer_config.json has it alone or with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
