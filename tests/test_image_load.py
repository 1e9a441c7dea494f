import base64
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from images import (
    BOMB,
    DATA,
    NOISE,
    PHOTO,
    RGBA,
    SIXTEEN,
    assert_one_sentence,
    pixels,
    saved,
    unit,
)
from PIL import Image

from fastvlm_mlx.image.load import dragged_path, image_files, load_image

RNG = np.random.default_rng(8)

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


def just_written() -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    return file


def test_what_was_just_written_is_read_from_its_start(tmp_path: Path) -> None:
    file = just_written()
    for _ in range(2):  # reading leaves it at its end again
        np.testing.assert_array_equal(pixels(file), NOISE)
    with tempfile.SpooledTemporaryFile() as spooled, (tmp_path / "x").open("w+b") as named:
        for stream in (spooled, named):
            stream.write(saved(NOISE))
            np.testing.assert_array_equal(pixels(stream), NOISE)


class Tensor:
    """What torch, jax and others offer; `error` is what they say of one on another device."""

    def __init__(self, values: np.ndarray, error: Exception | None = None):
        self.values, self.error = values, error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.error:
            raise self.error
        return self.values


class Interface:
    def __init__(self, values: np.ndarray):
        self.values = values
        self.__array_interface__ = values.__array_interface__


@pytest.mark.parametrize("kind", [Tensor, Interface])
def test_arrays_of_other_libraries(kind: Callable[[np.ndarray], Any]) -> None:
    np.testing.assert_array_equal(pixels(kind(NOISE)), NOISE)
    np.testing.assert_array_equal(pixels(kind(unit(NOISE))), NOISE)
    with pytest.raises(ValueError, match=r"\[3, 5, 7\].*transpose\(1, 2, 0\)") as caught:
        load_image(kind(np.ascontiguousarray(NOISE.transpose(2, 0, 1))))
    assert_one_sentence(caught.value)
    with pytest.raises(ValueError, match="as a list of images"):
        load_image(kind(NOISE[None]))


def test_a_tensor_on_another_device() -> None:
    said = TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    with pytest.raises(ValueError, match=r"the array: .*Tensor\.cpu\(\) first\.$") as caught:
        load_image(Tensor(NOISE, said))
    assert_one_sentence(caught.value)


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


def test_no_temporary_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such")
    monkeypatch.setattr(tempfile, "tempdir", "/no/such")
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        assert pixels(saved(Image.fromarray(NOISE).convert("L"), form)).shape == (5, 7, 3)


def test_import_brings_in_no_pil() -> None:
    script = "import fastvlm_mlx, sys; print([m for m in sys.modules if m == 'PIL'])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert out.stdout.strip() == b"[]"


# Errors

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
        ("~nouser/x.png", FileNotFoundError, "'~nouser/x.png'"),
        (Path("~nouser/x.png"), FileNotFoundError, "no such file"),
        ("~a\0b/x.png", ValueError, "zero byte"),
        ("~\ud800/x.png", ValueError, "ud800"),
        ("file:///a%00b.png", ValueError, "zero byte"),
        ("file:///%ED%A0%80.png", FileNotFoundError, "no such file"),
        ("data:\ud800,", ValueError, "ud800"),
        ("https://[\ud800]/x.png", OSError, "ud800"),
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
    str(caught.value).encode()  # it can be printed
    assert_one_sentence(caught.value)


def test_long_data_url_is_named_briefly() -> None:
    with pytest.raises(ValueError) as caught:
        load_image("data:image/png;base64," + "QUJD" * 100_000)
    assert "data:image/png;base64,QUJD" in str(caught.value)
    assert_one_sentence(caught.value)


class Upload:
    """As FastAPI hands on a file."""

    def __init__(self, data: bytes):
        self.file = io.BytesIO(data)

    async def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


def test_upload_that_must_be_awaited() -> None:
    upload = Upload(saved(NOISE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left unawaited
        with pytest.raises(ValueError, match=r"`await image\.read\(\)`.*`file`") as caught:
            load_image(upload)  # type: ignore[arg-type]
    assert_one_sentence(caught.value)
    np.testing.assert_array_equal(pixels(upload.file), NOISE)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "HEIC"])
