"""Whether this process can compute: one that was forked from a process that did can't."""

from __future__ import annotations

import os

_computed = False  # a model was loaded, and so MLX has threads, which a fork does not copy
_forked = False


def note_computation() -> None:
    """From here on a fork of this process can't compute."""
    global _computed
    _computed = True


def _after_fork() -> None:
    global _forked
    _forked = _computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_process() -> None:
    """RuntimeError in a forked process, where MLX would wait for ever."""
    if _forked:
        raise RuntimeError(
            "MLX can't compute in a process that was forked after a model was loaded; "
            'start processes with multiprocessing.get_context("spawn").'
        )
