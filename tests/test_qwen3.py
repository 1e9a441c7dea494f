"""A LLaVA checkpoint with a Qwen3 decoder, beside what transformers and mlx_lm compute of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.qwen3
import models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from sources import qwen3_folder, write_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.files import read_tensors
from fastvlm_mlx.checkpoint.layouts import transformers
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.checkpoint.names import quantized_linears, unfuse
from fastvlm_mlx.checkpoint.processor_files import config_json
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import CheckpointError, FastVLMConfig, load_config
from fastvlm_mlx.convert import convert
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.text.template import apply_chat_template

IMAGE, PLACES = -200, 4
VOCAB_SIZE = 100
TEXT = {
    "model_type": "llava_qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": VOCAB_SIZE,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in the original's layout, with a tokenizer of bytes."""
    target = qwen3_folder(data, tmp_path_factory.mktemp("qwen3"))
    write_tokenizer(target)
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[FastVLM, fv.Processor]:
    return fv.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def expected(data: Path) -> list[tuple[list[int], mx.array, list[int]]]:
    """(token ids, logits, greedy tokens) of each prompt, from transformers."""
    here = data / "qwen3-small"
    logits = mx.load(str(here / "expected.safetensors"))
    cases = json.loads((here / "expected.json").read_text())
    return [
        (case["input_ids"], logits[f"logits_{i}"], case["greedy_tokens"])
        for i, case in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def pixels(data: Path) -> mx.array:
    arrays = mx.load(str(data / "random-small" / "expected.safetensors"))
    return arrays["pixel_values"][:1].transpose(0, 2, 3, 1)


def random_model(seed: int = 2, **text: Any) -> FastVLM:
    return models.random_model(seed, **TEXT | text)


def reference_of(model: FastVLM) -> mlx_lm.models.qwen3.Model:
    """mlx_lm's Qwen3 with the same weights, by their names on disk."""
    text, names = model.config.text, TEXT.keys() - {"model_type"}
    reference = mlx_lm.models.qwen3.Model(
        mlx_lm.models.qwen3.ModelArgs(
            model_type="qwen3", **{name: getattr(text, name) for name in names}
        )
    )
    decoder = {n: t for n, t in unfuse(model).items() if n.startswith("language_model.")}
    weights = [(name.removeprefix("language_model."), value) for name, value in decoder.items()]
    reference.load_weights(weights, strict=True)
    return reference


def random_ids(length: int, batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(length).integers(0, VOCAB_SIZE, (batch, length)))


def error(found: mx.array, wanted: mx.array) -> float:
    """The largest difference, as a part of the largest value."""
    assert found.shape == wanted.shape
    return (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()


def greedy(model: FastVLM, logits: mx.array, cache: list[KVCache], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        token = mx.argmax(logits[:, -1], axis=-1)
        tokens.append(token.item())
        logits = model(token[None], cache)
    return tokens


# Beside other libraries


@pytest.mark.parametrize("device", ["cpu", "metal"])
@pytest.mark.parametrize("i", [0, 1], ids=["image", "text"])
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    i: int,
    device: str,
    folder: Path,
    pixels: mx.array,
    expected: list[tuple[list[int], mx.array, list[int]]],
    assume: Callable[[str], None],
) -> None:
    ids, logits, tokens = expected[i]
    assume(device)
    model = fv.load_model(folder, dtype="float32")
    places = [place for id in ids for place in [id] * (PLACES if id == IMAGE else 1)]
    cache = model.make_kv_cache()
    found = model(mx.array([places]), cache, pixel_values=pixels if IMAGE in ids else None)
    assert error(found[0], logits) < 1e-4
    assert greedy(model, found, cache, len(tokens)) == tokens
    assert len(set(tokens)) > 4


@pytest.mark.parametrize("dtype, limit", [("float16", 8 * 2**-11), ("bfloat16", 8 * 2**-8)])
def test_half_precision_is_near(
    dtype: str, limit: float, folder: Path, loaded: Any, assume: Callable[[str], None]
) -> None:
    """As on a GPU, where weights keep their dtype; eight roundings of the largest value."""
    assume("metal")
    model, ids = fv.load_model(folder, dtype=dtype), random_ids(12)
    cache = model.make_kv_cache()
    steps = [model(ids[:, i : i + 1], cache) for i in range(12)]
    assert model(ids).dtype == steps[0].dtype == getattr(mx, dtype)
    for found in (model(ids), mx.concatenate(steps, axis=1)):
        assert error(found.astype(mx.float32), loaded[0](ids)) < limit


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 24), (2, 1, 64), (8, 2, 8)], ids=str)
def test_logits_equal_those_of_mlx_lm(heads: tuple[int, int, int], tied: bool) -> None:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    geometry = dict(zip(names, heads, strict=True))
    model = random_model(**geometry, tie_word_embeddings=tied)
    ids = random_ids(23, batch=3)
    assert error(model.language_model(ids), reference_of(model)(ids)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "metal"])
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 11], [19, 1], [20]], ids=str)
def test_steps_equal_the_whole(
    chunks: list[int], device: str, assume: Callable[[str], None]
) -> None:
    assume(device)
    model, ids = random_model(), random_ids(20, batch=2)
    cache, starts = model.make_kv_cache(), np.cumsum([0, *chunks[:-1]])
    steps = [model(ids[:, a : a + n], cache=cache) for a, n in zip(starts, chunks, strict=True)]
    assert error(mx.concatenate(steps, axis=1), reference_of(model)(ids)) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlx_lm_cache.RotatingKVCache(max_size=12, keep=4),
        lambda: mlx_lm_cache.QuantizedKVCache(group_size=32, bits=8),
    ],
    ids=["rotating", "8-bit"],
)
def test_caches_of_mlx_lm_drop_in(make: Any) -> None:
    model, ids = random_model(head_dim=32), random_ids(25)
    reference = reference_of(model)
    ours, theirs = ([make() for _ in model.layers] for _ in range(2))
    for start, end in ((0, 20), (20, 21), (21, 24), (24, 25)):
        step = ids[:, start:end]
        assert error(model(step, cache=ours), reference(step, cache=theirs)) < 1e-4


