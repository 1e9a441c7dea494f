"""Files of a folder ↔ tensors by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast

import mlx.core as mx

from ..config import CheckpointError, read_json

Weights: TypeAlias = dict[str, mx.array]
"""Tensors by name."""

MAX_NAMED = 10  # in an error
MAX_SHARD_BYTES = 5 * 10**9


def read_tensors(folder: Path) -> Weights:
    """The tensors in a folder's files under the names that they have there, read when needed.

    Reads safetensors (one file, or shards with an index) or, if there are none, PyTorch's `.bin` or
    `.pth`, which takes the optional torch.

    Raises:
        CheckpointError: there are no weights, the index names a shard that is missing, or a file is
            broken.
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
    """The files that hold the weights of a folder; errors as `read_tensors`."""
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
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


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
        OSError: a file can't be written.
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
        except RuntimeError as error:  # as MLX reports a full disk
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
    """Write a value as indented JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
