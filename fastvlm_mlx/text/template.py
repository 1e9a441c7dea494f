"""Chat turns → one text, through a chat template or a conversation mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checks import brief, shown
from .messages import IMAGE_MARK, IMAGE_PLACE, ROLES, Messages, Turn, read_messages
from .sandbox import render
from .tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
# Lone surrogates, which no text has: around edges of control tokens, and for any content.
GUARD, PROBE = "\ud800", "\ud802"


@dataclass(frozen=True)
class ConvMode:
    """How a conversation is written: what stands before and after a turn of each role."""

    system_prompt: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt's text; it begins with the mode's own system prompt if messages have none."""
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


# The modes in ml-fastvlm's llava/conversation.py that fit `ConvMode`. FastVLM learned `qwen_2`.
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
        tokenizer: its own chat template is used. If it has none, or one that does not show texts
            (transformers' FastVLM has one for lists of parts), Qwen2's ChatML is, which FastVLM
            learned.
        messages: turns `{"role": "system" | "user" | "assistant", "content": text or parts}`; a
            string is one user turn. Images are written as `<image>`.
        add_generation_prompt: whether to open the assistant's turn at the end.
        conv_mode: one of `CONV_MODES`, instead of the template.

    Raises:
        ValueError: a malformed message, an unknown mode, or a template that rejects the messages.
    """
    turns, _ = read_messages(messages)
    text = render_turns(tokenizer, turns, add_generation_prompt, conv_mode)
    return text.replace(IMAGE_PLACE, IMAGE_MARK)


def render_turns(
    tokenizer: Tokenizer,
    turns: list[Turn],
    add_generation_prompt: bool = True,
    conv_mode: str | None = None,
) -> str:
    """As `apply_chat_template`, of turns as `read_messages` gives them, with its image places."""
    if conv_mode is not None:
        if conv_mode not in CONV_MODES:
            known = ", ".join(CONV_MODES)
            raise ValueError(
                f"Unknown conversation mode {shown(conv_mode)}: choose one of {known}."
            )
        return CONV_MODES[conv_mode].render(turns, add_generation_prompt)
    if tokenizer.chat_template is not None:
        probe = [{**turn, "content": PROBE} for turn in turns]
        if _render(tokenizer, probe, add_generation_prompt).count(PROBE) == len(turns):
            return _render(tokenizer, turns, add_generation_prompt)
    return CONV_MODES["qwen_2"].render(turns, add_generation_prompt)


def _render(tokenizer: Tokenizer, messages: list[Turn], add_generation_prompt: bool) -> str:
    try:
        return render(
            tokenizer.chat_template or "",
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a program and may fail in any way
        raise ValueError(
            f"The chat template fails on these messages: {brief(str(error))}"
        ) from None
