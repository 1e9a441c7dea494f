import base64
import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fastvlm_mlx.image import decode, load, resize
from fastvlm_mlx.image import preprocess as preprocessing
from fastvlm_mlx.image.decode import MAX_PIXELS
from fastvlm_mlx.image.grid import anyres_grid
from fastvlm_mlx.image.load import load_image
from fastvlm_mlx.image.preprocess import preprocess, preprocess_each
from fastvlm_mlx.image.resize import expand_to_square

DATA = Path(__file__).parent / "data" / "preprocess"
FILES = [entry["file"] for entry in json.loads((DATA / "images.json").read_text())["images"]]
EXPECTED = np.load(DATA / "expected.npz")
EXPECTED_MODES = np.load(DATA / "expected_modes.npz")  # from transformers and the original code
GRID = [(64, 128), (128, 64), (128, 128), (192, 64), (64, 192)]
RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)

quick = settings(max_examples=60, deadline=None)


def pixels(source: Any, **options: Any) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, form, **options)
    return file.getvalue()


def png(depth: int, colour: int, width: int, rows: list[bytes], **chunks: bytes) -> bytes:
    """A PNG made by hand, for what PIL can't save."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    extra = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None].astype(np.float64) / 255
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def unit(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / np.float32(255)


# Known pixels


@pytest.mark.parametrize("file", FILES)
def test_pixels_equal_the_reference(file: str) -> None:
    result = preprocess(DATA / file, 256)
    assert result.shape == (1, 256, 256, 3) and result.dtype == mx.float32
    np.testing.assert_array_equal(np.asarray(result)[0], unit(EXPECTED[file]))


@pytest.mark.parametrize("key", EXPECTED_MODES.files)
def test_other_modes_equal_the_reference(key: str) -> None:
    mode, file, side = key.split("-")
    result = preprocess(DATA / file, int(side), mode, GRID)
    np.testing.assert_array_equal(np.asarray(result), unit(EXPECTED_MODES[key]))


# Sources


def as_bytes_io(path: Path) -> io.BytesIO:
    return io.BytesIO(path.read_bytes())


def as_part_of_a_file(path: Path) -> io.BytesIO:
    file = io.BytesIO(b"before" + path.read_bytes())
    file.seek(6)
    return file


SOURCES: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": Path,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "BytesIO": as_bytes_io,
    "offset": as_part_of_a_file,
    "PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
    "mx": lambda path: mx.array(np.asarray(Image.open(path))),
    "floats": lambda path: unit(np.asarray(Image.open(path))),
    "bfloat16": lambda path: mx.array(unit(np.asarray(Image.open(path)))).astype(mx.bfloat16),
    "file URL": lambda path: path.as_uri(),
    "file URL with host": lambda path: path.as_uri().replace("file://", "FILE://localhost"),
    "base64": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "base64, percent-encoded and unpadded": lambda path: (
        "DATA:;BASE64," + quote(base64.b64encode(path.read_bytes()).decode().rstrip("="), safe="")
    ),
    "base64 in lines": lambda path: (
        "data:image/png;base64," + base64.encodebytes(path.read_bytes()).decode()
    ),
    "percent": lambda path: "data:image/png," + quote(path.read_bytes()),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode("a picture & ü#1.png".encode())
    path.write_bytes(saved(NOISE))
    source = SOURCES[kind](path)
    error = 1 if kind == "bfloat16" else 0
    assert np.abs(pixels(source).astype(int) - NOISE).max() <= error
    if hasattr(source, "close"):
        source.close()


def test_home_and_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(saved(NOISE))
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(pixels("~/x.png"), NOISE)
    script = (  # the standard input is a pipe
        "from fastvlm_mlx.image.load import load_image\n"
        "print(load_image('/dev/stdin').size, end='')"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], input=saved(NOISE), capture_output=True, check=True
    )
    assert out.stdout == b"(7, 5)"


def test_source_and_result_share_nothing() -> None:
    rgb, array = Image.fromarray(NOISE), NOISE.copy()
    sources: list[Any] = [rgb, array]
    for source in sources:
        load_image(source).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(rgb), NOISE)
    np.testing.assert_array_equal(array, NOISE)


def test_source_is_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(saved(Image.fromarray(NOISE).convert("P"), exif=exif)))
    image.info["transparency"] = 0
    before = image.mode, image.size, dict(image.info), image.tobytes()
    assert load_image(image).size == (5, 7)
    assert before == (image.mode, image.size, dict(image.info), image.tobytes())
    assert image.getexif()[0x0112] == 6


def test_import_brings_in_no_pil() -> None:
    script = "import fastvlm_mlx, sys; print([m for m in sys.modules if m == 'PIL'])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert out.stdout.strip() == b"[]"


# Orientation


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # the first row is the right edge
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    "form, options",
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
    ],
)
def test_orientation(form: str, options: dict, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0]] * 3], np.uint8)
    stored = corners.repeat(8, 0).repeat(8, 1)
    image = load_image(saved(stored, form, exif=exif, **options))
    found = np.asarray(image).astype(int)
    expected = TURNED[orientation](stored)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (4 if form == "JPEG" else 0)
    np.testing.assert_array_equal(pixels(image), found)  # and not turned once more


def test_unknown_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    np.testing.assert_array_equal(pixels(saved(NOISE, exif=exif)), NOISE)


def test_broken_exif_is_no_obstacle() -> None:
    data = saved(NOISE, exif=b"Exif\0\0this is no EXIF")
    np.testing.assert_array_equal(pixels(data), NOISE)


# Transparency


RGBA = np.stack([*np.meshgrid(np.arange(0, 256, 5), np.arange(256)), np.full((256, 52), 9)], -1)
COLOUR, ALPHA = RGBA[..., [0, 2, 0]].astype(np.uint8), RGBA[..., 1].astype(np.uint8)
RGBA = np.dstack([COLOUR, ALPHA])
PALETTE = [10, 20, 30, 200, 100, 50, 0, 0, 0, 255, 0, 255]


def in_palette(mode: str = "P") -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8))
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize(
    "source",
    [
        RGBA,
        mx.array(RGBA),
        unit(RGBA),
        Image.fromarray(RGBA),
        saved(RGBA),
        saved(RGBA, "TIFF"),
        saved(RGBA, "WEBP", lossless=True, exact=True),
    ],
    ids=["array", "mx", "floats", "PIL", "PNG", "TIFF", "WebP"],
)
def test_alpha_over_white(source: Any) -> None:
    np.testing.assert_array_equal(pixels(source), over_white(COLOUR, ALPHA))


@pytest.mark.parametrize("form", ["PNG", "PIL"])
def test_grey_with_alpha(form: str) -> None:
    image = Image.fromarray(np.dstack([COLOUR[..., 0], ALPHA]), "LA")
    expected = over_white(COLOUR[..., [0, 0, 0]], ALPHA)
    np.testing.assert_array_equal(pixels(saved(image) if form == "PNG" else image), expected)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode: str) -> None:
    straight = Image.fromarray(np.array([[[200, 200, 200, 128], [90, 90, 90, 0]]], np.uint8))
    found = pixels(straight.convert("LA" if mode == "La" else "RGBA").convert(mode))
    assert np.abs(found.astype(int) - [[[227] * 3, [255] * 3]]).max() <= 1


def test_palette_with_alpha() -> None:
    expected = np.array(PALETTE, np.uint8).reshape(1, 4, 3)
    alpha = np.array([[255, 128, 0, 1]], np.uint8)
    np.testing.assert_array_equal(pixels(saved(in_palette())), expected)
    some = saved(in_palette(), transparency=bytes(alpha.ravel()))
    np.testing.assert_array_equal(pixels(some), over_white(expected, alpha))
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(some))), over_white(expected, alpha))
    for form in ("PNG", "GIF"):
        one = pixels(saved(in_palette(), form, transparency=1))
        np.testing.assert_array_equal(one[0, [0, 2, 3]], expected[0, [0, 2, 3]])
        np.testing.assert_array_equal(one[0, 1], [255, 255, 255])
    own_alpha = in_palette().convert("PA")
    own_alpha.putalpha(Image.fromarray(alpha))
    assert own_alpha.mode == "PA"
    np.testing.assert_array_equal(pixels(own_alpha), over_white(expected, alpha))
    in_the_palette = in_palette()
    rgba = np.concatenate([expected[0], alpha[0][:, None]], 1)
    in_the_palette.putpalette(rgba.tobytes(), "RGBA")
    np.testing.assert_array_equal(pixels(in_the_palette), over_white(expected, alpha))


W = 255
KEYED = {
    "8-bit grey": (png(8, 0, 3, [b"\x05\x06\x07"], tRNS=b"\0\x06"), [5, W, 7]),
    "4-bit grey": (png(4, 0, 3, [b"\x12\x30"], tRNS=b"\0\x02"), [17, W, 51]),
    "4-bit grey, key among the decoded values": (
        png(4, 0, 2, [b"\x1f"], tRNS=b"\0\x0f"),
        [17, W],
    ),
    "2-bit grey": (png(2, 0, 4, [b"\x1b"], tRNS=b"\0\x01"), [0, W, 170, W]),
    "1-bit grey, black": (png(1, 0, 3, [b"\x40"], tRNS=b"\0\0"), [W, W, W]),
    "1-bit grey, white": (png(1, 0, 3, [b"\x40"], tRNS=b"\0\1"), [0, W, 0]),
    "16-bit grey": (
        png(16, 0, 3, [b"\x12\x34\x12\x35\x80\x00"], tRNS=b"\x12\x34"),
        [W, 0x12, 0x80],
    ),
    "RGB": (
        png(8, 2, 3, [b"\1\2\3\1\2\4\1\2\3"], tRNS=b"\0\1\0\2\0\3"),
        [[W, W, W], [1, 2, 4], [W, W, W]],
    ),
    "16-bit RGB": (
        png(16, 2, 2, [b"\x10\1\x20\2\x30\3\x10\1\x20\2\x40\3"], tRNS=b"\x10\x01\x20\x02\x30\x03"),
        [[W, W, W], [0x10, 0x20, 0x40]],
    ),
}


@pytest.mark.parametrize("kind", KEYED)
def test_transparent_colour(kind: str) -> None:
    data, expected = KEYED[kind]
    row = np.array(expected, np.uint8)
    row = row if row.ndim == 2 else row[:, None].repeat(3, 1)
    np.testing.assert_array_equal(pixels(data), row[None])
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), row[None])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("transparency", [5, 300, (1, 2), (1, 2, 3, 4), b"\0\1", "x"])
def test_meaningless_transparency_is_one_error_or_none(mode: str, transparency: Any) -> None:
    image = Image.new(mode, (2, 2), 7 if mode == "L" else (7,) * len(mode))
    image.info["transparency"] = transparency
    try:
        assert pixels(image).shape == (2, 2, 3)
    except ValueError as error:
        assert "the PIL image" in str(error)


# Modes


def grey(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)[None, :, None].repeat(3, 2)


SIXTEEN = np.array([[0, 255, 256, 0x1234, 0x80FF, 65535]], np.uint16)
HIGH = grey(0, 0, 1, 0x12, 0x80, 255)


@pytest.mark.parametrize(
    "source",
    [
        saved(SIXTEEN),
        Image.fromarray(SIXTEEN),
        Image.fromarray(SIXTEEN.astype(np.int32)),
        Image.frombytes("I;16B", (6, 1), SIXTEEN.astype(">u2").tobytes()),
        saved(SIXTEEN, "TIFF"),
        b"P5 6 1 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    ],
    ids=["PNG", "I;16", "I", "I;16B", "TIFF", "PGM"],
)
def test_16_bit_grey_keeps_its_high_byte(source: Any) -> None:
    np.testing.assert_array_equal(pixels(source), HIGH)


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_other_16_bit_png(colour: int, channels: int) -> None:
    values = RNG.integers(0, 65536, (1, 9, channels), dtype=np.uint16)
    found = pixels(png(16, colour, 9, [values.astype(">u2").tobytes()]))
    high = (values >> 8).astype(np.uint8)
    if channels == 3:
        np.testing.assert_array_equal(found, high)
    else:
        expected = over_white(
            high[..., [0, 0, 0]] if channels == 2 else high[..., :3], high[..., -1]
        )
        np.testing.assert_array_equal(found, expected)


def test_floats_to_255_or_to_1() -> None:
    full = np.array([[0, 1, 127.4, 127.6, 255]], np.float32)
    np.testing.assert_array_equal(pixels(Image.fromarray(full)), grey(0, 1, 127, 128, 255))
    np.testing.assert_array_equal(pixels(saved(full, "TIFF")), grey(0, 1, 127, 128, 255))
    whole = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(pixels(Image.fromarray(unit(whole))), grey(*range(256)))


def test_one_bit() -> None:
    bits = np.array([[True, False, True]])
    for source in (bits, mx.array(bits), Image.fromarray(bits), saved(Image.fromarray(bits))):
        np.testing.assert_array_equal(pixels(source), grey(255, 0, 255))


INKS = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]])
PAINT = np.array([[[255] * 3, [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]])
INKS = INKS.repeat(8, 0).repeat(8, 1).astype(np.uint8)
PAINT = PAINT.repeat(8, 0).repeat(8, 1)


def ycck_jpeg() -> bytes:
    """`INKS` as Photoshop saves them: inverted, and what is then 255 - CMY turned to YCbCr."""
    ycc = np.asarray(Image.fromarray(INKS[..., :3]).convert("YCbCr"))
    planes = np.dstack([ycc, 255 - INKS[..., 3]])
    data = saved(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=100, subsampling=0)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0  # "the four channels are as they are"
    return data[:place] + b"\2" + data[place + 1 :]


@pytest.mark.parametrize(
    "source, error",
    [
        (Image.fromarray(INKS, "CMYK"), 0),
        (saved(Image.fromarray(INKS, "CMYK"), "TIFF"), 0),
        (saved(Image.fromarray(INKS, "CMYK"), "JPEG", quality=100, subsampling=0), 3),
        (ycck_jpeg(), 4),
    ],
    ids=["PIL", "TIFF", "JPEG", "YCCK"],
)
def test_cmyk(source: Any, error: int) -> None:
    assert np.abs(pixels(source) - PAINT).max() <= error


@pytest.mark.parametrize(
    "mode, colour, expected, error",
    [
        ("HSV", (0, 255, 255), (255, 0, 0), 0),
        ("HSV", (170, 255, 255), (0, 0, 255), 4),
        ("YCbCr", (76, 85, 255), (254, 0, 0), 1),
        ("LAB", (255, 128, 128), (255, 255, 255), 1),
        ("LAB", (138, 209, 198), (255, 0, 0), 6),  # L 54.3, a 80.8, b 69.9 under D50
        ("RGBX", (1, 2, 3, 0), (1, 2, 3), 0),
        ("L", 9, (9, 9, 9), 0),
    ],
)
def test_other_modes(mode: str, colour: Any, expected: tuple, error: int) -> None:
    found = pixels(Image.new(mode, (1, 1), colour))[0, 0]
    assert np.abs(found.astype(int) - expected).max() <= error


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(form: str) -> None:
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(red, form, save_all=True, append_images=[blue], **options)
    assert (pixels(data) == [255, 0, 0]).all()


# Arrays

HALVES = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # all from 0 to 1


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.array([[0, 128, 255]], np.uint8), grey(0, 128, 255)),
        (np.array([[[0], [128], [255]]], np.uint8), grey(0, 128, 255)),
        (np.asfortranarray(NOISE), NOISE),
        (NOISE[::-1, ::-1], NOISE[::-1, ::-1]),
        (unit(NOISE), NOISE),
        (unit(NOISE).astype(np.float16), NOISE),
        (unit(NOISE).astype(">f8"), NOISE),
        (HALVES[None], np.rint(HALVES.astype(float) * 255)[None, :, None].repeat(3, 2)),
        (np.array([[0, 0.499 / 255, 0.501 / 255, 1]]), grey(0, 0, 1, 255)),
        (np.array([[[1, 2, 3, 255], [1, 2, 3, 0]]], np.uint8), [[[1, 2, 3], [255] * 3]]),
        (np.full((3, 2, 1), True), np.full((3, 2, 3), 255)),
    ],
)
def test_arrays(array: np.ndarray, expected: Any) -> None:
    np.testing.assert_array_equal(pixels(array), expected)
    if array.dtype != ">f8":
        np.testing.assert_array_equal(pixels(mx.array(array.copy())), expected)


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((3, 8, 9), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((1, 8, 9), np.float32), "transpose(1, 2, 0)"),
        (np.zeros((2, 8, 9, 3), np.uint8), "as a list"),
        (np.zeros((8, 9, 2), np.uint8), "[8, 9, 2]"),
        (np.zeros((), np.uint8), "[]"),
        (np.zeros(7, np.uint8), "[7]"),
        (np.zeros((0, 5, 3), np.uint8), "0 pixels"),
        (np.zeros((5, 5), np.int64), "int64"),
        (np.zeros((5, 5), np.uint16), "uint16"),
        (np.zeros((5, 5), np.complex64), "complex64"),
        (np.array([["a"]]), "uint8"),
        (np.array([[None]]), "object"),
        (np.array([[0, math.nan]]), "nan"),
        (np.array([[0, math.inf]]), "inf"),
        (np.array([[0, 1.01]]), "1.01"),
        (np.array([[-0.5, 1]], np.float16), "-0.5"),
        (mx.zeros((3, 8, 9)), "transpose(1, 2, 0)"),
        (mx.array([[0.0, 2.0]]), "from 0 to 2"),
        (mx.zeros((2, 2), dtype=mx.int32), "int32"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)), "3,600,000,000 pixels"),
    ],
)
def test_unusable_arrays(array: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_image(array)
    assert said in str(caught.value) and "the array" in str(caught.value)
    assert_one_sentence(caught.value)


# Errors


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and 20 < len(text) < 400, text
    assert "<_io" not in text and " at 0x" not in text, text
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


PHOTO = (DATA / "photo.jpg").read_bytes()
BOMB = png(1, 0, 60_000, [b""]).replace(
    struct.pack(">II", 60_000, 1), struct.pack(">II", *[60_000] * 2)
)
BOMB = BOMB[:29] + struct.pack(">I", zlib.crc32(BOMB[12:29])) + BOMB[33:]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
CONTENTS = {
    "empty": (b"", "empty"),
    "text": (b"Hello, this is no picture at all.\n" * 9, "not an image"),
    "truncated": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "truncated PNG": (
        saved(np.resize(RNG.permutation(256).astype(np.uint8), (64, 65)))[:-200],
        "truncated",
    ),
    "bomb": (BOMB, "3600000000 pixels"),
    "HEIC": (HEIC, "HEIC"),
    "PostScript": (saved(NOISE, "EPS"), "PostScript"),
    "floats": (saved(np.array([[0, 300]], np.float32), "TIFF"), "300"),
    "NaN": (saved(np.array([[0, math.nan]], np.float32), "TIFF"), "nan"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("where", ["path", "bytes", "file", "data"])
def test_bad_contents(kind: str, where: str, tmp_path: Path) -> None:
    data, said = CONTENTS[kind]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    sources: dict[str, tuple[Any, str]] = {
        "path": (path, "picture.png"),
        "bytes": (data, "image bytes"),
        "file": (io.BytesIO(data), "the file object"),
        "data": ("data:image/png;base64," + base64.b64encode(data).decode(), "data:image/png"),
    }
    source, name = sources[where]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            load_image(source)
    assert said in str(caught.value) and name in str(caught.value)
    assert_one_sentence(caught.value)


def test_bomb_without_pil_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="60000 × 60000 pixels") as caught:
        load_image(BOMB)
    assert_one_sentence(caught.value)
    with pytest.raises(ValueError, match="60000 × 60000 pixels"):
        load_image(Image.open(io.BytesIO(BOMB)))


def test_pixel_limit_and_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 20)  # 35 pixels are worth a warning to PIL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit, fits in ((35, True), (34, False)):
            monkeypatch.setattr(decode, "MAX_PIXELS", limit)
            sources: list[Any] = [saved(NOISE), Image.fromarray(NOISE), NOISE]
            for source in sources:
                if fits:
                    assert pixels(source).shape == (5, 7, 3)
                else:
                    with pytest.raises(ValueError, match="pixels, not 1 to 34"):
                        load_image(source)


@pytest.mark.parametrize(
    "source, kind, said",
    [
        ("no/such/file.png", FileNotFoundError, "'no/such/file.png'"),
        (Path("no/such/file.png"), FileNotFoundError, "no such file"),
        (DATA, IsADirectoryError, "folder"),
        (str(DATA), IsADirectoryError, "folder"),
        (str(DATA / "wide.png" / "x"), NotADirectoryError, "wide.png"),
        ("", FileNotFoundError, "''"),
        ("x" * 5000, OSError, "xxx…"),
        ("a\0b", ValueError, "a\\x00b"),
        ("\ud800.png", ValueError, "ud800"),
        ("file:///no/such%20file.png", FileNotFoundError, "such%20file"),
        ("file://relative.png", ValueError, "three slashes"),
        ("ftp://example.org/x.png", ValueError, "http, https, file or data"),
        ("data:image/png;base64", ValueError, "comma"),
        ("data:image/png;base64,@@@@", ValueError, "encoded"),
        ("data:image/png;base64,é", ValueError, "encoded"),
        ("data:,", ValueError, "empty"),
        (io.StringIO("text"), ValueError, "'rb'"),
        (None, ValueError, "NoneType"),
        (7, ValueError, "int"),
        ([NOISE], ValueError, "list"),
        (Image.new("RGB", (0, 5)), ValueError, "0 × 5"),
        (Image.fromarray(np.array([[-1, 9]], np.int32)), ValueError, "-1 to 9"),
    ],
)
def test_bad_sources(source: Any, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        load_image(source)
    assert said in str(caught.value)
    assert_one_sentence(caught.value)


def test_long_data_url_is_named_briefly() -> None:
    with pytest.raises(ValueError) as caught:
        load_image("data:image/png;base64," + "QUJD" * 100_000)
    assert "data:image/png;base64,QUJD" in str(caught.value)
    assert_one_sentence(caught.value)


def test_text_file_object_and_closed_image(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(saved(NOISE))
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match="mode 'rb'"):
        load_image(file)  # type: ignore[arg-type]
    image = Image.open(path)
    image.close()
    with pytest.raises(ValueError, match="the PIL image") as caught:
        load_image(image)
    assert_one_sentence(caught.value)


# URLs


class Site(BaseHTTPRequestHandler):
    """What a good or bad server does, by path."""

    stop = threading.Event()
    body = saved(NOISE)
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        page, _, rest = self.path[1:].partition("/")
        getattr(self, "page_" + page.partition(".")[0].partition("?")[0])(rest)

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def trickle(self, data: bytes) -> None:
        while not self.stop.wait(0.05):
            self.wfile.write(data)

    def page_ok(self, rest: str) -> None:
        self.head(200, Content_Length=len(self.body))
        self.wfile.write(self.body)

    def page_undeclared(self, rest: str) -> None:
        self.head(200)
        self.wfile.write(self.body)

    def page_chunked(self, rest: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.head(200, Transfer_Encoding="chunked")
        for part in (self.body[:50], self.body[50:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def page_open(self, rest: str) -> None:
        self.page_ok(rest)
        self.wfile.flush()
        self.stop.wait()

    def page_redirect(self, rest: str) -> None:
        left = int(rest)
        self.head(302, Location=f"/redirect/{left - 1}" if left else "/ok.png")

    def page_away(self, rest: str) -> None:
        self.head(301, Location=rest)

    def page_status(self, rest: str) -> None:
        self.head(int(rest))

    def page_empty(self, rest: str) -> None:
        self.head(200, Content_Length=0)

    def page_text(self, rest: str) -> None:
        self.head(200)
        self.wfile.write(b"<html>a page about the picture</html>")

    def page_never(self, rest: str) -> None:
        self.stop.wait()

    def page_drip(self, rest: str) -> None:
        self.head(200, Content_Length=10_000)
        self.trickle(b"x")

    def page_headers(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
        self.trickle(b"x")

    def page_detour(self, rest: str) -> None:
        self.head(302, Location="/ok.png")
        self.trickle(b"x" * 2**16)

    def page_short(self, rest: str) -> None:
        self.head(200, Content_Length=len(self.body) + 1)
        self.wfile.write(self.body)

    def page_huge(self, rest: str) -> None:
        self.head(200, Content_Length=10**12)
        self.wfile.write(self.body)

    def page_endless(self, rest: str) -> None:
        self.head(200)
        while not self.stop.is_set():
            self.wfile.write(bytes(2**16))

    def page_garbage(self, rest: str) -> None:
        self.wfile.write(b"\0\1\2 this is not HTTP\r\n\r\n")

    def page_hangup(self, rest: str) -> None:
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass  # clients that go away are the point here


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Site.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def site(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "*")
    return server


@pytest.mark.parametrize(
    "page",
    [
        "ok.png",
        "ok.png?size=large&x=%20#part",
        "ok.png/with space/ünï",
        "undeclared",
        "chunked",
        "open",
        "redirect/0",
        "redirect/9",
        "detour",
    ],
)
def test_url(site: str, page: str) -> None:
    np.testing.assert_array_equal(pixels(f"{site}/{page}", timeout=5), NOISE)


def test_url_spelling(site: str) -> None:
    np.testing.assert_array_equal(pixels(site.replace("http", "HTTP") + "/ok.png"), NOISE)
    load_image(f"{site}/ok.png/a b%20ü")
    assert Site.seen[-1] == "/ok.png/a%20b%20%C3%BC"
    load_image(f"{site}/away/{site}/ok.png")  # a whole address to go to
    assert Site.seen[-1] == "/ok.png"


@pytest.mark.parametrize(
    "page, kind, said",
    [
        ("status/404", OSError, "404 Not Found"),
        ("status/403", OSError, "403 Forbidden"),
        ("status/500", OSError, "500 Internal Server Error"),
        ("status/599", OSError, "599"),
        ("status/304", OSError, "304"),
        ("status/302", OSError, "302"),
        ("redirect/10", OSError, "more than 10 times"),
        ("away/file:///etc/passwd", OSError, "other than http"),
        ("away/ftp://example.org/x.png", OSError, "other than http"),
        ("empty", ValueError, "empty"),
        ("text", ValueError, "not an image"),
        ("short", OSError, "broke"),
        ("huge", OSError, "max_bytes"),
        ("endless", OSError, "max_bytes"),
        ("garbage", OSError, "not HTTP"),
        ("hangup", OSError, "closed"),
    ],
)
def test_url_errors(site: str, page: str, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        load_image(f"{site}/{page}", timeout=5, max_bytes=2**20)
    assert said in str(caught.value) and f"{site}/{page}" in str(caught.value)
    assert not isinstance(caught.value, TimeoutError)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("page", ["never", "drip", "headers"])
def test_url_deadline(site: str, page: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.3 seconds") as caught:
        load_image(f"{site}/{page}", timeout=0.3)
    assert time.monotonic() - start < 2
    assert f"{site}/{page}" in str(caught.value)
    assert_one_sentence(caught.value)


def test_no_download_goes_on_for_long(site: str) -> None:
    before = threading.enumerate()
    for page in ("drip", "endless"):
        with pytest.raises(TimeoutError):
            load_image(f"{site}/{page}", timeout=0.1, max_bytes=2**40)
    fetching = [t for t in threading.enumerate() if t not in before and "(fetch)" in t.name]
    for thread in fetching:
        thread.join(3)
        assert not thread.is_alive()


def test_url_size_limit_is_exact(site: str) -> None:
    size = len(Site.body)
    for page in ("ok.png", "undeclared", "chunked"):
        load_image(f"{site}/{page}", max_bytes=size)
        with pytest.raises(OSError, match=f"larger than max_bytes, {size - 1}"):
            load_image(f"{site}/{page}", max_bytes=size - 1)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://[bad/x.png", "http:///x.png", "http://a:b:c/x.png"]
)
def test_bad_addresses(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(OSError) as caught:
        load_image(url, timeout=5)
    assert repr(url) in str(caught.value)
    assert_one_sentence(caught.value)


# Resizing


@pytest.mark.parametrize(
    "size, corner",
    [((4, 4), (0, 0)), ((5, 2), (0, 1)), ((2, 5), (1, 0)), ((7, 6), (0, 0)), ((1, 4), (1, 0))],
)
def test_expand_to_square(size: tuple[int, int], corner: tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    square = np.asarray(expand_to_square(image, (9, 8, 7)))
    expected = np.tile(np.array([9, 8, 7], np.uint8), (max(size), max(size), 1))
    left, top = corner
    expected[top : top + size[1], left : left + size[0]] = np.asarray(image)
    np.testing.assert_array_equal(square, expected)


def whole(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 128, 320]))
def test_pad_in_bands_is_pad_at_once(width: int, height: int, side: int) -> None:
    image = whole(width, height)
    expected = expand_to_square(image).resize((side, side), Image.Resampling.BICUBIC)
    found = np.asarray(preprocess(image, side))
    np.testing.assert_array_equal(found[0], unit(np.asarray(expected)))


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with many cores, for images of any size."""
    monkeypatch.setattr(preprocessing.os, "cpu_count", lambda: 5)
    monkeypatch.setattr(resize, "PIXELS_FOR_THREADS", 0)


