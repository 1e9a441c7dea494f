"""`fastvlm generate`: one answer."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.load import load
from ..checks import reason
from ..evaluate.questions import DEFAULT_QUESTION
from ..generation.constrain import IncompleteAnswer, is_constrained
from ..generation.generate import stream_generate
from ..generation.options import Options
from ..generation.video import FRAMES
from ..hub.resolve import NANO
from ..image.load import dragged_path, dragged_paths
from ..text.messages import Messages
from .arguments import Adapter, Bits, Dtype, Frames, Images, Model, Revision, Video, option_flags
from .images import is_bundled
from .printing import print_answer, print_nano_note, print_timings, warnings_as_notes

SAMPLE_IMAGE = NANO / "images" / "penguins.png"


@option_flags()
def generate(
    model: Model = None,
    adapter: Adapter = None,
    image: Images = None,
    video: Video = None,
    frames: Frames = FRAMES,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The question. `<image>` in it marks the place of an image; without marks, images "
            f'come first. The default is "{DEFAULT_QUESTION}"'
        ),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with a list of messages, as OpenAI and transformers write them, "
            "instead of --prompt. Images may stand in their parts."
        ),
    ] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its timings as one JSON object.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option(help="Print a table of timings after the answer.")
    ] = False,
    **options: Any,
) -> None:
    """Answer a question about images or a video; without arguments, describe a bundled one.

    fastvlm generate --model apple/FastVLM-0.5B --image photo.jpg --prompt "What is this?"

    fastvlm generate --model apple/FastVLM-0.5B --video clip.mp4 --prompt "What happens?"
    """
    draft_model = options.pop("draft_model")
    chosen = Options(**options | {"stop": tuple(options["stop"])})
    question = _question(prompt, messages)
    loaded = load(model, revision=revision, dtype=dtype, quantize=quantize, adapter=adapter)
    if draft_model is not None:
        chosen = replace(chosen, draft_model=load(draft_model, dtype=dtype))
    if not image and video is None and prompt is None and messages is None:
        image = [str(SAMPLE_IMAGE)]
        typer.echo(f"No --image and no --prompt: describing {SAMPLE_IMAGE}.", err=True)
    images = [path for text in image or [] for path in dragged_paths(text)]
    clip = None if video is None else dragged_path(video)
    with warnings_as_notes() if clip or messages else nullcontext():
        responses = stream_generate(
            *loaded, question, image=images, video=clip, frames=frames, **vars(chosen)
        )
    text, last = print_answer(responses, quiet=as_json)
    known = clip is None and all(map(is_bundled, images))
    if model is None and (question != DEFAULT_QUESTION or not known):
        print_nano_note()
    if as_json:
        result = asdict(last) | {"text": text}
        del result["token"]
        typer.echo(json.dumps(result, ensure_ascii=False))
    elif verbose:
        print_timings(last)
    if last.finish_reason == "length" and is_constrained(chosen):
        raise IncompleteAnswer(text, last.generation_tokens)


def _question(prompt: str | None, messages: Path | None) -> Messages:
    """What is asked: a prompt, a file of messages, or by default for a description."""
    if messages is None:
        return DEFAULT_QUESTION if prompt is None else prompt
    if prompt is not None:
        raise ValueError("Give --prompt or --messages, not both.")
    try:
        found = json.loads(messages.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{messages} is not valid JSON ({reason(error)}).") from None
    if isinstance(found, dict) and "messages" in found:  # the body of a request
        found = found["messages"]
    if not isinstance(found, list):
        raise ValueError(f"{messages} must hold a list of messages, found {type(found).__name__}.")
    return found
