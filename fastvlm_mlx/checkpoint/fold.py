"""The arithmetic that turns trained weights into those that run.

Training form → inference form: parallel branches and their BatchNorms become one convolution
(`reparameterize` in the original's `mci.py`; FastViT paper, section 3). Inference form → memory:
the remaining BatchNorms and the layer scales are folded into their neighbours. Convolutions are
channels last, [out, height, width, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..config import VisionConfig
from .files import Weights

BATCH_NORM_EPS = 1e-5
Get = Callable[[str], mx.array]


class BranchError(ValueError):
    """A tensor of a parallel branch is missing or has a wrong shape.

    Attributes:
        name: the tensor's, in the mlx-vlm layout.
        problem: what is wrong with it, in a few words.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


def is_training_form(weights: Weights) -> bool:
    """Whether there are parallel branches."""
    return any(re.search(r"\.(rbr_\w+|lkb_origin|pe)\.", name) for name in weights)


def reparameterize(weights: Weights) -> Weights:
    """Training form → inference form.

    Args:
        weights: in the mlx-vlm layout. Tensors that belong to no branch pass unchanged.

    Returns:
        Tensors in the same layout; the convolutions that replace branches are float32.

    Raises:
        BranchError: a tensor of a branch is missing or does not fit its neighbours.
    """
    take = weights.copy()

    def pop(name: str) -> mx.array:
        if name not in take:
            raise BranchError(name, "is missing, a part of a parallel branch")
        return take.pop(name)

    folded: Weights = {}
    for prefix in _prefixes(weights, r"(.+\.token_mixer)\.mixer\."):
        _put(folded, f"{prefix}.reparam_conv", *_reparam_rep_mixer(take, pop, prefix))
    for prefix in _prefixes(take, r"(.+)\.rbr_(?:conv|scale|skip)\."):
        _put(folded, f"{prefix}.reparam_conv", *_reparam_mobile_one(take, pop, prefix))
    for prefix in _prefixes(take, r"(.+)\.lkb_origin\."):
        _put(folded, f"{prefix}.lkb_reparam", *_reparam_large_kernel(take, pop, prefix))
    for prefix in _prefixes(take, r"(.+)\.pe\."):
        weight = _pop_kernel(pop, f"{prefix}.pe.weight")
        bias = pop(f"{prefix}.pe.bias")
        _put(folded, f"{prefix}.reparam_conv", weight + _identity_kernel(weight.shape), bias)
    return take | folded


def _put(weights: Weights, prefix: str, weight: mx.array, bias: mx.array) -> None:
    """Store the weight and the bias of the layer at `prefix`."""
    weights[f"{prefix}.weight"] = weight
    weights[f"{prefix}.bias"] = bias


def _prefixes(weights: Weights, pattern: str) -> list[str]:
    """What the first group of a pattern matches at the start of names, each once."""
    matches = (re.match(pattern, name) for name in weights)
    return sorted({match.group(1) for match in matches if match})


def _identity_kernel(shape: tuple[int, ...]) -> mx.array:
    """The kernel [out, k, k, in / groups] of the convolution that returns its input."""
    out, kernel, _, width = shape
    one_hot = mx.arange(out)[:, None] % width == mx.arange(width)
    center = mx.arange(kernel) == kernel // 2
    spot = center[:, None] & center
    return (one_hot[:, None, None, :] & spot[None, :, :, None]).astype(mx.float32)


def _pad_kernel(weight: mx.array, size: int) -> mx.array:
    pad = (size - weight.shape[1]) // 2
    return mx.pad(weight, [(0, 0), (pad, pad), (pad, pad), (0, 0)])


def _pop_kernel(pop: Get, name: str) -> mx.array:
    weight = pop(name).astype(mx.float32)
    if weight.ndim != 4 or weight.shape[1] != weight.shape[2]:
        raise BranchError(name, f"is {weight.shape} where a square kernel is expected")
    return weight


def _pop_channels(pop: Get, name: str, channels: int) -> mx.array:
    vector = pop(name).astype(mx.float32).flatten()
    if vector.size != channels:
        raise BranchError(name, f"has {vector.size} channels where {channels} are expected")
    return vector


