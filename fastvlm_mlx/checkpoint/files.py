"""Files of a folder ↔ tensors by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, TypeAlias, cast

import mlx.core as mx

from ..checks import brief, is_litter, reason
from ..config import CheckpointError, read_json

Weights: TypeAlias = dict[str, mx.array]
"""Tensors by name."""

MAX_NAMED = 10  # in an error
MAX_SHARD_BYTES = 5 * 10**9
MAX_EXPANDED = 10**9  # bytes of a tensor that repeats fewer numbers
NAN_SCALE = 255  # among scales of 8 bits, in e8m0 and in e4m3
SHARD = re.compile(r"(?P<model>.+)-\d+-of-(?P<count>\d{1,9})\.\w+")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put tensors


def read_tensors(folder: Path) -> Weights:
    """The tensors in a folder's files under the names that they have there, read when needed.

    Reads safetensors (one file, or shards with an index) or, if there are none, PyTorch's `.bin` or
    `.pth`, which takes the optional torch.

    Raises:
        CheckpointError: there are no weights, the files don't belong together, the index names a
            shard that is missing, or a file is broken.
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
    if not file.is_file():  # opening a pipe would wait for ever
        link = file.is_symlink() and not file.exists()
        what = "a link to a file that is missing" if link else "a folder, a pipe or a device"
        raise CheckpointError(f"{file} is {what} and holds no weights; download it again.")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder; errors as `read_tensors`.

    As in transformers, a single `model.safetensors` wins over shards with an index beside it.
    Several files without an index must be the shards of one model.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.exists() or whole.is_symlink():
            return [whole]
        if index.is_file():
            return _indexed(index)
        if files := _matching(folder, f"{stem}*{suffix}"):
            return files
    for pattern in ("*.safetensors", "*.pth"):
        if files := _matching(folder, pattern):
            return files
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, its index, or pytorch_model.bin."
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no weight_map.")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise CheckpointError(f"{index} names {brief(name)}, which is not in its folder.")
    missing = [brief(name) for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index} names {', '.join(missing[:MAX_NAMED])}, "
            "which is not in the folder; download it again."
        )
    return [index.parent / name for name in names]


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a pattern: none, one, or all shards of one model."""
    files = sorted(file for file in folder.glob(pattern) if not is_litter(file.name))
    models = [_model_of(file) for file in files]
    for file, model in zip(files, models, strict=True):
        if model != models[0]:
            raise CheckpointError(
                f"{folder} holds {files[0].name} and {file.name}, which are not shards of one "
                "model, and no index; leave only one model in the folder."
            )
    if files and len(files) != models[0][1]:
        raise CheckpointError(
            f"{folder} holds {len(files)} of the {models[0][1]} shards of {models[0][0]}; "
            "download it again."
        )
    return files


def _model_of(file: Path) -> tuple[str, int]:
    """The model that a file of weights belongs to, and the number of its files."""
    shard = SHARD.fullmatch(file.name)
    return (shard["model"], int(shard["count"])) if shard else (file.name, 1)


def _read_safetensors(file: Path) -> Weights:
    try:
        return cast(Weights, mx.load(str(file)))
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
    import zipfile

    mmap = zipfile.is_zipfile(file)  # files of before torch 1.6 are not
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{file} is not a PyTorch file of plain tensors ({reason(error)})."
        ) from None
    state = _state_dict(state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{file} must hold tensors by name, found {type(state).__name__}.")
    tensors: Weights = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            try:
                tensors[name] = _from_torch(tensor, torch)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{file}: {brief(name)} is no tensor that MLX can hold ({reason(error)})."
                ) from None
    return tensors


def _state_dict(state: Any) -> Any:
    """The tensors by name in what a training script saved, which may be an entry of an entry."""
    for _ in NESTED:
        if not isinstance(state, dict):
            break
        entries = [state[name] for name in NESTED if isinstance(state.get(name), dict)]
        state = entries[0] if entries else state
    return state


def _from_torch(tensor: Any, torch: ModuleType) -> mx.array:
    """A tensor of any kind that has plain numbers: a parameter, a view, a conjugate, …"""
    size = tensor.numel() * tensor.element_size()
    if size > max(MAX_EXPANDED, tensor.untyped_storage().nbytes()):
        raise ValueError(f"it repeats its numbers until they fill {size:,} bytes")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if plain.dtype == torch.bfloat16:  # numpy has no bfloat16
        return mx.array(plain.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(plain.numpy())


def save_checkpoint(
    weights: Weights,
    folder: Path,
    *,
    shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Write tensors as safetensors, in shards where one file would be too large, and an index.

    Args:
        weights: emptied as they are written, so that memory holds at most one shard.
        folder: exists.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        progress: called with the bytes of each tensor once it is computed.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        OSError: a file can't be written.
    """
    total = sum(tensor.nbytes for tensor in weights.values())
    shards = _shards(weights, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        several = len(shards) > 1
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        shard = {name: weights.pop(name) for name in names}
        for name, tensor in shard.items():
            mx.eval(tensor)
            check_finite(name, tensor)
            progress(tensor.nbytes)
        try:
            mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        except RuntimeError as error:  # as MLX reports a full disk
            raise OSError(f"{folder / file} can't be written: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def check_finite(name: str, tensor: mx.array) -> None:
    """Raise a CheckpointError if a tensor, or what was packed with these scales, is not finite."""
    if mx.issubdtype(tensor.dtype, mx.floating):
        finite = mx.all(mx.isfinite(tensor))
    elif name.endswith(".scales"):
        finite = mx.all(tensor != NAN_SCALE)
    else:
        return
    if not finite.item():
        dtype = str(tensor.dtype).removeprefix("mlx.core.")
        raise CheckpointError(
            f"{re.sub('scales$', 'weight', name)} holds NaN or infinity in {dtype}: the source "
            "does, or its numbers are too large for that; nothing is written."
        )


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
    """Write a value as indented JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
