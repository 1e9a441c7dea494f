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

from .checkpoint.load import load, load_model
from .config import CheckpointError, FastVLMConfig
from .convert import convert
from .finetune import finetune
from .fuse import fuse
from .generation.batch import batch_generate
from .generation.chat import Chat
from .generation.generate import generate, stream_generate
from .generation.prompt_cache import PromptCache
from .generation.response import Response
from .image.load import load_image
from .image.preprocess import preprocess
from .live.watch import watch
from .model.fastvlm import FastVLM
from .processor import Processor
from .version import __version__

__all__ = [
    "Chat",
    "CheckpointError",
    "FastVLM",
    "FastVLMConfig",
    "Processor",
    "PromptCache",
    "Response",
    "__version__",
    "batch_generate",
    "convert",
    "finetune",
    "fuse",
    "generate",
    "load",
    "load_image",
    "load_model",
    "preprocess",
    "stream_generate",
    "watch",
]
