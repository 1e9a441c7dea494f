import copy
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from fastvlm_mlx.checkpoint.processor_files import config_json
from fastvlm_mlx.config import (
    CheckpointError,
    FastVLMConfig,
    TextConfig,
    VisionConfig,
    load_config,
    projector_depth,
    read_json,
)
from fastvlm_mlx.model.fastvlm import FastVLM

# The fields of the released 0.5B checkpoint's config.json that matter.
RELEASED = {
    "model_type": "llava_qwen2",
    "mm_vision_tower": "mobileclip_l_1024",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 3072,
    "image_aspect_ratio": "pad",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tokenizer_model_max_length": 8192,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# A whole one, small enough to build.
SMALL = {
    "model_type": "llava_qwen2",
    "mm_vision_tower": "mobileclip_test_128",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 256,
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "image_token_index": -200,
    "hidden_size": 64,
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "tokenizer_model_max_length": 2048,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "quantization": None,
    "text_config": None,
    "vision_config": {
        "image_size": 128,
        "patch_size": 64,
        "layers": [1, 1, 2, 1, 1],
        "embed_dims": [16, 32, 64, 64, 128],
        "mlp_ratios": [4, 4, 4, 4, 4],
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "downsamples": [True, True, True, True, True],
        "repmixer_kernel_size": 3,
        "down_patch_size": 7,
        "down_stride": 2,
        "cls_ratio": 2.0,
        "projection_dim": 32,
        "head_dim": 32,
    },
}
# What others have as well.
MORE = ("head_dim", "attention_bias", "layer_types", "rope_parameters", "dtype")
PATHS = [(name,) for name in (*SMALL, *MORE)]
PATHS += [("vision_config", name) for name in SMALL["vision_config"]]
MALFORMED = [
    ("model_type", None),
    ("model_type", "llava"),
    ("model_type", ["llava_qwen2"]),
    ("mm_projector_type", "mlp0x_gelu"),
    ("mm_projector_type", "resampler"),
    ("mm_projector_type", "identity"),  # 256 channels do not go into a decoder of 64
    ("mm_projector_type", {"depth": 2}),
    ("mm_hidden_size", 255),
    ("mm_hidden_size", "wide"),
    ("mm_patch_merge_type", "diagonal"),
    ("mm_use_im_start_end", True),
    ("image_aspect_ratio", "stretch"),
    ("image_aspect_ratio", ["pad"]),
    ("image_grid_pinpoints", "(1x2)"),
    ("image_grid_pinpoints", [1, 2]),
    ("image_grid_pinpoints", [[1, "wide"]]),
    ("image_grid_pinpoints", {"a": 1}),
    ("image_grid_pinpoints", "[(1e999, 2)]"),
    ("image_grid_pinpoints", [[0, 128]]),
    ("image_grid_pinpoints", [[128.5, 128]]),
    ("image_grid_pinpoints", [[True, True]]),
    ("image_grid_pinpoints", ["12"]),
    ("image_grid_pinpoints", "(" * 5000),
    ("image_token_index", "last"),
    ("image_token_index", "5"),
    ("image_token_index", math.inf),
    ("image_token_index", 2**63),
    ("image_token_index", 1.5),
    ("image_token_index", True),
    ("image_token_index", {}),
    ("hidden_size", None),
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 64.0),
    ("hidden_size", "64"),
    ("hidden_size", True),
    ("hidden_size", [64]),
    ("hidden_size", 10**400),
    ("hidden_size", 2**31 - 1),
    ("intermediate_size", 2**31 - 1),  # gate and up are one product
    ("num_attention_heads", 2**20),
    ("hidden_size", 66),  # 4 heads
    ("hidden_act", "gelu"),
    ("num_hidden_layers", None),
    ("num_hidden_layers", 0),
    ("intermediate_size", "wide"),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 3),
    ("vocab_size", None),
    ("vocab_size", 320.5),
    ("max_position_embeddings", -1),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", math.nan),
    ("rope_theta", -1.0),
    ("rope_theta", [1]),
    ("rope_theta", math.nan),
    ("rope_theta", math.inf),
    ("rope_scaling", "yarn"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": {}}),
    ("rope_theta", True),
    ("rope_theta", 10**400),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", False),  # transformers' Qwen2 always has it
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("head_dim", 15),
    ("head_dim", 2**28),
    ("torch_dtype", 16),
    ("torch_dtype", ["float32"]),
    ("use_sliding_window", True),
    ("tokenizer_model_max_length", "long"),
    ("tokenizer_model_max_length", [2048]),
    ("tokenizer_model_max_length", math.inf),
    ("tokenizer_model_max_length", 10**400),
    ("tokenizer_model_max_length", "2048"),
    ("tokenizer_model_max_length", 0),
    ("tokenizer_model_max_length", True),
    ("eos_token_id", "end"),
    ("eos_token_id", {}),
    ("eos_token_id", [[2]]),
    ("eos_token_id", True),
    ("eos_token_id", -1),
    ("eos_token_id", 2**63),
    ("eos_token_id", 2.0),
    ("eos_token_id", [2, "end"]),
    ("quantization", 4),
    ("quantization", [4]),
    ("text_config", 5),
    ("text_config", "qwen2"),
    ("text_config", {"model_type": "llama", "hidden_size": 64}),
    ("vision_config", "fastvithd"),
    ("vision_config", "x" * 10**6),
    ("vision_config", [1, 2]),
    ("vision_config.image_size", 0),
    ("vision_config.image_size", 128.0),
    ("vision_config.image_size", 100),
    ("vision_config.patch_size", 32),
    ("vision_config.layers", 5),
    ("vision_config.layers", []),
    ("vision_config.layers", [1, 1, 2, 1, 0]),
    ("vision_config.layers", [1, 1, 2, 1, [1]]),
    ("vision_config.embed_dims", [16, 32, 64, 64]),
    ("vision_config.embed_dims", [16, 32, 64, 64, "wide"]),
    ("vision_config.embed_dims", [16, 32, 64, 64, 10**400]),
    ("vision_config.embed_dims", [16, 24, 64, 64, 128]),  # not a multiple of the stage before
    ("vision_config.embed_dims", [16, 16, 16, 16, 16]),  # heads of 32 channels
    ("vision_config.mlp_ratios", [4, 4, 4, 4]),
    ("vision_config.mlp_ratios", [4, 4, 4, 4, 0]),
    ("vision_config.mlp_ratios", [4, 4, 4, 4, "4"]),
    ("vision_config.mlp_ratios", [4, 4, 4, 4, math.inf]),
    ("vision_config.mlp_ratios", [4, 4, 4, 4, 1e-9]),  # no hidden channel
    ("vision_config.token_mixers", "repmixer"),
    ("vision_config.token_mixers", ["repmixer", "repmixer", "repmixer", "attention", "pool"]),
    ("vision_config.token_mixers", ["repmixer", "repmixer", "repmixer", "attention", []]),
    ("vision_config.pos_embs_shapes", [None, None, None, [7, 7]]),
    ("vision_config.pos_embs_shapes", [None, None, None, [7, 7], [7, 5]]),
    ("vision_config.pos_embs_shapes", [None, None, None, [7, 7], 7]),
    ("vision_config.pos_embs_shapes", [None, None, None, [7, 7], [6, 6]]),
    ("vision_config.downsamples", [True]),
    ("vision_config.downsamples", "yes"),
    ("vision_config.downsamples", ["x"] * 5),
    ("vision_config.downsamples", [[7, 7]] * 5),
    ("vision_config.downsamples", [40, 40, 40, 40, 40]),
    ("vision_config.repmixer_kernel_size", 0),
    ("vision_config.repmixer_kernel_size", "3"),
    ("vision_config.repmixer_kernel_size", 4),  # padding by half keeps the size of odd ones alone
    ("vision_config.down_patch_size", -7),
    ("vision_config.down_patch_size", 8),
    ("vision_config.down_stride", 1.5),
    ("vision_config.cls_ratio", 1.5),
    ("vision_config.cls_ratio", -1),
    ("vision_config.cls_ratio", 1e-9),
    ("vision_config.cls_ratio", "2"),
    ("vision_config.cls_ratio", math.nan),
    ("vision_config.cls_ratio", 1e308),
    ("vision_config.projection_dim", "wide"),
    ("vision_config.projection_dim", -1),
    ("vision_config.head_dim", 0),
]

