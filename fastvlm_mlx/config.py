"""The geometry of a model, read from any known config.json."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .checks import brief, is_number, is_whole_number
from .fields import (
    MAX_SIZE,
    CheckpointError,
    check_positive_ints,
    is_moderate_number,
    is_odd_square,
    is_positive_int,
    is_size,
    read_json,
    reject,
    token_ids,
)

IMAGE_TOKEN_INDEX = -200
DECODERS = ("qwen2", "qwen3")
MODEL_TYPES = (*(f"llava_{decoder}" for decoder in DECODERS), "fastvlm")
TRANSFORMERS_TYPE = "fast_vlm"
QWEN3_HEAD_DIM = 128  # where config.json does not say (transformers' `Qwen3Config`)
STEM_STRIDE = 4  # of `vision.Stem`
MAX_LAYERS = 1000
FUSED_ADAPTERS = "fused_adapters"  # the field for those that the weights hold already


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of FastViTHD; the defaults are the released encoder (FastVLM paper, section 3)."""

    image_size: int = 1024
    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4, 4)
    token_mixers: tuple[str, ...] = ("repmixer", "repmixer", "repmixer", "attention", "attention")
    pos_embs_shapes: tuple[tuple[int, int] | None, ...] = (None, None, None, (7, 7), (7, 7))
    downsamples: tuple[bool, ...] = (True, True, True, True, True)
    repmixer_kernel_size: int = 3
    down_patch_size: int = 7
    down_stride: int = 2
    cls_ratio: float = 2.0
    head_dim: int = 32
    projection_dim: int = 768

    @property
    def hidden_size(self) -> int:
        """Channels of the visual features."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    @property
    def patch_size(self) -> int:
        """Side, in pixels, of the square that becomes one visual token."""
        steps = sum(self.has_downsample(i) for i in range(len(self.layers) - 1))
        return STEM_STRIDE * self.down_stride**steps

    def has_downsample(self, stage: int) -> bool:
        """Whether a patch-merging layer follows the stage (`mci.py`'s FastViT)."""
        return self.downsamples[stage] or self.embed_dims[stage] != self.embed_dims[stage + 1]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VisionConfig:
        """Read from a whole config.json: its `vision_config`, or the name of its vision tower.

        Raises:
            CheckpointError: a field is malformed, or neither source tells the geometry.
        """
        tower = str(config.get("mm_vision_tower") or "")
        named = re.search(r"mobileclip_l_(\d{1,6})$", tower)
        given = config.get("vision_config") or {}
        if not isinstance(given, dict):
            reject("vision_config", "an object", given)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in given.items() if k in known and v is not None}
        if tower and not values and not named:
            raise CheckpointError(
                f"config.json: unknown vision tower {brief(repr(tower))} and no vision_config; "
                "supported is mobileclip_l_<size>."
            )
        if named:
            values.setdefault("image_size", int(named.group(1)))
        vision = cls(**{k: _freeze(v) for k, v in values.items()})
        vision._validate(given.get("patch_size"))
        return vision

    def _validate(self, patch_size: int | None) -> None:
        stages = len(self.layers) if isinstance(self.layers, tuple) else 0
        for name in ("layers", "embed_dims", "mlp_ratios", "token_mixers", "pos_embs_shapes"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != stages or not stages:
                reject(f"vision_config.{name}", "a list with one entry per stage", value)
        steps = self.downsamples if isinstance(self.downsamples, tuple) else ()
        if len(steps) < stages - 1 or not all(isinstance(step, bool) for step in steps):
            reject("vision_config.downsamples", "a list of true or false", self.downsamples)
        check_positive_ints(self, "vision_config", "image_size", "repmixer_kernel_size")
        check_positive_ints(self, "vision_config", "down_patch_size", "down_stride", "head_dim")
        check_positive_ints(self, "vision_config", "projection_dim")
        for name in ("repmixer_kernel_size", "down_patch_size"):
            if getattr(self, name) % 2 == 0:  # padding by half the kernel keeps the size
                reject(f"vision_config.{name}", "an odd number", getattr(self, name))
        if sum(n for n in self.layers if is_positive_int(n)) > MAX_LAYERS:
            reject("vision_config.layers", f"at most {MAX_LAYERS} together", self.layers)
        if not all(is_positive_int(n) for n in (*self.layers, *self.embed_dims)):
            reject("vision_config.layers and embed_dims", "positive integers", self.layers)
        if not all(is_moderate_number(r) and r > 0 for r in (*self.mlp_ratios, self.cls_ratio)):
            reject("vision_config.mlp_ratios and cls_ratio", "positive numbers", self.mlp_ratios)
        for dim, ratio in zip(self.embed_dims, self.mlp_ratios, strict=True):
            if not is_positive_int(int(dim * ratio)):
                reject("vision_config.mlp_ratios", "large enough to leave channels", ratio)
        for i, (mixer, dim) in enumerate(zip(self.token_mixers, self.embed_dims, strict=True)):
            if mixer not in ("repmixer", "attention"):
                reject(f"vision_config.token_mixers[{i}]", "repmixer or attention", mixer)
            if mixer == "attention" and dim % self.head_dim:
                reject(f"vision_config.embed_dims[{i}]", f"a multiple of {self.head_dim}", dim)
            if i and dim % self.embed_dims[i - 1]:
                # A grouped convolution with one group per input channel needs it.
                reject(f"vision_config.embed_dims[{i}]", "a multiple of the stage before", dim)
        for shape in self.pos_embs_shapes:
            if shape is not None and not is_odd_square(shape):
                reject("vision_config.pos_embs_shapes", "null or a square, odd kernel", shape)
        if self.hidden_size % self.embed_dims[-1] or not is_positive_int(self.hidden_size):
            reject("vision_config.cls_ratio", "a whole number", self.cls_ratio)
        if patch_size is not None and patch_size != self.patch_size:
            reject(
                "vision_config.patch_size", f"{self.patch_size}, as the strides give", patch_size
            )
        if self.image_size % self.patch_size:
            reject("vision_config.image_size", f"a multiple of {self.patch_size}", self.image_size)


@dataclass(frozen=True)
class TextConfig:
    """Geometry of the Qwen2 or Qwen3 decoder; the defaults are those of Qwen2-0.5B."""

    model_type: str = "qwen2"
    hidden_size: int = 896
    num_hidden_layers: int = 24
    intermediate_size: int = 4864
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True

    @property
    def qk_norm(self) -> bool:
        """Whether each head of queries and keys is normalised."""
        return self.model_type == "qwen3"

    @property
    def attention_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TextConfig:
        """Read the decoder's fields of config.json.

        Raises:
            CheckpointError: a field is malformed or asks for a feature that this decoder
                does not have.
        """
        given = config.get("text_config") or config
        if not isinstance(given, dict):
            reject("text_config", "an object", given)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in given.items() if k in known and v is not None}
        values["model_type"] = _decoder(given.get("model_type") or config.get("model_type"))
        for name in ("rope_scaling", "rope_parameters"):
            if "rope_theta" in (rope := _plain_rope(name, given.get(name) or {})):
                values["rope_theta"] = rope["rope_theta"]
        missing = {"hidden_size", "num_hidden_layers", "vocab_size"} - values.keys()
        if missing:
            raise CheckpointError(f"config.json has no {' and no '.join(sorted(missing))}.")
        text = cls(**values)
        text._validate()
        text._check_features(given)
        return text if "head_dim" in values else text._with_usual_heads()

    def _validate(self) -> None:
        integers = [f.name for f in fields(self) if f.type == "int"]
        check_positive_ints(self, "config", *integers)
        if self.num_hidden_layers > MAX_LAYERS:
            reject("num_hidden_layers", f"at most {MAX_LAYERS}", self.num_hidden_layers)
        for name in ("rms_norm_eps", "rope_theta"):
            if not is_moderate_number(getattr(self, name)) or getattr(self, name) <= 0:
                reject(name, "a positive number", getattr(self, name))
        if not isinstance(self.tie_word_embeddings, bool):
            reject("tie_word_embeddings", "true or false", self.tie_word_embeddings)
        if self.head_dim % 2:
            reject("head_dim", "even", self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            reject("num_key_value_heads", "a divisor of the heads", self.num_key_value_heads)
        if self.num_attention_heads * self.head_dim > MAX_SIZE:
            reject(
                "num_attention_heads", f"at most {MAX_SIZE} / head_dim", self.num_attention_heads
            )

    def _check_features(self, given: dict[str, Any]) -> None:
        """Refuse what transformers' Qwen2 and Qwen3 may have and this decoder does not."""
        if given.get("use_sliding_window"):
            reject("use_sliding_window", "false", True)
        if given.get("hidden_act", "silu") != "silu":
            reject("hidden_act", "silu", given["hidden_act"])
        kinds = given.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            reject("layer_types", "full_attention for every layer", kinds)
        bias = given.get("attention_bias")
        if bias is not None and bias is not self.attention_bias:
            reject("attention_bias", f"{json.dumps(self.attention_bias)} or left out", bias)

    def _with_usual_heads(self) -> TextConfig:
        """The same with the width of heads that transformers takes if config.json has none."""
        if self.qk_norm:
            return replace(self, head_dim=QWEN3_HEAD_DIM)
        if self.hidden_size % (2 * self.num_attention_heads):
            reject("hidden_size", "an even multiple of num_attention_heads", self.hidden_size)
        return replace(self, head_dim=self.hidden_size // self.num_attention_heads)


@dataclass(frozen=True)
class FastVLMConfig:
    """A whole FastVLM: encoder, projector, decoder, and how images join a prompt."""

    vision: VisionConfig
    text: TextConfig
    mm_projector_type: str = "mlp2x_gelu"
    mm_hidden_size: int = 3072
    image_token_index: int = IMAGE_TOKEN_INDEX
    image_aspect_ratio: str = "pad"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    mm_patch_merge_type: str = "flat"
    max_length: int = 8192
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    """config.json as read."""

    @property
    def projector_depth(self) -> int:
        """Linear layers of the projector: 0 for `identity`, 1 for `linear`, N for `mlpNx_gelu`."""
        return projector_depth(self.mm_projector_type)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> FastVLMConfig:
        """Read a parsed config.json.

        Raises:
            CheckpointError: naming the field that is missing, malformed or not supported.
        """
        model_type = config.get("model_type")
        if model_type == TRANSFORMERS_TYPE:
            config = _llava_fields(config)
        elif model_type not in MODEL_TYPES:
            reject("model_type", " or ".join((*MODEL_TYPES, TRANSFORMERS_TYPE)), model_type)
        if config.get("mm_use_im_start_end"):
            reject("mm_use_im_start_end", "false", True)
        vision = VisionConfig.from_dict(config)
        text = TextConfig.from_dict(config)
        aspect_ratio = str(config.get("image_aspect_ratio", "pad") or "square")
        aspect_ratio = "square" if aspect_ratio == "none" else aspect_ratio
        if aspect_ratio not in ("pad", "square", "anyres"):
            reject("image_aspect_ratio", "pad, square or anyres", aspect_ratio)
        merge_type = config.get("mm_patch_merge_type") or "flat"
        if merge_type not in ("flat", "spatial", "spatial_unpad"):
            reject("mm_patch_merge_type", "flat, spatial or spatial_unpad", merge_type)
        mm_hidden_size = config.get("mm_hidden_size") or vision.hidden_size
        if mm_hidden_size != vision.hidden_size:
            reject("mm_hidden_size", f"{vision.hidden_size}, the encoder's width", mm_hidden_size)
        projector = config.get("mm_projector_type") or "linear"
        if projector_depth(projector) == 0 and mm_hidden_size != text.hidden_size:
            reject(
                "mm_projector_type", "one that maps the encoder's width to the decoder's", projector
            )
        quantization = config.get("quantization") or config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            reject("quantization", "an object", quantization)
        return cls(
            vision=vision,
            text=text,
            mm_projector_type=projector,
            mm_hidden_size=vision.hidden_size,
            image_token_index=_image_token_index(config.get("image_token_index")),
            image_aspect_ratio=aspect_ratio,
            image_grid_pinpoints=_grid_pinpoints(config.get("image_grid_pinpoints")),
            mm_patch_merge_type=merge_type,
            max_length=_max_length(config, text.max_position_embeddings),
            eos_token_ids=token_ids(config.get("eos_token_id")),
            dtype=_dtype(config),
            quantization=quantization,
            source=config,
        )


def _llava_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers (`FastVlmConfig`) with the fields of the original."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    arguments = vision.get("model_args") if isinstance(vision, dict) else vision
    if not isinstance(text, dict) or not isinstance(arguments, (dict, type(None))):
        reject("text_config and vision_config.model_args", "objects", [text, arguments])
    if vision.get("architecture", "fastvit_mci3") != "fastvit_mci3":
        reject("vision_config.architecture", "fastvit_mci3", vision["architecture"])
    visual_tokens = config.get("image_seq_length", 256)
    side = math.isqrt(visual_tokens) if is_positive_int(visual_tokens) else 0
    if side * side != visual_tokens or not side:
        reject("image_seq_length", "a square number", visual_tokens)
    geometry = {"image_size": 64 * side, **(arguments or {})}
    own = ["torch_dtype", "dtype", "image_token_index", "eos_token_id", "quantization"]
    own += [FUSED_ADAPTERS]
    decoder = _decoder(text.get("model_type"))
    return {
        **text,
        **{name: config[name] for name in own if config.get(name) is not None},
        "model_type": f"llava_{decoder}",
        "architectures": [f"Llava{decoder.capitalize()}ForCausalLM"],
        "vision_config": geometry,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.get("hidden_size"),
        "image_aspect_ratio": "pad",
    }


def load_config(folder: Path) -> FastVLMConfig:
    """Read `folder/config.json`.

    Raises:
        CheckpointError: it is missing, broken or not a FastVLM's.
    """
    return FastVLMConfig.from_dict(read_json(folder / "config.json"))


def projector_depth(projector_type: str) -> int:
    """The number of linear layers that a `mm_projector_type` names (`build_vision_projector`).

    Raises:
        CheckpointError: it names no known projector.
    """
    if projector_type == "identity":
        return 0
    if projector_type == "linear":
        return 1
    named = re.fullmatch(r"mlp(\d{1,6})x_gelu", str(projector_type))
    if not named or not 0 < int(named.group(1)) <= MAX_LAYERS:
        reject("mm_projector_type", "linear, mlpNx_gelu or identity", projector_type)
    return int(named.group(1))


def _decoder(named: Any) -> str:
    """The kind of decoder that a `model_type` names; those without one have a Qwen2."""
    decoder = str(named or "qwen2").removeprefix("llava_").replace("fastvlm", "qwen2")
    if decoder not in DECODERS:
        reject("text_config.model_type", " or ".join(DECODERS), named)
    return decoder


def _plain_rope(name: str, rope: Any) -> dict[str, Any]:
    """A field that describes rotary positions, if it describes plain ones."""
    if not isinstance(rope, dict):
        reject(name, "an object", rope)
    kind, share = rope.get("rope_type", rope.get("type")), rope.get("partial_rotary_factor")
    if kind not in (None, "default") or share not in (None, 1):
        reject(name, "null or of the default type", rope)
    return rope


def _grid_pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    try:
        pairs = ast.literal_eval(value) if value and isinstance(value, str) else value or []
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pairs = None
    if not isinstance(pairs, (list, tuple)) or not all(is_size(pair) for pair in pairs):
        reject("image_grid_pinpoints", "a list of [width, height]", value)
    return tuple((width, height) for width, height in pairs)


def _image_token_index(value: Any) -> int:
    if value is not None and not (is_whole_number(value, -MAX_SIZE) and value <= MAX_SIZE):
        reject("image_token_index", f"an integer from -{MAX_SIZE} to {MAX_SIZE}", value)
    return IMAGE_TOKEN_INDEX if value is None else int(value)


def _max_length(config: dict[str, Any], default: int) -> int:
    """Tokens of a prompt and its answer; transformers writes 1e30 where there is no limit."""
    value = config.get("tokenizer_model_max_length")
    if value is not None and not (is_number(value) and value >= 1):
        reject("tokenizer_model_max_length", "a number from 1", value)
    return default if value is None else int(value)


def _dtype(config: dict[str, Any]) -> str | None:
    value = config.get("torch_dtype") or config.get("dtype") or None
    if not isinstance(value, (str, type(None))):
        reject("torch_dtype", "a name", value)
    return value


def _freeze(value: Any, depth: int = 2) -> Any:
    """Lists as tuples, and lists in them."""
    if not depth or not isinstance(value, list):
        return value
    return tuple(_freeze(each, depth - 1) for each in value)
