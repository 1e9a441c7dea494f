"""Where captions come from and go to: folders, lists, tables, archives, sidecars."""

import csv
import io
import json
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
from captions import alone, numbered, picture, pictures, run

from fastvlm_mlx.caption import containers, exif, tables, xmp
from fastvlm_mlx.caption.files import AppendedFile, replace_bytes
from fastvlm_mlx.caption.sources import all_items, find_sources
from fastvlm_mlx.image.load import load_image

PROMPT = "Describe the image."


def keys(*names: str | Path) -> list[str]:
    return [item.key for item in all_items(find_sources(names))]


def png(seed: int) -> bytes:
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    return data.getvalue()


def same_picture(item, seed: int) -> bool:
    return load_image(item.image).tobytes() == picture(seed).tobytes()


# Sources


def test_a_folder_is_searched_without_hidden_files(tmp_path):
    folder = pictures(tmp_path / "p", "b.png", "a.jpg", "a.png")
    pictures(folder / "deep", "c.webp")
    pictures(folder / ".hidden", "d.png")
    pictures(folder, ".e.png")
    (folder / "._a.png").write_bytes(b"a Mac's shadow")
    (folder / "notes.txt").write_text("no image")
    found = [str(folder / name) for name in ("a.jpg", "a.png", "b.png", "deep/c.webp")]
    assert keys(folder) == found
    assert keys(f"{folder}/*.png") == [found[1], found[2]]
    assert keys(f"{folder}/**/*.webp", folder) == [found[3], *found[:3]]  # each once


def test_captions_that_a_pattern_matches_are_no_lists(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.png", "b.jpg", "b.png")
    run(nano, folder, ".txt")
    run(nano, folder, ".xmp")
    images = [str(folder / name) for name in ("a.png", "b.jpg", "b.png")]
    assert sorted(keys(f"{folder}/*")) == images  # by the command, or written out by a shell
    assert sorted(keys(*(file for file in folder.iterdir() if file.name[0] != "."))) == images


def test_names_in_both_unicode_forms_are_two_images(nano, tmp_path):
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    folder = pictures(tmp_path / "p", *names)
    if len(os.listdir(folder)) == 1:
        pytest.skip("this file system takes them for one")
    run(nano, folder, tmp_path / "c.jsonl")
    found = {row["image"]: row["caption"] for row in tables.read_rows(tmp_path / "c.jsonl")}
    assert found == {str(folder / n): alone(nano, PROMPT, folder / n) for n in names}
    run(nano, folder, ".txt")
    for name in names:
        assert (folder / f"{name}.txt").read_text().strip() == found[str(folder / name)]


def test_a_name_that_is_no_text_is_captioned_once(nano, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"\xff.png")).write_bytes(png(0))
    except OSError:
        pytest.skip("this file system has only text for names")
    for out in ("c.jsonl", "c.csv"):
        for _ in range(2):
            run(nano, folder, tmp_path / out)
        assert len(list(tables.read_rows(tmp_path / out))) == 1


def test_a_list_may_be_relative_to_its_folder(tmp_path, monkeypatch):
    pictures(tmp_path / "p", "a b.png", "c.png")
    (tmp_path / "p" / "list.txt").write_bytes(b"\xef\xbb\xbfa b.png\r\n\n c.png \n")
    items = list(all_items(find_sources([str(tmp_path / "p" / "list.txt")])))
    assert [item.key for item in items] == ["a b.png", "c.png"]
    assert all(same_picture(item, seed) for seed, item in enumerate(items))
    monkeypatch.chdir(tmp_path)  # or to where the command runs
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.txt").write_text("p/c.png\n")
    (item,) = all_items(find_sources(["lists/a.txt"]))
    assert same_picture(item, 1)


def test_a_list_comes_from_standard_input(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "p", "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder / 'a.png'}\nhttps://x.y/b.png\n"))
    assert keys("-") == [str(folder / "a.png"), "https://x.y/b.png"]


