"""A checkpoint folder ↔ a model.

On disk a model has the names and axes of the mlx-vlm layout; the modules of `convert` map other
layouts to it. In memory the encoder is folded and the decoder's projections are fused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import hub
from .config import CheckpointError, FastVLMConfig, load_config, read_json
from .convert import adapters, apple_export, fold, llava, mlx_vlm, transformers
from .convert.fold import Weights
from .model import FastVLM
from .ops import SideBySide, on_cpu, on_metal
from .ops import quantize as quantize_layers
from .prompt import Processor, Tokenizer
from .quantize import Quantize, Settings, layer_settings, quantize_checkpoint

LAYOUTS: tuple[ModuleType, ...] = (mlx_vlm, llava, transformers, apple_export)
VISION = "vision_tower.vision_model."
FOLDED = "vision_tower.stem."  # a folder with a quantized encoder has the names of `FastViTHD`
HEAD = f"{VISION}head.proj"
DECODER = "language_model.model."
LM_HEAD = "language_model.lm_head."
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
MAX_NAMED = 10
MAX_SHARD_BYTES = 5 * 10**9
READ_AT_ONCE = 10**8  # bytes; enough for parallel reads


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
) -> tuple[FastVLM, Processor]:
    """Load a model and what reads its images and prompts.

    Args:
        source: a folder or a Hub id (`apple/FastVLM-0.5B`), in any known layout, converted on the
            fly; the bundled nano model by default.
        revision: branch, tag or commit on the Hub.
        dtype, quantize: as `load_model`.

    Raises:
        FileNotFoundError: no such folder or repository.
        CheckpointError: not a whole FastVLM.
        OSError: the download failed.
    """
    folder = hub.resolve(source, revision=revision)
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

    Tensors are read when their place in the model is known, largest first.

    Args:
        folder: holds config.json and the weights.
        dtype: of the weights that are not quantized. By default the checkpoint's own, but float32
            where arrays are computed on the CPU, which is slow at half precision.
        quantize: bits a weight, a mode or preset by name, or a mapping; see `quantize.settings`.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file, a field or a tensor is missing, surplus or wrong.
        ValueError: `dtype` or `quantize` is not one that exists.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    config, weights = read_whole(folder)
    target = resolve_dtype(dtype, weights)
    if quantize is not None or target == mx.float32:
        weights = {name: cast(tensor, target) for name, tensor in weights.items()}
    if quantize is not None:
        weights, quantization, _ = quantize_checkpoint(weights, config, quantize)
        config = replace(config, quantization=quantization)
    model = FastVLM(config)
    quantize_like(model, weights)
    parameters = to_memory(weights, config)
    model.load_weights([(name, cast(value, target)) for name, value in parameters.items()])
    parameters.clear()
    _evaluate(model)
    model.eval()
    return model


def _evaluate(model: FastVLM) -> None:
    """Read and compute the parameters, the largest layers first: what a layer is made from then
    takes the room of those that are still to come."""
    layers = [
        [tensor for _, tensor in tree_flatten(layer.parameters())]
        for _, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    ]
    layers.sort(key=lambda tensors: sum(t.nbytes for t in tensors), reverse=True)
    waiting: list[mx.array] = []
    for tensors in layers:
        waiting += tensors
        if sum(t.nbytes for t in waiting) > READ_AT_ONCE:
            mx.eval(waiting)
            waiting.clear()
    mx.eval(model.parameters())
    limit = mx.device_info().get("max_recommended_working_set_size") if on_metal() else None
    if limit is not None:  # else the system may page weights out between two answers
        mx.set_wired_limit(int(limit))


def read_whole(folder: Path) -> tuple[FastVLMConfig, Weights]:
    """The configuration and the tensors of a folder, in the mlx-vlm layout, checked.

    Raises:
        CheckpointError: a file, a field or a tensor is missing, surplus or wrong.
    """
    base = hub.resolve(adapters.base_of(folder)) if adapters.is_adapter(folder) else folder
    config = load_config(folder if (folder / "config.json").is_file() else base)
    weights, layout = read_checkpoint(base)
    if base is not folder:
        weights = _with_trained_parts(weights, folder)
    config = trust_tensors(config, weights)
    check_tensors(weights, config, layout, folder)
    return config, weights


def read_checkpoint(folder: Path) -> tuple[Weights, ModuleType]:
    """The tensors of a folder in the names of the mlx-vlm layout, and the layout they came in.

    Training form is merged to inference form. Nothing is read from disk yet.

    Raises:
        CheckpointError: no weights, a broken file, or tensors of an unknown layout.
    """
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
    if fold.is_training_form(weights):
        try:
            weights = fold.merge_branches(weights)
        except fold.BranchError as error:
            name = _name_in_files(error.name, weights, layout)
            raise CheckpointError(f"{folder}: {name} {error.problem}.") from None
    return weights, layout


def _with_trained_parts(base: Weights, folder: Path) -> Weights:
    if any(name.endswith(".scales") for name in base):
        raise CheckpointError(f"{folder} needs its base in full precision, not a quantized one.")
    parts = [folder / name for name in (*adapters.ADAPTER, *adapters.TRAINED)]
    files = {file.name: read_file(file) for file in parts if file.is_file()}
    settings = folder / "adapter_config.json"
    return adapters.apply(base, files, read_json(settings) if settings.is_file() else {})


def _name_in_files(name: str, weights: Weights, layout: ModuleType) -> str:
    others = {key: tensor for key, tensor in weights.items() if key != name}
    names = layout.from_mlx(others | {name: mx.zeros(1)}).keys() - layout.from_mlx(others).keys()
    return next((found for found in names if not llava.UNUSED.match(found)), name)


def read_tensors(folder: Path) -> Weights:
    """The tensors in a folder's files, lazily, under the names they have there.

    Takes safetensors (one file or shards with an index); without any, PyTorch's `.bin` or `.pth`,
    which needs the optional torch.

    Raises:
        CheckpointError: no weights, a shard that the index names is missing, or a broken file.
    """
    files = weight_files(folder)
    tensors: Weights = {}
    for file in files:
        tensors |= read_file(file)
    if not tensors:
        raise CheckpointError(f"{folder} holds weight files without tensors.")
    return tensors


def read_file(file: Path) -> Weights:
    """The tensors of one safetensors or PyTorch file; errors as `read_tensors`."""
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder; see `read_tensors`."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index_name).is_file():
            shards = read_json(folder / index_name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{folder / index_name} has no weight_map.")
            files = [folder / name for name in sorted(set(map(str, shards.values())))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder / index_name} names {', '.join(missing[:MAX_NAMED])}, "
                    "which is not in the folder; download it again."
                )
            return files
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.pth"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, its index, or pytorch_model.bin."
    )


def _read_safetensors(file: Path) -> Weights:
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); download it again."
        ) from None


def _read_torch(file: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{file} is a PyTorch file and torch is not installed; "
            "pip install 'fastvlm-mlx[torch]' or use the safetensors checkpoint."
        ) from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} is not a PyTorch file of plain tensors ({reason})."
        ) from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{file} must hold tensors by name, found {type(state).__name__}.")
    try:
        return {
            name: _from_torch(tensor, torch)
            for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        }
    except TypeError as error:
        raise CheckpointError(
            f"{file} holds a tensor that MLX has no type for ({error})."
        ) from None


def _from_torch(tensor: Any, torch: ModuleType) -> mx.array:
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def trust_tensors(config: FastVLMConfig, weights: Weights) -> FastVLMConfig:
    """Correct what config.json says wrongly: an untied head is there exactly if its tensor is."""
    tied = f"{LM_HEAD}weight" not in weights
    return replace(config, text=replace(config.text, tie_word_embeddings=tied))


def check_tensors(
    weights: Weights, config: FastVLMConfig, layout: ModuleType, folder: Path
) -> None:
    """Compare a checkpoint with what the model needs, in the names that the files use.

    Raises:
        CheckpointError: naming up to ten missing, surplus and misshapen tensors.
    """
    expected = to_checkpoint(FastVLM(config), folded=is_folded(weights))
    if HEAD in expected:  # carried for other readers, never computed with
        weights.setdefault(HEAD, expected[HEAD])
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    for linear, settings in quantized_linears(weights, config):
        shapes |= _packed_shapes(linear, shapes, settings)
    packed = {name for name in shapes if f"{name.rpartition('.')[0]}.scales" in shapes}
    integers = [
        name
        for name, tensor in weights.items()
        if name in shapes and name not in packed and not mx.issubdtype(tensor.dtype, mx.floating)
    ]
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


def is_folded(weights: Weights) -> bool:
    """Whether a checkpoint holds the encoder in the names of `vision.FastViTHD`."""
    return any(name.startswith(FOLDED) for name in weights)


def quantized_linears(weights: Weights, config: FastVLMConfig) -> Iterator[tuple[str, Settings]]:
    """(name, settings) of each quantized layer of a checkpoint.

    Raises:
        CheckpointError: config.json has settings that do not exist.
    """
    base = {k: v for k, v in config.quantization.items() if k in ("group_size", "bits", "mode")}
    for name in weights:
        if name.endswith(".scales"):
            linear = name.removesuffix(".scales")
            own = config.quantization.get(linear)
            try:
                yield linear, layer_settings(own if isinstance(own, dict) else base)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"config.json, {linear}: {error}") from None


def _packed_shapes(
    linear: str, shapes: dict[str, tuple[int, ...]], settings: Settings
) -> dict[str, tuple[int, ...]]:
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


def to_memory(weights: Weights, config: FastVLMConfig) -> Weights:
    """A checkpoint in the mlx-vlm layout → the parameters of `FastVLM`; empties `weights`."""
    parameters: Weights = {}
    if not is_folded(weights):
        encoder = fold.fold_encoder(lambda name: weights.pop(VISION + name), config.vision)
        parameters = {f"vision_tower.{name}": value for name, value in encoder.items()}
    weights.pop(HEAD, None)
    for i in range(config.projector_depth):
        source = projector_name(config, i)
        for key in _keys_of(weights, source):
            parameters[f"mm_projector.layers.{i}.{key}"] = weights.pop(f"{source}.{key}")
    apart = _apart(weights, config)
    for i in range(config.text.num_hidden_layers):
        for whole, parts in FUSED.items():
            target = f"language_model.layers.{i}.{whole}"
            sources = [f"{DECODER}layers.{i}.{part}" for part in parts]
            if f"layers.{i}.{whole}" in apart:
                for n, source in enumerate(sources):
                    for key in _keys_of(weights, source):
                        parameters[f"{target}.layers.{n}.{key}"] = weights.pop(f"{source}.{key}")
            for key in _keys_of(weights, sources[0]):
                tensors = [weights.pop(f"{source}.{key}") for source in sources]
                parameters[f"{target}.{key}"] = mx.concatenate(tensors)
    for name in list(weights):
        parameters[name.replace(DECODER, "language_model.", 1)] = weights.pop(name)
    return parameters


def to_checkpoint(model: FastVLM, *, folded: bool = False) -> Weights:
    """The inverse of `to_memory`, with neutral BatchNorms, layer scales and head.

    Args:
        model: the model.
        folded: leave the encoder as it is in memory.
    """
    config = model.config
    parameters: Weights = dict(tree_flatten(model.parameters()))
    weights: Weights = {}
    if not folded:
        encoder = fold.unfold_encoder(
            lambda name: parameters[f"vision_tower.{name}"], config.vision
        )
        weights = {VISION + name: value for name, value in encoder.items()}
        weights[HEAD] = mx.zeros((config.vision.hidden_size, config.vision.projection_dim))
    for name, value in parameters.items():
        if name.startswith("mm_projector.layers."):
            _, _, i, key = name.split(".")
            weights[f"{projector_name(config, int(i))}.{key}"] = value
        elif name.startswith("language_model.") and not name.startswith(LM_HEAD):
            weights |= _split_fused(name.replace("language_model.", DECODER, 1), value, config)
        elif folded or not name.startswith("vision_tower."):
            weights[name] = value
    return weights


def _split_fused(name: str, value: mx.array, config: FastVLMConfig) -> Weights:
    rows = _fused_rows(config)
    for whole, parts in FUSED.items():
        if side := re.search(rf"\.{whole}\.layers\.(\d)\.", name):
            return {name.replace(side.group(), f".{parts[int(side.group(1))]}."): value}
        if f".{whole}." in name:
            ends = [sum(rows[whole][: i + 1]) for i in range(len(parts) - 1)]
            pieces = mx.split(value, ends)
            return {name.replace(whole, part): p for part, p in zip(parts, pieces, strict=True)}
    return {name: value}


def _fused_rows(config: FastVLMConfig) -> dict[str, list[int]]:
    """Outputs of each part of a fused layer."""
    text = config.text
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    return {
        "self_attn.qkv_proj": [n * text.head_dim for n in heads],
        "mlp.gate_up_proj": [text.intermediate_size] * 2,
    }


def projector_name(config: FastVLMConfig, layer: int) -> str:
    """The projector's layers are numbered as in the original's Sequential, GELUs counted."""
    linear = config.mm_projector_type == "linear"
    return "mm_projector" if linear else f"mm_projector.{2 * layer}"


def _keys_of(weights: Weights, module: str) -> list[str]:
    keys = ("weight", "bias", "scales", "biases")
    return [key for key in keys if f"{module}.{key}" in weights]


def _apart(weights: Weights, config: FastVLMConfig) -> set[str]:
    """The layers ("layers.0.mlp.gate_up_proj") whose parts stay apart: those of unlike precision,
    and on the CPU the large ones in float, which are not faster joined and take time to join."""
    settings = dict(quantized_linears(weights, config))
    apart = set()
    for i in range(config.text.num_hidden_layers):
        for whole, parts in FUSED.items():
            found = [settings.get(f"{DECODER}layers.{i}.{part}") for part in parts]
            large_float = whole == "mlp.gate_up_proj" and found[0] is None and on_cpu()
            if large_float or any(other != found[0] for other in found):
                apart.add(f"layers.{i}.{whole}")
    return apart


def quantize_like(model: FastVLM, weights: Weights) -> None:
    """Make those layers of the model quantized that are so in the checkpoint."""
    config = model.config
    settings = dict(quantized_linears(weights, config))
    for path in _apart(weights, config):
        _, i, block, whole = path.split(".")
        module = model.language_model.layers[int(i)][block]
        fused = module[whole]
        width = fused.weight.shape[1]
        rows = _fused_rows(config)[f"{block}.{whole}"]
        module[whole] = SideBySide([nn.Linear(width, n, bias="bias" in fused) for n in rows])

    if settings:
        quantize_layers(model, lambda path: settings.get(source_name(path, config)))


def source_name(path: str, config: FastVLMConfig) -> str:
    """A checkpoint's name of a layer in memory; the first part's of a fused one."""
    if path.startswith("mm_projector.layers."):
        return projector_name(config, int(path.rsplit(".", 1)[1]))
    if path.startswith(("vision_tower.", LM_HEAD[:-1])):
        return path
    path = path.replace("language_model.", DECODER, 1)
    for whole, parts in FUSED.items():
        before, found, side = path.partition(whole)
        if found:
            return before + parts[int(side.removeprefix(".layers.") or 0)]
    return path


def resolve_dtype(dtype: mx.Dtype | str | None, weights: Weights) -> mx.Dtype:
    """The dtype asked for; by default float32 on the CPU, elsewhere the checkpoint's own."""
    if dtype is None:
        return mx.float32 if on_cpu() else weights[f"{DECODER}norm.weight"].dtype
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, found {dtype!r}.")
    return found