def test_norms_matter_and_have_their_own_weights() -> None:
    model, ids = random_model(), random_ids(9)
    logits = model(ids)
    for name in ("q_norm", "k_norm"):
        other = random_model()
        other.layers[0].self_attn[name].weight = 1 + other.layers[0].self_attn[name].weight
        assert error(other(ids), logits) > 1e-3


# Folders


def test_the_geometry_of_a_checkpoint(folder: Path) -> None:
    text = load_config(folder).text
    assert (text.model_type, text.head_dim, text.hidden_size) == ("qwen3", 16, 32)
    assert text.qk_norm and not text.attention_bias


@pytest.mark.parametrize(
    "size, fields, head_dim",
    [(384, {}, 128), (512, {"head_dim": 64}, 64), (1024, {"head_dim": None}, 128)],
)
def test_the_fields_of_a_trained_checkpoint(
    size: int, fields: dict[str, Any], head_dim: int
) -> None:
    """Those of Qwen3-0.6B below `mobileclip_l_384`, as transformers 4 writes them."""
    config = FastVLMConfig.from_dict(
        {
            "architectures": ["LlavaQwen3ForCausalLM"],
            "model_type": "llava_qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "layer_types": ["full_attention"] * 28,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "mm_hidden_size": 3072,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": f"mobileclip_l_{size}",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
            **fields,
        }
    )
    assert config.text.head_dim == head_dim and config.vision.image_size == size
    attention = FastVLM(config).layers[0].self_attn
    assert attention.qkv_proj.weight.shape == (32 * head_dim, 1024)
    assert attention.o_proj.weight.shape == (1024, 16 * head_dim)
    assert "bias" not in attention.qkv_proj


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_bias", True),
        ("attention_bias", "no"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("head_dim", 15),
        ("head_dim", 0),
        ("head_dim", "16"),
        ("hidden_act", "gelu"),
    ],
)
def test_what_the_decoder_does_not_have_is_refused(name: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"{name} must be .*\.$"):
        FastVLMConfig.from_dict(config | {name: value})


def test_a_decoder_of_its_own_in_text_config() -> None:
    for text in (TEXT, TEXT | {"model_type": "qwen3"}):
        nested = {"model_type": "fastvlm", "vision_config": models.VISION, "text_config": text}
        config = FastVLMConfig.from_dict(nested)
        assert (config.text.qk_norm, config.text.head_dim) == (True, 24)
        written = config_json(config, "float32", {})
        assert written["model_type"] == "llava_qwen3"
        assert FastVLMConfig.from_dict(written).text == config.text


def test_to_mlx_and_back(folder: Path, tmp_path: Path) -> None:
    there = convert(folder, tmp_path / "mlx", progress=False)
    back = convert(there, tmp_path / "llava", layout="llava", progress=False)
    for written in (there, back):
        config = json.loads((written / "config.json").read_text())
        assert (config["model_type"], config["head_dim"]) == ("llava_qwen3", 16)
        assert load_config(written).text == load_config(folder).text
    tensors, again = read_tensors(folder), read_tensors(back)
    assert again.keys() == tensors.keys()
    counters = {name for name in tensors if "num_batches_tracked" in name}
    assert all(mx.array_equal(again[n], tensors[n]) for n in tensors.keys() - counters)


@pytest.mark.parametrize("quantize", [{"bits": 4, "group_size": 32}, "mxfp8"], ids=str)
def test_quantized(quantize: Any, folder: Path, tmp_path: Path) -> None:
    ids = random_ids(12)
    written = convert(folder, tmp_path / "packed", quantize=quantize, progress=False)
    model = fv.load_model(written, dtype="float32")
    on_the_fly = fv.load_model(folder, dtype="float32", quantize=quantize)
    assert mx.array_equal(model(ids), on_the_fly(ids))
    assert error(model(ids), unpacked(written, tmp_path / "unpacked")(ids)) < 1e-4
    names = {name.rpartition(".")[0] for name in read_tensors(written) if name.endswith(".scales")}
    assert "language_model.model.layers.1.self_attn.k_proj" in names
    assert not any("norm" in name for name in names)


