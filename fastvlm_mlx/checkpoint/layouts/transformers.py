"""The layout of Hugging Face transformers (`fast_vlm`), whose encoder has timm's names."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from ...config import FUSED_ADAPTERS, FastVLMConfig, VisionConfig
from ..files import Weights
from . import mlx_vlm
from .llava import UNUSED, channels_first, channels_last

ENCODER = "model.vision_tower.timm_model."
# (timm's name of a module, the original's).
MODULES = (
    ("stem.", "patch_embed.blocks."),
    ("final_conv.", "conv_exp."),
    ("mlp.conv.", "convffn.conv."),
    ("mlp.fc", "convffn.fc"),
    ("conv_kxk.", "rbr_conv."),
    ("conv_scale.", "rbr_scale."),
    ("identity.", "rbr_skip."),
    ("large_conv.", "lkb_origin."),
    ("proj.0.reparam_conv.", "proj.0.lkb_reparam."),
    ("pos_enc.", "pe."),
    ("se.fc1.", "se.reduce."),
    ("se.fc2.", "se.expand."),
)
# timm's place of each part of the original's flat network: in a stage of the released encoder, the
# only one that transformers has, downsampling comes first, then the embedding of positions.
STAGES = (
    "stages.0.blocks",
    *("stages.1.downsample", "stages.1.blocks"),
    *("stages.2.downsample", "stages.2.blocks"),
    *("stages.3.downsample", "stages.3.pos_emb", "stages.3.blocks"),
    *("stages.4.downsample", "stages.4.pos_emb", "stages.4.blocks"),
)
PLACES = {f"network.{i}": stage for i, stage in enumerate(STAGES)}
NETWORK = {stage: place for place, stage in PLACES.items()}
PREFIXES = (
    ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def matches(names: set[str]) -> bool:
    """Whether tensors of these names are such a checkpoint's."""
    return any(name.startswith(ENCODER) for name in names)


def to_mlx(weights: Weights) -> Weights:
    """Names and axes of the mlx-vlm layout."""
    return {
        _to_mlx_name(name): channels_last(name, tensor)
        for name, tensor in weights.items()
        if not UNUSED.match(name)
    }


def from_mlx(weights: Weights) -> Weights:
    """The inverse of `to_mlx` without parallel branches and the head, which timm does not have."""
    source: Weights = {}
    for name, tensor in weights.items():
        if name == mlx_vlm.HEAD:
            continue
        target = _from_mlx_name(name)
        source[target] = channels_first(name, tensor)
        if name.endswith("running_mean"):
            counter = target.replace("running_mean", "num_batches_tracked")
            source[counter] = mx.array(0, mx.int64)
    return source


def config_json(config: FastVLMConfig, dtype: str, image_token_index: int) -> dict[str, Any]:
    """config.json of transformers' `FastVlmConfig`.

    Args:
        config: the model's.
        dtype: name of the weights' dtype.
        image_token_index: id of the token `<image>`, which stands for every visual token.

    Raises:
        ValueError: transformers' model has no such geometry.
    """
    vision, text = config.vision, config.text
    released = VisionConfig(
        image_size=vision.image_size,
        layers=vision.layers,
        embed_dims=vision.embed_dims,
        mlp_ratios=vision.mlp_ratios,
        projection_dim=vision.projection_dim,
    )
    if vision != released or config.mm_projector_type != "mlp2x_gelu":
        raise ValueError("transformers has no FastVLM of this geometry; choose another layout.")
    if image_token_index >= text.vocab_size or config.image_aspect_ratio != "pad":
        raise ValueError(
            "transformers' FastVLM needs a row for <image> in the vocabulary, and pads images."
        )
    eos = config.eos_token_ids[0] if config.eos_token_ids else None
    fused = config.source.get(FUSED_ADAPTERS)
    return {
        **({FUSED_ADAPTERS: fused} if fused else {}),
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "dtype": dtype,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "image_token_index": image_token_index,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
        "eos_token_id": eos,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": vision.hidden_size,
            "initializer_range": 0.02,
            "model_args": {
                "inference_mode": True,
                "layers": vision.layers,
                "embed_dims": vision.embed_dims,
                "mlp_ratios": vision.mlp_ratios,
            },
        },
        "text_config": {
            "hidden_act": "silu",
            "eos_token_id": eos,
            **asdict(text),
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        },
    }


def _to_mlx_name(name: str) -> str:
    if name.startswith(ENCODER):
        name = name.removeprefix(ENCODER)
        if part := re.match(r"stages\.\d+\.\w+", name):
            name = NETWORK.get(part.group(), part.group()) + name[part.end() :]
        for timm, original in MODULES:
            name = name.replace(timm, original)
        return mlx_vlm.ENCODER + name.replace(".gamma", "")
    for transformers, original in PREFIXES:
        if name.startswith(transformers):
            return original + name.removeprefix(transformers)
    return name


def _from_mlx_name(name: str) -> str:
    if name.startswith(mlx_vlm.ENCODER):
        name = name.removeprefix(mlx_vlm.ENCODER)
        if part := re.match(r"network\.\d+", name):
            name = PLACES.get(part.group(), part.group()) + name[part.end() :]
        for timm, original in MODULES:
            name = name.replace(original, timm)
        return ENCODER + re.sub(r"(layer_scale\w*)$", r"\1.gamma", name)
    for transformers, original in PREFIXES:
        if name.startswith(original):
            return transformers + name.removeprefix(original)
    return name
