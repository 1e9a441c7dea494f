"""FastVLM in VLMEvalKit: `python -m fastvlm_mlx.evaluate.vlmevalkit --model FastVLM-MLX-0.5B …`.

VLMEvalKit has no entry points: its models stand in one table. The command adds ours to it and goes
on as VLMEvalKit's own `run.py`, with the same arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from ..checkpoint.load import load
from ..checks import shown
from ..generation.generate import generate
from ..generation.prompt_cache import PromptCache

MODELS: dict[str, str | None] = {
    "FastVLM-MLX-nano": None,
    "FastVLM-MLX-0.5B": "apple/FastVLM-0.5B",
    "FastVLM-MLX-1.5B": "apple/FastVLM-1.5B",
    "FastVLM-MLX-7B": "apple/FastVLM-7B",
}


class FastVLMKit(BaseModel):
    """A model for VLMEvalKit, greedy by default.

    Args:
        model_path: as `load` takes it; by default the bundled nano model.
        quantize: bits per weight.
        **options: of `generate`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str | None = None, quantize: int | None = None, **options: Any):
        super().__init__()
        self.model, self.processor = load(model_path, quantize=quantize)
        self.cache = PromptCache(self.model)
        self.options = options

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to texts and images in their order.

        Raises:
            ValueError: there is a part of another kind.
        """
        content = [_part(**part) for part in message]
        messages = [{"role": "user", "content": content}]
        return generate(
            self.model, self.processor, messages, prompt_cache=self.cache, **self.options
        )


def _part(type: str, value: str, **_: Any) -> dict[str, str]:
    if type not in ("text", "image"):
        raise ValueError(f"FastVLM answers about texts and images, not about {shown(type)}.")
    return {"type": type, type: value}


def register() -> None:
    """Add FastVLM's models to VLMEvalKit's table."""
    from vlmeval.config import supported_VLM

    for name, path in MODELS.items():
        supported_VLM[name] = partial(FastVLMKit, model_path=path)


def main() -> None:
    """VLMEvalKit's command, with FastVLM's models in it."""
    from vlmeval.run import main as run

    register()
    run()


if __name__ == "__main__":
    main()
