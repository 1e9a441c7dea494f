import hashlib
import os
import shutil
import stat
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import (
    MIB,
    REPO,
    Fault,
    Hub,
    assert_one_sentence,
    everything,
    special,
    zipped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.hub import fetch as fetching
from fastvlm_mlx.hub.fetch import TRIES, DiskFullError, fetch, unpack

DATA = hashlib.shake_256(b"weights").digest(3 * MIB)
SHA256 = hashlib.sha256(DATA).hexdigest()


# A file


def test_a_file_comes_whole(server: Hub, tmp_path: Path) -> None:
    server.archives["/a.bin"] = DATA
    target = tmp_path / "new" / "a.bin"
    assert fetch(f"{server.cdn}/a.bin", target, size=len(DATA), sha256=SHA256) == target
    assert target.read_bytes() == DATA
    assert os.listdir(target.parent) == ["a.bin"]
    fetch(f"{server.cdn}/a.bin", target)
    assert len(server.requests) == 1  # it is there


def test_a_cut_connection_is_taken_up_again(
    server: Hub, tmp_path: Path, waits: list[float]
) -> None:
    server.archives["/a.bin"] = DATA
    server.faults = [Fault("a.bin", cut=MIB + 5), Fault("a.bin", cut=1000)]
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    ranges = [r.headers.get("range") for r in server.requests]
    assert ranges == [None, f"bytes={MIB + 5}-", f"bytes={MIB + 1005}-"]
    assert {r.headers.get("if-range") for r in server.requests[1:]} == {
        f'"{hashlib.sha1(DATA).hexdigest()}"'
    }
    assert len(waits) == 2
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_server_that_answers_in_pieces(server: Hub, tmp_path: Path, waits: list[float]) -> None:
    server.archives["/a.bin"] = DATA
    server.piece = MIB
    server.faults = [Fault("a.bin", cut=MIB // 2)]
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert len(server.requests) == 4


def test_what_came_is_kept_for_the_next_call(
    server: Hub, tmp_path: Path, waits: list[float]
) -> None:
    server.archives["/a.bin"] = DATA
    server.faults = [Fault("a.bin", cut=MIB), Fault("a.bin", times=TRIES, cut=100)]
    with pytest.raises(OSError, match="1,049,076 bytes are kept: try again") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert_one_sentence(caught.value, f"{server.cdn}/a.bin")
    assert not (tmp_path / "a.bin").exists()
    assert len(server.requests) == 1 + TRIES
    assert waits == [0.5, 1, 2, 4, 8]
    server.requests.clear()
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert [r.headers["range"] for r in server.requests] == [f"bytes={MIB + 500}-"]


def test_a_part_that_is_whole_already(server: Hub, tmp_path: Path) -> None:
    """The process was killed between the last byte and the end."""
    server.archives["/a.bin"] = DATA
    (tmp_path / "a.bin.part").write_bytes(DATA)
    (tmp_path / "a.bin.part.version").write_text(f'"{hashlib.sha1(DATA).hexdigest()}"')
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert [r.headers.get("range") for r in server.requests] == [f"bytes={len(DATA)}-"]
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("length", [MIB, len(DATA), 4 * MIB])
def test_a_file_that_changed_on_the_server(
    server: Hub, tmp_path: Path, waits: list[float], length: int, heeds_if_range: bool
) -> None:
    server.archives["/a.bin"] = DATA
    server.heeds_if_range = heeds_if_range
    (tmp_path / "a.bin.part").write_bytes(b"x" * length)
    (tmp_path / "a.bin.part.version").write_text('"another"')
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert everything(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("missing", ["ranges", "etags", "both"])
def test_servers_that_can_only_start_over(
    server: Hub, tmp_path: Path, waits: list[float], missing: str
) -> None:
    server.archives["/a.bin"] = DATA
    server.heeds_ranges = missing == "etags"
    server.gives_etags = missing == "ranges"
    server.faults = [Fault("a.bin", cut=MIB)]
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert len(server.requests) == 2
    assert everything(tmp_path) == ["a.bin"]


def test_a_part_of_unknown_origin_is_not_trusted(server: Hub, tmp_path: Path) -> None:
    server.archives["/a.bin"] = DATA
    (tmp_path / "a.bin.part").write_bytes(b"x" * MIB)
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server(server: Hub, tmp_path: Path, waits: list[float], status: int) -> None:
    server.archives["/a.bin"] = DATA
    busy = Fault("a.bin", status=status, headers={"Retry-After": "7"})
    server.faults = [busy, Fault("a.bin", status=status)]
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert waits == [7, 2]


def test_numbers_of_thousands_of_digits_say_nothing(
    server: Hub, tmp_path: Path, waits: list[float]
) -> None:
    server.archives["/a.bin"] = DATA
    many = "9" * 5000
    server.faults = [Fault("a.bin", status=503, headers={"Retry-After": many})]
    server.faults += [Fault("a.bin", status=206, headers={"Content-Range": f"bytes 0-1/{many}"})]
    fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA and many not in map(str, waits)


def test_a_server_that_stays_busy(server: Hub, tmp_path: Path, waits: list[float]) -> None:
    server.faults = [Fault("a.bin", times=99, status=429)]
    with pytest.raises(OSError, match="answered 429") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert_one_sentence(caught.value, "try again later")
    assert len(server.requests) == TRIES
    server.faults = [Fault("a.bin", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(OSError, match="try again in 3600 seconds") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert 3600 not in waits
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, PermissionError), (403, PermissionError), (404, FileNotFoundError), (418, OSError)],
)
def test_a_server_that_refuses(
    server: Hub, tmp_path: Path, status: int, kind: type[Exception]
) -> None:
    server.faults = [Fault("a.bin", times=99, status=status)]
    with pytest.raises(kind, match=f"answered {status}") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert_one_sentence(caught.value, f"{server.cdn}/a.bin")
    assert len(server.requests) == 1
    assert everything(tmp_path) == []


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=r"Can't download http://127\.0\.0\.1:9/a\.bin") as caught:
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")  # where nothing listens
    assert_one_sentence(caught.value)
    assert time.monotonic() - start < 5
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set") as caught:
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")
    assert everything(tmp_path) == []


def test_wrong_size_and_wrong_hash(server: Hub, tmp_path: Path) -> None:
    server.archives["/a.bin"] = DATA
    url, target = f"{server.cdn}/a.bin", tmp_path / "a.bin"
    with pytest.raises(OSError, match="has 3,145,728 bytes where 7 are expected") as caught:
        fetch(url, target, size=7)
    assert_one_sentence(caught.value, url)
    with pytest.raises(OSError, match="arrived damaged and was removed") as caught:
        fetch(url, target, sha256="0" * 64)
    assert_one_sentence(caught.value, url, SHA256, "download it again")
    assert everything(tmp_path) == []


def test_passwords_are_never_shown(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    address = server.cdn.replace("://", "://me:password@") + "/nowhere"
    with pytest.raises(FileNotFoundError, match=r"://\*\*\*@") as caught:
        fetch(address, tmp_path / "x", progress=False)
    assert "password" not in str(caught.value)
    with pytest.raises(OSError, match=r"://\*\*\*@") as caught:
        fetch("http://me:password@127.0.0.1:1/x", tmp_path / "x", progress=False)
    assert "password" not in str(caught.value)


def test_authorization_stays_with_its_host(server: Hub, tmp_path: Path) -> None:
    server.files[REPO] = {"model.safetensors": DATA}
    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    fetch(url, tmp_path / "a.bin", headers={"Authorization": "Bearer secret"})
    asked, redirected = server.requests
    assert asked.headers["authorization"] == "Bearer secret"
    assert redirected.host == "cdn" and "authorization" not in redirected.headers


def test_the_body_of_a_redirect_is_not_read(server: Hub, tmp_path: Path) -> None:
    server.archives["/a.bin"] = DATA
    away = {"Location": f"{server.cdn}/a.bin"}
    server.faults = [Fault("/moved", status=302, headers=away, body=bytes(MIB), stall=100)]
    start = time.monotonic()
    fetch(f"{server.url}/moved", tmp_path / "a.bin", sha256=SHA256)
    assert time.monotonic() - start < 5  # not until the client gives up


def test_redirects_in_a_circle(server: Hub, tmp_path: Path) -> None:
    around = {"Location": f"{server.cdn}/a.bin"}
    server.faults = [Fault("a.bin", times=99, status=302, headers=around)]
    with pytest.raises(OSError, match="it redirects more than 10 times") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert_one_sentence(caught.value, f"{server.cdn}/a.bin")
    assert len(server.requests) == 11


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up(server: Hub, tmp_path: Path) -> None:
    server.archives["/a.bin"] = DATA
    with pytest.raises(DiskFullError, match=r"disk is full and .+/a.bin is not") as caught:
        fetch(f"{server.cdn}/a.bin", tmp_path / "a.bin")
    assert_one_sentence(caught.value)
    assert everything(tmp_path) == []


def test_a_disk_without_room(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    server.archives["/a.bin"] = DATA
    target = tmp_path / "a.bin"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * MIB))
    with pytest.raises(DiskFullError, match=f"no room for {target}: it needs 0.0 GB") as caught:
        fetch(f"{server.cdn}/a.bin", target)
    assert_one_sentence(caught.value)
    assert everything(tmp_path) == []
    (tmp_path / "a.bin.part").write_bytes(DATA[: 2 * MIB])  # only the rest needs room
    (tmp_path / "a.bin.part.version").write_text(f'"{hashlib.sha1(DATA).hexdigest()}"')
    assert fetch(f"{server.cdn}/a.bin", target, sha256=SHA256) == target


# An archive


def saved(data: bytes, folder: Path) -> Path:
    file = folder / "model.zip"
    file.write_bytes(data)
    return file


def test_the_folder_that_holds_everything_is_left_out(tmp_path: Path) -> None:
    files = {"model/config.json": b"{}", "model/a/b/weight.bin": DATA, "__MACOSX/model/._a": b"-"}
    files |= {"model/._config.json": b"-", "model/a/.DS_Store": b"-", "._model": b"-"}
    archive = saved(zipped(files, zipfile.ZIP_DEFLATED), tmp_path)
    folder = unpack(archive, tmp_path / "target")
    assert everything(folder) == ["a/b/weight.bin", "config.json"]
    assert (folder / "a/b/weight.bin").read_bytes() == DATA
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500


def test_several_folders_are_kept(tmp_path: Path) -> None:
    archive = saved(zipped({"a/config.json": b"{}", "b/config.json": b"{}"}), tmp_path)
    assert everything(unpack(archive, tmp_path / "x")) == ["a/config.json", "b/config.json"]
    archive = saved(zipped({"config.json": b"{}", "b/weight.bin": b""}), tmp_path)
    assert everything(unpack(archive, tmp_path / "y")) == ["b/weight.bin", "config.json"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (special("../escaped"), "'../escaped' would leave the folder"),
        (special("model/../../escaped"), "would leave the folder"),
        (special("/tmp/escaped"), "'/tmp/escaped' would leave the folder"),
        (special("//server/escaped"), "would leave the folder"),
        (special("C:/escaped"), "would leave the folder"),
        (special("c:escaped"), "would leave the folder"),
        (special("..\\escaped"), "is no file name"),
        (special("model/a\0/../../escaped"), "would leave the folder"),
        (special("model/a\0b"), "is no file name"),
        (special("."), "is no file name"),
        (special("model/link", stat.S_IFLNK | 0o777), "'model/link' is a link or a device"),
        (special("model/pipe", stat.S_IFIFO | 0o666), "is a link or a device"),
        (special("model/CONFIG.json", data=b"1"), "'model/CONFIG.json' is there twice"),
        (special("a/" * 2000 + "b"), "lies 2,000 folders deep"),
        (special("model/" + "b" * 300), "has too long a name"),
        (special("model/" + "é" * 130), "has too long a name"),
        (special("/".join(["c" * 100] * 8)), "has too long a name"),
        (special("/" + "d" * 60_000), "would leave the folder"),
        (zipped({}), "holds no files"),
        (zipped({"__MACOSX/a": b"-", "model/.DS_Store": b"-"}), "holds no files"),
        (zipped({"a": bytes(80 * MIB)}, zipfile.ZIP_DEFLATED), "would become 83,886,080"),
        (b"", "is not a whole zip archive"),
        (b"<html>Sign in</html>", "is not a whole zip archive"),
        (zipped({"model/weight.bin": DATA})[:-100], "is not a whole zip archive"),
        (zipped({"model/weight.bin": DATA})[:MIB], "is not a whole zip archive"),
        (zipped({"a": DATA}).replace(DATA, DATA[::-1]), "whole zip archive (Bad CRC-32"),
    ],
)
def test_archives_that_are_not_unpacked(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    archive = saved(data, tmp_path / "in")
    with pytest.raises(ValueError) as caught:
        unpack(archive, tmp_path / "in" / "target")
    assert_one_sentence(caught.value, str(archive), said)
    assert len(str(caught.value)) < len(str(archive)) + 300
    assert everything(tmp_path) == ["in/model.zip"]
    assert not Path("/tmp/escaped").exists()


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_FILES", 2)
    with pytest.raises(ValueError, match="holds 3 files, more than 2"):
        unpack(saved(zipped(dict.fromkeys("abc", b"")), tmp_path), tmp_path / "target")


def test_an_encrypted_archive(tmp_path: Path) -> None:
    data = bytearray(zipped({"a": b"secret"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    with pytest.raises(ValueError, match="'a' is encrypted"):
        unpack(saved(bytes(data), tmp_path), tmp_path / "target")


def test_a_target_that_exists(tmp_path: Path) -> None:
    archive = saved(zipped({"a": b"1"}), tmp_path)
    (tmp_path / "empty").mkdir()
    for litter in (".DS_Store", "._.DS_Store"):  # of macOS's, in any folder that was looked at
        (tmp_path / "empty" / litter).touch()
    assert everything(unpack(archive, tmp_path / "empty")) == ["a"]
    for target in (tmp_path / "empty", archive):
        with pytest.raises(FileExistsError, match="exists already; remove it or choose"):
            unpack(archive, target)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up_while_unpacking(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("a", DATA)
    with pytest.raises(DiskFullError, match="disk is full") as caught:
        unpack(tmp_path / "model.zip", tmp_path / "target")
    assert_one_sentence(caught.value, str(tmp_path / "target"))
    assert everything(tmp_path) == ["model.zip"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".target.part").mkdir()
    (tmp_path / ".target.part" / "half").write_bytes(b"-")
    archive = saved(zipped({"a": b"1"}), tmp_path)
    assert everything(unpack(archive, tmp_path / "target")) == ["a"]
    assert everything(tmp_path) == ["model.zip", "target/a"]


WHOLE = zipped({"m/config.json": b"{}", "m/w/a.bin": DATA[:300]}, zipfile.ZIP_DEFLATED)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_damaged_archives(damage: list[tuple[int, int]]) -> None:
    """Any damage is found, or does no harm."""
    import tempfile

    data = bytearray(WHOLE)
    for place, value in damage:
        data[place] = value
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name) / "in").mkdir()
        archive = saved(bytes(data), folder)
        try:
            unpack(archive, folder / "target")
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            assert everything(Path(name)) == ["in/model.zip"]
        else:
            found = everything(Path(name))
            assert all(file.startswith(("in/target/", "in/model.zip")) for file in found)
            contents = {(folder / "target" / n).read_bytes() for n in everything(folder / "target")}
            assert contents <= {b"{}", DATA[:300]}
