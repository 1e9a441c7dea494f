"""A folder in any known layout → tensors in the mlx-vlm layout, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import mlx.core as mx

from ..config import CheckpointError, FastVLMConfig, load_config
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from . import fold
from .adapt import apply, check_base, read_adapter, with_mark
from .files import MAX_NAMED, Weights, read_tensors
from .layouts import adapters, apple_export, llava, mlx_vlm, transformers
from .layouts.adapters import LowRank
from .layouts.mlx_vlm import HEAD, LM_HEAD, is_folded
from .names import quantized_linears, unfuse
from .quantize import LayerSettings

LAYOUTS: tuple[ModuleType, ...] = (mlx_vlm, llava, transformers, apple_export)


def read_checkpoint(folder: Path) -> tuple[FastVLMConfig, Weights]:
    """The configuration and the tensors of a folder, in the mlx-vlm layout, checked.

    Raises:
        CheckpointError: a file, a field or a tensor is missing, surplus or wrong; or the folder is
            an adapter of a quantized model, which stays beside its weights.
    """
    config, weights, beside = read_adapted(folder)
    if beside:
        raise CheckpointError(
            f"{folder} is an adapter of a quantized model; `fastvlm fuse` writes both as one."
        )
    return config, weights


Change: TypeAlias = Callable[[FastVLMConfig, Weights], tuple[FastVLMConfig, Weights]]
"""Of a checkpoint, between reading and filling a model."""


def read_adapted(
    folder: Path, adapter: Path | None = None, change: Change | None = None
) -> tuple[FastVLMConfig, Weights, dict[str, LowRank]]:
    """As `read_checkpoint`, with an adapter on top, and the LoRA of layers that are quantized.

    Args:
        folder: of the base, or of an adapter that names its base.
        adapter: on top of a base.
        change: quantizes the base, before the adapter comes to it.

    Raises:
        CheckpointError: as `read_checkpoint`; or the adapter is that of another model.
    """
    base, config = folder, None
    if adapter is None and adapters.is_adapter(folder):
        name, revision = adapters.base_of(folder)
        base, adapter = resolve(name, revision=revision), folder
        config = load_config(folder) if (folder / "config.json").is_file() else None
    if adapter is not None and not adapters.is_adapter(adapter):
        raise adapters.no_adapter(adapter)
    own, weights, layout = _read_base(base, adapter)
    config = own if config is None else replace(config, quantization=own.quantization)
    config = trust_tensors(config, weights)
    if change is not None:
        check_tensors(weights, trust_tensors(own, weights), layout, base)
        config, weights = change(config, weights)
    beside: dict[str, LowRank] = {}
    if adapter is not None:
        read = read_adapter(adapter)
        check_base(read, weights, own, adapter, base)
        config = with_mark(config, own, adapter, base)
        weights, beside = apply(weights, read, config)
    check_tensors(weights, config, layout, folder)
    return config, weights, beside


def _read_base(base: Path, adapter: Path | None) -> tuple[FastVLMConfig, Weights, ModuleType]:
    """A base as `read_layout` reads it, with its configuration; it may be an adapter of its own."""
    if not adapters.is_adapter(base):
        return load_config(base), *read_layout(base)
    if adapter is not None and base.resolve() == adapter.resolve():
        raise CheckpointError(f"{base} is an adapter and names itself as its base.")
    return *read_checkpoint(base), mlx_vlm


def read_layout(folder: Path) -> tuple[Weights, ModuleType]:
    """The tensors of a folder in the names of the mlx-vlm layout, and the layout they came in.

    Parallel branches become one convolution each. Tensors are read only when they are computed
    with.

    Raises:
        CheckpointError: there are no weights, a file is broken, or the layout is unknown.
    """
    weights, layout = _read_as_stored(folder)
    if fold.is_training_form(weights):
        try:
            weights = fold.reparameterize(weights)
        except fold.BranchError as error:
            name = _name_in_files(error.name, weights, layout)
            raise CheckpointError(f"{folder}: {name} {error.problem}.") from None
    return weights, layout


def read_branches(folder: Path) -> Weights:
    """The tensors of an encoder in training form, in the names of the mlx-vlm layout, without
    those of the rest of the model.

    Raises:
        CheckpointError: as `read_layout`, or the encoder is in inference form.
    """
    weights, _ = _read_as_stored(folder)
    encoder = {name: value for name, value in weights.items() if name.startswith(mlx_vlm.ENCODER)}
    if not fold.is_training_form(encoder):
        raise CheckpointError(
            f"{folder} has an encoder in inference form, without the parallel branches and "
            "BatchNorms of training; train it as it is."
        )
    return {name.removeprefix(mlx_vlm.ENCODER): t for name, t in encoder.items() if name != HEAD}


def _read_as_stored(folder: Path) -> tuple[Weights, ModuleType]:
    """As `read_layout`, with parallel branches."""
    tensors = read_tensors(folder)
    layout = next((layout for layout in LAYOUTS if layout.matches(set(tensors))), None)
    if layout is None:
        found = ", ".join(sorted(tensors)[:3])
        raise CheckpointError(
            f"{folder} holds tensors of an unknown layout ({found}, …); supported are those of the "
            "original PyTorch code (model.vision_tower.vision_tower.…), of transformers "
            "(model.vision_tower.timm_model.…), of the MLX community (vision_tower.…) and of the "
            "Apple silicon export (multi_modal_projector.… beside an .mlpackage)."
        )
    weights = layout.to_mlx(tensors)
    if layout is apple_export:
        weights |= apple_export.read_encoder(folder, load_config(folder).vision)
    return weights, layout


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder has the layout of transformers, whose modules have other names."""
    return not adapters.is_adapter(folder) and transformers.matches(set(read_tensors(folder)))


