"""An adapter on its base: merged into weights in float, kept beside those that are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from .. import ops
from ..checks import brief
from ..config import FUSED_ADAPTERS, CheckpointError, FastVLMConfig, read_json
from ..model.fastvlm import FastVLM
from . import encoder_layers
from .files import Weights, read_file
from .layouts import adapters
from .layouts.adapters import FOLDED, UNTIED, Adapter, LowRank
from .layouts.mlx_vlm import DECODER, LM_HEAD, PROJECTOR, is_folded
from .names import memory_name, quantized_linears
from .quantize import LayerSettings

GEOMETRY = ("vocab_size", "hidden_size", "num_hidden_layers")
MARK = f"{DECODER}norm.weight"  # in float at every precision, and another in every model
MARKS = 16
SAME = 0.02  # of two roundings of one model, and of its stages


def read_adapter(folder: Path) -> Adapter:
    """What the files of an adapter's folder hold.

    Raises:
        CheckpointError: as `adapters.parse`, or the projector that LLaVA trained is missing.
    """
    found = [folder / name for name in (*adapters.ADAPTER, *adapters.TRAINED)]
    found = [file for file in found if file.is_file()]
    # Of one file in two formats, the one that needs no PyTorch.
    tensors = {file.name for file in found if file.suffix == ".safetensors"}
    files = [f for f in found if f.suffix != ".bin" or f"{f.stem}.safetensors" not in tensors]
    settings = folder / adapters.SETTINGS
    read = {file.name: read_file(file) for file in files}
    adapter = adapters.parse(read, read_json(settings) if settings.is_file() else {})
    _check_projector(folder, adapter)
    return replace(adapter, about=adapter.about | adapters.read_about(folder))


def _check_projector(folder: Path, adapter: Adapter) -> None:
    """Raise a CheckpointError if the projector was trained, as LLaVA's config.json says, and is
    not there."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    trained = config.get("tune_mm_mlp_adapter") is True
    names = (*adapter.low_rank, *adapter.whole)
    if trained and not any(name.startswith(PROJECTOR.rstrip(".")) for name in names):
        raise CheckpointError(
            f"{folder} lacks the projector, which was trained with it (tune_mm_mlp_adapter in its "
            f"config.json): put LLaVA's {adapters.WHOLE}.bin or mm_projector.bin into the folder."
        )


