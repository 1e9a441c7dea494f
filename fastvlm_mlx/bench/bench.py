"""How fast a model runs here, stage by stage, and how fast it could.

Each stage stands beside its floor: the time that its floating-point operations take at the rate
of a large matrix product, or its bytes at the rate of a large copy, whichever is longer, both
measured on the same machine. Operations and bytes are counted from the configuration.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..checkpoint import load
from ..checkpoint.load import load_processor
from ..checks import check_whole_number
from ..generation.decode import generate_tokens, make_kv_cache
from ..generation.inputs import check_length, encode_images, preprocess_images
from ..generation.options import Options
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from ..ops import on_cpu
from ..processor import Processor
from ..text.tokenizer import Tokenizer
from . import graph
from .machine import copy_bandwidth, describe_machine, name_of, product_rates
from .table import STAGES
from .work import Need, decoder_work, encoder_work, need, projector_work, size_of

PHOTO = (4032, 3024)  # 12 megapixels, as a telephone takes them
LOAD_SECONDS = 3.0  # loading is not repeated beyond this


def bench(
    source: str | None = None,
    *,
    image: str | Path | None = None,
    image_size: int | None = None,
    prompt_tokens: int = 32,
    tokens: int = 32,
    runs: int = 5,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a model on this machine.

    Args:
        source, revision, dtype, quantize: as `load`.
        image: a file; by default a picture of 12 megapixels, as a JPEG in memory.
        image_size: side in pixels, a multiple of 64, if not the model's own.
        prompt_tokens: of text, beside the image's.
        tokens: to generate; the end of an answer is not heeded.
        runs: of everything, after one that does not count.
        note: called with a line before each step.

    Returns:
        "settings", "machine", "rates" (floating-point operations and bytes a second), "stages" by
        the names of `STAGES` ("samples", "median", "least", "most", "floor", "ratio" and what the
        floor is counted from) and "graph" ("primitives" and "launches" of "encode", "prefill" and
        "decode").

    Raises:
        ValueError: a number is too small, or the prompt is longer than the model's limit.
        FileNotFoundError: no such image or model.
    """
    check_whole_number("prompt_tokens", prompt_tokens)
    check_whole_number("tokens", tokens, 2)
    check_whole_number("runs", runs)
    content = sample_photo(PHOTO) if image is None else Path(image).read_bytes()
    note("loading the model")
    folder = resolve(source, revision=revision)
    load = partial(load_model, folder, dtype=dtype, quantize=quantize)
    load_times, model, processor = time_loads(load, runs)
    (pixel_values,), (original,) = preprocess_images(processor, [content], image_size)
    (features,) = encode_images(model, [pixel_values], [original])
    input_ids = make_prompt(model, len(features), prompt_tokens)
    check_length(input_ids, processor.max_length - tokens)
    images, side = pixel_values.shape[:2]
    del features, pixel_values
    samples: dict[str, list[float]] = {name: [] for name in STAGES} | {"load": load_times}
    for i in range(runs + 1):
        note(f"run {i} of {runs}" if i else "warming up")
        found = run_once(model, processor, content, image_size, input_ids, tokens)
        for name, value in found.items() if i else ():
            samples[name].append(value)
    activations = name_of(model.language_model.norm.weight.dtype)
    needs = stage_needs(model, (images, side), original, len(input_ids), tokens)
    note("measuring the machine")
    products = product_rates(model)
    rates = {"flops": max(products.values()), "bytes": copy_bandwidth()}
    note("counting primitives")
    if on_cpu():
        del model
        with graph.as_on_gpu():  # where other layers are joined
            model, _ = load()
    counts = {
        "encode": graph.count_encode(model, side),
        "prefill": graph.count_prefill(model, len(input_ids)),
        "decode": graph.count_decode(model, len(input_ids)),
    }
    return {
        "settings": {
            "model": "nano" if source is None else source,
            "revision": revision,
            "dtype": activations,
            "quantize": quantize,
            "image": list(original),
            "image_size": side,
            "prompt_tokens": prompt_tokens,
            "visual_tokens": len(input_ids) - prompt_tokens,
            "tokens": tokens,
            "runs": runs,
        },
        "machine": describe_machine(),
        "rates": {**rates, "products": products},
        "stages": summarize(samples, needs, rates, tokens),
        "graph": {
            name: {"primitives": dict(counted.primitives), "launches": counted.launches}
            for name, counted in counts.items()
        },
    }


