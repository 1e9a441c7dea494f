"""Models whose encoder is in training form: read, made from nothing, and folded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from .. import ops
from ..config import CheckpointError, FastVLMConfig
from ..model.fastvlm import FastVLM
from ..model.vision_training import TrainingFastViTHD
from .files import MAX_NAMED, Weights
from .load import cast, inference_weights, load_for_training, quantize_like, resolve_dtype
from .names import fuse
from .read import read_branches

DECODER_SCALE = 0.02  # of a new decoder's weights (`initializer_range` of Qwen2)


def load_training_form(folder: str | Path, *, dtype: mx.Dtype | str | None = None) -> FastVLM:
    """As `load.load_for_training`, but the encoder keeps the parallel branches and BatchNorms that
    it was trained with.

    Args:
        folder: of a checkpoint whose encoder is not folded yet, such as `fastvithd.pth`'s.
        dtype: as for `load_for_training`; what BatchNorms remember stays float32.

    Raises:
        CheckpointError: the encoder is in inference form, or as `load_for_training`.
    """
    model = load_for_training(folder, dtype=dtype)
    kind = model.language_model.norm.weight.dtype
    tower = TrainingFastViTHD(model.config.vision)
    found = read_branches(Path(folder).expanduser())
    _check_branches(found, dict(tree_flatten(tower.parameters())), Path(folder))
    tower.load_weights([(name, _cast(kind, name, tensor)) for name, tensor in found.items()])
    model.update_modules({"vision_tower": tower})
    mx.eval(model.parameters())
    return model


def _check_branches(found: Weights, wanted: Weights, folder: Path) -> None:
    """Raise a CheckpointError that names what does not fit."""
    problems = [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is surplus" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} is {found[name].shape} where {tensor.shape} is expected"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise CheckpointError(
            f"{folder}: its encoder does not fit the training form: "
            f"{'; '.join(problems[:MAX_NAMED])}{more}."
        )


def fresh_model(
    config: FastVLMConfig,
    seed: int = 0,
    *,
    dtype: mx.Dtype | str | None = None,
    computed: bool = True,
) -> FastVLM:
    """A new model with random weights, in training mode, its encoder in training form.

    Convolutions and the encoder's and projector's linear layers are drawn as PyTorch draws them,
    embeddings and the decoder's layers from a normal distribution of width 0.02 as transformers
    does, norms start at 1, biases at 0 and layer scales at 0.1.

    Args:
        config: the geometry; it may not ask for quantization.
        seed: of the random numbers; MLX's own generator is left with it.
        dtype: float32 by default; what BatchNorms remember stays float32.
        computed: draw the weights now; otherwise when they are needed, as for a model of which only
            the shapes are.

    Raises:
        ValueError: the configuration is that of a quantized model.
    """
    if config.quantization:
        raise ValueError("A new model has no quantized weights: leave out quantization.")
    ops.keep_freed_memory()
    mx.random.seed(seed)
    model = FastVLM(config)
    model.unfuse()
    model.update_modules({"vision_tower": TrainingFastViTHD(config.vision)})
    decoder = model.language_model
    decoder.update(tree_map_with_path(_draw, decoder.parameters()))
    if "image_newline" in model:
        width = config.text.hidden_size
        model.image_newline = mx.random.normal((width,)) / width**0.5
    kind = mx.float32 if dtype is None else resolve_dtype(dtype)
    model.update(tree_map_with_path(partial(_cast, kind), model.parameters()))
    if computed:
        mx.eval(model.parameters())
        ops.note_computation()
    model.train()
    return model


def _cast(dtype: mx.Dtype, name: str, value: mx.array) -> mx.array:
    return cast(value, mx.float32 if ".running_" in name else dtype)


def _draw(name: str, value: mx.array) -> mx.array:
    if value.ndim == 2:
        return DECODER_SCALE * mx.random.normal(value.shape)
    return mx.zeros_like(value) if name.endswith(".bias") else mx.ones_like(value)


def folded(model: FastVLM) -> FastVLM:
    """A copy of a trained model as `load.load_model` would read it: its encoder in inference form,
    its projections fused, for inference.

    Raises:
        ValueError: an adapter is not fused yet.
    """
    weights = inference_weights(model)
    copy = FastVLM(model.config)
    quantize_like(copy, weights)
    parameters = fuse(weights, model.config)
    dtype = model.language_model.norm.weight.dtype
    copy.load_weights([(name, cast(value, dtype)) for name, value in parameters.items()])
    copy.vision_tower.fold_biases()
    mx.eval(copy.parameters())
    return copy
