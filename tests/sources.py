"""Folders that several test files convert."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.checkpoint.layouts import llava
from fastvlm_mlx.checkpoint.names import quantized_linears
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.convert import WRITTEN
from fastvlm_mlx.hub.resolve import NANO

# Every layout that is written, as a parameter; one of them needs a library.
LAYOUTS = [
    pytest.param(layout, marks=pytest.mark.needs("coremltools")) if "apple" in layout else layout
    for layout in WRITTEN
]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes and three control tokens, which fits the smallest vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_tokenizer(folder: Path, target: Path) -> Path:
    """A copy of a folder, with a tokenizer of bytes."""
    shutil.copytree(folder, target)
    write_tokenizer(target)
    return target


def qwen3_folder(data: Path, target: Path) -> Path:
    """The small model with a Qwen3 decoder, in the original's layout, without a tokenizer.

    Its encoder is that of `random-small`; see `make.py` in its folder.
    """
    encoder = mx.load(str(data / "random-small" / "llava" / "model.safetensors"))
    tensors = {name: t for name, t in encoder.items() if name.startswith(llava.ENCODER)}
    tensors |= mx.load(str(data / "qwen3-small" / "model.safetensors"))
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    shutil.copyfile(data / "qwen3-small" / "config.json", target / "config.json")
    return target


def full_nano(target: Path) -> Path:
    """The bundled model with nothing in it quantized."""
    config, tensors = read_checkpoint(NANO)
    for layer, settings in list(quantized_linears(tensors, config)):
        packed = [tensors.pop(f"{layer}.{name}") for name in ("weight", "scales", "biases")]
        tensors[f"{layer}.weight"] = mx.dequantize(*packed, **settings)
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    plain = {k: v for k, v in config.source.items() if not k.startswith("quantization")}
    (target / "config.json").write_text(json.dumps(plain))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(NANO / name, target)
    return target