quick = settings(max_examples=150, deadline=None)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([10**6, 2**31, 2**63, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "a\udfff", "x" * 10_000, "qwen3", "llava_qwen3"])
    | st.sampled_from(["repmixer", "attention", "pad", "anyres", "identity", "mlp3x_gelu", "64"])
    | st.sampled_from(["llava_qwen2", "fastvlm", "fast_vlm", "mobileclip_l_512", "[(1e999, 1)]"])
)
json_values = st.recursive(
    scalars,
    lambda values: (
        st.lists(values, max_size=5)
        | st.lists(values, min_size=5, max_size=5)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "rope_theta", "layers"]), values)
    ),
    max_leaves=8,
)


def with_field(name: str, value: Any) -> dict[str, Any]:
    """SMALL with another value at a dotted name."""
    config = copy.deepcopy(SMALL)
    *parents, last = name.split(".")
    (config[parents[0]] if parents else config)[last] = value
    return config


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and "\n" not in message and len(message) < 400


def is_small(config: FastVLMConfig) -> bool:
    """Whether building the model takes no time."""
    vision, text = config.vision, config.text
    widths = [*vision.embed_dims, vision.hidden_size, text.vocab_size, text.intermediate_size]
    widths += [vision.down_patch_size, vision.repmixer_kernel_size, max(vision.mlp_ratios)]
    widths += [s[0] for s in vision.pos_embs_shapes if s]
    layers = sum(vision.layers) + text.num_hidden_layers + config.projector_depth
    return layers < 100 and max(*widths, text.hidden_size) < 1000