@pytest.mark.usefixtures("many_threads")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.sampled_from([64, 192, 256, 320, 512]),
    st.sampled_from(list(TURNED)),
)
def test_pad_in_threads_is_pad_at_once(
    width: int, height: int, side: int, orientation: int
) -> None:
    stored = whole(width, height)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.ascontiguousarray(TURNED[orientation](np.asarray(stored))))
    expected = expand_to_square(upright).resize((side, side), Image.Resampling.BICUBIC)
    found = preprocess(saved(stored, exif=exif, compress_level=0), side, dtype=mx.uint8)
    assert found.dtype == mx.uint8
    np.testing.assert_array_equal(np.asarray(found)[0], np.asarray(expected))


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(
    "size, side",
    [
        ((1200, 1600), 1024),
        ((1601, 1203), 1024),
        ((1081, 1923), 768),
        ((3, 4097), 1024),
        ((16_391, 7), 1024),  # too many digits for a box in single precision, but for the 16
        ((40_001, 9), 1024),
        ((7, 6_001), 512),
        ((640, 480), 1024),
    ],
)
def test_pad_of_large_images(size: tuple[int, int], side: int) -> None:
    image = whole(*size)
    longest = max(size)
    if longest > 5000:  # its square is too large: the same in two passes
        square = Image.new("RGB", (side, longest))
        row = Image.new("RGB", (longest, size[1]))
        row.paste(image, ((longest - size[0]) // 2, 0))
        row = row.resize((side, size[1]), Image.Resampling.BICUBIC)
        square.paste(row, (0, (longest - size[1]) // 2))
    else:
        square = expand_to_square(image)
    expected = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(preprocess(image, side, dtype=mx.uint8))[0], expected)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (40, 900)])
def test_only_a_little_black_is_resized(size: tuple[int, int]) -> None:
    picture = load._read(whole(*size))
    for axis, edge in enumerate(size):
        span = resize._padded_span(picture, axis, 256)
        filled = 256 * edge / max(size)
        assert filled <= span.size <= min(256, filled + 48)
        assert span.stop - span.start <= edge + 48 * max(size) / 256


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000).map(lambda n: 64 * n),
    st.integers(1, MAX_PIXELS // 64),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_box_is_exact_in_single_precision(
    side: int, longest: int, ratio: float, tall: bool
) -> None:
    longest = max(1, min(longest, MAX_PIXELS // side))
    short = max(1, min(int(longest * ratio), MAX_PIXELS // longest))
    size = (short, longest) if tall else (longest, short)
    image: Any = SimpleNamespace(size=size)
    for axis, edge in enumerate(size):
        picture = decode._Picture(image, 1, size)
        span = resize._padded_span(picture, axis, side)
        before = (longest - edge) // 2
        assert Fraction(span.high - span.low) == Fraction(span.size * longest, side)
        assert Fraction(span.low + span.start + before) == Fraction(span.first * longest, side)
        for place in (span.low, span.high, span.high - span.low):
            assert np.float32(place) == place


@quick
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 128]))
def test_square_keeps_the_centre(width: int, height: int, side: int) -> None:
    image = whole(width, height)
    if width <= height:
        long = int(side * height / width)
        resized = np.asarray(image.resize((side, long), Image.Resampling.BICUBIC))
        expected = resized[(long - side) // 2 :][:side]
    else:
        long = int(side * width / height)
        resized = np.asarray(image.resize((long, side), Image.Resampling.BICUBIC))
        expected = resized[:, (long - side) // 2 :][:, :side]
    for mode in ("square", None, "", "none"):
        np.testing.assert_array_equal(np.asarray(preprocess(image, side, mode))[0], unit(expected))


def best_of(width: int, height: int, grid: list[tuple[int, int]]) -> tuple[int, int]:
    """Every choice weighed against every other."""
    kept = {}
    for across, down in grid:
        scale = min(across / width, down / height)
        kept[across, down] = min(int(width * scale) * int(height * scale), width * height)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        if kept[one] != kept[other]:
            return kept[one] > kept[other]
        return math.prod(one) - kept[one] < math.prod(other) - kept[other]

    return next(one for one in grid if not any(beats(other, one) for other in grid))


@quick
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
    st.booleans(),
)
def test_anyres(width: int, height: int, tiles: list[tuple[int, int]], as_text: bool) -> None:
    grid = [(64 * across, 64 * down) for across, down in tiles]
    given_grid = str([list(size) for size in grid]) if as_text else grid
    best = best_of(width, height, grid)
    across, down = anyres_grid((width, height), given_grid, 64)
    assert (64 * across, 64 * down) == best
    image = whole(width, height)
    found = np.asarray(preprocess(image, 64, "anyres", given_grid))
    assert found.shape == (1 + across * down, 64, 64, 3)
    squeezed = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[0], unit(squeezed))

    tiled = found[1:].reshape(down, across, 64, 64, 3).swapaxes(1, 2)
    tiled = tiled.reshape(64 * down, 64 * across, 3)
    if best[0] / width < best[1] / height:
        fitted = best[0], min(math.ceil(height * (best[0] / width)), best[1])
    else:
        fitted = min(math.ceil(width * (best[1] / height)), best[0]), best[1]
    left, top = (best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2
    resized = np.asarray(image.resize(fitted, Image.Resampling.BICUBIC))
    right, bottom = best[0] - fitted[0] - left, best[1] - fitted[1] - top
    padded = np.pad(resized, ((top, bottom), (left, right), (0, 0)))
    np.testing.assert_array_equal(tiled, unit(padded))


@pytest.mark.parametrize(
    "size, expected",
    [
        ((336, 672), (1, 2)),
        ((672, 336), (2, 1)),
        ((2000, 2000), (2, 2)),
        ((3000, 500), (3, 1)),
        ((500, 3000), (1, 3)),
        ((100, 100), (1, 2)),  # nothing to gain from the larger ones: the first of the small
        ((1, 100_000), (1, 2)),
    ],
)
def test_anyres_grid_of_llava(size: tuple[int, int], expected: tuple[int, int]) -> None:
    grid = "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"
    assert anyres_grid(size, grid, 336) == expected


@pytest.mark.parametrize(
    "grid",
    [
        "",
        "[",
        "[]",
        "7",
        "__import__('os').getcwd()",
        "(" * 5000,
        "[(64, 64), (64)]",
        [],
        [(64,)],
        [(64, 0)],
        [(-64, 64)],
        [(64.0, 64)],
        [("64", "64")],
        [(100, 64)],
        [(64 * 10**6, 64 * 10**6)],
        {"64": 64},
        64,
    ],
)
def test_bad_grids(grid: Any) -> None:
    for call in (
        lambda: anyres_grid((10, 10), grid, 64),
        lambda: preprocess(NOISE, 64, "anyres", grid),
    ):
        with pytest.raises(ValueError, match="grid_pinpoints") as caught:
            call()
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (1, 2, 3)])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="width, height"):
        anyres_grid(size, GRID, 64)
    with pytest.raises(ValueError, match="positive"):
        anyres_grid((5, 5), GRID, 0)


