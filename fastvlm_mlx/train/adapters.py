"""What was trained in a model → an adapter's folder, and back, so that training goes on from it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint import encoder_layers, fold, write_adapter
from ..checkpoint.adapt import apply, check_base, read_adapter
from ..checkpoint.card import license_of
from ..checkpoint.files import Weights
from ..checkpoint.layouts.adapters import FOLDED, PLAIN, Adapter, LowRank
from ..checkpoint.layouts.mlx_vlm import ENCODER, VISION_TOWER, is_folded
from ..checkpoint.names import memory_name, stored_name
from ..checkpoint.read import is_of_transformers, read_checkpoint
from ..hub.resolve import BUNDLED, NANO, resolve
from ..model.fastvlm import FastVLM

MATRICES = ("lora_a", "lora_b", "m")  # of mlx_lm's LoRA and DoRA layers


def write(
    model: FastVLM,
    target: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what was trained in a model as an adapter of its base.

    Args:
        model: with mlx_lm's LoRA or DoRA layers, or trainable parameters; unfused.
        target: the folder to write, which appears only when it is whole.
        base: what the model was loaded from, as `load` takes it.
        revision: of the base on the Hub.
        layout: whose names the modules get: "llava", or "transformers", which is the default for a
            base in its layout.
        overwrite: replace a folder with an adapter.

    Raises:
        CheckpointError: a trained tensor holds NaN or infinity, or fits no layer of the base.
        ValueError: nothing was trained.
        FileExistsError, OSError: as `checkpoint.write_adapter.write_adapter`.
    """
    folder = resolve(base, revision=revision)
    config, weights = read_checkpoint(folder)
    adapter = adapter_of(model, weights)
    apply(weights, adapter, config)  # raises if anything does not fit
    if layout is None:
        layout = "transformers" if is_of_transformers(folder) else "llava"
    target, name = Path(target).expanduser(), name_of(base, folder)
    license = license_of(folder, "" if base is None else base)
    return write_adapter.write_adapter(
        adapter,
        target,
        name,
        weights,
        config,
        layout=layout,
        license=license,
        overwrite=overwrite,
    )


def name_of(base: str | os.PathLike[str] | None, folder: Path) -> str:
    """What an adapter calls its base, so that it is found again: a Hub id, or a whole path."""
    if base is None or folder == NANO:
        return BUNDLED
    return str(folder.resolve()) if Path(base).expanduser().is_dir() else os.fspath(base)


def adapter_of(model: FastVLM, base: Weights) -> Adapter:
    """What was trained in a model, in the names of the mlx-vlm layout; errors as `write`.

    Args:
        model: as `write` takes.
        base: the tensors of its base.
    """
    places = {place.folded: place for place in encoder_layers.places(model.config.vision)}
    adapted = {path: layer for path, layer in model.named_modules() if is_adapted(layer)}
    uses_dora = any("m" in layer for layer in adapted.values())
    low_rank: dict[str, LowRank] = {}
    plain = []
    for path, layer in adapted.items():
        found = _low_rank(layer, uses_dora=uses_dora)
        if path in places:
            name = places[path].name
            found = encoder_layers.unfolded(found, places[path], base)
        else:
            name = stored_name(path, model.config)
        low_rank[name] = found
        if uses_dora and "m" not in layer:
            plain.append(name)
    whole = _whole(model)
    if not low_rank and not whole:
        raise ValueError("Nothing of the model is trained: there is no adapter to write.")
    about = {FOLDED: "true"} if is_folded(base) else {}
    if plain:
        about[PLAIN] = " ".join(plain)
    return Adapter(low_rank, whole, about)


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer is one of mlx_lm's with LoRA or DoRA."""
    return "lora_a" in layer and "lora_b" in layer


def _low_rank(layer: Any, *, uses_dora: bool) -> LowRank:
    """The matrices of a layer; where others have DoRA, LoRA is the DoRA that leaves each row of the
    sum as long as it is, since an adapter holds one kind of both."""
    found = LowRank(layer.lora_a.T, layer.lora_b.T, float(layer.scale), layer.get("m"))
    if not uses_dora or found.magnitude is not None:
        return found
    linear = layer.linear
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        settings = {key: getattr(linear, key) for key in ("group_size", "bits", "mode")}
        weight = mx.dequantize(weight, linear.scales, linear.get("biases"), **settings)
    lengths = mx.linalg.norm(found.added_to(weight), axis=1)
    return LowRank(found.down, found.up, found.scale, lengths)


