"""How fast a model runs here, stage by stage, and how fast it could.

Each stage stands beside its floor: the time that its floating-point operations take at the rate
of a large matrix product, or its bytes at the rate of a large copy, whichever is longer, both
measured on the same machine. Operations and bytes are counted from the configuration.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import graph, hub, weights
from .config import FastVLMConfig, TextConfig, VisionConfig
from .decode import generate_tokens, make_kv_cache
from .inputs import check_length, encode_images, preprocess_images
from .model import FastVLM
from .ops import QuantizedLinear, on_cpu
from .options import Options
from .prompt import Processor, Tokenizer
from .version import __version__
from .vision import CONV_FFN_KERNEL, SE_REDUCTION, STEM_KERNEL

PHOTO = (4032, 3024)  # 12 megapixels, as a telephone takes them
LOAD_SECONDS = 3.0  # loading is not repeated beyond this
RATE_SECONDS = 0.3
COPY_BYTES = 1 << 27
SMALLEST_PRODUCT, LARGEST_PRODUCT = 512, 8192


# --- work, counted from the configuration -------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a computation can't do without.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a
            multiplication and an addition are two.
        weights: numbers read of the model, each once.
        activations: numbers that these operations read and write, each once. What stands between
            them (biases, GELU, norms, residuals) is taken to be fused with them.
    """

    flops: int = 0
    weights: int = 0
    activations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weights + other.weights,
            self.activations + other.activations,
        )

    def __mul__(self, times: int) -> Work:
        """The same on `times` inputs, with the same weights."""
        return Work(times * self.flops, self.weights, times * self.activations)


def linear_work(positions: int, inputs: int, outputs: int, *, bias: bool = True) -> Work:
    """A matrix product with the weights of a linear layer."""
    return Work(
        2 * positions * inputs * outputs,
        inputs * outputs + outputs * bias,
        positions * (inputs + outputs),
    )


