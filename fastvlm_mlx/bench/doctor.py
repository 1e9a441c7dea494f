"""What a person runs first on a new machine and pastes into a report.

The model, as this machine computes it by default, stands against the same model on this machine's
CPU in float32. Where there is no GPU, the forms that a GPU gets stand against those of the CPU:
it computes both. Then each stage stands beside its floor, and known faults of what is installed
are named.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from .. import ops
from ..generation.decode import generate_tokens, make_kv_cache, prefill
from ..generation.inputs import compute_visual_tokens, preprocess_images, tokenize
from ..generation.options import Options
from ..hub.resolve import NANO, resolve
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..version import __version__
from .bench import bench, load_with_processor, make_prompt
from .machine import cpu_name, dtype_name, has_compiler

if TYPE_CHECKING:
    import numpy as np

PICTURE = NANO / "images" / "penguins.png"
QUESTION = "How many penguins are there?"
TOKENS = 16
OPTIONS = Options(max_tokens=TOKENS)
PROMPT_TOKENS = 32  # of random text, where a folder has no tokenizer

# Where there is no GPU, pictures are smaller: the forms are the same and the CPU is in time.
CPU_IMAGE_SIZE = 256

# The greatest relative error of one rounding. In float32 it is rather the sums that lose digits, up
# to four bits in thousands of products. TF32 has the digits of float16.
ROUNDOFF = {"float32": 2**-20, "tf32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}
# How many times that the outputs may be off. For nano, in the forms for a GPU and in either half
# precision, visual tokens are 5 times off and logits 15 times; for 24 random layers in float32
# twice and 32 times.
VISUAL_FACTOR = 32
LOGIT_FACTOR = 128
# A decoder may amplify more. How much is measured on the CPU, where the output of each block is
# rounded once. Kernels round several times in each block, and what they read is off already: 24
# random layers are 3 to 4 times as far off, whether they amplify 3 times or 100 times.
BLOCK_FACTOR = 8
UNRELATED = 0.5  # no bound is above it: logits that have nothing to do with each other are 1.4 off


class Check(NamedTuple):
    """One comparison; it holds if the error is a number and within the bound."""

    name: str
    error: float | None
    bound: float | None
    holds: bool


@dataclass
class Outputs:
    """What a model computes for the picture and the question.

    Attributes:
        visual_tokens: [n, hidden_size].
        tokens: of the greedy answer; end-of-sequence tokens end nothing.
        logits: [TOKENS, vocab_size], the distribution of each token of an answer.
        text: the answer, if there is a tokenizer.
        dtype: of the activations.
        amplification: how many roundings the logits are off, where each block's output has one.
    """

    visual_tokens: np.ndarray
    tokens: list[int]
    logits: np.ndarray
    text: str | None
    dtype: str
    amplification: float = 0.0


def doctor(
    source: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Whether a model computes here what it should, how fast, and what is known to be amiss.

    Args:
        source, revision, dtype: as `load`.
        note: called with a line of text before each step.

    Returns:
        "model", "system" (see `describe_system`), "compared" (what with the CPU), "checks" (see
        `Check`), "answer", "bench" (as `bench.bench`), "healthy" (whether all checks hold),
        "seconds", and "known": sentences on what is slow or wrong.

    Raises:
        FileNotFoundError, CheckpointError, OSError, ValueError: as `load`.
    """
    start = time.perf_counter()
    folder = resolve(source, revision=revision)
    has_gpu = mx.default_device().type != mx.DeviceType.cpu
    image_size = None if has_gpu else CPU_IMAGE_SIZE
    if dtype is None and not has_gpu:
        dtype = "float32"  # half precision is slow there
    note("computing on the CPU in float32")
    with mx.stream(mx.cpu), ops.assume("cpu"):
        exact = compute_outputs(folder, "float32", image_size)
    note("computing on the GPU" if has_gpu else "computing as a GPU does, on the CPU")
    with forms_of_a_gpu(has_gpu):
        found = compute_outputs(folder, dtype, image_size, exact.tokens)
    kind = product_kind(found.dtype)
    checks = compare(found, exact, ROUNDOFF[kind])
    del exact
    measured = bench(
        source,
        revision=revision,
        dtype=dtype,
        image_size=image_size,
        tokens=TOKENS,
        runs=3 if has_gpu else 1,
        note=note,
    )
    result = {
        "model": measured["settings"]["model"],
        "system": describe_system(),
        "compared": {"gpu": has_gpu, "dtype": found.dtype, "products": kind},
        "checks": [check._asdict() for check in checks],
        "answer": found.text,
        "bench": measured,
        "healthy": all(check.holds for check in checks),
        "seconds": time.perf_counter() - start,
    }
    return result | {"known": list(known_faults(result))}