def check_total(value: Any) -> None:
    """A config or CheckpointError comes out; a config can be written, read and made a model of."""
    try:
        config = FastVLMConfig.from_dict(value)
    except CheckpointError as error:
        assert is_one_sentence(str(error)) and str(error).isprintable()
        return
    written = config_json(config, "float32", config.quantization)
    again = FastVLMConfig.from_dict(json.loads(json.dumps(written)))
    assert (again.vision, again.text) == (config.vision, config.text)
    assert again.image_token_index == -200 and again.max_length == config.max_length
    if is_small(config):
        assert all(0 not in array.shape for _, array in tree_flatten(FastVLM(config).parameters()))


@pytest.mark.parametrize("tower, size", [("mobileclip_l_1024", 1024), ("mobileclip_l_512", 512)])
@pytest.mark.parametrize("vision_config", [{}, None, "absent"])
def test_the_name_of_a_released_tower_gives_its_geometry(tower, size, vision_config):
    config = RELEASED | {"mm_vision_tower": tower, "vision_config": vision_config}
    if vision_config == "absent":
        del config["vision_config"]
    vision = FastVLMConfig.from_dict(config).vision
    assert vision == VisionConfig(
        image_size=size,
        layers=(2, 12, 24, 4, 2),
        embed_dims=(96, 192, 384, 768, 1536),
        mlp_ratios=(4, 4, 4, 4, 4),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention", "attention"),
        pos_embs_shapes=(None, None, None, (7, 7), (7, 7)),
    )
    assert (vision.hidden_size, vision.patch_size) == (3072, 64)


def test_a_tower_may_be_a_path_that_ends_in_its_name():
    config = RELEASED | {"mm_vision_tower": "checkpoints/mobileclip_l_512"}
    assert FastVLMConfig.from_dict(config).vision.image_size == 512


def test_vision_config_goes_before_the_name_of_the_tower():
    config = RELEASED | {"vision_config": {"image_size": 768}}
    assert FastVLMConfig.from_dict(config).vision.image_size == 768


@pytest.mark.parametrize("tower", ["openai/clip-vit-large-patch14-336", "mobileclip_s_256"])
def test_an_unknown_tower_is_named(tower):
    with pytest.raises(CheckpointError, match="unknown vision tower") as error:
        FastVLMConfig.from_dict(RELEASED | {"mm_vision_tower": tower})
    assert tower in str(error.value) and is_one_sentence(str(error.value))


def test_a_tower_whose_size_is_no_image_size():
    for size in ("0", "1000", "9" * 5000):
        with pytest.raises(CheckpointError):
            FastVLMConfig.from_dict(RELEASED | {"mm_vision_tower": f"mobileclip_l_{size}"})


def test_the_fields_of_a_released_checkpoint():
    config = FastVLMConfig.from_dict(RELEASED)
    assert config.text == TextConfig(hidden_size=896, num_hidden_layers=24, vocab_size=151936)
    assert config.text.head_dim == 64
    assert config.max_length == 8192
    assert config.eos_token_ids == (151645,)
    assert config.projector_depth == 2
    assert config.image_token_index == -200
    assert config.source == RELEASED


def test_the_fields_of_a_small_one():
    config = FastVLMConfig.from_dict(SMALL)
    vision = config.vision
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (128, 64, 256)
    assert vision.embed_dims == (16, 32, 64, 64, 128)
    assert vision.pos_embs_shapes == (None, None, None, (7, 7), (7, 7))
    assert config.text.rope_theta == 1e6 and config.text.num_key_value_heads == 2
    assert hash(vision) == hash(FastVLMConfig.from_dict(copy.deepcopy(SMALL)).vision)


def test_other_spellings():
    config = FastVLMConfig.from_dict(
        SMALL
        | {
            "model_type": "fastvlm",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": "[(128, 256), (256, 128)]",
            "mm_patch_merge_type": "spatial_unpad",
            "eos_token_id": [2, 3],
            "tokenizer_model_max_length": 1e30,  # transformers' way to say there is no limit
            "quantization_config": {"bits": 4, "group_size": 64},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        }
    )
    assert config.image_grid_pinpoints == ((128, 256), (256, 128))
    assert config.mm_patch_merge_type == "spatial_unpad"
    assert config.eos_token_ids == (2, 3)
    assert config.max_length == int(1e30)
    assert config.quantization == {"bits": 4, "group_size": 64}
    assert config.text.rope_theta == 5000.0