def _whole(model: FastVLM) -> Weights:
    """The parameters trained in full; all of the encoder if one of them is in it."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    adapted = [path for path, layer in model.named_modules() if is_adapted(layer)]
    kept = {f"{path}.{key}" for path in adapted for key in MATRICES}
    names = [name for name in trained if name not in kept]
    whole = {_stored(name, model): trained[name] for name in names if not _is_encoders(name)}
    if any(map(_is_encoders, names)):
        if any(map(_is_encoders, adapted)):
            raise ValueError("The encoder has both LoRA and parameters trained in full.")
        parameters = dict(tree_flatten(model.vision_tower.parameters()))
        encoder = fold.unfold_encoder(lambda name: parameters[name], model.config.vision)
        whole |= {ENCODER + name: tensor for name, tensor in encoder.items()}
    return whole


def _is_encoders(name: str) -> bool:
    return name.startswith(VISION_TOWER)


def _stored(name: str, model: FastVLM) -> str:
    path, dot, key = name.rpartition(".")
    return stored_name(path, model.config) + dot + key


def apply_adapter(
    model: FastVLM,
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dropout: float = 0.0,
) -> None:
    """Put an adapter's layers and tensors into a model of its base, to go on training it.

    LoRA and DoRA become mlx_lm's layers, whose bases are frozen. Which other parameters are
    trained, the caller says.

    Args:
        model: unfused, as `checkpoint.load.load_for_training` gives it; changed in place.
        folder: the adapter's, or its Hub id.
        base: what the model was loaded from, as `load` takes it.
        revision: of the base on the Hub.
        dropout: of LoRA and DoRA.

    Raises:
        CheckpointError: the adapter is another model's.
    """
    config = model.config
    found, name = resolve(base, revision=revision), resolve(folder)
    _, weights = read_checkpoint(found)
    adapter = read_adapter(name)
    check_base(adapter, weights, config, name, found)
    apply(weights, adapter, config)  # raises if anything does not fit
    _replace(model, adapter.whole)
    modules = dict(model.named_modules())
    for layer in adapter.about.get(PLAIN, "").split():
        adapter.low_rank[layer] = replace(adapter.low_rank[layer], magnitude=None)
    for layer, low_rank in encoder_layers.in_memory(adapter, config.vision, weights).items():
        path, _ = memory_name(layer, config, modules)
        adapted = adapted_layer(modules[path], low_rank, dropout)
        model.update_modules(tree_unflatten([(path, adapted)]))


def _replace(model: FastVLM, whole: Weights) -> None:
    """Give a model the tensors that were trained in full; a quantized layer becomes a plain one."""
    config, modules = model.config, dict(model.named_modules())
    encoder = {name: tensor for name, tensor in whole.items() if name.startswith(ENCODER)}
    found: Weights = {}
    for name in whole.keys() - encoder.keys():
        layer, dot, key = name.rpartition(".")
        path, _ = memory_name(layer, config, modules) if layer else ("", 0)
        found[f"{path}{dot}{key}"] = whole[name]
        if key == "weight" and "scales" in modules[path]:
            outputs, inputs = whole[name].shape
            plain = nn.Linear(inputs, outputs, bias="bias" in modules[path])
            model.update_modules(tree_unflatten([(path, plain)]))
    if encoder:
        folded = fold.fold_encoder(lambda name: encoder[ENCODER + name], config.vision)
        found |= {VISION_TOWER + name: tensor for name, tensor in folded.items()}
    dtype = model.language_model.norm.weight.dtype
    cast = [(name, tensor.astype(dtype)) for name, tensor in found.items()]
    model.update(tree_unflatten(cast))


def adapted_layer(layer: nn.Module, low_rank: LowRank, dropout: float = 0.0) -> Any:
    """mlx_lm's LoRA or DoRA layer over a layer, with trained matrices."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    inputs, outputs = low_rank.down.shape[1], len(low_rank.up)
    kind = LoRALinear if low_rank.magnitude is None else DoRALinear
    adapted = kind(inputs, outputs, len(low_rank.down), dropout, low_rank.scale)
    if low_rank.magnitude is None:
        adapted.linear = layer
    else:
        adapted.set_linear(layer)
        adapted.m = low_rank.magnitude.astype(mx.float32)
    adapted.lora_a, adapted.lora_b = low_rank.down.T, low_rank.up.T
    adapted.linear.freeze()
    return adapted