def forms_of_a_gpu(has_gpu: bool) -> AbstractContextManager[None]:
    """The forms of operations that a GPU gets, whatever computes them."""
    return nullcontext() if has_gpu else ops.assume("metal")


def compute_outputs(
    folder: Path, dtype: str | None, image_size: int | None, forced: list[int] | None = None
) -> Outputs:
    """Load a model and let it answer; nothing of it stays in memory.

    Args:
        folder, dtype: as `load_model` takes them.
        image_size: side in pixels, if not the model's own.
        forced: the answer whose logits are computed; by default the model's own.
    """
    model, processor = load_with_processor(folder, dtype=dtype)
    pixel_values, sizes = preprocess_images(processor, [PICTURE], image_size)
    visual_tokens = compute_visual_tokens(model, pixel_values, sizes)
    input_ids = read_question(model, processor, visual_tokens)
    embeddings = model.embed_inputs(mx.array([input_ids]), visual_tokens=visual_tokens)
    cache = make_kv_cache(model, OPTIONS)
    tokens = list(generate_tokens(model, input_ids, embeddings, cache, OPTIONS, TOKENS))
    logits = answer_logits(model, embeddings, tokens if forced is None else forced)
    amplification = 0.0 if forced else amplify(model, embeddings, tokens, logits)
    return Outputs(
        to_numpy(visual_tokens[0]),
        tokens,
        to_numpy(logits),
        read_answer(processor, tokens),
        dtype_name(model.language_model.norm.weight.dtype),
        amplification,
    )


class Rounded:
    """A block of the decoder whose output, in float32, is rounded to the digits of float16."""

    def __init__(self, block: Callable[..., mx.array]):
        self.block = block

    def __call__(self, *args: Any) -> mx.array:
        return rounded(self.block(*args))


def rounded(x: mx.array) -> mx.array:
    """To 11 binary digits, in any range: the product pushes the others out (Veltkamp's split)."""
    wide = x * (2**13 + 1)
    return wide - (wide - x)


def amplify(model: FastVLM, embeddings: mx.array, tokens: Sequence[int], logits: mx.array) -> float:
    """How many roundings logits are off if each block's output is rounded; spoils the model."""
    decoder = model.language_model
    decoder.layers = [Rounded(block) for block in decoder.layers]  # type: ignore[misc]
    off = answer_logits(model, rounded(embeddings), tokens) - logits
    return float(mx.sqrt(mx.mean(off**2)) / mx.std(logits)) / ROUNDOFF["float16"]


def read_question(
    model: FastVLM, processor: Processor, visual_tokens: Sequence[mx.array]
) -> list[int]:
    """Token ids of the question; of random text, where there is no tokenizer."""
    if processor.tokenizer is None:
        return make_prompt(model, len(visual_tokens[0]), PROMPT_TOKENS)
    counts = [len(tokens) for tokens in visual_tokens]
    return tokenize(model, processor, QUESTION, counts, OPTIONS)


