"""What there is to say of a model: its family, size and precision."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..model.fastvlm import FastVLM
from ..ops import on_cpu


@dataclass(frozen=True)
class Facts:
    """What the interfaces say of a model.

    Attributes:
        family: of the decoder.
        parameters: how many numbers it has learned.
        precision: that of its weights, as in "4-bit" or "bfloat16".
        bytes: that they take.
        gpu_bytes: those of them that a GPU reads.
        digest: 64 hexadecimal digits that differ from those of other geometries.
    """

    family: str
    parameters: int
    precision: str
    bytes: int
    gpu_bytes: int
    digest: str

    @property
    def parameter_size(self) -> str:
        """As in "4.5M" or "0.6B"."""
        millions = self.parameters / 1e6
        return f"{millions / 1000:.1f}B" if millions >= 100 else f"{millions:.1f}M"


def facts_of(model: FastVLM) -> Facts:
    """The facts of a model, from its arrays and configuration; nothing is computed."""
    config = model.config
    flat: Any = tree_flatten(model.parameters())
    arrays: list[mx.array] = [array for _, array in flat]
    size = sum(array.nbytes for array in arrays)
    bits = config.quantization.get("bits")
    source = json.dumps(config.source, sort_keys=True, default=str)
    dtype = str(model.language_model.norm.weight.dtype).removeprefix("mlx.core.")
    return Facts(
        family=config.text.model_type,
        parameters=sum(_count(array, bits) for array in arrays),
        precision=f"{bits}-bit" if bits else dtype,
        bytes=size,
        gpu_bytes=0 if on_cpu() else size,
        digest=hashlib.sha256(source.encode()).hexdigest(),
    )


def _count(array: mx.array, bits: int | None) -> int:
    packed = array.dtype == mx.uint32 and bits
    return array.size * 32 // bits if packed and bits else array.size