def test_rows_of_jsonl_name_images_in_many_ways(tmp_path):
    from base64 import b64encode

    pictures(tmp_path, "a.png")
    url = "data:image/png;base64," + b64encode(png(1)).decode()
    rows = [{"file_name": "a.png", "id": 1}, {"image": url}, {"other": 2}, {"path": "nope.png"}]
    table = tmp_path / "in.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)) + '\n{"image": \n[]\n')
    items = list(all_items(find_sources([str(table)])))
    assert [item.key for item in items[:2]] == ["a.png", f"{table}:2"]
    assert same_picture(items[0], 0) and same_picture(items[1], 1)
    assert items[0].row == {"id": 1}
    said = [str(item.image) for item in items[2:3] + items[4:]]
    assert "names no image" in said[0] and "other" in said[0]
    assert said[1] == "line 5 is no JSON object" and said[2] == "line 6 is no JSON object"


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_rows_of_csv_keep_their_other_columns(nano, tmp_path, kind):
    mark = "," if kind == "csv" else "\t"
    pictures(tmp_path, "a.png")
    rows = [["image", "note", "n"], ["a.png", 'two\nlines, "quoted"', "1"]]
    with (tmp_path / f"in.{kind}").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=mark).writerows(rows)
    run(nano, tmp_path / f"in.{kind}", tmp_path / f"out.{kind}")
    with (tmp_path / f"out.{kind}").open(newline="") as file:
        (found,) = csv.DictReader(file, delimiter=mark)
    assert found["note"] == rows[1][1] and found["n"] == "1"
    assert found["caption"] == alone(nano, PROMPT, tmp_path / "a.png")


@pytest.mark.needs("pyarrow")
def test_rows_of_parquet_may_hold_the_images(nano, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pictures(tmp_path, "a.png")
    images = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "a.png"}]
    images.append({"bytes": png(2), "path": "there.png"})
    table = pyarrow.table({"image": images, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    (source,) = find_sources([str(tmp_path / "in.parquet")])
    items = list(source.items())
    assert source.count() == 3
    assert all(same_picture(item, seed) for item, seed in zip(items, (1, 0, 2), strict=True))
    assert [item.row for item in items] == [{"id": 1}, {"id": 2}, {"id": 3}]
    assert run(nano, tmp_path / "in.parquet", tmp_path / "c.jsonl").written == 3


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def test_samples_of_a_webdataset_have_keys_up_to_the_first_dot(nano, tmp_path):
    members = {"x/1.png": png(1), "x/1.json": b'{"id": 1}', "x/1.txt": b"old"}
    members |= {"22.05.png": png(2), "22.05.txt": b"five", "22.06.png": png(3)}
    members |= {"._1.png": b"shadow", "2.png": png(4), "2.json": b"broken"}
    tar = write_tar(tmp_path / "in.tar", members)
    (source,) = find_sources([str(tar)])
    items = list(source.items())
    names = ["x/1.png", "22.05.png", "22.06.png", "2.png"]
    assert [item.key for item in items] == [f"{tar}/{name}" for name in names]
    assert source.count() == 4
    assert all(same_picture(item, seed) for seed, item in enumerate(items, 1))
    assert items[0].row == {"id": 1, "caption": "old"}
    assert items[1].row == {"caption": "five"} and items[2].row == items[3].row == {}
    summary = run(nano, tar, tmp_path / "c.jsonl")
    assert summary.kept == 2 and summary.written == 2
    assert [r["caption"] for r in tables.read_rows(tmp_path / "c.jsonl")][:2] == ["old", "five"]


def test_a_broken_tar_is_said(tmp_path):
    tar = write_tar(tmp_path / "in.tar", {"1.png": png(1)})
    tar.write_bytes(tar.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole tar"):
        keys(tar)


# Tables


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b'{"image": "x", "caption": "y"}\n{"image": "p', b'{"image": "x", "caption": "y"}\n'),
        (b'{"image": "x", "caption": "y"}', b'{"image": "x", "caption": "y"}\n'),
        (b'{"image": "x", "caption": "\xc3', b""),
        (b'{"ima\n{"image": "x"}\n', b'{"ima\n{"image": "x"}\n'),
        (b"", b""),
    ],
    ids=["half", "no newline", "half a character", "a line in the middle", "empty"],
)
def test_jsonl_is_appended_to_rightly(nano, tmp_path, left, kept):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.jsonl"
    out.write_bytes(left)
    run(nano, folder, out, prompts=[PROMPT])
    data = out.read_bytes()
    assert data.startswith(kept) and data.count(b"a.png") == 1 and data.endswith(b"\n")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_csv_is_appended_to_rightly(nano, tmp_path, end):
    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.csv"
    out.write_bytes(f'file,caption,n\nx,"two\nlines ""q""",1\ny,plain,2{end}'.encode())
    before = out.read_bytes()
    run(nano, folder, out)
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert out.read_bytes().startswith(before) and len(found) == 3
    assert found[0]["caption"] == 'two\nlines "q"' and found[1]["n"] == "2"
    image = folder / "a.png"
    assert found[2] == {"file": str(image), "caption": alone(nano, PROMPT, image), "n": ""}


