"""`fastvlm serve`: the HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.load import load
from ..checks import check_whole_number
from ..generation.prompt_cache import MAX_BYTES
from ..hub import registry
from ..model.fastvlm import FastVLM
from ..serve.cache import RequestCache
from ..serve.disk import MAX_DISK_BYTES
from ..serve.engine import MAX_BATCH, MAX_QUEUE, Engine
from ..serve.settings import Place, Settings
from .arguments import Adapter, Bits, Dtype, Model, Revision
from .printing import print_nano_note

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
EXAMPLE = """Any client of OpenAI, Anthropic or Ollama asks it, and so does curl:
curl http://127.0.0.1:8000/api/generate -d '{"prompt": "Who are you?", "stream": false}'
docs/serve.md has examples with images."""


def _flag(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, **more)


# Those of the fields of `Place`, `Settings` and `Engine` that are flags
FLAGS: dict[str, Any] = {
    "host": Annotated[str, _flag("Address to listen at; 0.0.0.0 is every network.")],
    "port": Annotated[int, _flag("Port to listen at; 0 is any free one.")],
    "api_key": Annotated[
        str | None,
        _flag(
            "Key that clients must send. The variable is better: others see flags of a process.",
            envvar="FASTVLM_API_KEY",
        ),
    ],
    "cors": Annotated[
        list[str],
        _flag("Let web pages of another origin ask. Repeat it for several.", metavar="ORIGIN"),
    ],
    "allowed_hosts": Annotated[
        list[str],
        _flag(
            "A name by which clients reach the server. Repeat it for several.",
            "--allowed-host",
            metavar="NAME",
        ),
    ],
    "allow_remote_images": Annotated[
        bool,
        _flag("Fetch images by URL, from public addresses only.", "--allow-remote-images"),
    ],
    "media_root": Annotated[
        Path | None, _flag("Folder below which requests may name image files.")
    ],
    "certfile": Annotated[Path | None, _flag("Certificate in PEM, for https.")],
    "keyfile": Annotated[Path | None, _flag("Its key in PEM.")],
    "max_batch": Annotated[int, _flag("Answers that are decoded together at most.")],
    "max_queue": Annotated[int, _flag("Requests that may wait beyond those.")],
    "max_cache": Annotated[
        int, _flag("Bytes kept of images and prompts for later requests; 0 is nothing.")
    ],
    "cache_dir": Annotated[
        Path | None, _flag("Folder in which these are kept too, and outlive the server.")
    ],
    "max_cache_dir": Annotated[int, _flag("Bytes of that folder at most.")],
    "max_body": Annotated[int, _flag("Bytes of a request at most.")],
    "max_images": Annotated[int, _flag("Images of a request at most.")],
    "max_image_bytes": Annotated[int, _flag("Bytes of an image's file at most.")],
    "max_image_pixels": Annotated[int, _flag("Width × height of an image at most.")],
    "max_prompt_tokens": Annotated[
        int | None, _flag("Tokens of a prompt at most, images included; by default the model's.")
    ],
    "max_output_tokens": Annotated[int, _flag("Tokens of an answer at most.")],
    "timeout": Annotated[float, _flag("Seconds from a request to the end of its answer.")],
    "grace": Annotated[float, _flag("Seconds that running answers have when the server ends.")],
    "log_prompts": Annotated[bool, _flag("Log the texts of prompts and answers.", "--log-prompts")],
}
PARTS = (Settings, Place)


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that ends in `**given` the flags of `FLAGS`; defaults are the dataclasses'."""
    defaults = {field.name: field.default for part in PARTS for field in fields(part)}
    defaults |= {"max_batch": MAX_BATCH, "max_queue": MAX_QUEUE, "max_cache": MAX_BYTES}
    defaults |= {"cache_dir": None, "max_cache_dir": MAX_DISK_BYTES}
    flags = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in FLAGS.items()
    ]
    *own, _ = signature(command, eval_str=True).parameters.values()
    command.__signature__ = Signature([*own, *flags])  # type: ignore[attr-defined]
    return command


@_with_flags
def serve(
    model: Model = None,
    adapter: Adapter = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantize: Bits = None,
    **given: Any,
) -> None:
    """Answer over HTTP as OpenAI, Anthropic and Ollama do, with a page to try it at /.

    fastvlm serve --model apple/FastVLM-0.5B
    """
    given |= {name: tuple(given[name]) for name in ("cors", "allowed_hosts")}
    settings, place = (_part(part, given) for part in PARTS)
    _check_extra()
    from ..serve.server import listen, run

    name = _name_of(model)
    with listen(place) as listening:  # a port in use is found before the model is loaded
        typer.echo(f"Loading {name} …", err=True)
        loaded = load(model, revision=revision, dtype=dtype, quantize=quantize, adapter=adapter)
        sizes = {size: given[size] for size in ("max_batch", "max_queue")}
        engine = Engine(*loaded, name=name, cache=_cache(loaded[0], given), **sizes)
        if model is None:
            print_nano_note()
        _say_where(place, listening.getsockname()[1], settings)
        run(engine, settings, place, listening)


def _name_of(model: str | None) -> str:
    """What clients call the model: its published name, or that of its folder."""
    if model is None:
        return "nano"
    if registry.knows(model):
        return registry.find(model).name
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _part(part: type[Any], given: dict[str, Any]) -> Any:
    """A dataclass of those flags that are its fields."""
    return part(**{f.name: given[f.name] for f in fields(part) if f.name in given})


def _cache(model: FastVLM, given: dict[str, Any]) -> RequestCache | None:
    """What is kept across requests; None if nothing is to be."""
    check_whole_number("max_cache", given["max_cache"], 0)
    check_whole_number("max_cache_dir", given["max_cache_dir"])
    if not given["max_cache"]:
        return None
    bounds = {"max_bytes": given["max_cache"], "max_disk_bytes": given["max_cache_dir"]}
    return RequestCache(model, cache_dir=given["cache_dir"], **bounds)


def _check_extra() -> None:
    """ImportError, with the command to run, if the server's libraries are not installed."""
    if any(find_spec(library) is None for library in NEEDED):
        raise ImportError(
            "The server needs FastAPI, uvicorn and prometheus-client: "
            "pip install 'fastvlm-mlx[serve]'."
        )


def _say_where(place: Place, port: int, settings: Settings) -> None:
    """Say on standard error where the server is, and what to mind."""
    if not place.is_local and settings.api_key is None:
        typer.echo(
            f"Warning: whoever reaches {place.host} can ask, since no key is set; set "
            "FASTVLM_API_KEY.",
            err=True,
        )
    typer.echo(f"Serving at {place.url(port)} (Ctrl-C ends it).", err=True)
