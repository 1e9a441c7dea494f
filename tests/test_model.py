import math
from itertools import chain
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache

import fastvlm_mlx as fv
from fastvlm_mlx.generation.generate import generate, stream_generate
from fastvlm_mlx.image.grid import anyres_grid
from fastvlm_mlx.model.fastvlm import FastVLM, unpad_margins
from fastvlm_mlx.processor import Processor

V = -200  # a visual token's place
FIELDS = {
    "mm_projector_type": "mlp2x_gelu",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 768,
}
GRID = [[128, 256], [256, 128], [256, 256], [384, 128], [128, 384]]
SIZES = [(300, 200), (200, 300), (128, 128), (500, 90), (90, 500), (1000, 3), (3, 1000), (257, 256)]


def random_model(**fields: Any) -> FastVLM:
    return models.random_model(0, **FIELDS | fields)


def anyres_model(merge_type: str) -> FastVLM:
    return random_model(
        image_aspect_ratio="anyres", mm_patch_merge_type=merge_type, image_grid_pinpoints=GRID
    )


def random_pixels(*sides: int) -> list[mx.array]:
    """One square image [1, S, S, 3] for each side S."""
    mx.random.seed(len(sides))
    return [mx.random.uniform(shape=(1, side, side, 3)) for side in sides]


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def model() -> FastVLM:
    return random_model()


# Projector


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize(
    "kind, depth",
    [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)],
)
def test_projectors(kind: str, depth: int) -> None:
    model = random_model(mm_projector_type=kind)
    layers = model.mm_projector.layers
    assert len(layers) == depth
    features = mx.random.normal((2, 3, 64))
    expected = np.array(features, np.float64)
    for i, layer in enumerate(layers):
        expected = exact_gelu(expected) if i else expected
        expected = expected @ np.array(layer.weight).T + np.array(layer.bias)
    assert_close(model.mm_projector(features), expected)
    (pixels,) = random_pixels(128)
    visual = model.encode_image(pixels)
    assert visual.shape == (1, 4, 64)
    assert_close(visual, model.mm_projector(model.vision_tower(pixels)))


def test_projector_widths() -> None:
    model = random_model(mm_projector_type="mlp2x_gelu", hidden_size=96)
    assert [layer.weight.shape for layer in model.mm_projector.layers] == [(96, 64), (96, 96)]
    with pytest.raises(ValueError, match="mm_projector_type"):
        random_model(mm_projector_type="identity", hidden_size=96)


# Images among tokens


def spliced(model: FastVLM, ids: list[int], features: list[mx.array]) -> mx.array:
    """Embeddings with the visual tokens put in one after the other."""
    visual = iter(np.concatenate([np.array(f) for f in features]) if features else [])
    table = np.array(model.language_model.embed_tokens.weight)
    return mx.array(np.stack([next(visual) if i == V else table[i] for i in ids]))


@pytest.mark.parametrize(
    "ids, sides",
    [
        ([1, 2, 3], []),
        ([1, V, 2], [64]),
        ([V, 1], [64]),
        ([1, V], [64]),
        ([V], [64]),
        ([V, V, 1, V, 2], [64, 64, 64]),
        ([5, V, 6, V, V, V, V, 7], [64, 128]),
        ([V, V, V, V, 5, V], [128, 64]),
        # A visual token belongs to the next place, whatever stands between.
        ([V, 1, V, 2, V, 3, V], [128]),
        ([9, *[V] * 9, 8, V], [192, 64]),
    ],
)
def test_images_anywhere(ids: list[int], sides: list[int], model: FastVLM) -> None:
    pixels = random_pixels(*sides)
    features = [model.encode_image(p)[0] for p in pixels]
    expected = spliced(model, ids, features)[None]
    input_ids = mx.array([ids])
    assert_close(model.embed_inputs(input_ids, pixels), expected)
    assert_close(model.embed_inputs(input_ids, visual_tokens=features), expected)
    logits = model.language_model(None, input_embeddings=expected)
    assert_close(model(input_ids, pixel_values=pixels), logits, 1e-4)
    assert_close(model(input_ids, input_embeddings=expected), logits)


def test_no_images_as_none_or_an_empty_list(model: FastVLM) -> None:
    ids = mx.array([[1, 2, 3]])
    expected = model.language_model.embed_tokens(ids)
    for images in (None, []):
        assert_close(model.embed_inputs(ids, images), expected)
        assert_close(model(ids, pixel_values=images), model.language_model(ids))


def test_one_array_is_a_batch_of_images(model: FastVLM) -> None:
    pixels = mx.concatenate(random_pixels(64, 64, 64))
    together = model.encode_images(pixels)
    apart = model.encode_images([pixels[i : i + 1] for i in range(3)])
    assert [f.shape for f in together] == [(1, 64)] * 3
    for a, b in zip(together, apart, strict=True):
        size = b.square().mean().sqrt()
        assert_close(a / size, b / size)
    assert mx.abs(together[0] - together[1]).max() > 0.01