def test_bare_base64(form: str) -> None:
    image = Image.fromarray(NOISE).convert("P" if form == "GIF" else "RGB")
    data = HEIC if form == "HEIC" else saved(image, form)
    text = base64.b64encode(data).decode()
    for source in (text, text[:60], text.encode(), text * 1000):
        with pytest.raises(ValueError, match="base64,") as caught:
            load_image(source)
        assert_one_sentence(caught.value)


def test_a_path_is_no_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(saved(NOISE)).decode().replace("/", "+")[:60]
    Path(name).write_bytes(saved(NOISE))
    np.testing.assert_array_equal(pixels(name), NOISE)
    with pytest.raises(FileNotFoundError):
        load_image("UklGR.png")


@pytest.mark.parametrize("how", ["closed", "for writing", "odd"])
def test_file_objects_that_cannot_be_read(how: str, tmp_path: Path) -> None:
    file: Any = (tmp_path / "x").open("wb")
    if how == "closed":
        file.close()
    if how == "odd":
        file.close()
        file = type("Odd", (), {"read": lambda self: 7})()
    with pytest.raises(ValueError, match="the file object") as caught:
        load_image(file)
    assert_one_sentence(caught.value)
    if how == "for writing":
        file.close()


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


# Anything

quick = settings(max_examples=60, deadline=None)


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


# Files that a person points to


def test_image_files_are_sorted_and_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = ["B.HEIC", "a.jpg", "b.JPEG", "c/d.png", "c/e/f.webp", "z.avif"]
    hidden = ["._a.jpg", ".DS_Store", ".x.png", ".trash/a.png", "c/._d.png", "notes.txt", "a"]
    for name in shown + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path, True) == sorted(tmp_path / name for name in shown)
    assert image_files(str(tmp_path)) == [tmp_path / n for n in sorted(shown) if "/" not in n]
    inside = tmp_path / ".trash"  # asked for by name, it is not hidden
    assert image_files(inside) == [inside / "a.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_files("~/c") == [tmp_path / "c/d.png"]


@pytest.mark.parametrize("folder", ["no/such", "~nouser/x", "a\0b", "~\0", "~\ud800"])
@pytest.mark.parametrize("recursive", [True, False])
def test_image_files_of_no_folder(folder: str, recursive: bool) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        image_files(folder, recursive)
    str(caught.value).encode()
    assert_one_sentence(caught.value)


NAMES = ["plain.png", "my photo (1).png", "it's.png", 'a "b".png', "ü&$;#.png", "a\\b.png", " x "]


def escaped(path: str) -> str:
    """As macOS's Terminal writes what is dragged into it."""
    return re.sub(r"([^\w./~-])", r"\\\1", path)


@pytest.mark.parametrize("name", NAMES)
def test_dragged_paths(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    Path(path).touch()
    double = '"' + re.sub(r'(["\\])', r"\\\1", path) + '"'
    for text in (path, escaped(path), shlex.quote(path), double, Path(path).as_uri()):
        for spaced in (text, text + " ", f"  {text}\n"):
            if name == " x " and text == path and spaced != text:
                continue  # where it ends can't be told
            assert dragged_path(spaced) in (path, spaced.strip() if text == path else path)
            assert os.path.samefile(dragged_path(spaced), path)


def test_a_path_that_exists_as_given_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("'quoted.png'", r"a\ b.png", "a.png ", "~"):
        Path(name).touch()
        assert dragged_path(name) == name


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://example.org/a\\b.png?x='1' ", "https://example.org/a\\b.png?x='1'"),
        ("'https://example.org/x.png'", "https://example.org/x.png"),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
        (r"no\ such.png", "no such.png"),
        ("it's", "it's"),
        ("a.png b.png", "a.png b.png"),
        ("~/no such.png", "/home/me/no such.png"),
        ("~nouser/x.png", "~nouser/x.png"),
        ("file:///no%20such.png", "/no such.png"),
        ("file://relative.png", "file://relative.png"),
        ("", ""),
        ("  ", ""),
        ("a\0b", "a\0b"),
        ("\ud800", "\ud800"),
    ],
)
def test_dragged_text_that_names_no_file(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert dragged_path(text) == expected


@quick
@given(st.text(alphabet=" '\"\\\\:/~fileab.\0\ud800", max_size=20))
def test_any_dragged_text_is_a_text(text: str) -> None:
    assert isinstance(dragged_path(text), str)