def test_batch() -> None:
    sources: list[Any] = [DATA / "wide.png", NOISE, (DATA / "photo.jpg").read_bytes()]
    for mode in ("pad", "square"):
        batch = preprocess(sources, 64, mode)
        assert batch.shape == (3, 64, 64, 3)
        for one, source in zip(batch, sources, strict=True):
            assert mx.array_equal(one[None], preprocess(source, 64, mode))
        assert mx.array_equal(batch, preprocess(tuple(sources), 64, mode))


def test_bytes_and_floats() -> None:
    found = preprocess(DATA / "photo.jpg", 128, dtype=mx.uint8)
    assert found.shape == (1, 128, 128, 3) and found.dtype == mx.uint8
    assert mx.array_equal(preprocess(DATA / "photo.jpg", 128), mx.array(unit(np.asarray(found))))
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, 0).repeat(4, 1)
    every_byte = preprocess(ramp, 64)
    assert every_byte.dtype == mx.float32
    np.testing.assert_array_equal(np.asarray(every_byte)[0, ..., 0], unit(ramp))


# Many images


class Late(io.BytesIO):
    """A file that tells how many are being read, and takes its time."""

    reading = 0
    most = 0
    begun = 0
    lock = threading.Lock()

    def read(self, size: int | None = -1) -> bytes:
        with Late.lock:
            Late.begun += 1
            Late.reading += 1
            Late.most = max(Late.most, Late.reading)
        time.sleep(0.02)
        with Late.lock:
            Late.reading -= 1
        return super().read(size)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    for name in ("reading", "most", "begun"):
        monkeypatch.setattr(Late, name, 0)
    return Late


