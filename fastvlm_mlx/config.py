"""The geometry of a model, read from any known config.json."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .checks import is_number, is_whole_number

IMAGE_TOKEN_INDEX = -200
MODEL_TYPES = ("llava_qwen2", "fastvlm")
TRANSFORMERS_TYPE = "fast_vlm"
STEM_STRIDE = 4  # of `vision.Stem`
MAX_SIZE = 2**31 - 1  # of any dimension
MAX_LAYERS = 1000
MAX_SHOWN = 80  # characters of a value in an error

T = TypeVar("T")


class CheckpointError(ValueError):
    """A model folder can't be used: a file, a field or a tensor is missing or wrong."""


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
            raise CheckpointError(f"config.json: vision_config must be an object, found {given!r}.")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in given.items() if k in known and v is not None}
        if tower and not values and not named:
            raise CheckpointError(
                f"config.json: unknown vision tower {tower!r} and no vision_config; "
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
                _reject(f"vision_config.{name}", "a list with one entry per stage", value)
        steps = self.downsamples if isinstance(self.downsamples, tuple) else ()
        if len(steps) < stages - 1 or not all(isinstance(step, bool) for step in steps):
            _reject("vision_config.downsamples", "a list of true or false", self.downsamples)
        _check_positive_ints(self, "vision_config", "image_size", "repmixer_kernel_size")
        _check_positive_ints(self, "vision_config", "down_patch_size", "down_stride", "head_dim")
        _check_positive_ints(self, "vision_config", "projection_dim")
        for name in ("repmixer_kernel_size", "down_patch_size"):
            if getattr(self, name) % 2 == 0:  # padding by half the kernel keeps the size
                _reject(f"vision_config.{name}", "an odd number", getattr(self, name))
        if sum(n for n in self.layers if _is_positive_int(n)) > MAX_LAYERS:
            _reject("vision_config.layers", f"at most {MAX_LAYERS} together", self.layers)
        if not all(_is_positive_int(n) for n in (*self.layers, *self.embed_dims)):
            _reject("vision_config.layers and embed_dims", "positive integers", self.layers)
        if not all(_is_number(r) and r > 0 for r in (*self.mlp_ratios, self.cls_ratio)):
            _reject("vision_config.mlp_ratios and cls_ratio", "positive numbers", self.mlp_ratios)
        for dim, ratio in zip(self.embed_dims, self.mlp_ratios, strict=True):
            if not _is_positive_int(int(dim * ratio)):
                _reject("vision_config.mlp_ratios", "large enough to leave channels", ratio)
        for i, (mixer, dim) in enumerate(zip(self.token_mixers, self.embed_dims, strict=True)):
            if mixer not in ("repmixer", "attention"):
                _reject(f"vision_config.token_mixers[{i}]", "repmixer or attention", mixer)
            if mixer == "attention" and dim % self.head_dim:
                _reject(f"vision_config.embed_dims[{i}]", f"a multiple of {self.head_dim}", dim)
            if i and dim % self.embed_dims[i - 1]:
                # A grouped convolution with one group per input channel needs it.
                _reject(f"vision_config.embed_dims[{i}]", "a multiple of the stage before", dim)
        for shape in self.pos_embs_shapes:
            if shape is not None and not _is_odd_square(shape):
                _reject("vision_config.pos_embs_shapes", "null or a square, odd kernel", shape)
        if self.hidden_size % self.embed_dims[-1] or not _is_positive_int(self.hidden_size):
            _reject("vision_config.cls_ratio", "a whole number", self.cls_ratio)
        if patch_size is not None and patch_size != self.patch_size:
            _reject(
                "vision_config.patch_size", f"{self.patch_size}, as the strides give", patch_size
            )
        if self.image_size % self.patch_size:
            _reject("vision_config.image_size", f"a multiple of {self.patch_size}", self.image_size)


@dataclass(frozen=True)
class TextConfig:
    """Geometry of the Qwen2 decoder; the defaults are those of Qwen2-0.5B."""

    hidden_size: int = 896
    num_hidden_layers: int = 24
    intermediate_size: int = 4864
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TextConfig:
        """Read the decoder's fields of config.json.

        Raises:
            CheckpointError: a field is malformed or asks for a feature that this decoder
                does not have.
        """
        given = config.get("text_config") or config
        if not isinstance(given, dict):
            _reject("text_config", "an object", given)
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            _reject("rope_scaling", "an object", rope)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in given.items() if k in known and v is not None}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        missing = {"hidden_size", "num_hidden_layers", "vocab_size"} - values.keys()
        if missing:
            raise CheckpointError(f"config.json has no {' and no '.join(sorted(missing))}.")
        text = cls(**values)
        text._validate()
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            _reject("rope_scaling", "null", rope)
        if given.get("use_sliding_window"):
            _reject("use_sliding_window", "false", True)
        if given.get("hidden_act", "silu") != "silu":
            _reject("hidden_act", "silu", given["hidden_act"])
        return text

    def _validate(self) -> None:
        integers = [f.name for f in fields(self) if f.type == "int"]
        _check_positive_ints(self, "config", *integers)
        if self.num_hidden_layers > MAX_LAYERS:
            _reject("num_hidden_layers", f"at most {MAX_LAYERS}", self.num_hidden_layers)
        for name in ("rms_norm_eps", "rope_theta"):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                _reject(name, "a positive number", getattr(self, name))
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            _reject("hidden_size", "an even multiple of num_attention_heads", self.hidden_size)
        if self.num_attention_heads % self.num_key_value_heads:
            _reject("num_key_value_heads", "a divisor of the heads", self.num_key_value_heads)


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
            _reject("model_type", " or ".join((*MODEL_TYPES, TRANSFORMERS_TYPE)), model_type)
        if config.get("mm_use_im_start_end"):
            _reject("mm_use_im_start_end", "false", True)
        vision = VisionConfig.from_dict(config)
        text = TextConfig.from_dict(config)
        aspect_ratio = str(config.get("image_aspect_ratio", "pad") or "square")
        aspect_ratio = "square" if aspect_ratio == "none" else aspect_ratio
        if aspect_ratio not in ("pad", "square", "anyres"):
            _reject("image_aspect_ratio", "pad, square or anyres", aspect_ratio)
        merge_type = config.get("mm_patch_merge_type") or "flat"
        if merge_type not in ("flat", "spatial", "spatial_unpad"):
            _reject("mm_patch_merge_type", "flat, spatial or spatial_unpad", merge_type)
        mm_hidden_size = config.get("mm_hidden_size") or vision.hidden_size
        if mm_hidden_size != vision.hidden_size:
            _reject("mm_hidden_size", f"{vision.hidden_size}, the encoder's width", mm_hidden_size)
        projector = config.get("mm_projector_type") or "linear"
        if projector_depth(projector) == 0 and mm_hidden_size != text.hidden_size:
            _reject(
                "mm_projector_type", "one that maps the encoder's width to the decoder's", projector
            )
        quantization = config.get("quantization") or config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            _reject("quantization", "an object", quantization)
        return cls(
            vision=vision,
            text=text,
            mm_projector_type=projector,
            mm_hidden_size=mm_hidden_size,
            image_token_index=_as(int, config, "image_token_index", IMAGE_TOKEN_INDEX),
            image_aspect_ratio=aspect_ratio,
            image_grid_pinpoints=_grid_pinpoints(config.get("image_grid_pinpoints")),
            mm_patch_merge_type=merge_type,
            max_length=_as(int, config, "tokenizer_model_max_length", text.max_position_embeddings),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            dtype=config.get("torch_dtype") or config.get("dtype"),
            quantization=quantization,
            source=config,
        )


