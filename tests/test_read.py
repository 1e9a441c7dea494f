"""Checkpoints whose tensors or config.json are wrong."""

from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import logits_of, one_sentence, rewrite

from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import CheckpointError

# --- what config.json says wrongly ---


def test_a_head_that_the_config_says_is_tied(small_copy, small_tensors):
    head = mx.random.normal(small_tensors["model.embed_tokens.weight"].shape)
    loaded = load_model(rewrite(small_copy, small_tensors | {"lm_head.weight": head}))
    assert not loaded.config.text.tie_word_embeddings
    assert mx.array_equal(loaded.language_model.lm_head.weight, head)
    states = mx.ones((1, 64))
    assert mx.allclose(loaded.language_model.logits(states), states @ head.T, atol=1e-4)


def test_a_head_that_the_config_says_is_there(small_copy, small_tensors, small):
    loaded = load_model(rewrite(small_copy, small_tensors, tie_word_embeddings=False))
    assert loaded.config.text.tie_word_embeddings
    assert "lm_head" not in loaded.language_model
    assert mx.array_equal(logits_of(loaded), logits_of(small))


# --- tensors that do not fit ---

NORM = "model.layers.1.input_layernorm.weight"
NETWORK = "model.vision_tower.vision_tower.model.network"
CONV = f"{NETWORK}.1.proj.0.lkb_reparam.weight"
LAYER_SCALE = f"{NETWORK}.0.0.layer_scale"


def spoil(folder: Path, tensors: dict[str, mx.array], **changes: mx.array | None) -> str:
    """The message of the error that these tensors (None for missing) give."""
    with pytest.raises(CheckpointError) as error:
        spoiled = {k: v for k, v in (tensors | changes).items() if v is not None}
        load_model(rewrite(folder, spoiled))
    assert str(folder) in str(error.value)
    return one_sentence(error)


def test_missing_tensors(small_copy, small_tensors):
    message = spoil(small_copy, small_tensors, **{NORM: None, CONV: None})
    assert f"{NORM} (64,) is missing" in message
    assert f"{CONV} (32, 1, 7, 7) is missing" in message
    assert "more" not in message


def test_surplus_tensors(small_copy, small_tensors):
    extra = "model.layers.2.input_layernorm.weight"
    message = spoil(small_copy, small_tensors, **{extra: mx.zeros(64)})
    assert f"{extra} (64,) is surplus" in message


def test_misshapen_tensors(small_copy, small_tensors):
    message = spoil(
        small_copy, small_tensors, **{NORM: mx.zeros(63), CONV: mx.zeros((32, 1, 5, 5))}
    )
    assert f"{NORM} is (63,) where (64,) is expected" in message
    assert f"{CONV} is (32, 1, 5, 5) where (32, 1, 7, 7) is expected" in message


@pytest.mark.parametrize("name", [NORM, CONV, LAYER_SCALE, "model.mm_projector.0.weight"])
@pytest.mark.parametrize("shape", [(), (7,), (64, 64), (1, 2, 3, 4), (2, 2, 2, 2, 2)])
def test_tensors_of_another_rank(small_copy, small_tensors, name, shape):
    assert name in spoil(small_copy, small_tensors, **{name: mx.zeros(shape)})


def test_up_to_ten_tensors_are_named(small_copy, small_tensors):
    missing = [name for name in small_tensors if name.startswith("model.layers.1.")]
    assert len(missing) == 12
    message = spoil(small_copy, small_tensors, **dict.fromkeys(missing))
    assert sum(name in message for name in missing) == 10
    assert message.endswith("; and 2 more.")


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.input_layernorm",
        f"{NETWORK}.0.0.convffn.fc1",
        f"{NETWORK}.0.0.nothing",
    ],
)
def test_scales_without_a_quantized_layer(small_copy, small_tensors, module):
    assert f"{module}." in spoil(
        small_copy, small_tensors, **{f"{module}.scales": mx.zeros((4, 2))}
    )


def test_integers_are_no_weights(small_copy, small_tensors):
    assert NORM in spoil(small_copy, small_tensors, **{NORM: mx.ones(64, mx.int8)})


def test_counters_and_frequencies_are_not_needed(small_copy, small_tensors, small):
    kept = {k: v for k, v in small_tensors.items() if "num_batches_tracked" not in k}
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    assert mx.array_equal(logits_of(load_model(rewrite(small_copy, kept))), logits_of(small))


def test_the_classifiers_head_is_not_needed(small_copy, small_tensors, small):
    kept = {k: v for k, v in small_tensors.items() if not k.endswith("head.proj")}
    assert len(kept) == len(small_tensors) - 1
    assert mx.array_equal(logits_of(load_model(rewrite(small_copy, kept))), logits_of(small))
