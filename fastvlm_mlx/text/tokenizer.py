"""Text ↔ token ids, with Qwen2's byte-level BPE; a stream of tokens → text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import shown
from ..config import CheckpointError, read_json

if TYPE_CHECKING:
    import tokenizers

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Lone surrogates are not characters. `encode` drops them, so the prompt can use them as marks.
SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Qwen2's byte-level BPE, which gives control ids only where it is told to.

    Attributes:
        bpe: the tokenizer of the `tokenizers` package underneath.
        controls: every added token (`<|im_end|>`, …) and its id.
        special_tokens: texts of `bos_token`, `eos_token`, `pad_token`, if the folder names them.
        eos_token_ids: the ids that end an answer.
        chat_template: the folder's own template, in Jinja.
        vocab_size: number of tokens, including the added ones.
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
        # `encode_special_tokens` makes plain text only of special tokens: mark all as special.
        bpe.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.controls]
        )
        bpe.encode_special_tokens = True
        self.bpe = bpe
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
            eos_token_ids: more ids that end an answer, as in config.json or
                generation_config.json.

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
        """Token ids of a text, with nothing added before or after.

        Args:
            text: any text; lone surrogates are dropped.
            allow_special: whether a literal `<|im_end|>` (or another added token) becomes its
                control id. By default it is spelled out like any other text.
        """
        if not allow_special:
            return self.bpe.encode(SURROGATES.sub("", text), add_special_tokens=False).ids
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
        text = self.bpe.id_to_token(token) or ""
        alphabet = _byte_alphabet()
        # An added token may hold characters that stand for no byte: it stands for itself.
        known = all(char in alphabet for char in text)
        return bytes(alphabet[char] for char in text) if known else text.encode()

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self.bpe.token_to_id(text)


class Detokenizer:
    """Turns a stream of tokens into text, as soon as characters are complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        token_bytes = self._tokenizer.token_bytes(token, skip_special_tokens=self._skip)
        return self._utf8.decode(token_bytes)

    def finish(self) -> str:
        """What was held back: U+FFFD if the stream ended within a character."""
        return self._utf8.decode(b"", final=True)


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
    """Qwen2's tokenizer from the older files, as in the released checkpoints."""
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
            f"in an unknown way ({shown(error)})."
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
        raise CheckpointError(f"{path}: chat_template must be a text, found {shown(template)}.")
    return template


def _text_of(token: Any) -> str | None:
    """A special token's text: tokenizer_config.json gives only the text, or an entry with flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
