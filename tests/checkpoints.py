"""What several tests of checkpoints share."""

import json
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.model.fastvlm import FastVLM

PLACES = 4  # visual tokens of an image of 128 x 128 pixels
MIB = 2**20


@contextmanager
def peak_memory():
    """Bytes that were allocated at most in the block, beyond those before: its one element."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, used = mx.get_active_memory(), []
    yield used
    used.append(max(mx.get_peak_memory(), before) - before)


def rewrite(folder: Path, tensors: dict[str, mx.array], **fields) -> Path:
    """Save other tensors, or other fields of config.json, in a folder."""
    mx.eval(tensors)  # they may be those of the file that is replaced
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def logits_of(model: FastVLM) -> mx.array:
    """Logits of one prompt with one image."""
    ids = [5, 9, 11, *[model.config.image_token_index] * PLACES, 17, 23, 42, 7]
    pixels = mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(0))
    return model(mx.array([ids]), pixel_values=pixels).astype(mx.float32)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    """The message of an error, which must be one sentence."""
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message
