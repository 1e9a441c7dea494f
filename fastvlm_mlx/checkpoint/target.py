"""The folder that a conversion writes: checked beforehand, and there only when it is whole."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checks import is_empty, is_litter
from ..config import MODEL_TYPES, TRANSFORMERS_TYPE, CheckpointError, read_json
from .layouts import adapters
from .layouts.coreml.program import PACKAGE
from .processor_files import COPIED
from .record import PLOT, TRAINING

CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
WRITTEN = {*COPIED, CONFIG, PACKAGE, "README.md", "model.safetensors.index.json"}
WRITTEN |= {"preprocessor_config.json", "processor_config.json"}
ADAPTERS = {adapters.ADAPTER[0], *adapters.TRAINED}
WRITTEN |= {*ADAPTERS, adapters.SETTINGS, PLOT, TRAINING}
NEW, OLD = ".converting", ".replaced"  # ends of the names of temporary folders
SWAP, HERE = 2, -100  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS; AT_FDCWD


def check_apart(target: Path, source: str | os.PathLike[str]) -> None:
    """Raise a ValueError if writing the target would replace the source."""
    folder = Path(source).expanduser()
    if not (folder.is_dir() and target.exists()):
        return
    if folder.resolve() == target.resolve():
        raise ValueError(f"{target} is both the source and the target; choose another target.")
    if folder.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} holds the source {folder}; choose another target.")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise an error unless a folder can be written and nothing but a converted model is lost.

    An empty folder is taken; one with a converted model only if `overwrite` is set.

    Raises:
        FileExistsError: the target is a file, holds something else, or holds a model and
            `overwrite` is not set.
        NotADirectoryError: it would lie in a file.
        PermissionError: it may not be written.
        OSError: it is a mount point.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file.")
    if target.is_mount():
        raise OSError(f"{target} is a mount point and can't be replaced; name a folder in it.")
    if target.is_dir() and (problem := _irreplaceable(target)):
        raise FileExistsError(f"{target} {problem}, so it is not replaced; choose another target.")
    if target.is_dir() and not overwrite and not is_empty(target):
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it.")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{target} can't be written: {parent} is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} can't be written: you may not write to {parent}.")


def _irreplaceable(folder: Path) -> str | None:
    """What a folder has or lacks unlike what `convert` writes; None if it may be replaced."""
    names = sorted(path.name for path in folder.iterdir() if not is_litter(path.name))
    foreign = [name for name in names if not _is_written(folder / name)]
    if foreign:
        return f"holds {foreign[0]}, which is no part of a converted model"
    if ADAPTERS & set(names):
        return None
    if names and not (CONFIG in names and any(map(WEIGHTS.fullmatch, names))):
        return f"holds {names[0]} but no whole model"
    if names and not _is_fastvlm(folder):
        return f"holds a {CONFIG} that is not a FastVLM's"
    return None


def _is_written(path: Path) -> bool:
    """Whether a file or folder is one of those that `convert` writes."""
    name = path.name
    known = name in WRITTEN or WEIGHTS.fullmatch(name) or name.startswith("LICENSE")
    return bool(known) and path.is_dir() == (name == PACKAGE)


def _is_fastvlm(folder: Path) -> bool:
    try:
        model_type = read_json(folder / CONFIG).get("model_type")
    except CheckpointError:
        return False
    return model_type in (*MODEL_TYPES, TRANSFORMERS_TYPE)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and otherwise disappears.

    Where the system can swap two folders, there is no moment without the old one or the new one.
    What a process that was killed has left beside the target is removed.

    Raises:
        OSError: as `check_target`.
    """
    import tempfile

    target = target.resolve()
    if target.parent.is_dir():
        _tidy(target)
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(NEW, f".{target.name}.", target.parent))
    lock = _lock(temporary)
    try:
        yield temporary
        temporary.chmod(0o755)
        check_target(target, overwrite=overwrite)  # much may have happened meanwhile
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _put_in_place(new: Path, target: Path) -> None:
    """Give a folder the target's name, and remove the target of before."""
    inside = target.exists() and target.samefile(".")
    if not target.exists():
        new.rename(target)
    elif not _swap(new, target):
        old = target.rename(new.with_suffix(OLD))
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    if inside:  # relative paths mean the new folder
        os.chdir(target)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False if the system or the file system can't."""
    import ctypes

    paths = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return library.renamex_np(*paths, SWAP) == 0
        return library.renameat2(HERE, paths[0], HERE, paths[1], SWAP) == 0
    except (AttributeError, OSError, TypeError):  # there is no such function
        return False


def _tidy(target: Path) -> None:
    """Remove the temporary folders of processes that were killed while they wrote the target."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}({NEW}|{OLD})")
    folders = sorted(path for path in target.parent.iterdir() if ours.fullmatch(path.name))
    for folder in folders:
        if folder.suffix == NEW and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    for folder in folders:
        if folder.suffix == OLD and not folder.with_suffix(NEW).exists():
            if target.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:  # killed between the two steps of a replacement
                folder.rename(target)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or this process ends; None if that can't be."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor
