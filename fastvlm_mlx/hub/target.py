"""The folder that a download writes: free beforehand, and there only when it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checks import is_empty


def check_free(target: Path) -> None:
    """FileExistsError if a folder to be written exists, unless it is empty but for litter."""
    if target.exists() and not (target.is_dir() and is_empty(target)):
        raise FileExistsError(f"{target} exists already; remove it or choose another folder.")


def put_in_place(folder: Path, target: Path) -> None:
    """Give a folder the name of a target, which `check_free` has found free."""
    check_free(target)  # much may have happened meanwhile
    if target.is_dir():  # with litter, over which no folder can be moved
        shutil.rmtree(target)
    folder.replace(target)