def test_images_of_a_batch_in_reading_order(model: FastVLM) -> None:
    pixels = random_pixels(64, 128, 64)
    features = model.encode_images(pixels)
    rows = [[V, 3, V, V, V, V], [1, 2, 3, 4, 5, V]]
    embeddings = model.embed_inputs(mx.array(rows), pixels)
    assert_close(embeddings[0], spliced(model, rows[0], features[:2]))
    assert_close(embeddings[1], spliced(model, rows[1], features[2:]))


@pytest.mark.parametrize(
    "ids, sides",
    [([1, 2], [64]), ([1, V], []), ([V, V], [64]), ([V], [64, 64]), ([V], [128]), ([V] * 3, [128])],
)
def test_places_and_visual_tokens_differ(ids: list[int], sides: list[int], model: FastVLM) -> None:
    tokens, places = sum((side // 64) ** 2 for side in sides), ids.count(V)
    with pytest.raises(ValueError, match=f"give {tokens} visual tokens.* has {places} places"):
        model.embed_inputs(mx.array([ids]), random_pixels(*sides))


def test_another_image_token() -> None:
    model = random_model(image_token_index=700)
    pixels = random_pixels(64)
    features = model.encode_images(pixels)
    expected = spliced(model, [1, V, 2], features)[None]
    assert_close(model.embed_inputs(mx.array([[1, 700, 2]]), pixels), expected)


def test_visual_tokens_take_the_decoders_dtype(model: FastVLM) -> None:
    half = random_model()
    half.language_model.set_dtype(mx.float16)
    assert half.embed_inputs(mx.array([[1, V]]), random_pixels(64)).dtype == mx.float16


def test_gradients_reach_every_part() -> None:
    model = random_model()
    pixels = random_pixels(64)

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return mx.square(model(mx.array([[1, V, 2]]), pixel_values=pixels)).mean()

    gradients = mx.grad(loss)(model.trainable_parameters())
    for weight in (
        gradients["vision_tower"]["stem"]["conv"]["weight"],
        gradients["mm_projector"]["layers"][0]["weight"],
        gradients["language_model"]["embed_tokens"]["weight"],
    ):
        assert mx.abs(weight).max() > 0


# A batch of prompts

PROMPTS: list[tuple[list[int], list[int]]] = [
    ([1, 2, 3], []),
    ([4, V, 5, 6, 7, 8, 9], [64]),
    ([V, V, V, V, 10, 11, V, 12], [128, 64]),
    ([13], []),
    ([14, V, V, 15, V, 16, 17, 18, 19, 20, 21], [64, 64, 64]),
]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [4, 0], [3, 3], [1, 2], [0]])
def test_left_padded_batch_equals_single_prompts(chosen: list[int], model: FastVLM) -> None:
    prompts = [PROMPTS[i][0] for i in chosen]
    pixels = [random_pixels(*PROMPTS[i][1]) for i in chosen]
    padding = [max(map(len, prompts)) - len(ids) for ids in prompts]
    input_ids = mx.array([[0] * n + ids for n, ids in zip(padding, prompts, strict=True)])
    cache = [BatchKVCache(padding) for _ in model.layers]
    logits = model(input_ids, cache=cache, pixel_values=list(chain(*pixels)))
    following = model(mx.array([[7]] * len(chosen)), cache=cache)
    for row, (ids, images, n) in enumerate(zip(prompts, pixels, padding, strict=True)):
        alone = model.make_kv_cache()
        expected = model(mx.array([ids]), cache=alone, pixel_values=images)
        assert_close(logits[row, n:], expected[0], 1e-4)
        assert_close(following[row], model(mx.array([[7]]), cache=alone)[0], 1e-4)


# anyres: an image as overview and tiles


def best_resolution(size: tuple[int, int], resolutions: list[list[int]]) -> list[int]:
    """`select_best_resolution` of the original."""
    width, height = size
    best, most_effective, least_wasted = None, 0, math.inf
    for w, h in resolutions:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = w * h - effective
        if effective > most_effective or (effective == most_effective and wasted < least_wasted):
            best, most_effective, least_wasted = [w, h], effective, wasted
    assert best is not None
    return best


