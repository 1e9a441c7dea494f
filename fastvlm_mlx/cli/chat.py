"""`fastvlm chat`: a conversation, read line by line."""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..checkpoint.load import load
from ..generation.chat import Chat
from .arguments import Adapter, Bits, Dtype, Images, Model, Revision, option_flags
from .images import NamedImage, named_images
from .interrupts import forget_interrupt
from .printing import print_answer, print_error, print_nano_note

CHAT_HELP = """\
/image PATH  show an image (a path or URL) with the next question
/images      list the images that the conversation knows
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
    adapter: Adapter = None,
    image: Images = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    **options: Any,
) -> None:
    """Talk about images, turn by turn.

    Commands in the chat: /image PATH, /images, /reset, /help, /quit. Ctrl-C stops an answer,
    Ctrl-D leaves.
    """
    if sys.stdin is None:
        raise ValueError("Standard input is closed: questions are read from there.")
    loaded = load(model, revision=revision, dtype=dtype, quantize=quantize, adapter=adapter)
    conversation = Chat(*loaded, **options)
    known: list[NamedImage] = []
    pending = [shown for text in image or [] for shown in named_images(text)]
    if model is None:
        print_nano_note()
    typer.echo("Ask away; /help lists the commands.", err=True)
    while (line := _read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        elif command == "/help":
            typer.echo(CHAT_HELP)
        elif command == "/reset":
            conversation.reset()
            known.clear()
            pending.clear()
        elif command == "/images":
            _list_images(known, pending)
        elif command == "/image":
            _add_image(pending, argument.strip())
        elif line.startswith("/"):
            typer.echo(f"There is no command {command}; /help lists the commands.", err=True)
        elif line:
            known += _answer(conversation, line, pending)


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


def _list_images(known: list[NamedImage], pending: list[NamedImage]) -> None:
    """Print what has been shown, and what waits for the next question."""
    for number, image in enumerate([*known, *pending], 1):
        waits = ", shown with the next question" if number > len(known) else ""
        typer.echo(f"{number}. {image}{waits}")
    if not known and not pending:
        typer.echo("No image yet: /image PATH shows one.")


def _add_image(pending: list[NamedImage], path: str) -> None:
    """Put an image, or several, before the next question, or say why that can't be."""
    if not path:
        typer.echo("Name an image: /image PATH.", err=True)
        return
    try:
        pending += named_images(path)
    except (ValueError, OSError) as error:
        print_error(error)


def _answer(conversation: Chat, question: str, pending: list[NamedImage]) -> list[NamedImage]:
    """Print the answer to a question about the pending images, and return those now known."""
    turns, paths = len(conversation.messages), [image.path for image in pending]
    forget_interrupt()
    try:
        print_answer(conversation.ask(question, image=paths, stream=True))
    except KeyboardInterrupt:
        typer.echo(" [stopped]")
        conversation.stop()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print_error(error)
    if len(conversation.messages) == turns:
        return []
    shown = list(pending)
    pending.clear()
    return shown
