"""FastVLM, the vision language model, native in MLX.

import fastvlm_mlx as fv

model, processor = fv.load()
print(fv.generate(model, processor, "Describe the image.", image="photo.jpg"))
"""

from typing import TYPE_CHECKING, Any

from .start import quiet_start

try:
    quiet_start()
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX has no backend on this system; install one with "
        "pip install 'fastvlm-mlx[cpu]', or with the extra cuda12 or cuda13."
    ) from error

from .checkpoint.load import load, load_model
from .config import CheckpointError, FastVLMConfig
from .convert import convert
from .fuse import fuse
from .generation.batch import batch_generate
from .generation.chat import Chat
from .generation.generate import generate, stream_generate
from .generation.prompt_cache import PromptCache
from .generation.response import Response
from .image.load import load_image
from .image.preprocess import preprocess
from .model.fastvlm import FastVLM
from .processor import Processor
from .version import __version__

if TYPE_CHECKING:
    from .caption import CaptionJob, caption_images
    from .finetuning import finetune
    from .live.watch import watch

__all__ = [
    "CaptionJob",
    "Chat",
    "CheckpointError",
    "FastVLM",
    "FastVLMConfig",
    "Processor",
    "PromptCache",
    "Response",
    "__version__",
    "batch_generate",
    "caption_images",
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

# What few programs use is imported when it is first asked for: `import fastvlm_mlx` stays instant.
_LATER = {
    "CaptionJob": ".caption",
    "caption_images": ".caption",
    "finetune": ".finetuning",
    "watch": ".live.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = getattr(import_module(_LATER[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