@pytest.mark.usefixtures("many_threads")
def test_each_in_order_and_at_once(late: type[Late]) -> None:
    sizes = [(50 + n, 100 - 3 * n) for n in range(23)]
    sources = [late(saved(whole(*size))) for size in sizes]
    for n, (pixel_values, size) in enumerate(preprocess_each(sources, 64)):
        assert size == sizes[n]
        assert mx.array_equal(pixel_values, preprocess(whole(*size), 64))
        assert late.begun <= n + 1 + 2 * 5  # not all of a long list at once
    assert n == 22 and 2 <= late.most <= 5


def test_one_core_reads_one_at_a_time(late: type[Late], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing.os, "cpu_count", lambda: None)
    sizes = [size for _, size in preprocess_each([late(saved(NOISE)) for _ in range(3)], 64)]
    assert sizes == [(7, 5)] * 3 and late.most == 1


@pytest.mark.usefixtures("many_threads")
def test_no_thread_outlives_its_images(late: type[Late]) -> None:
    before = threading.active_count()
    each = preprocess_each([late(saved(NOISE)) for _ in range(50)], 64)
    next(each)
    assert threading.active_count() > before
    del each
    assert threading.active_count() == before


@pytest.mark.usefixtures("many_threads")
def test_every_kind_of_source_in_threads() -> None:
    opened = Image.open(DATA / "photo.jpg")
    sources: list[Any] = [opened, opened, mx.array(NOISE) + 0, opened, NOISE, "no/such/file", None]
    each = preprocess_each(sources, 64)
    for expected in (DATA / "photo.jpg", DATA / "photo.jpg", NOISE, DATA / "photo.jpg", NOISE):
        assert mx.array_equal(next(each)[0], preprocess(expected, 64))
    with pytest.raises(FileNotFoundError, match="no/such/file") as caught:
        next(each)
    assert_one_sentence(caught.value)