def batch_norm_terms(pop: Get, prefix: str, channels: int) -> tuple[mx.array, mx.array]:
    """(scale, shift) of the BatchNorm at `prefix`: y = scale x + shift."""
    weight, bias, mean, var = (
        _pop_channels(pop, f"{prefix}.{name}", channels)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * mx.rsqrt(var + BATCH_NORM_EPS)
    return scale, bias - mean * scale


def _fold_norm(weight: mx.array, pop: Get, norm: str) -> tuple[mx.array, mx.array]:
    """(weight, bias) of a convolution without bias and the BatchNorm at `norm` after it."""
    scale, shift = batch_norm_terms(pop, norm, weight.shape[0])
    return weight.astype(mx.float32) * scale[:, None, None, None], shift


def _fold_conv_norm(pop: Get, prefix: str) -> tuple[mx.array, mx.array]:
    return _fold_norm(_pop_kernel(pop, f"{prefix}.conv.weight"), pop, f"{prefix}.bn")


def _reparam_mobile_one(take: Weights, pop: Get, prefix: str) -> tuple[mx.array, mx.array]:
    """Convolutions, one of 1x1 and the identity, each with a BatchNorm (`MobileOneBlock`)."""
    branches = _prefixes(take, rf"({re.escape(prefix)}\.rbr_conv\.\d+)\.")
    if not branches:
        raise BranchError(f"{prefix}.rbr_conv.0.conv.weight", "is missing, a parallel branch")
    folded = [_fold_conv_norm(pop, branch) for branch in branches]
    shape = folded[0][0].shape
    if _prefixes(take, rf"({re.escape(prefix)}\.rbr_scale)\."):
        weight, bias = _fold_conv_norm(pop, f"{prefix}.rbr_scale")
        folded.append((_pad_kernel(weight, shape[1]), bias))
    if _prefixes(take, rf"({re.escape(prefix)}\.rbr_skip)\."):
        folded.append(_fold_norm(_identity_kernel(shape), pop, f"{prefix}.rbr_skip"))
    if any(weight.shape != shape for weight, _ in folded):
        raise BranchError(f"{prefix}.rbr_scale.conv.weight", "differs in shape from its neighbour")
    weights, biases = zip(*folded, strict=True)
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def _reparam_rep_mixer(take: Weights, pop: Get, prefix: str) -> tuple[mx.array, mx.array]:
    """y = x + layer_scale (mixer(x) - norm(x)), where norm is only a BatchNorm (`RepMixer`)."""
    weight, bias = _reparam_mobile_one(take, pop, f"{prefix}.mixer")
    identity = _identity_kernel(weight.shape)
    norm_weight, norm_bias = _fold_norm(identity, pop, f"{prefix}.norm.rbr_skip")
    weight, bias = weight - norm_weight, bias - norm_bias
    if f"{prefix}.layer_scale" in take:
        scale = _pop_channels(pop, f"{prefix}.layer_scale", bias.size)
        weight, bias = weight * scale[:, None, None, None], bias * scale
    return identity + weight, bias


def _reparam_large_kernel(take: Weights, pop: Get, prefix: str) -> tuple[mx.array, mx.array]:
    """A large kernel and maybe a small one, each with a BatchNorm (`ReparamLargeKernelConv`)."""
    weight, bias = _fold_conv_norm(pop, f"{prefix}.lkb_origin")
    if _prefixes(take, rf"({re.escape(prefix)}\.small_conv)\."):
        small, small_bias = _fold_conv_norm(pop, f"{prefix}.small_conv")
        if small.shape[0] != weight.shape[0] or small.shape[1] > weight.shape[1]:
            raise BranchError(f"{prefix}.small_conv.conv.weight", "does not fit the large kernel")
        weight, bias = weight + _pad_kernel(small, weight.shape[1]), bias + small_bias
    return weight, bias


class Layer(NamedTuple):
    """A layer of `vision.build_network`: what it is, its name in the mlx-vlm layout, and how many
    outputs its convolution gives per input."""

    kind: str
    name: str
    ways: int = 1


def network_layers(config: VisionConfig) -> list[Layer]:
    """The layers of `vision.build_network`, in order."""
    layers: list[Layer] = []
    index = 0
    for i, depth in enumerate(config.layers):
        if config.pos_embs_shapes[i] is not None:
            layers.append(Layer("position", f"network.{index}"))
            index += 1
        mixer = config.token_mixers[i]
        layers += [Layer(mixer, f"network.{index}.{block}") for block in range(depth)]
        index += 1
        if i + 1 < len(config.layers) and config.has_downsample(i):
            ways = config.embed_dims[i + 1] // config.embed_dims[i]
            layers.append(Layer("downsample", f"network.{index}", ways))
            index += 1
    return layers


def fold_encoder(get: Get, config: VisionConfig) -> Weights:
    """Inference form → the parameters of `vision.FastViTHD`.

    Scaled weights keep their dtype: the product of two half-precision numbers is rounded once.

    Args:
        get: name of a tensor in the mlx-vlm layout, without `vision_tower.vision_model.` → it.
        config: the geometry.
    """
    folded = _fold_stem(get)
    for i, layer in enumerate(network_layers(config)):
        parameters = FOLD[layer.kind](get, layer)
        folded |= {f"network.{i}.{name}": value for name, value in parameters.items()}
    return folded | _fold_expand(get, config.hidden_size // config.embed_dims[-1])


def unfold_encoder(get: Get, config: VisionConfig) -> Weights:
    """The inverse of `fold_encoder`, with neutral BatchNorms and layer scales.

    Args:
        get: name of a parameter of `vision.FastViTHD` → it.
        config: the geometry.
    """
    weights = _unfold_stem(get)
    for i, layer in enumerate(network_layers(config)):

        def parameter(name: str, prefix: str = f"network.{i}.") -> mx.array:
            return get(prefix + name)

        weights |= UNFOLD[layer.kind](parameter, layer)
    return weights | _unfold_expand(get, config.hidden_size // config.embed_dims[-1])


def _copy(weights: Weights, get: Get, target: str, source: str) -> None:
    _put(weights, target, get(f"{source}.weight"), get(f"{source}.bias"))


def _conv_to_linear(get: Get, name: str) -> tuple[mx.array, mx.array]:
    return get(f"{name}.weight").flatten(1), get(f"{name}.bias")


def _linear_to_conv(weights: Weights, get: Get, target: str, source: str) -> None:
    _put(weights, target, get(f"{source}.weight")[:, None, None, :], get(f"{source}.bias"))


def _fold_stem(get: Get) -> Weights:
    folded: Weights = {}
    _copy(folded, get, "stem.conv", "patch_embed.blocks.0.reparam_conv")
    _copy(folded, get, "stem.depthwise", "patch_embed.blocks.1.reparam_conv")
    _put(folded, "stem.pointwise", *_conv_to_linear(get, "patch_embed.blocks.2.reparam_conv"))
    return folded


def _unfold_stem(get: Get) -> Weights:
    weights: Weights = {}
    _copy(weights, get, "patch_embed.blocks.0.reparam_conv", "stem.conv")
    _copy(weights, get, "patch_embed.blocks.1.reparam_conv", "stem.depthwise")
    _linear_to_conv(weights, get, "patch_embed.blocks.2.reparam_conv", "stem.pointwise")
    return weights


def _fold_position(get: Get, layer: Layer) -> Weights:
    source = f"{layer.name}.reparam_conv"
    return {name: get(f"{source}.{name}") for name in ("weight", "bias")}


def _unfold_position(get: Get, layer: Layer) -> Weights:
    return {f"{layer.name}.reparam_conv.{name}": get(name) for name in ("weight", "bias")}


def _fold_conv_ffn(get: Get, name: str, layer_scale: str) -> Weights:
    folded: Weights = {}
    conv = _fold_norm(get(f"{name}.convffn.conv.conv.weight"), get, f"{name}.convffn.conv.bn")
    _put(folded, "convffn.conv", *conv)
    _put(folded, "convffn.fc1", *_conv_to_linear(get, f"{name}.convffn.fc1"))
    weight, bias = _conv_to_linear(get, f"{name}.convffn.fc2")
    scale = get(f"{name}.{layer_scale}").flatten()
    _put(folded, "convffn.fc2", weight * scale[:, None], bias * scale)
    return folded


def _unfold_conv_ffn(get: Get, name: str, layer_scale: str) -> Weights:
    weight, bias = get("convffn.conv.weight"), get("convffn.conv.bias")
    ones = mx.ones_like(bias)
    norm = f"{name}.convffn.conv.bn"
    weights = {
        f"{name}.convffn.conv.conv.weight": weight,
        f"{norm}.weight": ones,
        f"{norm}.bias": bias,
        f"{norm}.running_mean": mx.zeros_like(bias),
        f"{norm}.running_var": ones.astype(mx.float32) - BATCH_NORM_EPS,
        f"{name}.{layer_scale}": ones.reshape(1, 1, -1),
    }
    for linear in ("fc1", "fc2"):
        _linear_to_conv(weights, get, f"{name}.convffn.{linear}", f"convffn.{linear}")
    return weights


def _fold_rep_mixer(get: Get, layer: Layer) -> Weights:
    folded: Weights = {}
    _copy(folded, get, "token_mixer", f"{layer.name}.token_mixer.reparam_conv")
    return folded | _fold_conv_ffn(get, layer.name, "layer_scale")


def _unfold_rep_mixer(get: Get, layer: Layer) -> Weights:
    weights: Weights = {}
    _copy(weights, get, f"{layer.name}.token_mixer.reparam_conv", "token_mixer")
    return weights | _unfold_conv_ffn(get, layer.name, "layer_scale")


def _fold_attention(get: Get, layer: Layer) -> Weights:
    name = layer.name
    kept = ("norm.weight", "norm.bias", "token_mixer.qkv.weight")
    folded = {key: get(f"{name}.{key}") for key in kept}
    weight, bias = (get(f"{name}.token_mixer.proj.{key}") for key in ("weight", "bias"))
    scale = get(f"{name}.layer_scale_1").flatten()
    _put(folded, "token_mixer.proj", weight * scale[:, None], bias * scale)
    return folded | _fold_conv_ffn(get, name, "layer_scale_2")


def _unfold_attention(get: Get, layer: Layer) -> Weights:
    name = layer.name
    kept = ["norm.weight", "norm.bias", "token_mixer.qkv.weight"]
    kept += ["token_mixer.proj.weight", "token_mixer.proj.bias"]
    weights = {f"{name}.{key}": get(key) for key in kept}
    weights[f"{name}.layer_scale_1"] = mx.ones_like(get("norm.bias")).reshape(1, 1, -1)
    return weights | _unfold_conv_ffn(get, name, "layer_scale_2")


def _split_conv(get: Get, name: str, ways: int) -> Weights:
    """A convolution with `ways` outputs per input → as many with one each."""
    weight, bias = get(f"{name}.weight"), get(f"{name}.bias")
    split: Weights = {}
    for i in range(ways):
        _put(split, f"convs.{i}", mx.contiguous(weight[i::ways]), mx.contiguous(bias[i::ways]))
    return split


def _join_conv(get: Get, ways: int) -> tuple[mx.array, mx.array]:
    """The inverse of `_split_conv`: (weight, bias)."""
    weights, biases = (
        mx.stack([get(f"convs.{i}.{name}") for i in range(ways)], axis=1).flatten(0, 1)
        for name in ("weight", "bias")
    )
    return weights, biases


def _fold_downsample(get: Get, layer: Layer) -> Weights:
    folded = _split_conv(get, f"{layer.name}.proj.0.lkb_reparam", layer.ways)
    weight, bias = _conv_to_linear(get, f"{layer.name}.proj.1.reparam_conv")
    out = weight.shape[0]
    by_conv = weight.reshape(out, -1, layer.ways).swapaxes(1, 2).reshape(out, -1)
    _put(folded, "pointwise", by_conv, bias)
    return folded


def _unfold_downsample(get: Get, layer: Layer) -> Weights:
    weights: Weights = {}
    _put(weights, f"{layer.name}.proj.0.lkb_reparam", *_join_conv(get, layer.ways))
    weight, bias = get("pointwise.weight"), get("pointwise.bias")
    out = weight.shape[0]
    by_channel = weight.reshape(out, layer.ways, -1).swapaxes(1, 2).reshape(out, 1, 1, -1)
    _put(weights, f"{layer.name}.proj.1.reparam_conv", by_channel, bias)
    return weights


def _fold_expand(get: Get, ways: int) -> Weights:
    folded = _split_conv(get, "conv_exp.reparam_conv", ways)
    for name in ("reduce", "expand"):
        _put(folded, name, *_conv_to_linear(get, f"conv_exp.se.{name}"))
    return {f"conv_exp.{name}": value for name, value in folded.items()}


def _unfold_expand(get: Get, ways: int) -> Weights:
    weights: Weights = {}
    joined = _join_conv(lambda name: get(f"conv_exp.{name}"), ways)
    _put(weights, "conv_exp.reparam_conv", *joined)
    for name in ("reduce", "expand"):
        _linear_to_conv(weights, get, f"conv_exp.se.{name}", f"conv_exp.{name}")
    return weights


FOLD: dict[str, Callable[[Get, Layer], Weights]] = {
    "position": _fold_position,
    "repmixer": _fold_rep_mixer,
    "attention": _fold_attention,
    "downsample": _fold_downsample,
}
UNFOLD: dict[str, Callable[[Get, Layer], Weights]] = {
    "position": _unfold_position,
    "repmixer": _unfold_rep_mixer,
    "attention": _unfold_attention,
    "downsample": _unfold_downsample,
}
