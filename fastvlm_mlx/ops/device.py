"""Where arrays are computed; everything that depends on it asks here."""

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
    """Build graphs in the form for another device ("cpu", "metal" or "cuda"), to count or test."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