@pytest.mark.usefixtures("many_threads")
def test_the_first_bad_image_is_reported() -> None:
    late_and_bad = Late(b"no image, but it takes time to see")
    with pytest.raises(ValueError, match="the file object: it is not an image"):
        preprocess([NOISE, late_and_bad, "no/such/file", b""], 64)


@pytest.mark.usefixtures("many_threads")
def test_threads_leave_warnings_as_they_are() -> None:
    data = png(8, 0, 3, [b"\x05\x06\x07"], tRNS=b"\0\x06")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        preprocess([data] * 40, 64)
        assert warnings.filters == before
        with pytest.raises(ValueError):
            preprocess([data] * 9 + [b"bad"] + [data] * 9, 64)
        assert warnings.filters == before


@pytest.mark.usefixtures("many_threads")
def test_pil_is_asked_for_formats_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, most, really_open = 0, 0, Image.open

    def slowly_open(stream: io.BytesIO) -> Image.Image:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        time.sleep(0.01)
        asking -= 1
        return really_open(stream)

    monkeypatch.setattr(PIL.Image, "open", slowly_open)
    preprocess([saved(NOISE)] * 8, 64)
    assert most == 1


# JPEG reduced while decoding


def photo(width: int, height: int) -> Image.Image:
    """A real one, enlarged: without the detail that no photo of that many pixels has."""
    with Image.open(DATA / "photo.jpg") as image:
        return image.resize((width, height), Image.Resampling.BICUBIC)