def unpacked(folder: Path, target: Path) -> FastVLM:
    """A quantized model in float, with the values that its packed weights stand for."""
    config, tensors = read_checkpoint(folder)
    for layer, settings in list(quantized_linears(tensors, config)):
        names = [f"{layer}.{part}" for part in ("weight", "scales", "biases")]
        packed = [tensors.pop(name) for name in names if name in tensors]
        tensors[f"{layer}.weight"] = mx.dequantize(*packed, **settings, dtype=mx.float32)
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    plain = {k: v for k, v in config.source.items() if not k.startswith("quantization")}
    (target / "config.json").write_text(json.dumps(plain))
    return fv.load_model(target, dtype="float32")


def test_to_transformers_and_back(folder: Path, tmp_path: Path) -> None:
    there = convert(folder, tmp_path / "there", layout="transformers", progress=False)
    text = json.loads((there / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["head_dim"]) == ("qwen3", 16)
    assert "model.language_model.layers.0.self_attn.q_norm.weight" in read_tensors(there)
    again = convert(there, tmp_path / "again", layout="llava", progress=False)
    config = json.loads((again / "config.json").read_text())
    assert config["model_type"] == "llava_qwen3"
    assert config["architectures"] == ["LlavaQwen3ForCausalLM"]
    assert load_config(again).text == load_config(folder).text
    assert transformers.config_json(load_config(again), "float32", 260)["text_config"] == text


def test_the_demo_app_has_no_qwen3(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert.__globals__, "import_coremltools", lambda what: None)
    with pytest.raises(ValueError, match="Qwen2"):
        convert(folder, tmp_path / "app", layout="apple-export", progress=False)


def test_a_missing_norm_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = read_tensors(folder)
    tensors.pop("model.layers.1.self_attn.k_norm.weight")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight .* missing"):
        fv.load_model(tmp_path)


# Answers

QUESTIONS = ["What is this?", "Hello!", "abcabcabcabc"]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "conv_mode": "plain"}


def test_batches_drafts_and_conversations_say_what_generate_says(loaded: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    requests = [(question, image) for question in QUESTIONS]
    answers = [fv.generate(*loaded, q, image=image, **OPTIONS) for q in QUESTIONS]
    assert len(set(answers)) == 3 and all(answers)
    assert fv.batch_generate(*loaded, requests, **OPTIONS) == answers
    for drafter in ({"prompt_lookup": 4}, {"draft_model": loaded}):
        found = [fv.generate(*loaded, q, image=image, **OPTIONS, **drafter) for q in QUESTIONS]
        assert found == answers
    cache = fv.PromptCache(loaded[0])
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert fv.generate(*loaded, question, image=image, prompt_cache=cache, **OPTIONS) == answer
    chat = fv.Chat(*loaded, **OPTIONS)
    assert chat.ask(QUESTIONS[0], image=image) == answers[0]
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert chat.ask(QUESTIONS[1]) == fv.generate(*loaded, turns, image=image, **OPTIONS)


# What matters of Qwen3's: no system prompt of its own, and thoughts that only it had.
REASONING = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("template, kept", [(REASONING, False), ("{{ messages }}", True)])
def test_prompts_are_those_of_the_originals_code(
    template: str, kept: bool, folder: Path, tmp_path: Path
) -> None:
    """A checkpoint keeps the base's template, but was trained with ChatML and a system prompt."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(template)
    tokenizer = load_processor(copy).tokenizer
    assert (tokenizer.chat_template == template) is kept
    if not kept:
        assert apply_chat_template(tokenizer, "Hi") == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )


def test_an_image_of_384_pixels(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["vision_config"]["image_size"]
    config["mm_vision_tower"] = "mobileclip_l_384"
    (copy / "config.json").write_text(json.dumps(config))
    written = convert(copy, tmp_path / "mlx", progress=False)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    answers = []
    for each in (copy, written):
        model, processor = fv.load(each, dtype="float32")
        assert processor.preprocess(image).shape == (1, 384, 384, 3)
        *_, last = fv.stream_generate(model, processor, "?", image=image, **OPTIONS)
        answers.append(
            (last.prompt_tokens, fv.generate(model, processor, "?", image=image, **OPTIONS))
        )
    assert answers[0] == answers[1] and answers[0][0] > (384 // 64) ** 2


def test_all_parameters_are_those_of_the_file(folder: Path, loaded: Any) -> None:
    """None stays as it was made."""
    found = dict(tree_flatten(loaded[0].language_model.parameters()))
    tensors = read_tensors(folder)
    for norm in ("q_norm", "k_norm"):
        name = f"layers.1.self_attn.{norm}.weight"
        assert mx.array_equal(found[name], tensors[f"model.{name}"])