def test_csv_with_newlines_and_quotes_is_read_as_it_was_written(tmp_path):
    values = ['"', "a\nb", "c\r\nd", ",", "", " x ", "é", '","', "\\"]
    (tmp_path / "c.csv").write_bytes(tables.to_csv("abcdefghi") + tables.to_csv(values))
    (row,) = tables.read_rows(tmp_path / "c.csv")
    assert list(row.values()) == values
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == values


@pytest.mark.needs("pyarrow")
def test_parquet_has_one_schema_and_is_whole_at_any_time(nano, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    from fastvlm_mlx.caption import rewritten

    monkeypatch.setattr(rewritten, "PERIOD", 0)
    monkeypatch.setattr(rewritten, "SHARE", 0)
    pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    rows = [{"image": f"{i}.png", **({"tags": ["a"]} if i % 2 else {"n": i})} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, seen = tmp_path / "c.parquet", []
    plain = os.replace

    def looking(source, target):
        plain(source, target)
        if Path(target) == out:
            seen.append(pyarrow.parquet.read_table(out).num_rows)

    monkeypatch.setattr(os, "replace", looking)
    run(nano, tmp_path / "in.jsonl", out)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == 20
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["image", "caption", "prompt", "flags", "row"]
    assert table.schema.field("flags").type == pyarrow.list_(pyarrow.string())
    found = table.to_pylist()
    assert [row["image"] for row in found] == [f"{i}.png" for i in range(20)]
    assert json.loads(found[1]["row"]) == {"tags": ["a"]}
    assert json.loads(found[2]["row"]) == {"n": 2}
    for row in found:
        assert row["caption"] == alone(nano, PROMPT, tmp_path / row["image"])
    run(nano, tmp_path / "in.jsonl", out, existing="append")
    again = pyarrow.parquet.read_table(out).to_pylist()
    assert [r["caption"] for r in again] == [f"{r['caption']} {r['caption']}" for r in found]


@pytest.mark.needs("pyarrow")
def test_a_foreign_parquet_is_left_alone(nano, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder, out = pictures(tmp_path / "p", "a.png"), tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x"], "text": ["y"]}), out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="has the columns image, text"):
        run(nano, folder, out)
    out.write_bytes(b"no table")
    with pytest.raises(ValueError, match="is no Parquet file"):
        run(nano, folder, out)
    assert before and out.read_bytes() == b"no table"


# Sidecars


def test_images_that_share_a_name_have_sidecars_of_their_own(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.jpg", "a.png", "b.png", "22.05.png", "22.06.png")
    pictures(folder, "A.webp", first=9)
    (folder / "._b.jpg").write_bytes(b"a Mac's shadow")
    run(nano, folder, ".txt")
    found = {file.name: file.read_text() for file in folder.glob("*.txt")}
    images = {"a.jpg.txt": "a.jpg", "a.png.txt": "a.png", "A.webp.txt": "A.webp"}
    images |= {"b.txt": "b.png", "22.05.txt": "22.05.png", "22.06.txt": "22.06.png"}
    wanted = {name: alone(nano, PROMPT, folder / image) + "\n" for name, image in images.items()}
    assert found == wanted


def test_sidecars_that_are_there(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.png", "b.png", "c.png")
    (folder / "a.txt").write_text("old")  # without a newline
    (folder / "b.txt").write_text(" \n")  # as good as none
    (folder / "c.txt").write_bytes(b"\xff\xfe")  # no text
    new = {name: alone(nano, PROMPT, folder / f"{name}.png") for name in "ab"}
    summary = run(nano, folder, ".txt")
    assert summary.kept == 1 and summary.written == 1 and "can't be read" in summary.failed[0][1]
    assert (folder / "a.txt").read_text() == "old"
    assert (folder / "b.txt").read_text() == new["b"] + "\n"
    assert (folder / "c.txt").read_bytes() == b"\xff\xfe"
    for _ in range(2):
        run(nano, folder, ".txt", existing="append", separator=", ")
    assert (folder / "a.txt").read_text() == f"old, {new['a']}\n"


def test_an_image_that_is_no_file_has_no_sidecar(nano, tmp_path):
    tar = write_tar(tmp_path / "in.tar", {"1.png": png(1)})
    summary = run(nano, tar, ".txt")
    assert "no file of its own" in summary.failed[0][1]
    assert (tmp_path / ".fastvlm-captions.txt.manifest").exists()


def test_several_columns_do_not_go_into_a_sidecar(nano, tmp_path):
    with pytest.raises(ValueError, match="holds one caption"):
        run(nano, pictures(tmp_path / "p", "a.png"), ".txt", questions={"n": "How many?"})


def test_xmp_holds_the_caption_in_utf_8():
    text = 'Ein Bär & "Käse" <b>, 熊 🐻\nzwei\x00'
    packet = xmp.with_description(b"", text)
    assert xmp.description_of(packet) == text.replace("\0", "")
    assert "熊 🐻" in packet.decode("utf-8")


def test_xmp_of_other_programs_keeps_what_it_holds():
    packet = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
    <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
    <rdf:Description rdf:about="" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
        crs:Exposure="+1.5"><crs:Look>warm</crs:Look></rdf:Description></rdf:RDF></x:xmpmeta>"""
    assert xmp.description_of(packet) == ""
    changed = xmp.with_description(packet, "one")
    assert xmp.description_of(changed) == "one"
    assert b'crs:Exposure="+1.5"' in changed and b"<crs:Look>warm</crs:Look>" in changed
    assert xmp.description_of(xmp.with_description(changed, "two")) == "two"
    for broken in (b"no xml", b"<a/>"):
        with pytest.raises(ValueError, match="no XMP"):
            xmp.description_of(broken)


# WebDataset


def samples(folder: Path, pattern: str) -> dict[str, dict[str, bytes]]:
    """Read as the webdataset library does: files of a sample share all up to the first dot."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, kind = info.name.partition(".")
                found.setdefault(key, {})[kind] = tar.extractfile(info).read()
    return found


def test_a_webdataset_has_a_sample_for_each_image(nano, tmp_path):
    folder = pictures(tmp_path / "p", "22.05.png", "22.06.png", "a.jpg", "a.png", "é.png")
    run(nano, folder, tmp_path / "c-%03d.tar", shard_size=2)
    assert [file.name for file in sorted(tmp_path.glob("*.tar"))] == [
        f"c-{i:03d}.tar" for i in range(3)
    ]
    found = list(samples(tmp_path, "*.tar").values())
    assert len(found) == 5
    for sample, file in zip(found, sorted(folder.iterdir()), strict=True):
        assert sample[file.suffix[1:]] == file.read_bytes()
        assert sample["txt"].decode() == alone(nano, PROMPT, file)
        assert json.loads(sample["json"])["image"] == str(file)
    pictures(folder, "z.png", first=40)
    run(nano, folder, tmp_path / "c-%03d.tar", shard_size=2)
    assert len(samples(tmp_path, "*.tar")) == 6 and len(list(tmp_path.glob("*.tar"))) == 3


def test_a_tar_of_others_is_left_alone(nano, tmp_path):
    folder = pictures(tmp_path / "p", "a.png")
    tar = write_tar(tmp_path / "c.tar", {"1.png": png(1)})
    before = tar.read_bytes()
    with pytest.raises(ValueError, match="did not write"):
        run(nano, folder, tar)
    assert tar.read_bytes() == before


# Files


def test_a_record_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    file = AppendedFile(tmp_path / "a")
    file.append(b"one\n")

    class Full:
        """A disk with room for two bytes."""

        def __init__(self, stream):
            self.stream, self.room = stream, 2

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            data, self.room = data[: self.room], 0
            return self.stream.write(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    file._stream = Full(file._stream)
    with pytest.raises(OSError, match=f"No space .*{tmp_path / 'a'}"):
        file.append(b"two\n")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    replace_bytes(file, b"old")
    file.chmod(0o640)

    def failing(*paths):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="Input/output"):
            replace_bytes(file, b"new")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]
    replace_bytes(file, b"new")
    assert file.read_bytes() == b"new" and file.stat().st_mode & 0o777 == 0o640


def test_the_model_is_seldom_idle(nano, tmp_path):
    summary = run(nano, numbered(tmp_path / "p", 24), tmp_path / "c.jsonl", image_size=256)
    assert summary.idle / (summary.idle + summary.busy) < 0.25  # a busy machine; benchmarks: 0.05


# Descriptions within images

GREETING = 'Ein Bär & "Käse", 熊 🐻'


def saved(file: Path, mode: str = "RGB", **settings) -> Path:
    picture(3, 24).convert(mode).save(file, **settings)
    return file


def described(file: Path) -> str:
    """As Pillow, which others wrote, finds the description."""
    from PIL import Image

    with Image.open(file) as image:
        image.load()
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = packet.encode() if isinstance(packet, str) else packet
    return xmp.description_of(packet) if packet else ""


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [
        ("a.jpg", "RGB", {}),
        ("b.jpg", "L", {"progressive": True}),
        ("c.jpg", "RGB", {"xmp": xmp.with_description(b"", "old")}),
        ("d.png", "RGBA", {}),
        ("e.png", "P", {}),
        ("f.webp", "RGB", {"quality": 80}),
        ("g.webp", "RGBA", {"lossless": True}),
        ("h.webp", "RGB", {"xmp": xmp.with_description(b"", "old"), "lossless": True}),
    ],
)
def test_a_description_within_an_image_changes_nothing_else(tmp_path, name, mode, settings):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"  # turned, and the camera's maker
    file = saved(tmp_path / name, mode, exif=exif, **settings)
    before = load_image(file).tobytes()
    with Image.open(file) as image:
        kept_mode = image.mode
    for text in (GREETING, "two"):
        image = file.read_bytes()
        packet = xmp.with_description(containers.read_packet(image), text)
        replace_bytes(file, containers.with_packet(image, packet))
        assert described(file) == text
        assert xmp.description_of(containers.read_packet(file.read_bytes())) == text
    assert load_image(file).tobytes() == before
    with Image.open(file) as image:
        assert dict(image.getexif()) == dict(exif) and image.mode == kept_mode
    longer = len(containers.with_packet(image := file.read_bytes(), packet)) - len(image)
    assert longer == 0


def test_captions_within_images(nano, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    files = [saved(folder / name) for name in ("a.jpg", "b.png", "c.webp", "d.gif")]
    new = {file.name: alone(nano, PROMPT, file) for file in files}
    for _ in range(2):
        summary = run(nano, folder, "xmp")
    assert summary.kept == 3 and summary.failed_before == 1
    assert [described(file) for file in files[:3]] == [new[file.name] for file in files[:3]]
    for _ in range(2):
        run(nano, folder, "xmp", existing="append", prompts=["Read the text."])
    for file in files[:3]:
        assert described(file) == f"{new[file.name]} {alone(nano, 'Read the text.', file)}"


MAKERS_OWN = bytes(range(256))


def exif_with(**more):
    """EXIF as cameras write it, which is told by its distance from the start."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0131] = 6, "Maker", "Software that is longer"
    exif.get_ifd(0x8769)[0x927C] = MAKERS_OWN  # the maker's note
    for tag, value in more.items():
        exif[int(tag[1:], 16)] = value
    return exif


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [
        ("a.jpg", "RGB", {}),
        ("b.jpg", "L", {"exif": exif_with()}),
        ("c.jpg", "RGB", {"exif": exif_with(x010E="old"), "xmp": b"<x/>"}),
        ("d.png", "RGBA", {}),
        ("e.png", "P", {"exif": exif_with()}),
        ("f.webp", "RGB", {}),
        ("g.webp", "RGBA", {"exif": exif_with(), "xmp": b"<x/>", "lossless": True}),
        ("h.tif", "RGB", {"compression": "tiff_lzw"}),
        ("i.tif", "L", {"description": "old", "big_tiff": False}),
    ],
)
def test_an_exif_description_changes_nothing_else(tmp_path, name, mode, settings):
    """As Pillow finds it, which reads EXIF and TIFF by itself."""
    from PIL import Image

    def seen():
        with Image.open(file) as image:
            exif = image.getexif()
            own = {tag: value for tag, value in exif.items() if tag not in (0x010E, 0x8769)}
            own[0x927C] = exif.get_ifd(0x8769).get(0x927C)
            return image.mode, image.tobytes(), image.info.get("xmp"), own, exif.get(0x010E)

    file = saved(tmp_path / name, mode, **settings)
    before = seen()
    if "exif" in settings:
        assert before[3][0x927C] == MAKERS_OWN and before[3][0x010F] == "Maker"
    for text in ("There are 6 penguins, and a crown.", "two", "one more"):
        image = file.read_bytes()
        block = exif.with_description(containers.read_packet(image, containers.EXIF), text)
        replace_bytes(file, containers.with_packet(image, block, containers.EXIF))
        assert seen() == (*before[:4], text)
        block = containers.read_packet(file.read_bytes(), containers.EXIF)
        assert exif.description_of(block) == text


def test_captions_within_images_as_exif(nano, tmp_path):
    from PIL import Image

    folder = tmp_path / "p"
    folder.mkdir()
    files = [saved(folder / name) for name in ("a.jpg", "b.png", "c.webp", "d.tif", "e.gif")]
    new = {file.name: alone(nano, PROMPT, file) for file in files}
    for _ in range(2):
        summary = run(nano, folder, "exif")
    assert summary.kept == 4 and summary.failed_before == 1
    for file in files[:4]:
        with Image.open(file) as image:
            assert image.getexif()[0x010E] == new[file.name]


def test_exif_refuses_what_is_not_ascii_and_what_is_damaged():
    with pytest.raises(ValueError, match="is ASCII"):
        exif.with_description(b"", "Grüße")
    whole = exif.with_description(b"", "a panda")
    assert exif.description_of(whole) == "a panda" and exif.description_of(b"") == ""
    for broken in (b"II", b"XX*\0\0\0\0\0", whole[:12], whole[:4] + b"\xff" * 4):
        with pytest.raises(ValueError, match="damaged"):
            exif.with_description(broken, "x")
        with pytest.raises(ValueError, match="damaged"):
            exif.description_of(broken)


def test_damaged_images_are_not_written_into():
    for data in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n123", b"RIFF\0\0\0\0WEBP"):
        with pytest.raises(ValueError, match="damaged"):
            containers.with_packet(data, b"x")
    with pytest.raises(ValueError, match="JPEG, PNG and WebP"):
        containers.with_packet(b"GIF89a", b"x")
    with pytest.raises(ValueError, match="longer than a JPEG"):
        containers.with_packet(b"\xff\xd8\xff\xda\0\0", b"x" * 70_000)