FAST_MODES: list[tuple[str, Any]] = [("pad", None), ("square", None), ("anyres", GRID)]


@pytest.mark.parametrize("mode, grid", FAST_MODES)
@pytest.mark.parametrize("orientation", TURNED)
def test_fast_is_close(mode: str, grid: Any, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(1603, 1197), "JPEG", quality=92, exif=exif)  # of no whole blocks
    ((exact, size),) = preprocess_each([data], 64, mode, grid, dtype=mx.uint8)
    ((fast, fast_size),) = preprocess_each([data], 64, mode, grid, fast=True, dtype=mx.uint8)
    assert fast_size == size == ((1603, 1197) if orientation < 5 else (1197, 1603))
    assert fast.shape == exact.shape
    error = np.abs(np.asarray(fast).astype(int) - np.asarray(exact))
    # Beside the padding, the last row is a whole one, though it stands for a part of one.
    assert 0 < np.percentile(error, 95) <= 4 and error.max() <= 24 and error.mean() < 0.5


@pytest.mark.parametrize(
    "longest, decoded", [(191, 191), (192, 96), (383, 192), (384, 96), (768, 96), (9999, 1250)]
)
def test_fast_decodes_no_smaller_than_it_may(longest: int, decoded: int) -> None:
    for size in ((longest, 60), (60, longest)):
        data = saved(Image.new("RGB", size, (9, 99, 200)), "JPEG")
        _, reduction = resize._of_mode(64, "pad", None)
        picture = load._read(data, reduction=reduction)
        assert max(picture.size) == decoded and picture.full_size == size


