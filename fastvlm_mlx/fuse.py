"""A base and an adapter → one model in any layout; quantized weights are packed anew, measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .checkpoint import fold
from .checkpoint.adapt import dequantized, unpacked
from .checkpoint.card import license_of, model_card
from .checkpoint.files import Weights
from .checkpoint.layouts.adapters import LowRank, base_of, is_adapter, no_adapter
from .checkpoint.layouts.mlx_vlm import ENCODER, HEAD, VISION_TOWER, dtype_of, is_folded
from .checkpoint.load import load_model, load_processor, processor_folder
from .checkpoint.names import memory_name, quantized_linears
from .checkpoint.quantize import BITS, LayerSettings, Quantize
from .checkpoint.read import read_adapted
from .checkpoint.record import read_record, write_record
from .checkpoint.target import atomic_folder, check_apart, check_target
from .config import FastVLMConfig
from .convert import check_exporter, check_options, prepare, write
from .evaluate.questions import DEFAULT_QUESTION
from .evaluate.samples import SAMPLES, sample_outputs, token_agreement
from .generation.inputs import read_inputs
from .generation.options import Options
from .hub.resolve import resolve
from .model.fastvlm import FastVLM
from .progress import progress_bar

AGREEMENT = 0.99  # of a layer's outputs, below which it is kept wider
MOST_ROWS = 512  # of a layer's inputs, on which that is measured


@dataclass(frozen=True)
class FusedLayer:
    """A quantized layer that was packed anew.

    Attributes:
        name: in the mlx-vlm layout.
        agreement: cosine of its outputs and those of the unfused layer, on sample images.
        bits: it has now; None in float.
        before: agreement at the bits that it had, if that was too low.
    """

    name: str
    agreement: float
    bits: int | None
    before: float | None = None


@dataclass(frozen=True)
class Fused:
    """What `fuse` did.

    Attributes:
        folder: that it wrote.
        layers: the quantized layers that were packed anew; none if the base is in float.
        same_tokens: share of the unfused model's answers to sample images that is the same, token
            by token; None if nothing was packed anew.
    """

    folder: Path
    layers: tuple[FusedLayer, ...] = ()
    same_tokens: float | None = None

    @property
    def wider(self) -> list[FusedLayer]:
        """The layers that have more bits than before, since fewer would lose too much."""
        return [layer for layer in self.layers if layer.before is not None]


def fuse(
    base: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    layout: str = "mlx",
    dtype: str | None = None,
    quantize: Quantize | None = None,
    dequantize: bool = False,
    precision: str = "float32",
    overwrite: bool = False,
    progress: bool = True,
) -> Fused:
    """Write a base with an adapter merged into it as one model.

    Quantized layers with LoRA are expanded, merged and packed anew in the bits that they had. Where
    the outputs then agree to less than 99 % with those of the unfused layer, on sample images, the
    layer gets more bits.

    Args:
        base: folder or Hub id, as `load` takes it.
        adapter: folder or Hub id of what was trained on top of it.
        target: the folder to write, which appears only when it is whole.
        revision: of the base on the Hub.
        layout, dtype, precision, overwrite, progress: as for `convert`.
        quantize: as for `convert`; the base must be in float, or expanded by `dequantize`.
        dequantize: expand the quantized weights of the base, as layouts other than mlx need.

    Raises:
        CheckpointError: the adapter is another model's, or was fused already.
        FileNotFoundError, FileExistsError, OSError, ValueError: as `convert`.
    """
    check_options(layout, dtype, quantize)
    target = Path(target).expanduser()
    sources = [base, adapter] if base is not None else [adapter]
    for source in sources:
        check_apart(target, source)
    check_target(target, overwrite=overwrite)
    folder, trained = resolve(base, revision=revision), resolve(adapter)
    for source in (folder, trained):
        check_apart(target, source)
    check_exporter(layout)
    config, weights, beside = read_adapted(folder, trained)
    layers: tuple[FusedLayer, ...] = ()
    if dequantize:
        config, weights = expanded(config, weights, beside)
    elif config.quantization and layout != "mlx":
        raise ValueError(
            f"{folder} is quantized, and its weights go only into the mlx layout: add dequantize "
            f"for {layout}."
        )
    elif beside:
        inputs = layer_inputs(folder, trained, config, beside, progress=progress)
        config, weights, layers = packed_anew(config, weights, beside, inputs, progress=progress)
    checkpoint = prepare(
        processor_folder(folder), config, weights, layout, dtype, quantize, shown=progress
    )
    record = read_record(trained)
    with atomic_folder(target, overwrite=overwrite) as temporary:
        card = model_card(
            target.name,
            folder.name if base is None else base,
            checkpoint.dtype_name,
            layers=dict(quantized_linears(checkpoint.weights, checkpoint.config)),
            license=license_of(checkpoint.folder, "" if base is None else base),
            is_trained=True,
            record=record,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_record(record, temporary)
        write(checkpoint, temporary, layout, precision, shown=progress)
    same = same_tokens(folder, trained, target) if layers else None
    return Fused(target, layers, same)


def base_named_by(adapter: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision; errors as `fuse`."""
    folder = resolve(adapter)
    if not is_adapter(folder):
        raise no_adapter(folder)
    return base_of(folder)