def _name_in_files(name: str, weights: Weights, layout: ModuleType) -> str:
    """What a layout's files call a tensor of the mlx-vlm layout."""
    others = {key: tensor for key, tensor in weights.items() if key != name}
    names = layout.from_mlx(others | {name: mx.zeros(1)}).keys() - layout.from_mlx(others).keys()
    return next((found for found in names if not llava.UNUSED.match(found)), name)


def trust_tensors(config: FastVLMConfig, weights: Weights) -> FastVLMConfig:
    """A configuration whose output layer is tied exactly if the checkpoint has no tensor for it:
    some config.json are wrong about that."""
    tied = f"{LM_HEAD}weight" not in weights
    return replace(config, text=replace(config.text, tie_word_embeddings=tied))


def check_tensors(
    weights: Weights, config: FastVLMConfig, layout: ModuleType, folder: Path
) -> None:
    """Compare a checkpoint with what the model needs; a missing head is filled in.

    Args:
        weights: in the mlx-vlm layout.
        config: of the model.
        layout: of the files, whose names an error uses.
        folder: named in an error.

    Raises:
        CheckpointError: naming up to ten missing, surplus and misshapen tensors.
    """
    shapes = _expected_shapes(weights, config)
    integers = _misplaced_integers(weights, shapes)
    if not integers and shapes == {name: tensor.shape for name, tensor in weights.items()}:
        return
    wanted = layout.from_mlx({name: mx.zeros(shape) for name, shape in shapes.items()})
    found = layout.from_mlx(weights)
    problems = [
        *(f"{n} {wanted[n].shape} is missing" for n in wanted if n not in found),
        *(f"{n} {found[n].shape} is surplus" for n in found if n not in wanted),
        *(
            f"{n} is {found[n].shape} where {tensor.shape} is expected"
            for n, tensor in wanted.items()
            if n in found and found[n].shape != tensor.shape
        ),
        *(f"{_name_in_files(n, weights, layout)} holds integers" for n in integers),
    ]
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    raise CheckpointError(
        f"{folder} does not fit its config.json: {'; '.join(problems[:MAX_NAMED])}{more}."
    )


def _expected_shapes(weights: Weights, config: FastVLMConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the model needs, packed where the checkpoint's are."""
    expected = unfuse(FastVLM(config), folded=is_folded(weights))
    if HEAD in expected:
        weights.setdefault(HEAD, expected[HEAD])
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    for linear, settings in quantized_linears(weights, config):
        shapes |= _packed_shapes(linear, shapes, settings)
    return shapes


def _misplaced_integers(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The tensors of integers that are not packed weights."""
    packed = {name for name in shapes if f"{name.rpartition('.')[0]}.scales" in shapes}
    return [
        name
        for name, tensor in weights.items()
        if name in shapes and name not in packed and not mx.issubdtype(tensor.dtype, mx.floating)
    ]


def _packed_shapes(
    linear: str, shapes: dict[str, tuple[int, ...]], settings: LayerSettings
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a linear layer is packed in; none if it isn't one."""
    shape = shapes.get(f"{linear}.weight", ())
    if len(shape) != 2:
        return {}
    rows, columns = shape
    groups = (rows, columns // settings["group_size"])
    packed = {
        f"{linear}.weight": (rows, columns * settings["bits"] // 32),
        f"{linear}.scales": groups,
    }
    return packed | ({f"{linear}.biases": groups} if settings["mode"] == "affine" else {})
