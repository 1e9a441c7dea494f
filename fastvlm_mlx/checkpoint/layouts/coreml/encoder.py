"""The encoder as the layers of the Core ML program, for reading and for writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ....config import VisionConfig
from ... import fold


class Visitor(Protocol):
    """What `encode` calls, layer by layer: a `Reader` or a `Writer`. Values are [1, C, H, W]."""

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        """A convolution with a bias, padded by half its kernel; `grouped`: one group per input."""

    def conv_norm(self, x: Any, name: str) -> Any:
        """A depthwise convolution and its BatchNorm."""

    def channel_norm(self, x: Any, name: str) -> Any:
        """LayerNorm over the channels of each position."""

    def attention(self, x: Any, name: str, head_dim: int) -> Any:
        """Self-attention over all positions."""

    def activation(self, x: Any, kind: str) -> Any:
        """gelu (exact), relu or sigmoid."""

    def mean(self, x: Any) -> Any:
        """Over all positions: [1, C, 1, 1]."""

    def gate(self, x: Any, y: Any) -> Any:
        """x y."""

    def residual(self, x: Any, y: Any, name: str) -> Any:
        """x + y, y times a layer scale."""

    def tokens(self, x: Any) -> Any:
        """[1, C, H, W] → [1, H W, C]."""


def encode(visitor: Visitor, x: Any, config: VisionConfig) -> Any:
    """FastViTHD in inference form (`mci.py`): an image to visual features, layer by layer."""
    x = visitor.activation(visitor.conv(x, "patch_embed.blocks.0.reparam_conv", stride=2), "gelu")
    x = visitor.conv(x, "patch_embed.blocks.1.reparam_conv", stride=2, grouped=True)
    x = visitor.conv(visitor.activation(x, "gelu"), "patch_embed.blocks.2.reparam_conv")
    x = visitor.activation(x, "gelu")
    for layer in fold.network_layers(config):
        x = LAYERS[layer.kind](visitor, x, layer.name, config)
    x = visitor.conv(x, "conv_exp.reparam_conv", grouped=True)
    squeezed = visitor.activation(visitor.conv(visitor.mean(x), "conv_exp.se.reduce"), "relu")
    excited = visitor.activation(visitor.conv(squeezed, "conv_exp.se.expand"), "sigmoid")
    return visitor.tokens(visitor.activation(visitor.gate(x, excited), "gelu"))


def _position(visitor: Visitor, x: Any, name: str, _: VisionConfig) -> Any:
    return visitor.conv(x, f"{name}.reparam_conv", grouped=True)


def _conv_ffn(visitor: Visitor, x: Any, name: str, layer_scale: str) -> Any:
    y = visitor.conv_norm(x, f"{name}.convffn.conv")
    y = visitor.activation(visitor.conv(y, f"{name}.convffn.fc1"), "gelu")
    return visitor.residual(x, visitor.conv(y, f"{name}.convffn.fc2"), f"{name}.{layer_scale}")


def _rep_mixer(visitor: Visitor, x: Any, name: str, _: VisionConfig) -> Any:
    x = visitor.conv(x, f"{name}.token_mixer.reparam_conv", grouped=True)
    return _conv_ffn(visitor, x, name, "layer_scale")


def _attention(visitor: Visitor, x: Any, name: str, config: VisionConfig) -> Any:
    y = visitor.channel_norm(x, f"{name}.norm")
    y = visitor.attention(y, f"{name}.token_mixer", config.head_dim)
    x = visitor.residual(x, y, f"{name}.layer_scale_1")
    return _conv_ffn(visitor, x, name, "layer_scale_2")


def _downsample(visitor: Visitor, x: Any, name: str, config: VisionConfig) -> Any:
    x = visitor.conv(x, f"{name}.proj.0.lkb_reparam", stride=config.down_stride, grouped=True)
    x = visitor.conv(visitor.activation(x, "gelu"), f"{name}.proj.1.reparam_conv")
    return visitor.activation(x, "gelu")


LAYERS: dict[str, Callable[[Visitor, Any, str, VisionConfig], Any]] = {
    "position": _position,
    "repmixer": _rep_mixer,
    "attention": _attention,
    "downsample": _downsample,
}
