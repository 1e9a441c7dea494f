"""The encoder as the layers of the Core ML program, for reading and writing alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ....config import VisionConfig
from ... import fold


class Form(Protocol):
    """What `encode` asks of a `Reader` or a `Writer`; values are [1, C, H, W]."""

    def conv(self, x: Any, name: str, *, stride: int = 1, grouped: bool = False) -> Any:
        """A convolution with a bias, padded by half its kernel; `grouped`: one group an input."""

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


def encode(form: Form, x: Any, config: VisionConfig) -> Any:
    """FastViTHD in inference form (`mci.py`): image to features, layer by layer."""
    x = form.activation(form.conv(x, "patch_embed.blocks.0.reparam_conv", stride=2), "gelu")
    x = form.conv(x, "patch_embed.blocks.1.reparam_conv", stride=2, grouped=True)
    x = form.conv(form.activation(x, "gelu"), "patch_embed.blocks.2.reparam_conv")
    x = form.activation(x, "gelu")
    for layer in fold.network_layers(config):
        x = LAYERS[layer.kind](form, x, layer.name, config)
    x = form.conv(x, "conv_exp.reparam_conv", grouped=True)
    squeezed = form.activation(form.conv(form.mean(x), "conv_exp.se.reduce"), "relu")
    excited = form.activation(form.conv(squeezed, "conv_exp.se.expand"), "sigmoid")
    return form.tokens(form.activation(form.gate(x, excited), "gelu"))


def _position(form: Form, x: Any, name: str, _: VisionConfig) -> Any:
    return form.conv(x, f"{name}.reparam_conv", grouped=True)


def _conv_ffn(form: Form, x: Any, name: str, layer_scale: str) -> Any:
    y = form.conv_norm(x, f"{name}.convffn.conv")
    y = form.activation(form.conv(y, f"{name}.convffn.fc1"), "gelu")
    return form.residual(x, form.conv(y, f"{name}.convffn.fc2"), f"{name}.{layer_scale}")


def _rep_mixer(form: Form, x: Any, name: str, _: VisionConfig) -> Any:
    x = form.conv(x, f"{name}.token_mixer.reparam_conv", grouped=True)
    return _conv_ffn(form, x, name, "layer_scale")


def _attention(form: Form, x: Any, name: str, config: VisionConfig) -> Any:
    y = form.channel_norm(x, f"{name}.norm")
    y = form.attention(y, f"{name}.token_mixer", config.head_dim)
    x = form.residual(x, y, f"{name}.layer_scale_1")
    return _conv_ffn(form, x, name, "layer_scale_2")


def _downsample(form: Form, x: Any, name: str, config: VisionConfig) -> Any:
    x = form.conv(x, f"{name}.proj.0.lkb_reparam", stride=config.down_stride, grouped=True)
    x = form.conv(form.activation(x, "gelu"), f"{name}.proj.1.reparam_conv")
    return form.activation(x, "gelu")


LAYERS: dict[str, Callable[[Form, Any, str, VisionConfig], Any]] = {
    "position": _position,
    "repmixer": _rep_mixer,
    "attention": _attention,
    "downsample": _downsample,
}
