import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import (
    COMMIT,
    MIB,
    REPO,
    TOKEN,
    Fault,
    Hub,
    assert_one_sentence,
    everything,
    special,
    use,
    zipped,
)
from models import DEPTH

import fastvlm_mlx as fv
from fastvlm_mlx.hub import registry
from fastvlm_mlx.hub.fetch import DiskFullError
from fastvlm_mlx.hub.resolve import NANO, cache_folder, download, download_model, resolve

ARCHIVE = "llava-fastvithd_0.5b_stage2"


# The published archives


def archive_of(server: Hub, data: bytes) -> str:
    server.archives[f"/{ARCHIVE}.zip"] = data
    return f"{server.cdn}/{ARCHIVE}.zip"


def nano_zip() -> bytes:
    files = {p.name: p.read_bytes() for p in NANO.iterdir() if p.is_file()}
    return zipped({f"{ARCHIVE}/{name}": data for name, data in files.items()})


def test_an_archive_by_name(server: Hub, tmp_path: Path) -> None:
    archive_of(server, nano_zip())
    folder = download_model("0.5B", stage=2)
    assert folder == tmp_path / "home" / "archives" / ARCHIVE
    assert everything(folder.parent) == sorted(f"{ARCHIVE}/{name}" for name in server.files[REPO])
    model, processor = fv.load(ARCHIVE)
    assert fv.generate(model, processor, "What?", image=NANO / "images" / "penguins.png")
    assert len(server.requests) == 1
    target = tmp_path / "here" / "model"
    assert download_model("0.5b", stage=2, variant="pytorch", to=target) == target
    assert everything(target.parent) == sorted(f"model/{name}" for name in server.files[REPO])