def merged(
    features: np.ndarray, size: tuple[int, int], merge_type: str, newline: np.ndarray | None
) -> np.ndarray:
    """What `prepare_inputs_labels_for_multimodal` of the original makes of [1 + tiles, n, C]."""
    tokens, channels = features.shape[1:]
    if merge_type == "flat":
        return features.reshape(-1, channels)
    if len(features) == 1:
        return features[0] if newline is None else np.concatenate([features[0], newline[None]])
    side = int(math.sqrt(tokens))
    across, down = (edge // (64 * side) for edge in best_resolution(size, GRID))
    grid = features[1:].reshape(down, across, side, side, channels)
    if newline is None:
        return np.concatenate([features[0], grid.transpose(0, 2, 1, 3, 4).reshape(-1, channels)])
    grid = grid.transpose(4, 0, 2, 1, 3).reshape(channels, down * side, across * side)
    height, width = grid.shape[1:]
    if size[0] / size[1] > width / height:
        cut = (height - int(size[1] * (width / size[0]))) // 2
        grid = grid[:, cut : height - cut, :]
    else:
        cut = (width - int(size[0] * (height / size[1]))) // 2
        grid = grid[:, :, cut : width - cut]
    ends = np.broadcast_to(newline[:, None, None], (channels, grid.shape[1], 1))
    grid = np.concatenate([grid, ends], axis=-1)
    return np.concatenate([features[0], grid.reshape(channels, -1).T])


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_merge_as_in_the_original(merge_type: str, size: tuple[int, int]) -> None:
    model = anyres_model(merge_type)
    newline = np.array(model.image_newline) if merge_type == "spatial_unpad" else None
    width, height = best_resolution(size, GRID)
    assert anyres_grid(size, GRID, 128) == (width // 128, height // 128)
    for tiles in (width // 128 * (height // 128), 0):
        features = mx.random.normal((1 + tiles, 4, 64))
        expected = merged(np.array(features), size, merge_type, newline)
        assert_close(model.merge_tiles(features, size), expected, 0)


def test_only_spatial_unpad_has_a_newline() -> None:
    for merge_type in ("flat", "spatial", "spatial_unpad"):
        model = anyres_model(merge_type)
        assert ("image_newline" in model.parameters()) == (merge_type == "spatial_unpad")


def test_unpad_margins_leave_a_margin_on_both_sides() -> None:
    assert unpad_margins((4, 4), (200, 100)) == (1, 0)
    assert unpad_margins((4, 4), (100, 200)) == (0, 1)
    assert unpad_margins((4, 4), (100, 100)) == (0, 0)
    assert unpad_margins((2, 6), (100, 100)) == (0, 2)


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_encode_images_with_tiles(merge_type: str) -> None:
    model = anyres_model(merge_type)
    newline = np.array(model.image_newline) if merge_type == "spatial_unpad" else None
    sizes = [(300, 200), (90, 500)]
    images = [mx.random.uniform(shape=(1 + n, 128, 128, 3)) for n in (4, 3)]
    found = model.encode_images(images, sizes)
    for visual, tiles, size in zip(found, images, sizes, strict=True):
        expected = merged(np.array(model.encode_image(tiles)), size, merge_type, newline)
        assert_close(visual, expected)
    (alone,) = model.encode_images(images[0], sizes[:1])
    assert_close(alone, found[0])


def test_spatial_merging_needs_the_size() -> None:
    with pytest.raises(ValueError, match="original size"):
        anyres_model("spatial").encode_images(mx.zeros((5, 128, 128, 3)))
    with pytest.raises(ValueError):
        anyres_model("flat").encode_images([mx.zeros((5, 64, 64, 3))] * 2, [(300, 200)])


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_tiled_images_end_to_end(merge_type: str, nano: tuple[fv.FastVLM, fv.Processor]) -> None:
    model = anyres_model(merge_type)
    processor = Processor(
        nano[1].tokenizer, image_size=128, mode="anyres", grid_pinpoints=GRID, max_length=2048
    )
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES[:5]
    ]
    (empty,) = stream_generate(model, processor, "What is this?", max_tokens=1)
    for count in (1, 2, 5):
        pixels = [processor.preprocess(image) for image in images[:count]]
        visual = model.encode_images(pixels, SIZES[:count])
        response = next(
            stream_generate(model, processor, "What is this?", image=images[:count], max_tokens=1)
        )
        # Each image is followed by a newline.
        assert response.prompt_tokens == empty.prompt_tokens + sum(map(len, visual)) + count
    assert generate(model, processor, "What is this?", image=images, max_tokens=4) == generate(
        model, processor, f"{'<image>' + chr(10)}" * 5 + "What is this?", image=images, max_tokens=4
    )


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(100, 100), (300, 90), (90, 300), (130, 127), (1000, 10)])
def test_visual_tokens_are_counted_without_encoding(merge_type: str, size: tuple[int, int]) -> None:
    model = anyres_model(merge_type)
    across, down = anyres_grid(size, model.config.image_grid_pinpoints, 128)
    for tiles in (1, 1 + across * down):
        pixels = mx.zeros((tiles, 128, 128, 3))
        (found,) = model.encode_images([pixels], [size])
        assert model.num_visual_tokens(pixels, size) == len(found)