@pytest.mark.parametrize("mode, grid", FAST_MODES)
def test_fast_is_exact_where_it_has_no_effect(mode: str, grid: Any, tmp_path: Path) -> None:
    image = photo(700, 500)
    opened = Image.open(io.BytesIO(saved(image, "JPEG")))
    sources: list[Any] = [saved(image, "PNG"), saved(image, "WEBP"), np.asarray(image), opened]
    for source in sources:
        exact = preprocess(source, 64, mode, grid)
        assert mx.array_equal(preprocess(source, 64, mode, grid, fast=True), exact)
    assert opened.size == (700, 500)


def test_fast_from_everywhere(tmp_path: Path) -> None:
    data = saved(photo(700, 500), "JPEG")
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    expected = preprocess(data, 64, fast=True)
    assert not mx.array_equal(expected, preprocess(data, 64))
    encoded = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    sources: list[Any] = [path, str(path), path.as_uri(), io.BytesIO(data), encoded]
    for source in sources:
        assert mx.array_equal(preprocess(source, 64, fast=True), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_fast_in_other_colours(mode: str) -> None:
    data = saved(photo(700, 500).convert(mode), "JPEG", quality=95)
    exact, fast = (np.asarray(preprocess(data, 64, fast=f)) for f in (False, True))
    assert 0 < np.abs(exact - fast).max() < 12 / 255


def test_fast_finds_the_same_faults() -> None:
    for data in (PHOTO[: len(PHOTO) // 2], BOMB):
        with pytest.raises(ValueError) as caught:
            preprocess(data, 64, fast=True)
        assert_one_sentence(caught.value)


def test_default_size() -> None:
    result = preprocess(NOISE)
    assert result.shape == (1, 1024, 1024, 3)
    found = np.asarray(result)
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((NOISE, 0), "multiple of 64"),
        ((NOISE, -64), "multiple of 64"),
        ((NOISE, 100), "multiple of 64"),
        ((NOISE, 64.0), "multiple of 64"),
        ((NOISE, "64"), "multiple of 64"),
        ((NOISE, 64, "stretch"), "'stretch'"),
        ((NOISE, 64, "anyres"), "grid_pinpoints"),
        (([NOISE], 64, "anyres", GRID), "one image at a time"),
        (([], 64), "empty"),
        ((np.zeros((2, 5, 5, 3), np.uint8), 64), "as a list"),
        ((NOISE, 64_000), "64000 × 64000"),
        ((np.zeros((1, 3_000_000), np.uint8), 64), "3000000 × 1"),
        ((np.zeros((1, 50_000), np.uint8), 64, "square"), "crop it"),
        ((np.zeros((3_000_000, 1), np.uint8), 64, "anyres", GRID), "1 × 3000000"),
        ((np.zeros((40_000, 1), np.uint8), 64), "1 × 40000"),
    ],
)
def test_bad_arguments(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        preprocess(*arguments)
    assert said in str(caught.value)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [mx.float16, mx.int32, "uint8", np.uint8, None])
def test_bad_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match="float32 or uint8") as caught:
        preprocess(NOISE, 64, dtype=dtype)
    assert_one_sentence(caught.value)


