"""This library and mlx-vlm, each driven as its own `generate` drives it; see `worker.Side`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

IMAGE = -200
ROWS = 16  # sequences of a batch whose step is counted
# What mlx-vlm's VisionConfig has as constants of its class, not as fields to read.
VISION_CONSTANTS = (
    "layers",
    "embed_dims",
    "mlp_ratios",
    "token_mixers",
    "pos_embs_shapes",
    "downsamples",
    "down_patch_size",
    "down_stride",
    "repmixer_kernel_size",
    "cls_ratio",
)


class MlxSide:
    """What every library on MLX does in the same way."""

    package: str
    model: Any
    read_model: Callable[[Path, str], Any]
    vision_features: Callable[[mx.array], mx.array]
    visual_tokens: Callable[[mx.array], mx.array]
    next_logits: Callable[[mx.array, Sequence[int]], mx.array]
    generate: Callable[[mx.array, Sequence[int], int], Iterator[int]]
    batch_step: Callable[[int], Callable[[], mx.array]]
    start_run: Callable[[Path, str], Any]

    def about(self) -> dict[str, str]:
        return {"library": version(self.package), "mlx": version("mlx"), "device": device_name()}

    def load(self, folder: Path, dtype: str) -> None:
        vars(self).pop("model", None)  # not two models at once
        mx.clear_cache()
        self.model = self.read_model(folder, dtype)

    def to_device(self, pixel_values: np.ndarray) -> mx.array:
        array = mx.array(pixel_values)
        mx.eval(array)
        return array

    def features(self, pixel_values: mx.array) -> np.ndarray:
        return np.array(self.vision_features(pixel_values).astype(mx.float32))

    def encode(self, pixel_values: mx.array) -> None:
        mx.eval(self.visual_tokens(pixel_values))

    def logits(self, pixel_values: mx.array, prompt: Sequence[int]) -> np.ndarray:
        return np.array(self.next_logits(pixel_values, prompt).astype(mx.float32))

    def peak_array_bytes(self) -> int:
        return mx.get_peak_memory()

    def train(
        self, folder: Path, dtype: str, rows: int, batch_size: int, epoch: int, **sizes: int
    ) -> dict[str, float]:
        """Seconds of a step of LoRA training; arguments as for `train_sides.Rows`."""
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        if not hasattr(self, "run"):
            self.run = self.start_run(folder, dtype)
        given = train_sides().Rows(rows, vocab_size=vocab_size, **sizes)
        return {"seconds": self.run.train(given, batch_size, epoch=epoch)}

    def launches(
        self, folder: Path, dtype: str, image_size: int, prompt: Sequence[int], graph: str
    ) -> dict[str, Any]:
        """Primitives and kernel launches of encoding an image, of one step of decoding, and of one
        step of `ROWS` sequences together.

        Args:
            folder, dtype: as `load` takes.
            image_size: of the image whose encoding is counted, not computed.
            prompt: as `generate` takes.
            graph: path of `fastvlm_mlx/bench/graph.py`, which may lie in no package here.
        """
        graphs = import_file(graph)
        pixel_values, patch = mx.zeros((1, image_size, image_size, 3)), mx.zeros((1, 64, 64, 3))
        mx.eval(pixel_values, patch)
        with graphs.as_on_gpu():  # what is fused on loading may depend on the device too
            self.load(folder, dtype)
            encode = graphs.count(self.visual_tokens(pixel_values))
        # One step is submitted ahead: when the first token comes, the third is counted.
        tokens = self.generate(patch, prompt, 4)
        next(tokens)
        with graphs.as_on_gpu():
            decode = graphs.count(next_submitted(tokens))
        step = self.batch_step(ROWS)
        with graphs.as_on_gpu():
            batch = graphs.count(step())
        found = {"encode": encode, "decode": decode, "batch": batch}
        return {
            name: {"launches": counts.launches, "primitives": dict(counts.primitives)}
            for name, counts in found.items()
        }


class Ours(MlxSide):
    """This library."""

    package = "fastvlm-mlx"

    def __init__(self) -> None:
        from fastvlm_mlx.checkpoint.load import load_model
        from fastvlm_mlx.generation.decode import generate_tokens
        from fastvlm_mlx.generation.options import Options

        self.load_model, self.generate_tokens, self.options = load_model, generate_tokens, Options()

    def read_model(self, folder: Path, dtype: str) -> Any:
        return self.load_model(folder, dtype=dtype)

    def vision_features(self, pixel_values: mx.array) -> mx.array:
        return self.model.vision_tower(pixel_values)

    def visual_tokens(self, pixel_values: mx.array) -> mx.array:
        return self.model.encode_image(pixel_values)

    def generate(
        self, pixel_values: mx.array, prompt: Sequence[int], max_tokens: int
    ) -> Iterator[int]:
        input_ids, embeddings = self._read(pixel_values, prompt)
        cache = self.model.make_kv_cache()
        yield from self.generate_tokens(
            self.model, input_ids, embeddings, cache, self.options, max_tokens
        )

    def next_logits(self, pixel_values: mx.array, prompt: Sequence[int]) -> mx.array:
        _, embeddings = self._read(pixel_values, prompt)
        hidden_states = self.model.language_model.hidden_states(None, None, embeddings)
        return self.model.language_model.logits(hidden_states[0, -1])

    def batch_step(self, rows: int) -> Callable[[], mx.array]:
        """A greedy step of sequences of unlike lengths, to be counted; their cache is computed."""
        from fastvlm_mlx.model.batch_kv_cache import BatchKVCache

        decoder, lengths = self.model.language_model, list(range(1, rows + 1))
        prefilled = self.model.make_kv_cache()
        decoder.hidden_states(mx.zeros((rows, rows), mx.int32), prefilled)
        cache, token = BatchKVCache(len(prefilled)), mx.zeros((rows, 1), mx.int32)
        cache.add(prefilled, lengths)
        mx.eval(cache.arrays, token)

        def step() -> mx.array:
            hidden_states = decoder.hidden_states(token, cache.layers)
            return mx.argmax(decoder.logits(hidden_states[:, -1]), axis=-1)

        return step

    def caption(
        self, folder: Path, dtype: str, images: list[str], prompt: str, max_tokens: int
    ) -> dict[str, Any]:
        """Caption files into a new .jsonl file; seconds, the share of them that the model was
        idle, and the texts."""
        from fastvlm_mlx.caption import Job, caption_images
        from fastvlm_mlx.checkpoint.load import load

        if not hasattr(self, "loaded"):
            self.loaded = load(folder, dtype=dtype)
        with tempfile.TemporaryDirectory() as scratch:
            out, job = Path(scratch, "captions.jsonl"), Job(prompts=[prompt])
            start = time.perf_counter()
            done = caption_images(*self.loaded, images, out, job, max_tokens=max_tokens)
            seconds = time.perf_counter() - start
            rows = map(json.loads, out.read_text("utf-8").splitlines())
            texts = [row["caption"] for row in rows]
        return {"seconds": seconds, "idle": done.idle / (done.idle + done.busy), "texts": texts}

    def start_run(self, folder: Path, dtype: str) -> Any:
        return train_sides().OurRun(folder, dtype)

    def _read(self, pixel_values: mx.array, prompt: Sequence[int]) -> tuple[list[int], mx.array]:
        visual_tokens = self.model.encode_images(pixel_values)
        mx.eval(visual_tokens)
        at = list(prompt).index(IMAGE)
        places = [self.model.config.image_token_index] * len(visual_tokens[0])
        input_ids = [*prompt[:at], *places, *prompt[at + 1 :]]
        embeddings = self.model.embed_inputs(mx.array([input_ids]), visual_tokens=visual_tokens)
        return input_ids, embeddings


class MlxVlm(MlxSide):
    """mlx-vlm."""

    package = "mlx-vlm"

    def __init__(self) -> None:
        from mlx_vlm import utils
        from mlx_vlm.generate import common, generate_step
        from mlx_vlm.models.fastvlm.config import VisionConfig

        self.load_model, self.generate_step = utils.load_model, generate_step
        self.common, self.vision_config = common, VisionConfig

    def read_model(self, folder: Path, dtype: str) -> Any:
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        shapes = [shape and tuple(shape) for shape in vision["pos_embs_shapes"]]
        for name in VISION_CONSTANTS:
            setattr(self.vision_config, name, (vision | {"pos_embs_shapes": shapes})[name])
        return self.load_model(folder)  # in the folder's dtype, which is `dtype`

    def vision_features(self, pixel_values: mx.array) -> mx.array:
        dtype = self.model.mm_projector[0].bias.dtype
        _, features, _ = self.model.vision_tower(pixel_values.astype(dtype))
        return features.flatten(1, 2)

    def visual_tokens(self, pixel_values: mx.array) -> mx.array:
        return self.model.mm_projector(self.vision_features(pixel_values))

    def generate(
        self, pixel_values: mx.array, prompt: Sequence[int], max_tokens: int
    ) -> Iterator[int]:
        input_ids, channels_first, mask = self._read(pixel_values, prompt)
        with self.common.wired_limit(self.model, [self.common.generation_stream]):
            for token, _ in self.generate_step(
                input_ids, self.model, channels_first, mask, max_tokens=max_tokens, temperature=0.0
            ):
                yield token

    def next_logits(self, pixel_values: mx.array, prompt: Sequence[int]) -> mx.array:
        input_ids, channels_first, mask = self._read(pixel_values, prompt)
        embeddings = self.model.get_input_embeddings(input_ids, channels_first, mask=mask)
        output = self.model.language_model(None, inputs_embeds=embeddings.inputs_embeds)
        return output.logits[0, -1]

    def batch_step(self, rows: int) -> Callable[[], mx.array]:
        """As that of `Ours`, with the cache that mlx-vlm's own batches have."""
        from mlx_vlm.models.cache import BatchKVCache

        decoder, padding = self.model.language_model, list(range(rows - 1, -1, -1))
        cache = [BatchKVCache(padding) for _ in decoder.model.layers]
        decoder(mx.zeros((rows, rows), mx.int32), cache=cache)
        token = mx.zeros((rows, 1), mx.int32)
        mx.eval([layer.state for layer in cache], token)

        def step() -> mx.array:
            logits = decoder(token, cache=cache).logits[:, -1]
            return mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)

        return step

    def caption(
        self, folder: Path, dtype: str, images: list[str], prompt: str, max_tokens: int
    ) -> dict[str, Any]:
        """Caption files with mlx-vlm's own batches; seconds and the texts."""
        from mlx_vlm.generate import batch_generate
        from mlx_vlm.utils import load_processor

        if not hasattr(self, "processor"):
            self.load(folder, dtype)
            self.processor = load_processor(folder)
        start = time.perf_counter()
        found = batch_generate(
            self.model,
            self.processor,
            images=images,
            prompts=[prompt] * len(images),
            max_tokens=max_tokens,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "texts": [text.strip() for text in found.texts]}

    def start_run(self, folder: Path, dtype: str) -> Any:
        return train_sides().MlxVlmRun(self.read_model(folder, dtype))

    def _read(
        self, pixel_values: mx.array, prompt: Sequence[int]
    ) -> tuple[mx.array, mx.array, mx.array]:
        input_ids = mx.array([list(prompt)])
        return input_ids, pixel_values.transpose(0, 3, 1, 2), mx.ones_like(input_ids)


class Submitted(Exception):
    """Carries what a loop gives MLX to compute."""


def next_submitted(tokens: Iterator[int]) -> tuple[mx.array, ...]:
    """What the next step of a decoding loop asks MLX to compute; the loop ends there."""

    def submit(*arrays: mx.array) -> None:
        raise Submitted(arrays)

    async_eval, mx.async_eval = mx.async_eval, submit
    try:
        next(tokens)
    except Submitted as submitted:
        return submitted.args[0]
    finally:
        mx.async_eval = async_eval
    raise RuntimeError("The decoding loop does not call mx.async_eval.")


def train_sides() -> ModuleType:
    """The file beside this one: found by the worker that another Python runs."""
    return importlib.import_module("train_sides")


def import_file(file: str) -> ModuleType:
    """A module by its path."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def device_name() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return str(mx.device_info().get("device_name", "GPU"))
