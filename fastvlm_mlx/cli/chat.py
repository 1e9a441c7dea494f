"""`fastvlm chat`: a conversation, read line by line."""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..checkpoint.load import load
from ..generation.chat import Chat
from ..image.load import load_image
from .arguments import Bits, Dtype, Images, Model, Revision, option_flags
from .printing import print_answer, print_error

CHAT_HELP = """\
/image PATH  show an image (a path or URL) with the next question
/reset       forget the conversation
/help        list these commands
/quit        leave, as Ctrl-D does; Ctrl-C stops an answer"""


@option_flags(
    "system",
    "image_size",
    "fast",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "max_kv_size",
    "kv_bits",
)
def chat(
    model: Model = None,
    image: Images = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    **options: Any,
) -> None:
    """Talk about images, turn by turn.

    Commands in the chat: /image PATH, /reset, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    loaded = load(model, revision=revision, dtype=dtype, quantize=quantize)
    conversation = Chat(*loaded, **options)
    pending = [_checked(path) for path in image or []]
    typer.echo("Ask away; /help lists the commands.", err=True)
    while (line := _read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        elif command == "/help":
            typer.echo(CHAT_HELP)
        elif command == "/reset":
            conversation.reset()
            pending.clear()
        elif command == "/image":
            _add_image(pending, argument.strip())
        elif line.startswith("/"):
            typer.echo(f"There is no command {command}; /help lists the commands.", err=True)
        elif line:
            _answer(conversation, line, pending)


def _read_line() -> str | None:
    """A line typed in the chat, without spaces around it; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D or /quit leaves.", err=True)


def _checked(path: str) -> str:
    """The path itself, if an image can be read there; otherwise the error that says why not."""
    load_image(path)
    return path


def _add_image(pending: list[str], path: str) -> None:
    """Put an image before the next question, or say why it can't be."""
    if not path:
        typer.echo("Name an image: /image PATH.", err=True)
        return
    try:
        pending.append(_checked(path))
    except (ValueError, OSError) as error:
        print_error(error)


def _answer(conversation: Chat, question: str, pending: list[str]) -> None:
    """Print the answer to a question about the pending images, which are then used up."""
    turns = len(conversation.messages)
    try:
        print_answer(conversation.ask(question, image=list(pending), stream=True))
    except KeyboardInterrupt:
        typer.echo(" [stopped]")
        conversation.stop()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print_error(error)
    if len(conversation.messages) > turns:
        pending.clear()
