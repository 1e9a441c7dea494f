"""The machine: its description, and its rates of large products and copies."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.fastvlm import FastVLM
from ..ops import QuantizedLinear, on_cpu
from ..version import __version__

OWN_CHOICE = "the library's own choice"  # of kernels, by the processor
RATE_SECONDS = 0.3
COPY_BYTES = 1 << 27
SMALLEST_PRODUCT, LARGEST_PRODUCT = 512, 8192


def describe_machine() -> dict[str, Any]:
    """Processor, system, GPUs, BLAS and versions: what a figure depends on, in general terms."""
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "gpus": nvidia_gpus(),
        "preloaded": ", ".join(library.name for library in preloaded_libraries()),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE") or OWN_CHOICE,
        "openblas_kernels": openblas_kernels(),
        "mlx": version("mlx"),
        "fastvlm-mlx": __version__,
    }


def machine_in_words(machine: dict[str, Any]) -> str:
    """The machine of `describe_machine` in a line; the versions are left out."""
    words = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    if machine["preloaded"]:
        words += f", {machine['preloaded']} preloaded"
        if machine.get("openblas_kernels"):
            words += f" with {machine['openblas_kernels']} kernels"
        if "openblas_coretype" in machine:
            words += f" (OPENBLAS_CORETYPE: {machine['openblas_coretype']})"
    for gpu in machine.get("gpus", ()):
        words += f"; {gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}"
    return words


def device_name() -> str:
    """What computes: CPU, or the GPU's name."""
    return "CPU" if on_cpu() else str(mx.device_info().get("device_name", "GPU"))


def cpu_name() -> str:
    """The processor's name as its maker gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            x.split(":", 1)[1] for x in cpuinfo.read_text("utf-8").splitlines() if "model name" in x
        ]
        if names:
            return names[0].strip()
    brand = (
        _output_of("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    )
    return brand or platform.processor() or platform.machine()


def nvidia_gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU that nvidia-smi lists."""
    fields = ("name", "driver_version", "memory.total")
    listed = _output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [[value.strip() for value in line.split(",")] for line in listed.splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def preloaded_libraries() -> list[Path]:
    """The libraries in LD_PRELOAD, one of which may be a BLAS."""
    paths = re.split("[ :]+", os.environ.get("LD_PRELOAD", ""))
    return [Path(path) for path in paths if path]


def openblas_kernels() -> str | None:
    """The processor whose kernels a preloaded OpenBLAS uses, as it names it; None without one.

    OPENBLAS_CORETYPE does not tell: a name that OpenBLAS does not know changes nothing.
    """
    for library in preloaded_libraries():
        if "openblas" in library.name:
            try:
                corename = ctypes.CDLL(str(library)).openblas_get_corename
            except (OSError, AttributeError):
                continue
            corename.restype = ctypes.c_char_p
            return str(corename().decode())
    return None


def _output_of(*command: str) -> str:
    """What a command prints; empty if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def has_compiler() -> bool:
    """Whether there is the C++ compiler that MLX looks for to fuse what the CPU computes."""
    return _output_of("g++", "--version") != ""


def product_rates(model: FastVLM) -> dict[str, float]:
    """Floating-point operations per second of large matrix products, by their kind.

    A dense one in the dtype of the model's activations, one as its quantized layers compute it, and
    on the CPU numpy's, whose BLAS may be faster than the one that MLX uses.
    """
    dtype = model.language_model.norm.weight.dtype

    def dense(n: int) -> Callable[[], Any]:
        a = mx.random.normal((n, n)).astype(dtype)
        mx.eval(a)
        return lambda: mx.eval(a @ a)

    rates = {dtype_name(dtype): product_rate(dense)}
    for _, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            rates[f"{layer.bits} bits"] = product_rate(partial(quantized_product, layer, dtype))
            break
    if on_cpu():
        rates["numpy float32"] = product_rate(numpy_product)
    return rates


def quantized_product(layer: nn.QuantizedLinear, dtype: mx.Dtype, n: int) -> Callable[[], Any]:
    """A product of n x n matrices, the second of them quantized as a layer is."""
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    a = mx.random.normal((n, n)).astype(dtype)
    layer = QuantizedLinear.from_linear(nn.Linear(n, n, bias=False), **settings)
    layer.set_dtype(dtype)
    mx.eval(a, layer.parameters())
    return lambda: mx.eval(layer(a))


def numpy_product(n: int) -> Callable[[], Any]:
    """The same in numpy, in float32."""
    import numpy as np

    a = np.random.default_rng(0).random((n, n), dtype=np.float32)
    return lambda: a @ a


def product_rate(product: Callable[[int], Callable[[], Any]]) -> float:
    """Operations per second of n x n products: the best, up to an n that takes a while."""
    n, rate = SMALLEST_PRODUCT, 0.0
    while True:
        run = product(n)
        run()
        seconds = best_time(run, RATE_SECONDS)
        rate = max(rate, 2 * n**3 / seconds)
        if n == LARGEST_PRODUCT or seconds > RATE_SECONDS / 20:
            return rate
        n *= 2


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a large copy: the best of several."""
    if not on_cpu():
        x = mx.zeros(COPY_BYTES // 4)
        mx.eval(x, x + 1)
        return 2 * x.nbytes / best_time(lambda: mx.eval(x + 1), RATE_SECONDS)
    cores = os.cpu_count() or 1
    import numpy as np

    source = np.ones((cores, COPY_BYTES // (8 * cores)))
    target = np.ones_like(source)
    with ThreadPoolExecutor(len(source)) as pool:
        seconds = best_time(lambda: list(pool.map(np.copyto, target, source)), RATE_SECONDS)
    return 2 * source.nbytes / seconds


def best_time(run: Callable[[], Any], budget: float) -> float:
    """The shortest time of a call that is repeated for `budget` seconds, at least once."""
    times: list[float] = []
    while not times or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
