"""Small video files, made with PyAV."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

Pixels = np.ndarray


def write_clip(
    path: Path,
    pictures: Sequence[Pixels],
    *,
    rate: int = 10,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    format: str | None = None,
    sample_aspect_ratio: Fraction | None = None,
    keyframes: int = 12,
    crf: int = 1,
) -> Path:
    """RGB pictures [H, W, 3] as frames, by default nearly lossless."""
    import av

    height, width, _ = pictures[0].shape
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": str(crf), "preset": "ultrafast", "g": str(keyframes)}
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def plain(colour: Sequence[int], width: int = 64, height: int = 48) -> Pixels:
    """A picture of one colour."""
    return np.full((height, width, 3), colour, dtype=np.uint8)


def rotated_file(path: Path, matrix: Sequence[float]) -> None:
    """Put a display matrix (a, b, c, d) into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4  # version and flags come next, then times and places
    assert data[at] == 0
    a, b, c, d = (round(value * 65536) for value in matrix)
    struct.pack_into(">9i", data, at + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def yuv_of(rgb: Sequence[int], kr: float, kb: float, full: bool, bits: int) -> list[int]:
    """Y'CbCr of a colour by the definition that all of the BT standards share."""
    red, green, blue = (value / 255 for value in rgb)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))
    top = 2**bits - 1
    if full:
        values = [y * top, cb * top + 2 ** (bits - 1), cr * top + 2 ** (bits - 1)]
    else:
        scale = 2 ** (bits - 8)
        values = [scale * (16 + 219 * y), scale * (128 + 224 * cb), scale * (128 + 224 * cr)]
    return [min(round(value), top) for value in values]


def write_yuv_clip(
    path: Path, colours: Sequence[Sequence[int]], *, bits: int, colorspace: int, full: bool
) -> Path:
    """Frames of one Y'CbCr colour each, marked with a matrix and a range, lossless."""
    import av

    format = "yuv420p" if bits == 8 else "yuv420p10le"
    kind = np.uint8 if bits == 8 else np.uint16

    def marked(target: Any) -> None:
        target.colorspace, target.color_range = colorspace, 2 if full else 1

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, format
        stream.options = {"qp": "0", "preset": "ultrafast"}
        marked(stream.codec_context)
        for colour in colours:
            frame = av.VideoFrame(64, 48, format)
            marked(frame)
            for plane, value in zip(frame.planes, colour, strict=True):
                size = plane.buffer_size // np.dtype(kind).itemsize
                plane.update(np.full(size, value, kind).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
