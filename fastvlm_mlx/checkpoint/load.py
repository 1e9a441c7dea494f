"""A folder → a model and the processor of its images and prompts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import ops
from ..config import load_config, read_json
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.tokenizer import Tokenizer
from .files import Weights
from .layouts.mlx_vlm import dtype_of
from .names import fuse, fused_rows, quantized_linears, stored_name, unfused_layers
from .quantize import Quantize, quantize_checkpoint
from .read import read_checkpoint

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
READ_AT_ONCE = 10**8  # bytes; enough to read in parallel


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
) -> tuple[FastVLM, Processor]:
    """Load a model and the processor of its images and prompts.

    Args:
        source: a folder or a Hub id (`apple/FastVLM-0.5B`), in any known layout, converted on the
            fly; by default the bundled nano model.
        revision: branch, tag or commit on the Hub.
        dtype, quantize: as for `load_model`.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        CheckpointError: it is not a whole FastVLM.
        OSError: the download failed.
        ValueError: as for `load_model`.
    """
    folder = resolve(source, revision=revision)
    processor = load_processor(folder)
    return load_model(folder, dtype=dtype, quantize=quantize), processor


def load_processor(folder: str | Path) -> Processor:
    """Read the tokenizer and the image settings of a folder; errors as `load`."""
    folder = Path(folder)
    config = load_config(folder)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos_token_ids = [*config.eos_token_ids, *(eos if isinstance(eos, list) else [eos])]
    return Processor(
        tokenizer=Tokenizer.from_folder(folder, [i for i in eos_token_ids if i is not None]),
        image_size=config.vision.image_size,
        mode=config.image_aspect_ratio,
        grid_pinpoints=config.image_grid_pinpoints,
        patch_size=config.vision.patch_size,
        max_length=min(config.max_length, config.text.max_position_embeddings),
    )


def load_model(
    folder: str | Path, *, dtype: mx.Dtype | str | None = None, quantize: Quantize | None = None
) -> FastVLM:
    """Read a model from a folder in any known layout; the folder needs no tokenizer.

    Tensors are read once their place in the model is known, the largest first.

    Args:
        folder: holds config.json and the weights.
        dtype: of the weights that are not quantized; by default float32 on the CPU, which is slow
            at half precision, and otherwise the checkpoint's own, but float16 for bfloat16 on M1
            and M2, whose GPUs lack it (unless a weight is beyond float16's range).
        quantize: bits per weight, a mode or preset by name, or a mapping; see
            `quantize.parse_quantize`.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file, a field or a tensor is missing, surplus or wrong.
        ValueError: `dtype` or `quantize` is unknown, `dtype` can't hold a weight, or the checkpoint
            is already quantized.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    config, weights = read_checkpoint(folder)
    stored = dtype_of(weights)
    target = ops.fast_dtype(stored) if dtype is None else resolve_dtype(dtype)
    if quantize is not None or target == mx.float32:
        weights = {name: cast(tensor, target) for name, tensor in weights.items()}
    if quantize is not None:
        weights, quantization, _ = quantize_checkpoint(weights, config, quantize)
        config = replace(config, quantization=quantization)
    model = FastVLM(config)
    quantize_like(model, weights)
    parameters = fuse(weights, config)
    model.load_weights([(name, cast(value, target)) for name, value in parameters.items()])
    parameters.clear()
    model.vision_tower.fold_biases()
    _evaluate(model)
    if target == mx.float16 != stored and (name := _infinite(model)):
        if dtype is None:
            return load_model(folder, dtype=stored, quantize=quantize)
        raise ValueError(
            f"{name} has numbers beyond float16's largest, 65504: use dtype bfloat16 or float32."
        )
    model.eval()
    return model


def _infinite(model: FastVLM) -> str | None:
    """The name of a parameter that is not finite, if there is one."""
    parameters = dict(tree_flatten(model.parameters()))
    found = {name: mx.isinf(value).any() for name, value in parameters.items()}
    mx.eval(found)
    return next((name for name, is_infinite in found.items() if is_infinite), None)


def quantize_like(model: FastVLM, weights: Weights) -> None:
    """Give a model the quantized and the unfused layers of a checkpoint, in place of its own."""
    config = model.config
    settings = dict(quantized_linears(weights, config))
    for path in unfused_layers(weights, config):
        _, i, block, whole = path.split(".")
        module = model.language_model.layers[int(i)][block]
        fused = module[whole]
        width = fused.weight.shape[1]
        rows = fused_rows(config)[f"{block}.{whole}"]
        module[whole] = ops.UnfusedLinear([nn.Linear(width, n, bias="bias" in fused) for n in rows])
    if settings:
        ops.quantize(model, lambda path: settings.get(stored_name(path, config)))


def _evaluate(model: FastVLM) -> None:
    """Read and compute the parameters, the largest layers first, so that what a layer is made from
    uses memory that later layers will fill."""
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    layers = [list(dict(tree_flatten(m.parameters())).values()) for m in modules.values()]
    layers.sort(key=lambda tensors: sum(t.nbytes for t in tensors), reverse=True)
    waiting: list[mx.array] = []
    for tensors in layers:
        waiting += tensors
        if sum(t.nbytes for t in waiting) > READ_AT_ONCE:
            mx.eval(waiting)
            waiting.clear()
    mx.eval(model.parameters())


def resolve_dtype(dtype: mx.Dtype | str) -> mx.Dtype:
    """A floating dtype by its name or itself.

    Raises:
        ValueError: it is neither float32, float16 nor bfloat16.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, found {dtype!r}.")
    return found


def cast(value: mx.array, dtype: mx.Dtype) -> mx.array:
    """A tensor in a dtype; integers (packed weights) stay as they are."""
    return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
