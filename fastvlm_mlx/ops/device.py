"""Where arrays are computed; whatever depends on it asks here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_assumed: str | None = None


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


def fast_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in, for weights stored in another: float32 on the CPU, which is slow at
    half precision, and otherwise as stored."""
    return mx.float32 if on_cpu() else stored


def wire_memory() -> None:
    """On Metal, keep weights in memory: otherwise the system may page them out between answers."""
    limit = mx.device_info().get("max_recommended_working_set_size") if on_metal() else None
    if limit is not None:
        mx.set_wired_limit(int(limit))
