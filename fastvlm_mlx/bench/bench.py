"""Measure how fast a model runs here, stage by stage, and how fast it could.

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

from ..checkpoint.load import load_model, load_processor
from ..checks import check_whole_number
from ..generation.decode import generate_tokens, make_kv_cache
from ..generation.inputs import compute_visual_tokens, preprocess_images
from ..generation.options import Options
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from ..ops import on_cpu
from ..processor import Processor
from ..text.tokenizer import Tokenizer
from . import graph
from .machine import copy_bandwidth, describe_machine, dtype_name, product_rates
from .table import STAGES
from .work import Need, stage_needs

PHOTO = (4032, 3024)  # 12 megapixels, as phones take them
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
        tokens: to generate; end-of-sequence tokens are ignored.
        runs: of everything, after one that does not count.
        note: called with a line of text before each step.

    Returns:
        "settings", "machine", "rates" (floating-point operations and bytes per second), "stages" by
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
    load = partial(load_with_processor, folder, dtype=dtype, quantize=quantize)
    load_times, model, processor = time_loads(load, runs)
    (pixel_values,), (original,) = preprocess_images(processor, [content], image_size)
    (features,) = compute_visual_tokens(model, [pixel_values], [original])
    check_positions(len(features) + prompt_tokens + tokens, processor.max_length)
    input_ids = make_prompt(model, len(features), prompt_tokens)
    images, side = pixel_values.shape[:2]
    del features, pixel_values
    answer = partial(run_once, model, processor, content, image_size, input_ids, tokens)
    samples = {"load": load_times} | take_samples(answer, runs, note)
    del answer
    activations = model.language_model.norm.weight.dtype
    needs = stage_needs(model, (images, side), original, len(input_ids), tokens)
    note("measuring the machine")
    products = product_rates(model)
    rates = {"flops": max(products.values()), "bytes": copy_bandwidth()}
    note("counting primitives")
    if on_cpu():
        del model
        with graph.as_on_gpu():  # other layers are fused there
            model, _ = load()
    return {
        "settings": {
            "model": "nano" if source is None else source,
            "revision": revision,
            "dtype": dtype_name(activations),
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
        "graph": count_parts(model, side, len(input_ids)),
    }


def take_samples(
    answer: Callable[[], dict[str, float]], runs: int, note: Callable[[str], None]
) -> dict[str, list[float]]:
    """What each of some runs gives, by name, after one that does not count."""
    note("warming up")
    answer()
    samples: dict[str, list[float]] = {}
    for i in range(1, runs + 1):
        note(f"run {i} of {runs}")
        for name, value in answer().items():
            samples.setdefault(name, []).append(value)
    return samples


def count_parts(model: FastVLM, image_size: int, prompt_tokens: int) -> dict[str, Any]:
    """The primitives and kernel launches of each part of an answer, as on a GPU."""
    counts = {
        "encode": graph.count_encode(model, image_size),
        "prefill": graph.count_prefill(model, prompt_tokens),
        "decode": graph.count_decode(model, prompt_tokens),
    }
    return {
        name: {"primitives": dict(found.primitives), "launches": found.launches}
        for name, found in counts.items()
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


def load_with_processor(folder: Path, **options: Any) -> tuple[FastVLM, Processor]:
    """As `checkpoint.load.load`, but the folder may lack a tokenizer, which is not needed here."""
    model = load_model(folder, **options)
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
    """Seconds of each loading but the first (unless that took long), and what was loaded."""
    loaded = None
    seconds: list[float] = []
    while len(seconds) <= runs and sum(seconds) < LOAD_SECONDS:
        loaded = None  # never two models at once
        start = time.perf_counter()
        loaded = load()
        seconds.append(time.perf_counter() - start)
    assert loaded is not None
    return seconds[1:] or seconds, *loaded


def check_positions(positions: int, limit: int) -> None:
    """ValueError if the model has no positions for the image, the prompt and the answer."""
    if positions >= limit:
        raise ValueError(
            f"prompt_tokens and tokens take {positions} positions with the image, "
            f"and the model's limit is {limit}."
        )


def make_prompt(model: FastVLM, visual_tokens: int, text_tokens: int) -> list[int]:
    """Random token ids of a text with one image's places in the middle."""
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
    features = compute_visual_tokens(model, pixel_values, sizes)
    encoded = time.perf_counter()
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=features)
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


def summarize(
    samples: dict[str, list[float]],
    needs: dict[str, Need],
    rates: dict[str, float],
    tokens: int,
) -> dict[str, dict[str, Any]]:
    """Median, least, most, floor and ratio of each stage; a ratio of 1 is the best possible."""
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
