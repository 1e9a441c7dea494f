"""Where arrays are computed; whatever depends on it asks here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
T = TypeVar("T")

WORKING_SET = "max_recommended_working_set_size"  # of `mx.device_info`
CACHE_SHARE = 4  # of memory is a fourth part
FIRST_WITH_BFLOAT16 = 15  # the generation of M3
IMAGES_AT_ONCE = 8  # for an encoder on a GPU

_assumed: str | None = None
_exported = False


def on_cpu() -> bool:
    """Whether arrays are computed on the CPU."""
    return _assumed == "cpu" if _assumed else mx.default_device().type == mx.DeviceType.cpu


def on_metal() -> bool:
    """Whether arrays are computed by Metal kernels."""
    return _assumed == "metal" if _assumed else mx.metal.is_available() and not on_cpu()


@contextmanager
def assume(device: str) -> Iterator[None]:
    """Build graphs as for another device ("cpu", "metal" or "cuda"), to count or test them."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before


@contextmanager
def exported() -> Iterator[None]:
    """Build graphs that are exported to be read and never computed: MLX can't export gradients that
    are written by hand, in whose place something stands that holds as much memory."""
    global _exported
    before, _exported = _exported, True
    try:
        yield
    finally:
        _exported = before


def is_exported() -> bool:
    """Whether graphs are built to be read."""
    return _exported


def fast_dtype(stored: mx.Dtype, for_training: bool = False) -> mx.Dtype:
    """The dtype to compute in, for weights stored in another.

    float32 on the CPU, which is slow at half precision, and otherwise as stored; but float16, in
    which the original runs, for bfloat16 on M1 and M2, whose GPUs have no instructions for it. Not
    so for training: sums of gradients may exceed what float16 holds.
    """
    if on_cpu():
        return mx.float32
    if for_training:
        return stored
    return mx.float16 if stored == mx.bfloat16 and _lacks_bfloat16() else stored


def differentiates_by_layer(dtype: mx.Dtype) -> bool:
    """Whether gradients of many layers are best computed layer by layer, outside `mx.grad`."""
    return on_cpu() and dtype == mx.float32


def images_at_once() -> int:
    """How many images an encoder is given together, where nothing else says it: on the CPU one is
    as fast as several, which hold as many times the memory."""
    return 1 if on_cpu() else IMAGES_AT_ONCE


def _lacks_bfloat16() -> bool:
    """Whether this is a GPU of the generations of M1 ("applegpu_g13g") and M2 (g14) or before."""
    if not on_metal():
        return False
    generation = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return generation is not None and int(generation[1]) < FIRST_WITH_BFLOAT16


@contextmanager
def wired_memory() -> Iterator[None]:
    """On Metal, keep all arrays in memory meanwhile: otherwise the system may page them out.

    Blocks may overlap in any way, as those of generators and threads do: the first sets the limit,
    and the last sets back the one before it.
    """
    limit = mx.device_info().get(WORKING_SET) if on_metal() else None
    if limit is None:
        yield
        return
    stream = mx.default_stream(mx.default_device())
    _wired.enter(int(limit))
    try:
        yield
    finally:
        # What still runs may use what is to be released. A generator may be dropped in a thread
        # that doesn't have the stream.
        with suppress(RuntimeError):
            mx.synchronize(stream)
        _wired.leave()


def wired(generate: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """A generator function that runs within `wired_memory` until it ends or is dropped."""

    @wraps(generate)
    def run(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with wired_memory():
            yield from generate(*args, **kwargs)

    return run


class _Wired:
    """How many blocks of `wired_memory` there are, and the limit before the first."""

    def __init__(self) -> None:
        # Reentrant, since a generator may be dropped, and leave, wherever Python collects garbage.
        self.lock, self.blocks, self.before = RLock(), 0, 0

    def enter(self, limit: int) -> None:
        with self.lock:
            if self.blocks == 0:
                self.before = mx.set_wired_limit(limit)
            self.blocks += 1

    def leave(self) -> None:
        with self.lock:
            self.blocks -= 1
            if self.blocks == 0:
                mx.set_wired_limit(self.before)


_wired = _Wired()


def clear_large_cache() -> None:
    """Give back what MLX keeps of freed arrays, if that is a large part of the memory.

    Less is kept: the next image, turn or token needs arrays of the same sizes, and allocating
    them anew takes longer than computing many of them.
    """
    info = mx.device_info()
    memory = info.get(WORKING_SET) or info.get("memory_size") or info.get("total_memory")
    if memory is not None and mx.get_cache_memory() > int(memory) // CACHE_SHARE:
        mx.clear_cache()