def cast(value: mx.array, dtype: mx.Dtype) -> mx.array:
    """As `dtype`, but integers (packed weights) as they are."""
    return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value


def save_checkpoint(
    weights: Weights,
    folder: Path,
    *,
    shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Write tensors as safetensors, in shards with an index where one file would be too large.

    Args:
        weights: emptied as they are written, so that memory holds one shard at most.
        folder: exists.
        shard_bytes: of one file at most, unless one tensor is larger.
        progress: called with the bytes of each tensor once it is computed.
    """
    total = sum(tensor.nbytes for tensor in weights.values())
    shards = _shards(weights, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        several = len(shards) > 1
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        shard = {name: weights.pop(name) for name in names}
        for tensor in shard.values():
            mx.eval(tensor)
            progress(tensor.nbytes)
        try:
            mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        except RuntimeError as error:  # so MLX says that the disk is full
            raise OSError(f"{folder / file} can't be written: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: Weights, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_target(target: Path, source: Path) -> None:
    """ValueError if writing the target would replace the source."""
    if target.exists() and source.resolve() == target.resolve():
        raise ValueError(f"{target} is both the source and the target; choose another target.")
    if target.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} holds the source {source}; choose another target.")


@contextmanager
def folder_written_whole(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and else disappears.

    Raises:
        FileExistsError: `target` is there and `overwrite` is not set, or it is a file.
    """
    target = target.resolve()
    if target.exists() and (not overwrite or not target.is_dir()):
        hint = "is a file" if target.is_file() else "exists; pass --overwrite to replace it"
        raise FileExistsError(f"{target} {hint}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