@pytest.mark.parametrize("value, mode", [(None, "square"), ("none", "square"), ("pad", "pad")])
def test_image_aspect_ratio(value, mode):
    assert FastVLMConfig.from_dict(with_field("image_aspect_ratio", value)).image_aspect_ratio == (
        mode
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_of_the_projector(depth):
    assert projector_depth(f"mlp{depth}x_gelu") == depth
    assert projector_depth("linear") == 1 and projector_depth("identity") == 0


def test_patch_size_follows_the_downsampling_layers():
    # Channels that grow ask for a downsampling layer even where `downsamples` has none.
    geometry = SMALL["vision_config"] | {"downsamples": [True, True, True, False, False]}
    vision = VisionConfig.from_dict({"vision_config": geometry})
    assert (vision.patch_size, vision.has_downsample(3)) == (64, True)
    geometry |= {"embed_dims": [16, 32, 64, 64, 64], "patch_size": 32}
    vision = VisionConfig.from_dict({"vision_config": geometry})
    assert (vision.patch_size, vision.has_downsample(3)) == (32, False)


def id_of(value: Any) -> str:
    return str(value)[:40]


@pytest.mark.parametrize("name, value", MALFORMED, ids=id_of)
def test_a_malformed_field_is_named(name, value):
    with pytest.raises(CheckpointError) as error:
        FastVLMConfig.from_dict(with_field(name, value))
    message = str(error.value)
    assert is_one_sentence(message) and message.startswith("config.json")
    assert name.split(".")[-1] in message


def test_a_long_value_is_not_quoted_whole():
    with pytest.raises(CheckpointError) as error:
        FastVLMConfig.from_dict(with_field("model_type", "x" * 10_000))
    assert is_one_sentence(str(error.value))


def test_a_number_that_python_does_not_write():
    with pytest.raises(CheckpointError, match="hidden_size must be a positive integer") as error:
        FastVLMConfig.from_dict(with_field("hidden_size", 10**5000))
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_field_without_default_is_asked_for(name):
    config = {k: v for k, v in SMALL.items() if k != name}
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        FastVLMConfig.from_dict(config)


@quick
@given(st.dictionaries(st.sampled_from([*SMALL, *MORE]), json_values))
@example({"model_type": "llava_qwen2"})
@example({"model_type": "fast_vlm", "vision_config": {"model_args": {"layers": 1}}})
def test_any_object_gives_a_config_or_checkpoint_error(config):
    check_total(config)


@quick
@given(
    st.sampled_from(["llava_qwen2", "llava_qwen3"]),
    st.lists(st.tuples(st.sampled_from(PATHS), json_values), min_size=1, max_size=3),
)
@example("llava_qwen2", [(("vision_config", "downsamples"), [1e308] * 5)])
@example("llava_qwen3", [(("head_dim",), 2**29)])
def test_any_field_changed_gives_a_config_or_checkpoint_error(model_type, changes):
    config = copy.deepcopy(SMALL) | {"model_type": model_type}
    for path, value in changes:
        if len(path) == 1:
            config[path[0]] = value
        elif isinstance(config["vision_config"], dict):
            config["vision_config"][path[1]] = value
    check_total(config)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not valid JSON"),
        (b'{"model_type": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "found list"),
        (b'"llava_qwen2"', "found str"),
        (b"null", "found NoneType"),
    ],
    ids=["empty", "cut", "no-text", "deep", "list", "string", "null"],
)
def test_a_file_that_is_no_json_object(tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize(
    "content",
    [rb'{"name": "\ud800"}', rb'{"\uDFFF": 1}', b'{"name": "\xed\xa0\x80"}'],
    ids=["value", "name", "bytes"],
)
def test_half_a_surrogate_pair_is_no_text(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"surrogate|utf-8") as error:
        read_json(tmp_path / "config.json")
    assert is_one_sentence(str(error.value)) and str(error.value).isprintable()
    (tmp_path / "config.json").write_bytes(rb'{"name": "\ud83d\udc27 \\ud800"}')
    assert read_json(tmp_path / "config.json") == {"name": "🐧 \\ud800"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_in_any_encoding_of_json(tmp_path, encoding):
    (tmp_path / "config.json").write_bytes('{"name": "Ärger 🐧"}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"name": "Ärger 🐧"}


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json") as error:
        load_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_file_with_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert load_config(tmp_path) == FastVLMConfig.from_dict(SMALL)
    assert read_json(tmp_path / "config.json") == SMALL