def sample_photo(size: tuple[int, int]) -> bytes:
    """A JPEG that costs as much to decode as a photograph: soft colours under grain."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    soft = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(soft).resize(size, Image.Resampling.BICUBIC))
    grain = random.normal(0, 4, (256, 256, 1)).astype(np.int8)
    repeats = (-(-size[1] // 256), -(-size[0] // 256), 1)
    grain = np.tile(grain, repeats)[: size[1], : size[0]]
    file = BytesIO()
    noisy = np.clip(picture.astype(np.int16) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def load_model(folder: Path, **options: Any) -> tuple[FastVLM, Processor]:
    """As `weights.load`, but a folder may lack a tokenizer, which is not needed here."""
    model = load.load_model(folder, **options)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return model, load_processor(folder)
    config = model.config
    return model, Processor(
        tokenizer=cast(Tokenizer, None),
        image_size=config.vision.image_size,
        mode=config.image_aspect_ratio,
        grid_pinpoints=config.image_grid_pinpoints,
        patch_size=config.vision.patch_size,
        max_length=min(config.max_length, config.text.max_position_embeddings),
    )


def time_loads(
    load: Callable[[], tuple[FastVLM, Processor]], runs: int
) -> tuple[list[float], FastVLM, Processor]:
    """Seconds of loading, without the first time unless it was long, and what was loaded."""
    loaded = None
    seconds: list[float] = []
    while len(seconds) <= runs and sum(seconds) < LOAD_SECONDS:
        loaded = None  # never two at once
        start = time.perf_counter()
        loaded = load()
        seconds.append(time.perf_counter() - start)
    assert loaded is not None
    return seconds[1:] or seconds, *loaded


def make_prompt(model: FastVLM, visual_tokens: int, text_tokens: int) -> list[int]:
    """Token ids of a text with an image in the middle."""
    import numpy as np

    random = np.random.default_rng(0)
    text = random.integers(0, model.config.text.vocab_size, text_tokens).tolist()
    image = [model.config.image_token_index] * visual_tokens
    return [*text[: text_tokens // 2], *image, *text[text_tokens // 2 :]]


def run_once(
    model: FastVLM,
    processor: Processor,
    content: bytes,
    image_size: int | None,
    input_ids: list[int],
    tokens: int,
) -> dict[str, float]:
    """One answer, from the file to the last token, as `generate` gives it: every stage but load."""
    mx.reset_peak_memory()
    options = Options(max_tokens=tokens)
    start = time.perf_counter()
    pixel_values, sizes = preprocess_images(processor, [content], image_size)
    mx.eval(pixel_values)
    preprocessed = time.perf_counter()
    features = encode_images(model, pixel_values, sizes)
    encoded = time.perf_counter()
    embeddings = model.embed_inputs(mx.array([input_ids]), image_features=features)
    del features, pixel_values
    cache = make_kv_cache(model, options)
    generated = generate_tokens(model, input_ids, embeddings, cache, options, tokens)
    next(generated)
    first = time.perf_counter()
    for _ in generated:
        pass
    last = time.perf_counter()
    return {
        "preprocess": preprocessed - start,
        "encode": encoded - preprocessed,
        "prefill": first - encoded,
        "ttft": first - start,
        "decode": (tokens - 1) / (last - first),
        "total": last - start,
        "memory": mx.get_peak_memory() / 1e9,
    }


def stage_needs(
    model: FastVLM,
    images: tuple[int, int],
    original: tuple[int, int],
    prompt_tokens: int,
    tokens: int,
) -> dict[str, Need]:
    """What each stage can't do without.

    Args:
        model: loaded.
        images: how many squares are encoded (more than one with `anyres`), and their side.
        original: width and height of the picture.
        prompt_tokens: of text and image.
        tokens: to generate.
    """
    config, decoder = model.config, model.language_model
    itemsize = decoder.norm.weight.itemsize
    n, side = images
    encoder = encoder_work(config.vision, side) * n
    projector = projector_work(config, (side // config.vision.patch_size) ** 2) * n
    output = decoder.embed_tokens if config.text.tie_word_embeddings else decoder.lm_head
    decoding = [*decoder.layers, decoder.norm, output]
    prefill = decoder_work(config.text, prompt_tokens)
    decode = decoder_work(config.text, 1, prompt_tokens + tokens // 2)
    kv_width = 2 * config.text.num_key_value_heads * config.text.head_dim
    kv_cache = config.text.num_hidden_layers * kv_width * (prompt_tokens + tokens) * itemsize
    decoded = 2 * 3 * original[0] * original[1]  # written, and read to be resized
    return {
        "load": Need(0, 2 * size_of(model)),
        "preprocess": Need(0, decoded + 3 * 4 * n * side**2),
        "encode": need(encoder + projector, [model.vision_tower, model.mm_projector], itemsize),
        "prefill": need(prefill, decoding, itemsize),
        "decode": need(decode, decoding, itemsize),
        "memory": Need(0, size_of(model) + kv_cache),
    }


def summarize(
    samples: dict[str, list[float]],
    needs: dict[str, Need],
    rates: dict[str, float],
    tokens: int,
) -> dict[str, dict[str, Any]]:
    """Median, least, most, floor and ratio of each stage; a ratio of 1 is as good as can be."""
    floors = {
        name: max(found.flops / rates["flops"], found.bytes / rates["bytes"])
        for name, found in needs.items()
    }
    floors["ttft"] = floors["preprocess"] + floors["encode"] + floors["prefill"]
    floors["total"] = floors["ttft"] + (tokens - 1) * floors["decode"]
    floors["decode"] = 1 / floors["decode"]
    floors["memory"] = needs["memory"].bytes / 1e9
    stages: dict[str, dict[str, Any]] = {}
    for name, stage in STAGES.items():
        median, floor = statistics.median(samples[name]), floors[name]
        stages[name] = {
            "unit": stage.unit,
            "samples": samples[name],
            "median": median,
            "least": min(samples[name]),
            "most": max(samples[name]),
            "floor": floor,
            "ratio": floor / median if stage.more else median / floor,
            **(needs[name]._asdict() if name in needs else {}),
        }
    return stages