def marks_of(weights: Weights, config: FastVLMConfig) -> dict[str, str]:
    """By what an adapter knows its base again, at any precision."""
    mark = weights[MARK].astype(mx.float32)
    values = cast("list[float]", mark[:: max(1, mark.size // MARKS)].tolist())
    geometry = {name: str(getattr(config.text, name)) for name in GEOMETRY}
    folded = {FOLDED: "true"} if is_folded(weights) else {}
    return geometry | folded | {"marks": " ".join(f"{value:.5g}" for value in values)}


def check_base(
    adapter: Adapter, weights: Weights, config: FastVLMConfig, name: Path, base: Path
) -> None:
    """Raise a CheckpointError if an adapter says that it was trained on another model.

    Args:
        adapter: those of other trainers say nothing.
        weights, config: of the base.
        name, base: the folders, for the message.
    """
    own, about = marks_of(weights, config), adapter.about
    trained_on = f"{name} was trained on {brief(about.get('base') or 'another model')}"
    for key in GEOMETRY:
        if key in about and about[key] != own[key]:
            raise CheckpointError(
                f"{trained_on}, whose {key} is {brief(about[key])}; that of {base} is {own[key]}."
            )
    wanted, found = (_numbers(each.get("marks", "")) for each in (about, own))
    if wanted and len(wanted) == len(found):
        off = sum(abs(a - b) for a, b in zip(wanted, found, strict=True))
        if off > SAME * sum(map(abs, wanted)):
            raise CheckpointError(
                f"{trained_on}, and {base} is another model: its weights differ by "
                f"{off / max(1e-9, sum(map(abs, wanted))):.0%}."
            )


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split()]
    except ValueError:
        return []


def with_mark(config: FastVLMConfig, own: FastVLMConfig, name: Path, base: Path) -> FastVLMConfig:
    """A configuration that says which adapter the weights hold, for config.json.

    Args:
        config: of the result.
        own: the base's.
        name, base: the folders of adapter and base.

    Raises:
        CheckpointError: the base holds the adapter already.
    """
    identity, held = adapters.identity_of(name), own.source.get(FUSED_ADAPTERS)
    fused = held if isinstance(held, list) else []
    if identity in fused:
        raise CheckpointError(
            f"{base} holds {name} already: it was fused with it, and a second time would be too "
            "much; load it without an adapter."
        )
    return replace(config, source=config.source | {FUSED_ADAPTERS: [*fused, identity]})


def apply(
    base: Weights, adapter: Adapter, config: FastVLMConfig
) -> tuple[Weights, dict[str, LowRank]]:
    """A base with an adapter.

    Args:
        base: in the mlx-vlm layout; left as it is.
        adapter: what was trained on top of it.
        config: the base's.

    Returns:
        The tensors with what could be merged, which is all that is not quantized; and the LoRA of
        quantized layers, by layer, which stays beside them.

    Raises:
        CheckpointError: a part fits no layer of the base.
    """
    weights = dict(base)
    packed = dict(quantized_linears(weights, config))
    adapter = encoder_layers.fitted(adapter, config.vision, is_folded=is_folded(base))
    if UNTIED in adapter.about and f"{LM_HEAD}weight" not in base:
        raise CheckpointError(
            f"{adapters.SETTINGS} has embed_tokens in modules_to_save without ensure_weight_tying, "
            "so that the output layer did not change with it, and in this base both are one table "
            "(tied); merge the adapter with peft (merge_and_unload) and convert the result."
        )
    for name, tensor in adapter.whole.items():
        layer = name.removesuffix(".weight")
        shape = _shape(weights, layer, packed) if layer in packed else _shape_of(weights, name)
        _check_there(layer, shape)
        if shape != tensor.shape:
            raise CheckpointError(f"The adapter's {brief(name)} fits no layer of the base model.")
        for key in ("scales", "biases") if layer in packed else ():
            weights.pop(f"{layer}.{key}", None)
        weights[name] = tensor
    beside = {}
    for layer, low_rank in adapter.low_rank.items():
        _check_fits(layer, low_rank, _shape(weights, layer, packed))
        if f"{layer}.scales" in weights:
            beside[layer] = low_rank
            continue
        weight = weights[f"{layer}.weight"]
        weights[f"{layer}.weight"] = low_rank.added_to(weight).astype(weight.dtype)
    return weights, beside


def _shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    return weights[name].shape if name in weights else ()


def _shape(weights: Weights, layer: str, packed: Mapping[str, LayerSettings]) -> tuple[int, ...]:
    """(outputs, …, inputs) of a layer, quantized or not; nothing if there is none."""
    shape = _shape_of(weights, f"{layer}.weight")
    if f"{layer}.scales" in weights and layer in packed:
        return (*shape[:-1], shape[-1] * 32 // packed[layer]["bits"])
    return shape


def _check_there(layer: str, shape: tuple[int, ...]) -> None:
    """Raise a CheckpointError if an adapter would untie the output layer from the embeddings."""
    if layer == LM_HEAD.rstrip(".") and not shape:
        raise CheckpointError(
            f"The adapter changes {layer}, which this base does not have: its output layer is the "
            "table of embeddings (tied), and stays so."
        )


def _check_fits(layer: str, low_rank: LowRank, shape: tuple[int, ...]) -> None:
    """Raise a CheckpointError unless the matrices are those of a layer of this shape."""
    down, up = low_rank.down, low_rank.up
    name = brief(layer)
    _check_there(layer, shape)
    if not shape or (len(shape) > 2 and shape[1:-1] != (1, 1)):
        raise CheckpointError(f"The adapter's {name} fits no layer of the base model.")
    rank = down.shape[0] if down.ndim else 0
    if (up.shape, down.shape) != ((shape[0], rank), (rank, shape[-1])):
        raise CheckpointError(
            f"The adapter's {name}.lora_A is {down.shape} and its lora_B {up.shape}, "
            f"which does not fit the base's {shape}."
        )
    magnitude = low_rank.magnitude
    if magnitude is not None and magnitude.shape != shape[:1]:
        raise CheckpointError(
            f"The adapter's {name}.{adapters.MAGNITUDE} is {magnitude.shape}, "
            f"which does not fit the base's {shape}."
        )


def attach(
    model: FastVLM, beside: Mapping[str, LowRank], weights: Weights, dtype: mx.Dtype
) -> None:
    """Put LoRA beside the quantized layers of a model, in place.

    The parts of a fused layer get one product together: their A one under the other, their B on
    the diagonal of blocks.

    Args:
        model: as it runs; its layers are filled.
        beside: as `apply` gives it.
        weights: of the base, in the mlx-vlm layout; DoRA's lengths are those of its rows.
        dtype: of the products.
    """
    modules = dict(model.named_modules())
    config = model.config
    places: dict[str, list[tuple[int, LowRank, mx.array | None]]] = {}
    for layer, low_rank in beside.items():
        path, first = memory_name(layer, config, modules)
        ratio = None
        if low_rank.magnitude is not None:
            ratio = low_rank.ratio(dequantized(layer, weights, config))
        places.setdefault(path, []).append((first, low_rank, ratio))
    for path, parts in places.items():
        outputs = len(modules[path].weight)
        down = mx.concatenate([each.down.astype(mx.float32) for _, each, _ in parts])
        blocks, ratio = [], mx.ones(outputs)
        for first, each, own in parts:
            up = each.scale * each.up.astype(mx.float32)
            last = first + len(up)
            blocks.append(mx.pad(up, [(first, outputs - last), (0, 0)]))
            if own is not None:
                ratio[first:last] = own
        up = mx.concatenate(blocks, axis=1)
        uses_dora = any(own is not None for _, _, own in parts)
        adapted = ops.AdaptedLinear(
            modules[path],
            down.T.astype(dtype),
            up.T.astype(dtype),
            ratio.astype(dtype) if uses_dora else None,
        )
        model.update_modules(tree_unflatten([(path, adapted)]))


def dequantized(layer: str, weights: Weights, config: FastVLMConfig) -> mx.array:
    """The weight of a quantized layer in float32, [outputs, inputs]."""
    settings = dict(quantized_linears(weights, config))[layer]
    keys = ("weight", "scales", "biases")
    return unpacked(
        [weights[f"{layer}.{key}"] for key in keys if f"{layer}.{key}" in weights], settings
    )


def unpacked(tensors: Sequence[mx.array], settings: LayerSettings) -> mx.array:
    """As `dequantized`, of a layer's tensors; at half precision it would be rounded once more than
    in a quantized product."""
    packed, scales, *biases = (
        t.astype(mx.float32) if mx.issubdtype(t.dtype, mx.floating) else t for t in tensors
    )
    weight = mx.dequantize(packed, scales, biases[0] if biases else None, **settings)
    return weight.astype(mx.float32)