def conv_work(
    side: int, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> Work:
    """A convolution with bias on side x side positions, zero-padded by half the kernel."""
    positions = (-(-side // stride)) ** 2
    taps = kernel * kernel * (inputs // groups) * outputs
    return Work(2 * positions * taps, taps + outputs, side * side * inputs + positions * outputs)


def attention_work(
    queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, *, causal: bool = False
) -> Work:
    """Scores and weighted values, the scores never written; causal queries are the last keys."""
    pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return Work(
        4 * pairs * heads * head_dim,
        0,
        2 * queries * heads * head_dim + 2 * keys * kv_heads * head_dim,
    )


def encoder_work(config: VisionConfig, image_size: int) -> Work:
    """FastViTHD on one image of that many pixels square."""
    first, last = config.embed_dims[0], config.embed_dims[-1]
    work = conv_work(image_size, 3, first, STEM_KERNEL, 2)
    work += conv_work(image_size // 2, first, first, STEM_KERNEL, 2, first)
    side = image_size // 4
    work += linear_work(side**2, first, first)
    for i, (depth, dim) in enumerate(zip(config.layers, config.embed_dims, strict=True)):
        if (shape := config.pos_embs_shapes[i]) is not None:
            work += conv_work(side, dim, dim, shape[0], groups=dim)
        for _ in range(depth):
            work += block_work(config, i, side)
        if i + 1 < len(config.layers) and config.has_downsample(i):
            wider, stride = config.embed_dims[i + 1], config.down_stride
            work += conv_work(side, dim, wider, config.down_patch_size, stride, dim)
            side = -(-side // stride)
            work += linear_work(side**2, wider, wider)
    work += conv_work(side, last, config.hidden_size, STEM_KERNEL, groups=last)
    squeezed = config.hidden_size // SE_REDUCTION
    work += linear_work(1, config.hidden_size, squeezed)
    return work + linear_work(1, squeezed, config.hidden_size)


def block_work(config: VisionConfig, stage: int, side: int) -> Work:
    """One block of a stage, on side x side positions."""
    dim, positions = config.embed_dims[stage], side**2
    hidden = int(dim * config.mlp_ratios[stage])
    if config.token_mixers[stage] == "attention":
        heads = dim // config.head_dim
        mixer = Work(weights=2 * dim)  # the norm's
        mixer += linear_work(positions, dim, 3 * dim, bias=False)
        mixer += attention_work(positions, positions, heads, heads, config.head_dim)
        mixer += linear_work(positions, dim, dim)
    else:
        mixer = conv_work(side, dim, dim, config.repmixer_kernel_size, groups=dim)
    conv = conv_work(side, dim, dim, CONV_FFN_KERNEL, groups=dim)
    return mixer + conv + linear_work(positions, dim, hidden) + linear_work(positions, hidden, dim)


def projector_work(config: FastVLMConfig, tokens: int) -> Work:
    """The projector on that many visual tokens."""
    width = config.text.hidden_size
    work = linear_work(tokens, config.mm_hidden_size, width)
    for _ in range(config.projector_depth - 1):
        work += linear_work(tokens, width, width)
    return work


def decoder_work(config: TextConfig, tokens: int, offset: int = 0) -> Work:
    """The decoder on `tokens` that follow `offset` others in the KV cache, and one's logits.

    The embeddings are given; where they share their weights with the output layer, these are
    counted there.
    """
    width, D = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = Work(weights=2 * width)  # the norms'
    layer += linear_work(tokens, width, (heads + 2 * kv_heads) * D)
    layer += attention_work(tokens, offset + tokens, heads, kv_heads, D, causal=True)
    layer += linear_work(tokens, heads * D, width, bias=False)
    layer += linear_work(tokens, width, 2 * config.intermediate_size, bias=False)
    layer += linear_work(tokens, config.intermediate_size, width, bias=False)
    n = config.num_hidden_layers
    layers = Work(n * layer.flops, n * layer.weights, n * layer.activations)
    return layers + Work(weights=width) + linear_work(1, width, config.vocab_size, bias=False)


class Need(NamedTuple):
    """Work in bytes: floating-point operations, and bytes read and written."""

    flops: int
    bytes: int


def need(work: Work, modules: Sequence[nn.Module], itemsize: int) -> Need:
    """The work of some modules, whose weights are as they are in memory, quantized or not."""
    stored = sum(size_of(module) for module in modules)
    return Need(work.flops, stored + work.activations * itemsize)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))


# --- what the machine can do --------------------------------------------------------------------


def product_rates(model: FastVLM) -> dict[str, float]:
    """Floating-point operations a second of large matrix products, by their kind.

    A dense one in the dtype of the model's activations, one as its quantized layers do it, and on
    the CPU that of numpy, whose library may be faster than the one that MLX has found.
    """
    dtype = model.language_model.norm.weight.dtype

    def dense(n: int) -> Callable[[], Any]:
        a = mx.random.normal((n, n)).astype(dtype)
        mx.eval(a)
        return lambda: mx.eval(a @ a)

    rates = {name_of(dtype): product_rate(dense)}
    for _, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            rates[f"{layer.bits} bits"] = product_rate(partial(quantized_product, layer, dtype))
            break
    if on_cpu():
        rates["numpy float32"] = product_rate(numpy_product)
    return rates


def quantized_product(layer: nn.QuantizedLinear, dtype: mx.Dtype, n: int) -> Callable[[], Any]:
    """A product of n x n matrices, the second quantized as a layer is."""
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    a = mx.random.normal((n, n)).astype(dtype)
    layer = QuantizedLinear.from_linear(nn.Linear(n, n, bias=False), **settings)
    layer.set_dtype(dtype)
    mx.eval(a, layer.parameters())
    return lambda: mx.eval(layer(a))


def numpy_product(n: int) -> Callable[[], Any]:
    """The same in numpy, in float32."""
    a = np.random.default_rng(0).random((n, n), dtype=np.float32)
    return lambda: a @ a


def product_rate(product: Callable[[int], Callable[[], Any]]) -> float:
    """Operations a second of n x n products, the best of several, up to an n that takes a while."""
    n, rate = SMALLEST_PRODUCT, 0.0
    while True:
        run = product(n)
        run()
        seconds = best_time(run, RATE_SECONDS)
        rate = max(rate, 2 * n**3 / seconds)
        if n == LARGEST_PRODUCT or seconds > RATE_SECONDS / 20:
            return rate
        n *= 2


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a large copy, the best of several."""
    if not on_cpu():
        x = mx.zeros(COPY_BYTES // 4)
        mx.eval(x, x + 1)
        return 2 * x.nbytes / best_time(lambda: mx.eval(x + 1), RATE_SECONDS)
    cores = os.cpu_count() or 1
    source = np.ones((cores, COPY_BYTES // (8 * cores)))
    target = np.ones_like(source)
    with ThreadPoolExecutor(len(source)) as pool:
        seconds = best_time(lambda: list(pool.map(np.copyto, target, source)), RATE_SECONDS)
    return 2 * source.nbytes / seconds


def best_time(run: Callable[[], Any], budget: float) -> float:
    """The shortest time of a call, repeated for `budget` seconds; one call at least."""
    times: list[float] = []
    while not times or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def describe_machine() -> dict[str, Any]:
    """The machine, in general terms, and the versions that ran on it."""
    device = "CPU" if on_cpu() else str(mx.device_info().get("device_name", "GPU"))
    return {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
        "mlx": version("mlx"),
        "fastvlm-mlx": __version__,
    }


def cpu_name() -> str:
    """The processor's name, as its system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.split(":", 1)[1] for x in cpuinfo.read_text().splitlines() if "model name" in x]
        if names:
            return names[0].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if found:
            return found
    return platform.processor() or platform.machine()


# --- measuring ----------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One row of the table; `more` says whether more of it is better."""

    title: str
    unit: str
    more: bool = False


STAGES = {
    "load": Stage("Load", "s"),
    "preprocess": Stage("Read and resize", "s"),
    "encode": Stage("Encode", "s"),
    "prefill": Stage("Prefill", "s"),
    "ttft": Stage("Time to first token", "s"),
    "decode": Stage("Decode", "tokens/s", more=True),
    "total": Stage("End to end", "s"),
    "memory": Stage("Peak memory", "GB"),
}


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
    check_at_least("prompt_tokens", prompt_tokens, 1)
    check_at_least("tokens", tokens, 2)
    check_at_least("runs", runs, 1)
    content = sample_photo(PHOTO) if image is None else Path(image).read_bytes()
    note("loading the model")
    folder = hub.resolve(source, revision=revision)
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


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError if a number is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}.")


def sample_photo(size: tuple[int, int]) -> bytes:
    """A JPEG that costs as much to decode as a photograph: soft colours under grain."""
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
    model = weights.load_model(folder, **options)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return model, weights.load_processor(folder)
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


# --- reporting ----------------------------------------------------------------------------------


def differences(result: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """What makes two results hard to compare, a sentence each."""
    sentences = []
    for part in ("settings", "machine"):
        for name, value in result[part].items():
            before = earlier[part].get(name)
            if before != value and name not in ("runs", "fastvlm-mlx"):
                sentences.append(f"{name.replace('_', ' ')} is {value}, and was {before}.")
    return sentences


def times_better(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, float]:
    """How many times better each stage is than in an earlier result."""
    better: dict[str, float] = {}
    for name, stage in STAGES.items():
        now, before = (r["stages"][name]["median"] for r in (result, earlier))
        better[name] = now / before if stage.more else before / now
    return better


def read_result(file: Path) -> dict[str, Any]:
    """A result that `--json` printed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    import json

    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for name in STAGES:
            float(result["stages"][name]["median"])
        dict(result["settings"]), dict(result["machine"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is not a result of `fastvlm bench --json`.") from None
    return result


def print_result(result: dict[str, Any], earlier: dict[str, Any] | None = None) -> None:
    """The tables, and in a line each what they are of."""
    from rich.console import Console
    from rich.table import Table

    titles = ["Before"] if earlier else []
    titles += ["Median", "Least", "Most", "Floor", "Times floor"]
    titles += ["Times better"] if earlier else []
    table = Table("Stage", "")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    better = times_better(result, earlier) if earlier else {}
    for name, stage in STAGES.items():
        row = result["stages"][name]
        cells = [show(row[key], stage.unit) for key in ("median", "least", "most", "floor")]
        cells.append(f"{row['ratio']:.1f}")
        if earlier:
            before = show(earlier["stages"][name]["median"], stage.unit)
            cells = [before, *cells, f"{better[name]:.2f}"]
        table.add_row(stage.title, "ms" if stage.unit == "s" else stage.unit, *cells)
    counts = Table("On a GPU")
    for title in ("Primitives", "Kernel launches, at least"):
        counts.add_column(title, justify="right")
    for name, title in (("encode", "Encode"), ("prefill", "Prefill"), ("decode", "One token")):
        found = result["graph"][name]
        counts.add_row(title, str(sum(found["primitives"].values())), str(found["launches"]))
    console = Console(width=max(100, Console().width), soft_wrap=True, highlight=False)
    console.print(*describe(result), sep="\n")
    console.print(table)
    console.print(counts)
    for sentence in differences(result, earlier) if earlier else ():
        console.print(f"Not the same as before: {sentence}")


def describe(result: dict[str, Any]) -> list[str]:
    """What was measured, and on what."""
    settings, machine, rates = result["settings"], result["machine"], result["rates"]
    bits = f", quantized to {settings['quantize']} bits" if settings["quantize"] else ""
    preloaded = f", {machine['preloaded']} preloaded" if machine["preloaded"] else ""
    width, height = settings["image"]
    products = ", ".join(f"{kind}: {rate / 1e9:.3g}" for kind, rate in rates["products"].items())
    return [
        f"{settings['model']}, {settings['dtype']}{bits}: a picture of {width} x {height} pixels "
        f"as {settings['image_size']} x {settings['image_size']}, a prompt of "
        f"{settings['visual_tokens']} visual and {settings['prompt_tokens']} text tokens, "
        f"{settings['tokens']} tokens generated, {settings['runs']} runs.",
        f"{machine['device']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"mlx {machine['mlx']}{preloaded}.",
        f"Floors: {rates['flops'] / 1e9:.3g} GFLOP/s, the best of large matrix products "
        f"({products}), and {rates['bytes'] / 1e9:.3g} GB/s, read and written by a large copy.",
    ]


def show(value: float, unit: str) -> str:
    """Three digits; seconds as milliseconds."""
    if unit == "s":
        value = 1000 * value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
