"""What is remembered between calls: never another answer, and never more than is allowed."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest
from models import PANDA, PENGUINS, Nano

import fastvlm_mlx as fv
from fastvlm_mlx.generation.prefix import common_prefix
from fastvlm_mlx.generation.prompt_cache import image_key
from fastvlm_mlx.model.fastvlm import FastVLM

COUNT, DESCRIBE = "How many penguins are there?", "Describe the image."


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """The images encoded and the lengths prefilled, as they happen."""
    done: dict[str, list[int]] = {"encoded": [], "prefilled": []}
    encode, run = FastVLM.encode_image, type(fv.load()[0].language_model).hidden_states

    def encode_image(self: FastVLM, pixel_values: mx.array) -> mx.array:
        done["encoded"].append(len(pixel_values))
        return encode(self, pixel_values)

    def hidden_states(self, input_ids, cache=None, input_embeddings=None) -> mx.array:  # type: ignore[no-untyped-def]
        if input_embeddings is not None:
            done["prefilled"].append(input_embeddings.shape[1])
        return run(self, input_ids, cache, input_embeddings)

    monkeypatch.setattr(FastVLM, "encode_image", encode_image)
    monkeypatch.setattr("fastvlm_mlx.model.qwen2.Qwen2.hidden_states", hidden_states)
    yield done


def test_an_image_is_encoded_and_read_once(nano: Nano, work: dict[str, list[int]]) -> None:
    model, _ = nano
    alone = [fv.generate(*nano, question, image=PENGUINS) for question in (COUNT, DESCRIBE)]
    whole = work["prefilled"][:]
    work["encoded"].clear()
    work["prefilled"].clear()
    prompt_cache = fv.PromptCache(model)
    for _ in range(2):
        found = [
            fv.generate(*nano, q, image=PENGUINS, prompt_cache=prompt_cache)
            for q in (COUNT, DESCRIBE)
        ]
        assert found == alone
    assert work["encoded"] == [1]
    first, second, *again = work["prefilled"]
    assert first == whole[0] and second < whole[1] // 2 and again == [1, 1]


def test_another_image_is_not_mistaken(nano: Nano, work: dict[str, list[int]]) -> None:
    prompt_cache = fv.PromptCache(nano[0])
    for image in (PENGUINS, PANDA, PENGUINS):
        expected = fv.generate(*nano, DESCRIBE, image=image)
        work["encoded"].clear()
        assert fv.generate(*nano, DESCRIBE, image=image, prompt_cache=prompt_cache) == expected
    assert work["encoded"] == []
    swapped = [PANDA, PENGUINS]
    expected = fv.generate(*nano, DESCRIBE, image=swapped)
    assert fv.generate(*nano, DESCRIBE, image=swapped[::-1], prompt_cache=prompt_cache)
    assert fv.generate(*nano, DESCRIBE, image=swapped, prompt_cache=prompt_cache) == expected


def test_the_prefix_before_the_image_is_shared(nano: Nano, work: dict[str, list[int]]) -> None:
    prompt_cache = fv.PromptCache(nano[0])
    for image in (PENGUINS, PANDA):
        fv.generate(
            *nano, DESCRIBE, image=image, system="Answer in one word.", prompt_cache=prompt_cache
        )
    first, second = work["prefilled"]
    assert 16 < second < first  # the visual tokens are other ones


@pytest.mark.parametrize(
    "options",
    [{"kv_bits": 8}, {"max_kv_size": 64}, {"prompt_lookup": 3}, {"temperature": 1.0, "seed": 3}],
    ids=str,
)
def test_options_answer_as_without(nano: Nano, options: dict[str, int]) -> None:
    prompt_cache = fv.PromptCache(nano[0])
    expected = fv.generate(*nano, COUNT, image=PENGUINS, **options)
    for _ in range(2):
        assert (
            fv.generate(*nano, COUNT, image=PENGUINS, prompt_cache=prompt_cache, **options)
            == expected
        )


def test_a_stopped_answer_leaves_what_it_read(nano: Nano, work: dict[str, list[int]]) -> None:
    prompt_cache = fv.PromptCache(nano[0])
    responses = fv.stream_generate(*nano, COUNT, image=PENGUINS, prompt_cache=prompt_cache)
    next(responses)
    responses.close()  # type: ignore[attr-defined]
    expected = fv.generate(*nano, COUNT, image=PENGUINS)
    work["prefilled"].clear()
    assert fv.generate(*nano, COUNT, image=PENGUINS, prompt_cache=prompt_cache) == expected
    assert work["prefilled"] == [1]


@pytest.mark.parametrize("max_bytes", [1, 20_000, 250_000, 2**30])
def test_never_keeps_more_than_allowed(nano: Nano, max_bytes: int) -> None:
    prompt_cache = fv.PromptCache(nano[0], max_bytes=max_bytes)
    most = 0
    for image in (PENGUINS, PANDA):
        for question in (COUNT, DESCRIBE):
            expected = fv.generate(*nano, question, image=image, max_tokens=3)
            assert (
                fv.generate(*nano, question, image=image, prompt_cache=prompt_cache, max_tokens=3)
                == expected
            )
            most = max(most, prompt_cache.nbytes)
            assert prompt_cache.nbytes <= max_bytes
    assert (most > 0) == (max_bytes > 1)
    prompt_cache.clear()
    assert prompt_cache.nbytes == 0


def test_is_for_one_model(nano: Nano, small: FastVLM) -> None:
    with pytest.raises(ValueError, match="another model"):
        fv.generate(*nano, COUNT, image=PENGUINS, prompt_cache=fv.PromptCache(small))


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, "1 GB", None])
def test_bad_bounds(nano: Nano, max_bytes: object) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        fv.PromptCache(nano[0], max_bytes=max_bytes)  # type: ignore[arg-type]


def test_keys_tell_images_apart() -> None:
    pixels = mx.zeros((1, 64, 64, 3), mx.uint8)
    other = pixels + mx.eye(64, dtype=mx.uint8)[None, :, :, None]
    keys = {
        image_key(pixels, (10, 10)),
        image_key(other, (10, 10)),
        image_key(pixels, (10, 20)),
        image_key(pixels.astype(mx.float32), (10, 10)),
        image_key(pixels.reshape(4, 32, 32, 3), (10, 10)),
    }
    assert len(keys) == 5 and image_key(mx.array(pixels), (10, 10)) in keys


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == common_prefix([1, 2, 4], [1, 2]) == 2