def read_answer(processor: Processor, tokens: Sequence[int]) -> str | None:
    """The text up to the token that ends it; None without a tokenizer."""
    tokenizer = processor.tokenizer
    if tokenizer is None:
        return None
    return tokenizer.decode(takewhile(lambda token: token not in tokenizer.eos_token_ids, tokens))


def answer_logits(model: FastVLM, embeddings: mx.array, tokens: Sequence[int]) -> mx.array:
    """[len(tokens), vocab_size]: the logits that each token of an answer is chosen from."""
    decoder, cache = model.language_model, make_kv_cache(model, OPTIONS)
    hidden_states = prefill(decoder, embeddings, cache, OPTIONS.prefill_step_size)
    rows = [decoder.logits(hidden_states[:, -1])]
    for token in tokens[:-1]:
        rows.append(decoder.logits(decoder.hidden_states(mx.array([[token]]), cache)[:, -1]))
        mx.eval(rows)
    return mx.concatenate(rows)


def to_numpy(x: mx.array) -> np.ndarray:
    """As float64, in which comparing adds no error of its own."""
    import numpy as np

    return np.array(x.astype(mx.float32), dtype=np.float64)


def compare(found: Outputs, exact: Outputs, roundoff: float) -> list[Check]:
    """Found outputs against exact ones.

    The error of the visual tokens is that of the worst of them, the norm of its difference over its
    own. That of the logits is the root mean square of their differences over their standard
    deviation. Where the greedy answers part, the error is how much worse, by the exact logits, the
    found token is; it can only seem the best one where that is less than what two logits are off.

    Args:
        found: with the logits of the exact answer.
        exact: in float32.
        roundoff: of what was found, from `ROUNDOFF`.
    """
    import numpy as np

    norms = np.linalg.norm(exact.visual_tokens, axis=-1)
    visual = np.max(np.linalg.norm(found.visual_tokens - exact.visual_tokens, axis=-1) / norms)
    off = (found.logits - exact.logits) / exact.logits.std()
    tokens = zip(found.tokens, exact.tokens, exact.logits / exact.logits.std(), strict=True)
    factor = max(LOGIT_FACTOR, BLOCK_FACTOR * exact.amplification)
    gaps = [row[best] - row[token] for token, best, row in tokens if token != best]
    return [
        check("visual tokens", visual, VISUAL_FACTOR * roundoff),
        check("logits", np.sqrt(np.mean(off**2)), min(UNRELATED, factor * roundoff)),
        check("greedy tokens", gaps[0] if gaps else 0.0, 2 * np.abs(off).max()),
    ]


def check(name: str, error: float, bound: float) -> Check:
    """A check; what is no number does not hold, and is None, which JSON has."""
    return Check(name, or_none(error), or_none(bound), bool(error <= bound))


