"""The arguments that several commands share; the options of an answer are the fields of `Options`.

A command takes those as `**options` under `option_flags`, which makes a flag of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from glob import escape, glob
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from ..generation.options import Options
from ..hub.cached import names_in_cache
from ..hub.registry import ENTRIES, SIZES


def complete_model(incomplete: str) -> list[str]:
    """Names for --model that begin so: published ones, those in the Hub's cache, and folders."""
    known = [*SIZES, *(entry.name for entry in ENTRIES if entry.on_hub), *names_in_cache()]
    folders = [path for path in glob(f"{escape(incomplete)}*/") if os.path.isdir(path)]
    names = [name for name in dict.fromkeys(known) if name.startswith(incomplete)]
    return [*names, *sorted(folders)]


Model = Annotated[
    str | None,
    typer.Option(
        envvar="FASTVLM_MODEL",
        autocompletion=complete_model,
        help="Folder, Hub id, or 0.5b, 1.5b or 7b for Apple's models. "
        "The default is the bundled nano model, which only knows drawn emoji, shapes and "
        "short texts.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub id of LoRA, DoRA or other parts trained on top of --model, here or "
        "with PEFT or LLaVA."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16. The default is the checkpoint's own, and float32 on "
        "the CPU."
    ),
]
Bits = Annotated[
    int | None, typer.Option(help="Quantize on loading to 2, 3, 4, 5, 6 or 8 bits per weight.")
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Path, URL or data: URI, also as dragged in; several stand one after the other, or "
        "each after its own --image."
    ),
]
Video = Annotated[
    str | None,
    typer.Option(help="Path or URL of a video, of which a few frames are shown with their times."),
]
Frames = Annotated[int, typer.Option(help="Frames of --video, the most.")]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Side in pixels, a multiple of 64; smaller is faster and coarser."),
]

# The fields of `Options` that are flags; of a draft model the flag is the name.
FLAGS: dict[str, Any] = {
    "system": Annotated[
        str | None, typer.Option(help="System prompt, instead of the model's own.")
    ],
    "conv_mode": Annotated[
        str | None, typer.Option(help="Conversation template, such as qwen_2 or plain.")
    ],
    "image_size": ImageSize,
    "fast": Annotated[
        bool, typer.Option("--fast", help="Decode large JPEGs more coarsely, in half the time.")
    ],
    "max_tokens": Annotated[int, typer.Option(help="Maximum number of tokens to generate.")],
    "temperature": Annotated[float, typer.Option(help="0 is greedy; above 0, answers vary.")],
    "top_p": Annotated[
        float,
        typer.Option(help="Sample from the likeliest tokens whose probabilities add up to this."),
    ],
    "top_k": Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")],
    "min_p": Annotated[
        float,
        typer.Option(help="Drop tokens less likely than this fraction of the likeliest."),
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help="Above 1, makes recent tokens less likely.")
    ],
    "frequency_penalty": Annotated[
        float,
        typer.Option(help="Above 0, makes a token less likely each time that it is said."),
    ],
    "presence_penalty": Annotated[
        float, typer.Option(help="Above 0, makes tokens less likely that were said at all.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")],
    "stop": Annotated[
        list[str], typer.Option(help="Text that ends the answer. Repeat it for several.")
    ],
    "max_kv_size": Annotated[
        int | None, typer.Option(help="Maximum number of positions that the KV cache keeps.")
    ],
    "kv_bits": Annotated[
        int | None, typer.Option(help="Quantize the KV cache to 2, 3, 4, 6 or 8 bits.")
    ],
    "prefill_step_size": Annotated[int, typer.Option(help="Prompt tokens processed in one step.")],
    "prompt_lookup": Annotated[
        int | None,
        typer.Option(help="Speculate up to this many tokens per step by prompt look-up."),
    ],
    "draft_model": Annotated[
        str | None,
        typer.Option(help="Speculate with a smaller model, named as for --model."),
    ],
    "num_draft_tokens": Annotated[
        int, typer.Option(help="Tokens that --draft-model proposes per step.")
    ],
    "num_beams": Annotated[int, typer.Option(help="Above 1, beam search, which does not sample.")],
    "schema": Annotated[
        str | None,
        typer.Option(
            help="Answer in JSON that is valid against this JSON schema, a file or its text; "
            "json_object for any object."
        ),
    ],
    "regex": Annotated[
        str | None, typer.Option(help="Answer with what matches this regular expression.")
    ],
    "choices": Annotated[
        list[str] | None,
        typer.Option(
            "--choice",
            "--choices",
            help="Answer with this text or another one given so; repeat it.",
        ),
    ],
}


def option_flags(*names: str) -> Callable[[Any], Any]:
    """Give a command that ends in `**options` the flags of `Options`, with its defaults.

    Typer makes its flags from a signature, so the command gets one in which the fields stand in the
    place of `**options`.

    Args:
        names: the fields to take; all of `FLAGS` by default.
    """
    defaults = {field.name: field.default for field in fields(Options)}
    flags = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=FLAGS[name])
        for name in names or FLAGS
    ]

    def decorate(command: Any) -> Any:
        *own, _ = signature(command, eval_str=True).parameters.values()
        command.__signature__ = Signature([*own, *flags])
        return command

    return decorate
