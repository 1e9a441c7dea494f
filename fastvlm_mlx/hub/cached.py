"""Which models are on this disk: the published ones, and those in the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import MODEL_TYPES, TRANSFORMERS_TYPE, CheckpointError, read_json
from .registry import Entry
from .resolve import cache_folder

INDEX = "model.safetensors.index.json"


def cached(entry: Entry) -> Path | None:
    """The folder of a published model, if it was downloaded whole; nothing is fetched."""
    if not entry.on_hub:
        folder = cache_folder() / entry.name
        return folder if folder.is_dir() else None
    return _newest_snapshot(_hub_cache() / f"models--{entry.name.replace('/', '--')}")


def names_in_cache() -> list[str]:
    """The Hub ids of the FastVLM models in the Hub's cache."""
    names = []
    for storage in sorted(_hub_cache().glob("models--*--*")):
        folder = _newest_snapshot(storage)
        if folder is not None and _is_fastvlm(folder):
            names.append("/".join(storage.name.split("--", 2)[1:]))
    return names


def size_on_disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _newest_snapshot(storage: Path) -> Path | None:
    """The newest whole model among the snapshots of a repository."""
    whole = [folder for folder in (storage / "snapshots").glob("*") if _is_whole(folder)]
    return max(whole, key=os.path.getmtime, default=None)


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a config.json and every file of weights that it should have."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / INDEX).is_file():
        try:
            files = set(read_json(folder / INDEX)["weight_map"].values())
        except (CheckpointError, KeyError, AttributeError, TypeError):
            return False
        return all((folder / str(file)).is_file() for file in files)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")]
    return bool(weights) and all(file.is_file() for file in weights)


def _is_fastvlm(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") in (
            *MODEL_TYPES,
            TRANSFORMERS_TYPE,
        )
    except (CheckpointError, OSError):
        return False
