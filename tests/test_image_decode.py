import io
import math
import struct
import time
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest
from images import (
    ALPHA,
    BOMB,
    COLOUR,
    NOISE,
    RGBA,
    SIXTEEN,
    TURNED,
    assert_one_sentence,
    grey,
    over_white,
    pixels,
    png,
    saved,
    tiff,
    unit,
)
from PIL import Image

from fastvlm_mlx.image import decode, flatten
from fastvlm_mlx.image.load import load_image
from fastvlm_mlx.image.preprocess import preprocess

RNG = np.random.default_rng(8)

# Orientation


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


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colour_of_cameras_fills_its_bits(bits: int, order: str, compressed: bool) -> None:
    samples = np.random.default_rng(bits).integers(0, 1 << bits, (9, 7, 3), np.uint16)
    samples[4, 3, 1] = (1 << bits) - 1
    data = tiff(samples, order, compressed)
    np.testing.assert_array_equal(pixels(data), (samples >> (bits - 8)).astype(np.uint8))


def test_dark_colour_that_says_how_bright_it_can_be() -> None:
    samples = np.full((2, 2, 3), 0x0123, np.uint16)
    assert (pixels(tiff(samples)) == 0x0123 >> 2).all()
    assert (pixels(tiff(samples, most=4095)) == 0x12).all()
    assert (pixels(tiff(samples, most=65535)) == 1).all()
    assert (pixels(tiff(samples * 0)) == 0).all()


def test_large_colour_is_joined_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).integers(0, 4096, (50, 30, 3), np.uint16)
    whole = pixels(tiff(samples))
    monkeypatch.setattr(flatten, "BAND", 100)
    np.testing.assert_array_equal(pixels(tiff(samples)), whole)
    np.testing.assert_array_equal(whole, (samples >> 4).astype(np.uint8))


def forms_of_grey(values: np.ndarray) -> dict[str, Any]:
    """The same values, unsigned 16 bits, in whatever holds them."""
    wide, big = values.astype(np.int32), values.astype(">u2").tobytes()
    size = (values.shape[1], values.shape[0])
    return {
        "PNG": saved(values),
        "TIFF": saved(values, "TIFF"),
        "32-bit TIFF": saved(wide, "TIFF"),
        "compressed TIFF": saved(values, "TIFF", compression="tiff_lzw"),
        "I;16": Image.fromarray(values),
        "I;16B": Image.frombytes("I;16B", size, big),
        "I": Image.fromarray(wide),
        "uint16": values,
        "int64": values.astype(np.int64),
        "int32, MLX": mx.array(wide),
        "uint64, big-endian": values.astype(">u8"),
    }


@pytest.mark.parametrize("form", forms_of_grey(SIXTEEN))
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_fills_the_fewest_usual_bits_that_hold_it(bits: int, form: str) -> None:
    values = np.linspace(0, 2**bits - 1, 300).astype(np.uint16).reshape(20, 15)
    expected = (values >> (bits - 8)).astype(np.uint8)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(forms_of_grey(values)[form]), expected)
    values = np.minimum(values, 1 << (bits - 2))  # too large by one for the bits before
    expected = (values >> (bits - 8)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(forms_of_grey(values)[form])[..., 0], expected)


@pytest.mark.parametrize("shape", [(9, 7, 1), (9, 7, 3), (9, 7, 4)])
def test_integers_of_several_channels(shape: tuple[int, ...]) -> None:
    values = RNG.integers(0, 256, shape)
    np.testing.assert_array_equal(pixels(values), pixels(values.astype(np.uint8)))
    values[0, 0, 0] = 200
    twelve = pixels(values * 16)
    np.testing.assert_array_equal(twelve, pixels(values.astype(np.uint8)))


def tiff_of_12_bits(values: list[int]) -> bytes:
    """A row of an even number of 12-bit samples, which PIL reads but does not write."""
    packed = "".join(f"{value:03x}" for value in values)
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, 1), (279, len(packed) // 2)]
    data = bytes.fromhex(packed)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_file_may_say_how_many_bits_its_grey_has() -> None:
    dark = np.array([[0, 16, 99, 200]], np.uint16)
    twelve, sixteen = grey(*(dark[0] >> 4)), grey(*(dark[0] >> 8))
    for wide in (dark, dark.astype(np.int32)):
        for highest, expected in ((4095, twelve), (65535, sixteen), (255, grey(*dark[0]))):
            data = saved(wide, "TIFF", tiffinfo={281: highest})
            np.testing.assert_array_equal(pixels(data), expected)
            np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), expected)
    np.testing.assert_array_equal(pixels(tiff_of_12_bits([0, 16, 99, 200])), twelve)
    pgm = b"P5 4 1 4095\n" + dark.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(pgm), twelve)
    too_low = saved(np.array([[0, 4095]], np.uint16), "TIFF", tiffinfo={281: 7})
    np.testing.assert_array_equal(pixels(too_low), grey(0, 255))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGBA),
        Image.fromarray(RGBA).convert("LA"),
        Image.fromarray(RGBA).convert("LA").convert("La"),
        Image.fromarray(RGBA[..., 0]).convert("P"),
        Image.fromarray(RGBA[..., 0].astype(np.int32) * 257),
        Image.fromarray(RGBA[..., 0].astype(np.float32)),
        Image.fromarray(RGBA[..., 0].astype(np.uint16) * 16),
    ],
    ids=lambda image: image.mode,
)
@pytest.mark.parametrize("band", [7, 52, 1000])
def test_bands_change_nothing(
    image: Image.Image, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, wide = pixels(image), pixels(image.transpose(Image.Transpose.ROTATE_90))
    monkeypatch.setattr(flatten, "BAND", band)
    np.testing.assert_array_equal(pixels(image), whole)
    found = pixels(image.transpose(Image.Transpose.ROTATE_90))
    np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "I", "P"])
def test_bands_change_no_transparent_colour(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(RGBA).convert("RGB").convert(mode)
    image.info["transparency"] = image.getpixel((20, 100))
    whole = pixels(image)
    assert (whole == 255).all(-1).any()
    monkeypatch.setattr(flatten, "BAND", 70)
    np.testing.assert_array_equal(pixels(image), whole)


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
        (np.full((5, 5), -1), "from -1 to -1 are not 0 to 65535"),
        (np.full((5, 5), 65536), "65536"),
        (np.zeros((5, 5), np.complex64), "complex64"),
        (np.array([["a"]]), "<U1"),
        (np.array([[None]]), "object"),
        (np.array([[0, math.nan]]), "nan"),
        (np.array([[0, math.inf]]), "inf"),
        (np.array([[0, 1.01]]), "1.01"),
        (np.array([[-0.5, 1]], np.float16), "-0.5"),
        (mx.zeros((3, 8, 9)), "transpose(1, 2, 0)"),
        (mx.array([[0.0, 2.0]]), "from 0 to 2"),
        (mx.array([[-5]], dtype=mx.int32), "-5"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)), "3,600,000,000 pixels"),
    ],
)
def test_unusable_arrays(array: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_image(array)
    assert said in str(caught.value) and "the array" in str(caught.value)
    assert_one_sentence(caught.value)


# Errors


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


# Several threads


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