def or_none(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def product_kind(dtype: str) -> str:
    """How exactly the default device multiplies: a dtype's name, or tf32.

    Unless MLX_ENABLE_TF32 is 0, MLX multiplies float32 as TF32 on CUDA and on Apple GPUs with
    neural accelerators (`is_nax_available` and `enable_tf32` in its sources).
    """
    gpu = mx.default_device().type != mx.DeviceType.cpu
    if dtype != "float32" or not gpu or os.environ.get("MLX_ENABLE_TF32") == "0":
        return dtype
    return "tf32" if not mx.metal.is_available() or has_neural_accelerators() else dtype


def has_neural_accelerators() -> bool:
    """Whether this Apple GPU is of the M5's generation or later."""
    architecture = str(mx.device_info().get("architecture"))  # as in applegpu_g17s; p is a phone's
    found = re.search(r"g(\d+)(\w)$", architecture)
    return found is not None and int(found[1]) >= (18 if found[2] == "p" else 17)


def describe_system() -> dict[str, Any]:
    """Versions, chip, system, memory and device, as a report names them."""
    mac = platform.mac_ver()[0]
    libraries = ("mlx", "mlx-lm", "numpy", "huggingface-hub", "safetensors", "tokenizers", "pillow")
    return {
        "versions": {"fastvlm-mlx": __version__, "python": platform.python_version()}
        | {name: version(name) for name in libraries},
        "chip": cpu_name(),
        "compiler": has_compiler(),
        "system": f"macOS {mac}" if mac else platform.platform(),
        "machine": platform.machine(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(mx.default_device()),
        "device_info": dict(mx.device_info()),
    }


# --- What is known to be slow or wrong ---


@dataclass(frozen=True)
class Known:
    """Something known, and when it applies: a function of what `doctor` returns."""

    applies: Callable[[dict[str, Any]], bool]
    said: str


def _dtype(result: dict[str, Any]) -> str:
    return str(result["bench"]["settings"]["dtype"])


def _is_short_of_memory(result: dict[str, Any]) -> bool:
    most = result["system"]["device_info"].get("max_recommended_working_set_size")
    return most is not None and result["bench"]["stages"]["memory"]["median"] * 1e9 > most


def _multiplies_slowly(result: dict[str, Any]) -> bool:
    products = result["bench"]["rates"]["products"]
    return "numpy float32" in products and products["numpy float32"] > 2 * products.get(
        "float32", math.inf
    )


KNOWN = (
    Known(
        lambda r: bool(re.match(r"Apple M[12]\b", r["system"]["chip"])) and _dtype(r) == "bfloat16",
        "Apple M1 and M2 have no native bfloat16, which makes them slower than --dtype float16.",
    ),
    Known(
        lambda r: r["compared"]["products"] == "tf32",
        "This GPU multiplies float32 as TF32, with the digits of float16, unless MLX_ENABLE_TF32=0 "
        "is set.",
    ),
    Known(
        lambda r: r["system"]["system"].startswith("macOS") and not r["compared"]["gpu"],
        "MLX does not see this Mac's GPU, so that the CPU computes everything, many times slower.",
    ),
    Known(
        lambda r: not r["system"]["compiler"],
        "There is no C++ compiler (g++) here: what the CPU computes MLX leaves uncompiled, about "
        "three times slower when it encodes images. On a Mac, `xcode-select --install` has one.",
    ),
    Known(
        _is_short_of_memory,
        "The model needs more memory than macOS lets the GPU keep: quantize it, for instance with "
        "`fastvlm convert MODEL FOLDER --quantize 4`.",
    ),
    Known(
        _multiplies_slowly,
        "The BLAS that MLX uses here is several times slower than numpy's. Preload OpenBLAS: "
        "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 after "
        "`apt install libopenblas0-pthread`.",
    ),
)

# Why a library must not be older than what setup.py asks for.
OLDER = {
    "mlx": "it reads truncated files without a word and multiplies nvfp4 wrongly",
    "mlx-lm": "it aborts with this mlx",
}


def known_faults(result: dict[str, Any]) -> Iterator[str]:
    """Sentences on what is known to be slow or wrong here.

    Args:
        result: of `doctor`.
    """
    for name, lowest in lowest_versions().items():
        installed = result["system"]["versions"].get(name)
        if installed is not None and numbers(installed) < numbers(lowest):
            why = f": {OLDER[name]}" if name in OLDER else ""
            yield f"{name} {installed} is older than {lowest}, the lowest version that works{why}."
    yield from (known.said for known in KNOWN if known.applies(result))


def lowest_versions() -> dict[str, str]:
    """Each requirement with a lowest version, as the installed distribution declares them."""
    try:
        declared = requires("fastvlm-mlx") or []
    except PackageNotFoundError:  # a clone that is not installed
        return {}
    found = (re.match(r"([\w.-]+) *>= *([\d.]+)", line) for line in declared if ";" not in line)
    return {match[1].lower(): match[2] for match in found if match}


def numbers(version: str) -> tuple[int, ...]:
    """A version to compare, without what marks a pre-release."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
