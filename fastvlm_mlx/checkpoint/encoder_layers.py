"""The linear layers of the encoder: in memory and, unfolded, in a checkpoint.

A folded layer's weight has its layer scale in it, and one that follows split convolutions has its
inputs in their order; what was trained on it is changed accordingly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from ..checks import brief
from ..config import CheckpointError, VisionConfig
from .files import Weights
from .fold import network_layers
from .layouts.adapters import FOLDED, Adapter, LowRank
from .layouts.mlx_vlm import ENCODER, VISION_TOWER


class Place(NamedTuple):
    """A linear layer of the encoder.

    Attributes:
        folded: its name in memory.
        name: in a checkpoint whose encoder is not folded, without `.weight`.
        scale: the tensor there that its rows are multiplied with, or "".
        ways: of the split convolution whose outputs it reads; 1 for others.
    """

    folded: str
    name: str
    scale: str = ""
    ways: int = 1


def places(config: VisionConfig) -> Iterator[Place]:
    """The linear layers of an encoder that can have LoRA."""
    for place in _places(config):
        scale = ENCODER + place.scale if place.scale else ""
        yield place._replace(
            folded=VISION_TOWER + place.folded, name=ENCODER + place.name, scale=scale
        )


def _places(config: VisionConfig) -> Iterator[Place]:
    yield Place("stem.pointwise", "patch_embed.blocks.2.reparam_conv")
    for i, layer in enumerate(network_layers(config)):
        here, name = f"network.{i}", layer.name
        if layer.kind == "downsample":
            yield Place(f"{here}.pointwise", f"{name}.proj.1.reparam_conv", ways=layer.ways)
        if layer.kind not in ("repmixer", "attention"):
            continue
        scale = f"{name}.layer_scale"
        if layer.kind == "attention":
            yield Place(f"{here}.token_mixer.qkv", f"{name}.token_mixer.qkv")
            yield Place(f"{here}.token_mixer.proj", f"{name}.token_mixer.proj", f"{scale}_1")
            scale += "_2"
        yield Place(f"{here}.convffn.fc1", f"{name}.convffn.fc1")
        yield Place(f"{here}.convffn.fc2", f"{name}.convffn.fc2", scale)
    for part in ("reduce", "expand"):
        yield Place(f"conv_exp.{part}", f"conv_exp.se.{part}")


def unfolded(low_rank: LowRank, place: Place, base: Weights) -> LowRank:
    """What was trained on a layer in memory, for the layer in a checkpoint.

    Args:
        low_rank: of the folded layer.
        place: the layer.
        base: the checkpoint, which has the layer scales if it is not folded.
    """
    down, up, magnitude = low_rank.down, low_rank.up, low_rank.magnitude
    if place.ways > 1:
        down = down.reshape(len(down), place.ways, -1).swapaxes(1, 2).flatten(1)
    if place.scale in base:
        scale = base[place.scale].astype(mx.float32).flatten()
        if not mx.all(scale).item():
            raise CheckpointError(
                f"{brief(place.scale)} of the base is 0 in places, where no adapter reaches."
            )
        up = up.astype(mx.float32) / scale[:, None]
        magnitude = None if magnitude is None else magnitude / mx.abs(scale)
    return LowRank(down, up, low_rank.scale, magnitude)


def folded(low_rank: LowRank, place: Place, base: Weights) -> LowRank:
    """The inverse of `unfolded`."""
    down, up, magnitude = low_rank.down, low_rank.up, low_rank.magnitude
    if place.ways > 1:
        down = down.reshape(len(down), -1, place.ways).swapaxes(1, 2).flatten(1)
    if place.scale in base:
        scale = base[place.scale].astype(mx.float32).flatten()
        up = up.astype(mx.float32) * scale[:, None]
        magnitude = None if magnitude is None else magnitude * mx.abs(scale)
    return LowRank(down, up, low_rank.scale, magnitude)


def fitted(adapter: Adapter, config: VisionConfig, *, is_folded: bool) -> Adapter:
    """An adapter for a base whose encoder is folded, as a quantized one is, or not.

    Raises:
        CheckpointError: it was trained on an encoder of the other kind.
    """
    parts = [name for name in (*adapter.low_rank, *adapter.whole) if name.startswith(ENCODER)]
    was_folded = FOLDED in adapter.about
    if not parts or (not is_folded and not was_folded):
        return adapter
    whole = next((name for name in adapter.whole if name.startswith(ENCODER)), None)
    if is_folded != was_folded or whole is not None:
        raise CheckpointError(
            f"The adapter's {brief(whole or parts[0])} was trained on an encoder in float, and the "
            "base's is quantized (or the other way about); use the base that it was trained on."
        )
    return Adapter(in_memory(adapter, config, {}), adapter.whole, adapter.about)


def in_memory(adapter: Adapter, config: VisionConfig, base: Weights) -> dict[str, LowRank]:
    """The LoRA of an adapter, that of the encoder for its layers in memory."""
    by_name = {place.name: place for place in places(config)}
    found = {}
    for name, low_rank in adapter.low_rank.items():
        place = by_name.get(name)
        if place is None:
            found[name] = low_rank
        else:
            found[place.folded] = folded(low_rank, place, base)
    return found