def expanded(
    config: FastVLMConfig, weights: Weights, beside: Mapping[str, LowRank]
) -> tuple[FastVLMConfig, Weights]:
    """A quantized model in float, with LoRA merged into its layers."""
    dtype, found = dtype_of(weights), dict(weights)
    for layer, _ in list(quantized_linears(weights, config)):
        weight = dequantized(layer, weights, config)
        if layer in beside:
            weight = beside[layer].added_to(weight)
        for key in ("scales", "biases"):
            found.pop(f"{layer}.{key}", None)
        found[f"{layer}.weight"] = weight.astype(dtype)
    if is_folded(found):
        encoder = fold.unfold_encoder(lambda name: found[VISION_TOWER + name], config.vision)
        found = {n: tensor for n, tensor in found.items() if not n.startswith(VISION_TOWER)}
        found |= {ENCODER + name: tensor.astype(dtype) for name, tensor in encoder.items()}
        found[HEAD] = mx.zeros((config.vision.hidden_size, config.vision.projection_dim), dtype)
    return replace(config, quantization={}), found


class Recorder(nn.Module):
    """A layer that keeps what it is given, some rows of each call."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._rows: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        self._rows.append(rows[:: max(1, len(rows) * len(SAMPLES) // MOST_ROWS)])
        return self.layer(x)

    @property
    def rows(self) -> mx.array:
        """[rows, inputs] in float32."""
        return mx.concatenate(self._rows).astype(mx.float32)


def layer_inputs(
    folder: Path,
    adapter: Path,
    config: FastVLMConfig,
    beside: Mapping[str, LowRank],
    *,
    progress: bool = True,
) -> dict[str, mx.array]:
    """What layers are given when the unfused model reads sample images, [rows, inputs] by layer."""
    model = load_model(folder, adapter=adapter)
    processor = load_processor(folder)
    modules = dict(model.named_modules())
    paths = {layer: memory_name(layer, config, modules)[0] for layer in beside}
    recorders = {path: Recorder(modules[path]) for path in paths.values()}
    model.update_modules(tree_unflatten(list(recorders.items())))
    with progress_bar(len(SAMPLES), "Measuring", shown=progress) as bar:
        for image in SAMPLES:
            inputs = read_inputs(model, processor, DEFAULT_QUESTION, image, Options())
            states = model.language_model.hidden_states(None, None, inputs.embeddings)
            mx.eval(states, [recorder._rows for recorder in recorders.values()])
            bar.update()
    return {layer: recorders[path].rows for layer, path in paths.items()}


def packed_anew(
    config: FastVLMConfig,
    weights: Weights,
    beside: Mapping[str, LowRank],
    inputs: Mapping[str, mx.array],
    *,
    progress: bool = True,
) -> tuple[FastVLMConfig, Weights, tuple[FusedLayer, ...]]:
    """Merge LoRA into quantized layers, each in the fewest bits that lose little.

    Args:
        config, weights: the model's; left as they are.
        beside: the LoRA of quantized layers.
        inputs: of each, as `layer_inputs` gives them.
        progress: show a bar.
    """
    settings, found = dict(quantized_linears(weights, config)), dict(weights)
    quantization, layers = dict(config.quantization), []
    with progress_bar(len(beside), "Fusing", shown=progress) as bar:
        for layer, low_rank in beside.items():
            weight = low_rank.added_to(dequantized(layer, weights, config))
            chosen, packed, agreements = _packed(weight, inputs[layer], settings[layer], weights)
            bits = None if chosen is None else chosen["bits"]
            before = agreements[0] if len(agreements) > 1 else None
            layers.append(FusedLayer(layer, agreements[-1], bits, before))
            for key in ("scales", "biases"):
                found.pop(f"{layer}.{key}", None)
            found |= {f"{layer}.{key}": tensor for key, tensor in packed.items()}
            if chosen is not None and chosen != settings[layer]:
                quantization[layer] = chosen
            bar.update()
    return replace(config, quantization=quantization), found, tuple(layers)


def _packed(
    weight: mx.array, x: mx.array, settings: LayerSettings, weights: Weights
) -> tuple[LayerSettings | None, dict[str, mx.array], list[float]]:
    """(settings, tensors, agreement at each number of bits that was tried) of a layer."""
    dtype, agreements, wanted = dtype_of(weights), [], x @ weight.T
    for chosen in _wider(settings):
        tensors = mx.quantize(weight.astype(dtype), **chosen)
        agreements.append(agreement(x @ unpacked(tensors, chosen).T, wanted))
        if agreements[-1] >= AGREEMENT:
            return (
                chosen,
                dict(zip(("weight", "scales", "biases"), tensors, strict=False)),
                agreements,
            )
    return None, {"weight": weight.astype(dtype)}, [*agreements, 1.0]


def _wider(settings: LayerSettings) -> Iterator[LayerSettings]:
    """A layer's settings, and then those with more bits."""
    yield settings
    affine = {"mode": "affine", "group_size": max(32, settings["group_size"])}
    for bits in BITS:
        if bits > settings["bits"]:
            yield affine | {"bits": bits}


def agreement(found: mx.array, wanted: mx.array) -> float:
    """The cosine of two layers' outputs, over all rows together."""
    lengths = mx.linalg.norm(found) * mx.linalg.norm(wanted)
    return float(mx.sum(found * wanted) / mx.maximum(lengths, 1e-12))


def same_tokens(folder: Path, adapter: Path, fused: Path) -> float:
    """How much of the unfused model's answers the fused one gives, token by token."""
    processor = load_processor(fused)

    def tokens(model: FastVLM) -> list[list[int]]:
        return sample_outputs(model, processor, SAMPLES).tokens

    return token_agreement(tokens(load_model(fused)), tokens(load_model(folder, adapter=adapter)))
