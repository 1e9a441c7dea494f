"""Headers that never end, and HEIC photos."""

import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import NOISE, TURNED, assert_one_sentence, pixels, png, saved
from PIL import Image

from fastvlm_mlx.image import open as opening
from fastvlm_mlx.image.load import load_image
from fastvlm_mlx.image.preprocess import preprocess

GRID = [(64, 128), (128, 64)]

# Headers


def jpeg_with(segments: list[bytes]) -> bytes:
    data = saved(NOISE, "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def png_with(chunks: bytes) -> bytes:
    """With chunks before the pixels."""
    data = saved(NOISE)
    return data[:33] + chunks + data[33:]


def gif_with_comment(size: int) -> bytes:
    data = saved(Image.fromarray(NOISE).convert("P"), "GIF")
    start = data.index(b"\x2c")  # of the frame
    blocks = (b"\xff" + b"c" * 255) * (size // 255) + b"\0"
    return data[:start] + b"\x21\xfe" + blocks + data[start:]


ENDLESS = {
    "JPEG with a thousand EXIF segments": lambda: jpeg_with(
        [segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 1000
    ),
    "JPEG with tiny segments": lambda: jpeg_with([segment(0xFE, b"")] * 1_000_000),
    "JPEG with padding": lambda: jpeg_with([b"\xff" * 30_000_000]),
    "PPM with a comment": lambda: b"P6\n#" + b"c" * 50_000_000 + b"\n1 1 255\n123",
    "GIF with a comment": lambda: gif_with_comment(20_000_000),
    "PNG with tiny chunks": lambda: png_with(
        (bytes(4) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))) * 1_000_000
    ),
    "XPM without a picture": lambda: b"/* XPM */\n" + b"\n" * 20_000_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_endless_headers_are_refused_soon(kind: str) -> None:
    data = ENDLESS[kind]()
    start = time.monotonic()
    with pytest.raises(ValueError, match="image bytes") as caught:
        load_image(data)
    assert time.monotonic() - start < 10  # without a bound, it is minutes
    assert "too long" in str(caught.value)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with([segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(65_000))] * 150),
        b"P6\n" + b"# made by a program\n" * 20 + b"7 5\n255\n" + NOISE.tobytes(),
        gif_with_comment(100_000),
        saved(NOISE, "TIFF"),
    ],
    ids=["JPEG with 10 MB of XMP", "PPM", "GIF", "TIFF"],
)
def test_long_headers_are_read(data: bytes) -> None:
    assert pixels(data).shape == NOISE.shape


@pytest.mark.parametrize("kind", ["P1", "P2", "P3"])
def test_comments_of_a_plain_ppm_cost_no_time(kind: str) -> None:
    values = {"P1": "0 1 1 0", "P2": "3 0 7 7 200", "P3": "7 3 0 1 2 3 200 1 2"}[kind]
    top = "" if kind == "P1" else "200\n"
    size = {"P1": "2 2", "P2": "5 1", "P3": "3 1"}[kind]
    plain = f"{kind}\n{size}\n{top}{values}\n"
    for comments in (
        "# a\n",
        "#\r#b\r\n# c # d\n",
        "#\n" * 300_000,
        "#" + "c" * 5_000_000 + "\n",
    ):
        for place in (3, plain.index(values), plain.index(values) + 2):
            start = time.monotonic()
            found = pixels(f"{plain[:place]}{comments}{plain[place:]}".encode())
            assert time.monotonic() - start < 10
            np.testing.assert_array_equal(found, pixels(plain.encode()))


def test_what_follows_the_header_is_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_HEADER", 2**17)
    large = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        np.testing.assert_array_equal(pixels(saved(large, form)), large)


