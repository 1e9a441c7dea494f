"""FastVLM, the vision language model, native in MLX.

import fastvlm_mlx as fv

model, processor = fv.load()
print(fv.generate(model, processor, "Describe the image.", image="photo.jpg"))
"""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX has no backend on this system; install one with "
        "pip install 'fastvlm-mlx[cpu]', or with the extra cuda12 or cuda13."
    ) from error

from . import convert
from .batch import batch_generate
from .chat import Chat
from .config import CheckpointError, FastVLMConfig
from .generate import generate, stream_generate
from .image import load_image, preprocess
from .model import FastVLM
from .parts import Part
from .prompt import Processor
from .reuse import Reuse
from .version import __version__
from .weights import load, load_model

__all__ = [
    "Chat",
    "CheckpointError",
    "FastVLM",
    "FastVLMConfig",
    "Part",
    "Processor",
    "Reuse",
    "__version__",
    "batch_generate",
    "convert",
    "generate",
    "load",
    "load_image",
    "load_model",
    "preprocess",
    "stream_generate",
]
