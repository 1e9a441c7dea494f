"""What tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import mlx.core as mx

from .fastvlm import FastVLM


def fingerprint(model: FastVLM) -> str:
    """A hash of a model: its geometry, and some values of every tensor."""
    import numpy as np
    from mlx.utils import tree_flatten

    found = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    tensors: list[tuple[str, mx.array]] = sorted(cast(Any, tree_flatten(model.parameters())))
    samples = [tensor.reshape(-1)[:: max(1, tensor.size // 64)] for _, tensor in tensors]
    samples = [each.astype(mx.float32) if each.dtype == mx.bfloat16 else each for each in samples]
    mx.eval(samples)
    for (name, tensor), sample in zip(tensors, samples, strict=True):
        found.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        found.update(np.asarray(sample).tobytes())
    return found.hexdigest()