def test_the_cache_has_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None):
        monkeypatch.setenv("FASTVLM_CACHE", value) if value is not None else (
            monkeypatch.delenv("FASTVLM_CACHE")
        )
        assert cache_folder() == tmp_path / ".cache" / "fastvlm-mlx"
    monkeypatch.setenv("FASTVLM_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"


def test_a_folder_with_only_litter_is_empty(server: Hub, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / ".DS_Store").touch()
    (target / "._model").touch()
    assert download_model(REPO, to=target) == target
    assert (target / "config.json").is_file() and not (target / ".DS_Store").exists()
    assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == ["target"]


def test_nothing_is_fetched_for_a_target_that_exists(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name, stage in (("0.5b", 2), ("0.5b", 3), (REPO, None)):
        with pytest.raises(FileExistsError, match="exists already; remove it or choose"):
            download_model(name, stage=stage, to=tmp_path)
    assert not server.requests


@pytest.mark.parametrize("damage", ["truncated", "crc", "escape", "page"])
def test_a_bad_archive_leaves_nothing(server: Hub, tmp_path: Path, damage: str) -> None:
    whole = nano_zip()
    middle = len(whole) // 2
    url = archive_of(
        server,
        {
            "truncated": whole[:middle],
            "crc": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "escape": special("../../escaped"),
            "page": b"<html>Sign in</html>",
        }[damage],
    )
    with pytest.raises(ValueError, match="and was removed") as caught:
        download_model("0.5b", stage=2)
    assert url in str(caught.value) and "\n" not in str(caught.value)
    assert everything(tmp_path) == []
    archive_of(server, whole)  # the next run begins anew
    assert fv.load_model(download_model("0.5b", stage=2)).config.text.num_hidden_layers == DEPTH


def test_an_archive_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at") as caught:
        download_model("0.5b", stage=2, to=tmp_path / "model")
    assert_one_sentence(caught.value, f"{server.cdn}/{ARCHIVE}.zip")
    assert everything(tmp_path) == []


# The Hub


def test_a_published_name_on_the_hub(server: Hub, tmp_path: Path) -> None:
    server.files["apple/FastVLM-0.5B"] = server.files.pop(REPO)
    folder = resolve("0.5b")
    assert folder.name == COMMIT and "models--apple--FastVLM-0.5B" in str(folder)
    weights = folder / "model.safetensors"
    assert weights.read_bytes() == (NANO / "model.safetensors").read_bytes()
    assert weights.resolve().name == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not [name for name in everything(tmp_path) if ".part" in name]
    server.requests.clear()
    assert resolve("0.5b") == folder
    assert not server.asked("resolve") and not server.asked("large")  # nothing is fetched twice


def test_large_files_are_fetched_once_and_from_the_cdn(server: Hub) -> None:
    folder = download(REPO)
    large = server.asked("^/large/")
    assert len(large) == 2 and {r.host for r in large} == {"cdn"}  # weights and tokenizer
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava_qwen2"
    assert (folder / "README.md").is_file()
    model, processor = fv.load(folder)
    assert fv.generate(model, processor, "What?", image=NANO / "images" / "penguins.png")


def test_parts_of_a_core_ml_package_come_along(server: Hub) -> None:
    names = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/w/weights/weight.bin")
    package = {f"fastvithd.mlpackage/{name}": name.encode() for name in names}
    server.files[REPO] |= {**package, "training/optimizer.bin": b"-", "model.py": b"-"}
    folder = download(REPO)
    for name, data in package.items():
        assert (folder / name).read_bytes() == data
    assert not (folder / "training").exists() and not (folder / "model.py").exists()


def test_a_folder_instead_of_the_cache(server: Hub, tmp_path: Path) -> None:
    target = tmp_path / "here" / "nano"
    assert download_model(REPO, to=target) == target
    assert everything(target.parent) == sorted(f"nano/{name}" for name in server.files[REPO])
    for name, data in server.files[REPO].items():
        assert (target / name).read_bytes() == data


def test_a_folder_of_what_is_in_the_cache(server: Hub, tmp_path: Path) -> None:
    resolve(REPO)
    server.requests.clear()
    target = download_model(REPO, to=tmp_path / "nano")
    assert everything(target) == sorted(server.files[REPO])
    assert not server.asked("^/large/")


def test_what_an_other_model_left_does_not_mix_in(server: Hub, tmp_path: Path) -> None:
    server.files["user/other"] = {
        "model.safetensors.index.json": b"{}",
        "model-1.safetensors": b"-",
    }
    server.faults = [Fault("model.safetensors.index.json", times=99, status=403)]
    with pytest.raises(FileNotFoundError):
        download_model("user/other", to=tmp_path / "model")
    server.commit = COMMIT[::-1]  # every repository has commits of its own
    target = download_model(REPO, to=tmp_path / "model")
    assert everything(target) == sorted(server.files[REPO])


def test_a_private_model(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.private.add(REPO)
    with pytest.raises(FileNotFoundError, match="hf auth login") as caught:
        resolve(REPO)
    assert_one_sentence(caught.value, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve(REPO) / "model.safetensors").is_file()
    assert all("authorization" not in r.headers for r in server.asked("^/large/"))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_gated_model(server: Hub, file: str) -> None:
    """The Hub says what there is, and refuses the files."""
    server.faults = [Fault(f"/resolve/.*/{file}", times=99, status=403)]
    with pytest.raises(FileNotFoundError, match="that you may read") as caught:
        resolve(REPO)
    assert_one_sentence(caught.value, REPO, "hf auth login")


def test_models_and_revisions_that_are_not_there(server: Hub, tmp_path: Path) -> None:
    for arguments in (("user/nothing", None), (REPO, "v9")):
        with pytest.raises(FileNotFoundError) as caught:
            download(arguments[0], arguments[1])
        assert_one_sentence(caught.value, *filter(None, arguments))
        with pytest.raises(FileNotFoundError):
            download(arguments[0], arguments[1], to=tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="is not a Hub id"):
        resolve("user/a--b..c")
    assert everything(tmp_path) == []


def test_damaged_weights_never_reach_the_cache(server: Hub, tmp_path: Path) -> None:
    data = server.files[REPO]["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    server.corrupt[digest] = data[:-1] + b"?"
    with pytest.raises(OSError, match="arrived damaged and was removed") as caught:
        resolve(REPO)
    assert_one_sentence(caught.value, "model.safetensors", digest)
    assert not [name for name in everything(tmp_path) if digest in name]
    server.corrupt[digest] = data[:-1]
    with pytest.raises(OSError, match=r"bytes where .* are expected"):
        resolve(REPO)
    server.corrupt.clear()
    assert fv.load_model(resolve(REPO)).config.text.num_hidden_layers == DEPTH


def test_small_files_that_are_cut(server: Hub, tmp_path: Path, waits: list[float]) -> None:
    server.faults = [Fault("resolve/.*/config.json", times=99, cut=10, method="GET")]
    with pytest.raises(OSError, match="The download of user/nano broke off") as caught:
        resolve(REPO)
    assert_one_sentence(caught.value, "try again")
    server.faults.clear()
    assert fv.load_model(resolve(REPO)).config.text.num_hidden_layers == DEPTH


def test_a_busy_hub(server: Hub, waits: list[float]) -> None:
    server.faults = [
        Fault("^/large/", times=2, status=429, headers={"Retry-After": "3"}),
        Fault("config.json", times=2, status=503),
    ]
    assert (resolve(REPO) / "config.json").is_file()
    assert waits[:2] == [3, 3]
    server.faults = [Fault("/api/", times=99, status=429)]
    with pytest.raises(OSError, match="answered 429") as caught:
        download(REPO)
    assert_one_sentence(caught.value, REPO)


@pytest.mark.parametrize("to", [True, False])
def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: bool) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:9"
    use(nowhere, tmp_path, monkeypatch)
    with pytest.raises(OSError, match="the Hub can't be reached") as caught:
        download_model("0.5b", to=tmp_path / "model" if to else None)
    assert_one_sentence(caught.value, "apple/FastVLM-0.5B")
    assert everything(tmp_path) == []


@pytest.mark.parametrize("to", [True, False])
@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up_with_a_model(server: Hub, tmp_path: Path, to: bool) -> None:
    with pytest.raises(DiskFullError, match="disk is full") as caught:
        download_model(REPO, to=tmp_path / "model" if to else None)
    assert_one_sentence(caught.value)
    assert not (tmp_path / "model").exists()
    assert not [name for name in everything(tmp_path) if "safetensors" in name or ".part" in name]


@pytest.mark.parametrize("to", [True, False])
def test_a_disk_without_room_for_a_model(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: bool
) -> None:
    """It is said before anything is fetched, even if there is room for some of the files."""
    sizes = [len(server.files[REPO][name]) for name in ("model.safetensors", "tokenizer.json")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sum(sizes) - 1))
    with pytest.raises(DiskFullError, match="There is no room for") as caught:
        download_model(REPO, to=tmp_path / "model" if to else None)
    assert_one_sentence(caught.value, str(tmp_path))
    assert not server.asked("resolve")
    assert everything(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sum(sizes)))
    assert download_model(REPO, to=tmp_path / "model" if to else None).is_dir()


@pytest.mark.parametrize("name", ["../escaped.json", "/tmp/escaped.json", "a/../../escaped.json"])
def test_names_that_would_leave_the_folder(server: Hub, tmp_path: Path, name: str) -> None:
    data = server.files[REPO].pop("tokenizer.json")
    server.files[REPO][name.replace(".json", "tokenizer.json")] = data
    with pytest.raises((ValueError, OSError)):
        download_model(REPO, to=tmp_path / "here" / "model")
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]
    assert not Path("/tmp/escapedtokenizer.json").exists()


