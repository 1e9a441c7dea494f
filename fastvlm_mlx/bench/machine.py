"""What this machine can do: products, copies, and its description."""

from __future__ import annotations

import os
import platform
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

RATE_SECONDS = 0.3
COPY_BYTES = 1 << 27
SMALLEST_PRODUCT, LARGEST_PRODUCT = 512, 8192


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
    import numpy as np

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
    import numpy as np

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
        names = [
            x.split(":", 1)[1] for x in cpuinfo.read_text("utf-8").splitlines() if "model name" in x
        ]
        if names:
            return names[0].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if found:
            return found
    return platform.processor() or platform.machine()