def test_bad_arguments_are_found_before_the_first_image() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        preprocess_each(["no/such/file"], 65)
    assert list(preprocess_each([])) == []


def test_wide_images_need_no_square() -> None:
    strip = np.full((20, 100_000), 255, np.uint8)  # its square would have 10,000 million pixels
    result = np.asarray(preprocess(strip, 64))[0]
    assert result[31:33].any(axis=(1, 2)).any() and not result[:30].any() and not result[34:].any()


# Anything


def reads_or_says_why(source: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = load_image(source)
        except (ValueError, OSError) as error:
            assert_one_sentence(error)
        else:
            assert type(image) is Image.Image and image.mode == "RGB" and not image.info


def seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(RGBA[::16])
    rgb = picture.convert("RGB")
    return [
        saved(picture, exif=exif),
        saved(picture.convert("P"), transparency=3),
        saved(SIXTEEN),
        saved(rgb, "JPEG", exif=exif),
        saved(rgb, "JPEG", progressive=True),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(picture.convert("P"), "GIF"),
        saved(picture, "WEBP"),
        saved(rgb, "TIFF", exif=exif),
        saved(rgb, "BMP"),
    ]


SEEDS = seeds()


@quick
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    reads_or_says_why(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_images(seed: bytes, draw: st.DataObject) -> None:
    data = bytearray(seed)
    near = st.integers(0, 80) | st.integers(0, len(data) - 1)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(near)
        new = draw.draw(st.binary(max_size=4))
        data[place : place + draw.draw(st.integers(0, 4))] = new
    reads_or_says_why(bytes(data[: draw.draw(st.just(len(data)) | near)]))


@quick
@given(
    hnp.arrays(
        st.one_of(
            hnp.boolean_dtypes(),
            hnp.integer_dtypes(),
            hnp.unsigned_integer_dtypes(),
            hnp.floating_dtypes(),
            st.just(np.dtype(np.uint8)),
        ),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_random_arrays(array: np.ndarray) -> None:
    reads_or_says_why(array)


@quick
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.float32, np.float64, np.bool_]),
        st.sampled_from([(3, 2), (2, 3, 1), (4, 2, 3), (2, 5, 4)]),
        elements={"min_value": 0, "max_value": 1},
    )
)
def test_good_arrays_are_read(array: np.ndarray) -> None:
    assert load_image(array).size == (array.shape[1], array.shape[0])


@quick
@given(st.text(max_size=40) | st.text(max_size=40).map("data:".__add__))
def test_random_text(text: str) -> None:
    if not text.lower().startswith(("http:", "https:")):
        reads_or_says_why(text)