# Killed in the middle

DOWNLOAD = """
import sys
from fastvlm_mlx.hub.resolve import download_model
print(download_model(sys.argv[1], to=sys.argv[2] or None))
"""


@pytest.mark.parametrize("to", [True, False])
@pytest.mark.parametrize("name", [REPO, ARCHIVE])
def test_killed_in_the_middle(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, to: bool
) -> None:
    """Nothing half-written is ever loaded, and the next run goes on where the last one was."""
    target = tmp_path / "model" if to else None
    home = tmp_path / "home"
    home.mkdir()
    archive_of(server, nano_zip())
    big = "^/large/|zip$"
    weights = "model.safetensors"
    if name == REPO:
        server.files[REPO].pop("tokenizer.json")  # the only other large file
    server.faults = [Fault(big, stall=2 * MIB)]
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"from fastvlm_mlx.hub import registry; registry.CDN = {server.cdn!r}; {DOWNLOAD}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, name, str(target or "")],
        env=environment,
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 20
    while not any(path.stat().st_size > MIB for path in tmp_path.rglob("*.part")):
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stderr.close()

    # Offline nothing is there that could be taken for a model.
    with monkeypatch.context() as offline:
        nowhere = Hub()
        nowhere.url = nowhere.cdn = "http://127.0.0.1:9"
        use(nowhere, home, offline)
        offline.setattr(registry, "CDN", nowhere.cdn)
        with pytest.raises(OSError, match=r"can't be reached|Can't download") as caught:
            fv.load(name)
        assert_one_sentence(caught.value)
        if target is not None:
            assert not target.exists()

    server.requests.clear()
    server.faults.clear()
    folder = download_model(name, to=target)
    (asked,) = server.asked(big)
    start = int(asked.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert start >= MIB
    assert (folder / weights).read_bytes() == (NANO / weights).read_bytes()
    assert fv.load_model(folder).config.text.num_hidden_layers == DEPTH
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]
