"""Measure what it takes to train the encoder, beside encoding.

In inference form and in training form, differentiated layer by layer, as is done on the CPU, and as
a whole; with random float32 weights in the geometry of a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.training_form import folded, fresh_model
from fastvlm_mlx.config import load_config
from fastvlm_mlx.hub.resolve import resolve
from fastvlm_mlx.model.vision_gradients import encode_with_pullback, trains_by_layer

from .tables import Result
from .turns import in_turns

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"nargs": "?"},
    "--image-size": {"default": 256},
    "--batch": {"type": int, "default": 16, "help": "images at a time"},
    "--rounds": {},
}


def measure(args: argparse.Namespace) -> Result:
    """Images per second and CPU time of each way, the medians of all rounds."""
    config = replace(load_config(resolve(args.model)), quantization={})
    new = fresh_model(config)
    plain = folded(new).vision_tower
    forms = {"inference": folded(new), "training": new}
    forms["inference"].train()
    pixels = mx.random.uniform(shape=(args.batch, args.image_size, args.image_size, 3))
    cotangent = mx.random.normal(plain(pixels).shape)
    mx.eval(pixels, cotangent)
    ways: dict[str, Callable[[], Any]] = {"encode": lambda: mx.eval(plain(pixels))}
    for name, model in forms.items():
        if trains_by_layer(model):
            ways[f"{name} form, by layer"] = partial(by_layer, model, pixels, cotangent)
        ways[f"{name} form, as a whole"] = partial(as_a_whole, model, pixels, cotangent)
    timed = {name: partial(times_of, way) for name, way in ways.items()}
    rows = []
    for name, times in in_turns(timed, args.rounds, "encoder").items():
        seconds, cpu_seconds = (median(t) / args.batch for t in zip(*times, strict=True))
        rows.append(
            {
                "way": name,
                "images_per_second": 1 / seconds,
                "cpu_milliseconds_per_image": 1000 * cpu_seconds,
            }
        )
    return {"kind": "table", "title": "Training the encoder", "results": rows}


def times_of(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) of a call; the latter say more on a busy machine."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu_start


def by_layer(model: fv.FastVLM, pixels: mx.array, cotangent: mx.array) -> None:
    """Features and gradients by `vision_gradients`."""
    features, pullback = encode_with_pullback(model.vision_tower, pixels)
    mx.eval(features, pullback(cotangent), model.parameters())


def as_a_whole(model: fv.FastVLM, pixels: mx.array, cotangent: mx.array) -> None:
    """Features and gradients by MLX."""
    encoder = model.vision_tower
    step = nn.value_and_grad(encoder, lambda encoder: (encoder(pixels) * cotangent).sum())
    mx.eval(step(encoder), model.parameters())