def _llava_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers (`FastVlmConfig`) with the fields of the original."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    arguments = vision.get("model_args") if isinstance(vision, dict) else vision
    if not isinstance(text, dict) or not isinstance(arguments, (dict, type(None))):
        _reject("text_config and vision_config.model_args", "objects", [text, arguments])
    if vision.get("architecture", "fastvit_mci3") != "fastvit_mci3":
        _reject("vision_config.architecture", "fastvit_mci3", vision["architecture"])
    visual_tokens = config.get("image_seq_length", 256)
    side = math.isqrt(visual_tokens) if _is_positive_int(visual_tokens) else 0
    if side * side != visual_tokens or not side:
        _reject("image_seq_length", "a square number", visual_tokens)
    geometry = {"image_size": 64 * side, **(arguments or {})}
    own = ("torch_dtype", "dtype", "image_token_index", "eos_token_id", "quantization")
    return {
        **text,
        **{name: config[name] for name in own if config.get(name) is not None},
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or no object in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


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
        _reject("mm_projector_type", "linear, mlpNx_gelu or identity", projector_type)
    return int(named.group(1))


def _grid_pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    if not value:
        return ()
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(width), int(height)) for width, height in pairs)
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError):
        _reject("image_grid_pinpoints", "a list of [width, height]", value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        _reject("eos_token_id", "an integer or a list of them", value)
    return tuple(ids)


def _as(kind: Callable[[Any], T], config: dict[str, Any], name: str, default: T) -> T:
    try:
        return kind(config[name]) if config.get(name) is not None else default
    except (TypeError, ValueError, OverflowError):
        _reject(name, f"of type {kind.__name__}", config[name])


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value


def _is_positive_int(value: Any) -> bool:
    return is_whole_number(value) and value <= MAX_SIZE


def _is_odd_square(shape: Any) -> bool:
    square = isinstance(shape, tuple) and len(shape) == 2 and shape[0] == shape[1]
    return square and _is_positive_int(shape[0]) and shape[0] % 2 == 1


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number no larger than a dimension may be."""
    return is_number(value) and -MAX_SIZE <= value <= MAX_SIZE


def _check_positive_ints(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not _is_positive_int(getattr(config, name)):
            _reject(f"{where}.{name}", "a positive integer", getattr(config, name))


def _reject(name: str, wanted: str, found: Any) -> NoReturn:
    shown = repr(found) if len(repr(found)) <= MAX_SHOWN else f"{repr(found)[:MAX_SHOWN]}…"
    raise CheckpointError(f"config.json: {name} must be {wanted}, found {shown}.")
