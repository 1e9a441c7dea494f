"""transformers on PyTorch, eager and compiled; see `worker.Side`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

IMAGE = -200


class Transformers:
    """transformers as it comes: the steps of its `generate`, greedy, with a growing cache."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.device = best_device()
        self.model: Any = None

    def about(self) -> dict[str, str]:
        cuda = self.device == "cuda"
        name = torch.cuda.get_device_name() if cuda else self.device.upper()
        versions = {"library": transformers.__version__, "torch": torch.__version__}
        if cuda:
            versions["cuda"] = str(torch.version.cuda)
        return {**versions, "device": name}

    def load(self, folder: Path, dtype: str) -> None:
        self.model = None  # not two models at once
        model = transformers.FastVlmForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model = model.to(self.device).eval()
        self.synchronize()

    def to_device(self, pixel_values: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(pixel_values).permute(0, 3, 1, 2).contiguous()
        return pixels.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def features(self, pixel_values: torch.Tensor) -> np.ndarray:
        features = self.model.get_image_features(pixel_values).last_hidden_state
        return features.flatten(2).permute(0, 2, 1).float().cpu().numpy()

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> None:
        self.model.get_image_features(pixel_values)
        self.synchronize()

    @torch.inference_mode()
    def generate(
        self, pixel_values: torch.Tensor, prompt: Sequence[int], max_tokens: int
    ) -> Iterator[int]:
        input_ids = self._input_ids(pixel_values, prompt)
        cache = self.make_cache(input_ids.shape[1] + max_tokens)
        step = self.model
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
        for _ in range(max_tokens):
            output = step(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(token)
            step, inputs = self.decoding_step(), {"input_ids": token}

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor, prompt: Sequence[int]) -> np.ndarray:
        input_ids = self._input_ids(pixel_values, prompt)
        output = self.model(input_ids=input_ids, pixel_values=pixel_values, logits_to_keep=1)
        return output.logits[0, -1].float().cpu().numpy()

    def peak_array_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def make_cache(self, max_length: int) -> Any:
        return transformers.DynamicCache(config=self.model.config)

    def decoding_step(self) -> Callable[..., Any]:
        """What computes one token after the first."""
        return self.model

    def synchronize(self) -> None:
        """Wait until the device has done all that it was asked."""
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()

    def _input_ids(self, pixel_values: torch.Tensor, prompt: Sequence[int]) -> torch.Tensor:
        places = (pixel_values.shape[-1] // 64) ** 2
        image = [self.model.config.image_token_id] * places
        ids = [i for token in prompt for i in (image if token == IMAGE else [token])]
        return torch.tensor([ids], device=self.device)


class Compiled(Transformers):
    """The encoder compiled, and each token's step, with a static cache as in `generate`."""

    def load(self, folder: Path, dtype: str) -> None:
        super().load(folder, dtype)
        torch.compiler.reset()
        self.model.model.vision_tower.compile(dynamic=False)
        # The mode of transformers' own CompileConfig; CUDA graphs, where there is CUDA.
        self.compiled_step = torch.compile(
            self.model.forward, mode="reduce-overhead", dynamic=False
        )
        self.cache: Any = None

    def make_cache(self, max_length: int) -> Any:
        if self.cache is None or self.cache.layers[0].max_cache_len != max_length:
            self.cache = transformers.StaticCache(self.model.config, max_cache_len=max_length)
        self.cache.reset()
        return self.cache

    def decoding_step(self) -> Callable[..., Any]:
        return self.compiled_step


def best_device() -> str:
    """cuda, mps (Metal) or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