@pytest.mark.parametrize(
    "form, options",
    [
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG2000", {"irreversible": False}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("PCX", {}),
        ("ICO", {"sizes": [(7, 5)]}),
    ],
)
def test_readers_that_take_the_file_itself(form: str, options: dict, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(saved(NOISE, form, **options))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(path), expected)
    np.testing.assert_array_equal(pixels(path.read_bytes()), expected)


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header alone says how large it is."""
    data = png(8, 0, 1, [b"a"]).replace(struct.pack(">II", 1, 1), struct.pack(">II", width, height))
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
@pytest.mark.parametrize("size", [(1, 178_000_000), (178_000_000, 1)])
def test_size_is_checked_before_the_pixels_are_decoded(mode: str, size: tuple[int, int]) -> None:
    source = claiming(*size)
    for fast in (False, True):
        with pytest.raises(ValueError, match=f"resize an image of {size[0]} × {size[1]}") as caught:
            preprocess(source, 64, mode, GRID if mode == "anyres" else None, fast=fast)
        assert_one_sentence(caught.value)


def test_a_turn_said_after_the_pixels_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = np.zeros((40_000, 2), np.uint8)  # as wide as this it fits, as tall it would not
    data = saved(tall)
    with pytest.raises(ValueError, match="2 × 40000"):
        preprocess(data, 64)
    info = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(info)) + b"eXIf" + info
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + info))
    assert preprocess(data[:-12] + chunk + data[-12:], 64).shape == (1, 64, 64, 3)


# Special files


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, said in ((pipe, "a named pipe"), ("/dev/zero", "a device")):
        start = time.monotonic()
        with pytest.raises(ValueError, match=said) as caught:
            load_image(path)
        assert time.monotonic() - start < 2
        assert_one_sentence(caught.value)


def test_what_a_shell_passes_in_a_pipe_is_read() -> None:
    ends = os.pipe()
    os.write(ends[1], saved(NOISE))
    os.close(ends[1])
    np.testing.assert_array_equal(pixels(f"/dev/fd/{ends[0]}"), NOISE)
    os.close(ends[0])


# HEIC

heif = pytest.mark.needs("pillow_heif")
CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (250, 9, 9), (9, 250, 9), (9, 9, 250)


def heic(*images: np.ndarray, primary: int = 0, **options: Any) -> bytes:
    import pillow_heif

    file = pillow_heif.HeifFile()
    for image in images:
        file.add_frombytes("RGB", (image.shape[1], image.shape[0]), image.tobytes())
    stream = io.BytesIO()
    file.save(stream, quality=-1, primary_index=primary, **options)
    return stream.getvalue()


@heif
@pytest.mark.parametrize("orientation", TURNED)
def test_heic_is_turned_once(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(heic(CORNERS, exif=exif.tobytes()))
    expected = TURNED[orientation](CORNERS).astype(int)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        found = pixels(source)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 2  # YCbCr of 8 bits there and back
    assert preprocess(path, 64, fast=True).shape == (1, 64, 64, 3)


@heif
def test_heic_has_the_values_of_the_plugin() -> None:
    import pillow_heif

    data = heic(np.random.default_rng(3).integers(0, 256, (33, 57, 3), dtype=np.uint8))
    given = pillow_heif.open_heif(data, convert_hdr_to_8bit=True).to_pillow()
    np.testing.assert_array_equal(pixels(data), np.asarray(given))
    np.testing.assert_array_equal(pixels(given), np.asarray(given))


@heif
@pytest.mark.parametrize("primary", [0, 1])
def test_of_several_images_the_primary_is_read(primary: int) -> None:
    images = [CORNERS, 255 - CORNERS]
    found = pixels(heic(*images, primary=primary)).astype(int)
    assert np.abs(found - images[primary]).max() <= 2


@heif
def test_damaged_heic() -> None:
    data = heic(CORNERS)
    for damaged in (data[:60], data[: len(data) // 2], data[:-40]):
        with pytest.raises(ValueError, match="image bytes") as caught:
            load_image(damaged)
        assert_one_sentence(caught.value)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_the_plugin(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"pip install 'fastvlm-mlx\[heic\]'") as caught:
        load_image(b"\0\0\0\x18ftyp" + brand + bytes(64))
    assert_one_sentence(caught.value)
