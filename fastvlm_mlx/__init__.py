"""FastVLM, the vision language model, native in MLX.

import fastvlm_mlx as fv

model, processor = fv.load()
print(fv.generate(model, processor, "Describe the image.", image="photo.jpg"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import convert
    from .chat import Chat
    from .config import CheckpointError, FastVLMConfig
    from .generate import Part, generate, stream_generate
    from .image import load_image, preprocess
    from .model import FastVLM
    from .prompt import Processor
    from .weights import load, load_model

__all__ = [
    "Chat",
    "CheckpointError",
    "FastVLM",
    "FastVLMConfig",
    "Part",
    "Processor",
    "__version__",
    "convert",
    "generate",
    "load",
    "load_image",
    "load_model",
    "preprocess",
    "stream_generate",
]

_HOMES = {
    "Chat": "chat",
    "CheckpointError": "config",
    "FastVLM": "model",
    "FastVLMConfig": "config",
    "Part": "generate",
    "Processor": "prompt",
    "generate": "generate",
    "load": "weights",
    "load_image": "image",
    "load_model": "weights",
    "preprocess": "image",
    "stream_generate": "generate",
}


def __getattr__(name: str) -> Any:
    # Names are imported when they are used, so that `import fastvlm_mlx` is instant.
    if name == "convert":
        return importlib.import_module(f"{__name__}.convert")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
