"""The losses of a run as a picture, drawn with Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 900, 480
LEFT, TOP, RIGHT, BOTTOM = 70, 46, 24, 50  # margins
INK, GRID, TRAINING, SMOOTH, VALIDATION = "#333333", "#e4e4e4", "#b9d3e8", "#1b6ca8", "#d1495b"
SMOOTHING = 0.95  # of the step before that the mean keeps
MOST_TICKS = 6
Points = Sequence[tuple[float, float]]


def draw_losses(lines: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Write a PNG of a log's training and validation losses; False if it has none."""
    from PIL import Image, ImageDraw, ImageFont

    training = _points(lines, "loss")
    validation = _points(lines, "validation_loss")
    if not training:
        return False
    smooth = list(_smoothed(training))
    shown = [*smooth, *validation, *_usual(training)]
    scale = _Scale(shown, [*training, *validation])
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    _draw_axes(draw, font, scale)
    for points, colour, width in ((training, TRAINING, 1), (smooth, SMOOTH, 3)):
        if len(points) > 1:
            draw.line([scale.place(p) for p in points], fill=colour, width=width, joint="curve")
    if len(validation) > 1:
        draw.line([scale.place(p) for p in validation], fill=VALIDATION, width=2)
    for x, y in map(scale.place, [*validation, *(smooth if len(smooth) == 1 else [])]):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=VALIDATION if validation else SMOOTH)
    _draw_legend(draw, font, bool(validation))
    content = BytesIO()
    image.save(content, "PNG")
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content.getvalue())
    os.replace(partial, file)
    return True


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line[name]))
        for line in lines
        if name in line and math.isfinite(line[name])
    ]


def _smoothed(points: Points) -> Iterator[tuple[float, float]]:
    """An exponential mean, corrected for its start."""
    total = weight = 0.0
    for step, value in points:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        yield step, total / weight


def _usual(points: Points) -> Points:
    """All but the highest hundredth, which would squeeze the others."""
    return sorted(points, key=lambda point: point[1])[: max(1, len(points) * 99 // 100)]


class _Scale:
    """Steps and losses → pixels."""

    def __init__(self, shown: Points, all_points: Points):
        losses = [loss for _, loss in shown]
        self.low, self.high = min(losses), max(losses)
        margin = 0.05 * (self.high - self.low) or 0.5
        self.low, self.high = max(0.0, self.low - margin), self.high + margin
        steps = [step for step, _ in all_points]
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        step, loss = point
        across = (step - self.first) / (self.last - self.first)
        up = min(1.0, (loss - self.low) / (self.high - self.low))
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def _draw_axes(draw: Any, font: Any, scale: _Scale) -> None:
    for loss in ticks(scale.low, scale.high):
        _, y = scale.place((scale.first, loss))
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{loss:g}", fill=INK, font=font, anchor="rm")
    for step in ticks(scale.first, scale.last):
        x, y = scale.place((step, scale.low))
        draw.line([(x, y), (x, y + 5)], fill=INK)
        draw.text((x, y + 8), f"{step:g}", fill=INK, font=font, anchor="ma")
    bottom = HEIGHT - BOTTOM
    draw.line([(LEFT, TOP), (LEFT, bottom), (WIDTH - RIGHT, bottom)], fill=INK)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), "step", fill=INK, font=font, anchor="ms")
    draw.text((LEFT, TOP - 12), "loss per token", fill=INK, font=font, anchor="ls")


def _draw_legend(draw: Any, font: Any, has_validation: bool) -> None:
    x, y = float(WIDTH - RIGHT), TOP - 18
    named = [("training", SMOOTH), ("validation", VALIDATION)][: 1 + has_validation]
    for name, colour in reversed(named):
        draw.text((x, y), name, fill=INK, font=font, anchor="rm")
        x -= draw.textlength(name, font=font) + 8
        draw.line([(x - 26, y), (x, y)], fill=colour, width=4)
        x -= 46


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, at most `MOST_TICKS`."""
    rough = (high - low) / (MOST_TICKS - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
