"""`fastvlm models`, and the names that `--model` completes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from command import Run

from fastvlm_mlx.hub import cached as cached_module
from fastvlm_mlx.hub.cached import cached, names_in_cache
from fastvlm_mlx.hub.registry import ENTRIES, LICENSE, find
from fastvlm_mlx.hub.resolve import NANO, cache_folder, download_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches: the Hub's, and beside it that of archives."""
    monkeypatch.setattr(cached_module, "_hub_cache", lambda: tmp_path / "hub")
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "archives"))
    return tmp_path / "hub"


def put(cache: Path, repo: str, revision: str = "1") -> Path:
    """A model as the Hub's library keeps it."""
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    return Path(shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images")))


def test_what_is_downloaded_is_found(server: hub_server.Hub) -> None:
    assert names_in_cache() == []
    folder = download_model(hub_server.REPO)
    assert names_in_cache() == [hub_server.REPO]
    assert cached_module._newest_snapshot(folder.parents[1]) == folder


def test_the_list_names_every_published_model(run: Run, cache: Path) -> None:
    folder = put(cache, "apple/FastVLM-0.5B")
    archive = cache_folder() / find("7b", variant="apple-silicon").name
    archive.mkdir(parents=True)
    rows = json.loads(run("models", "--json").out)
    assert [row["name"] for row in rows] == [entry.name for entry in ENTRIES]
    there = {row["name"]: row["downloaded"] for row in rows if row["downloaded"]}
    assert there == {"apple/FastVLM-0.5B": str(folder), archive.name: str(archive)}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert rows[0]["gigabytes"] == size / 1e9 and rows[2]["gigabytes"] == 15.5
    assert all(row["license_name"] == LICENSE["license_name"] for row in rows)


def test_the_table_for_people(run: Run, cache: Path) -> None:
    put(cache, "apple/FastVLM-1.5B")
    result = run("models")
    lines = {line.split()[0]: line.split() for line in result.out.splitlines()}
    assert lines["apple/FastVLM-0.5B"][-2:] == ["1.53", "no"]
    assert lines["apple/FastVLM-1.5B"][-1] == "yes"
    assert LICENSE["license_link"] in result.out and (result.code, result.err) == (0, "")


def test_half_a_download_is_none(cache: Path) -> None:
    entry = find("0.5b")
    folder = put(cache, entry.name)
    assert cached(entry) == folder
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    for content in (json.dumps({"weight_map": shards}), "{}", "["):
        index.write_text(content)
        assert cached(entry) is None
    index.write_text(json.dumps({"weight_map": {"a": shards["a"]}}))
    assert cached(entry) == folder
    (folder / "config.json").unlink()
    assert cached(entry) is None


def test_the_newest_whole_snapshot_counts(cache: Path) -> None:
    entry = find("0.5b")
    old, new = put(cache, entry.name, "1"), put(cache, entry.name, "2")
    os.utime(old, (1, 1))
    assert cached(entry) == new
    (new / "model.safetensors").unlink()
    assert cached(entry) == old


def completed(typed: str, home: Path) -> list[str]:
    """What bash offers after `fastvlm generate --model` and some letters."""
    words = {"COMP_WORDS": f"fastvlm generate --model {typed}", "COMP_CWORD": "3"}
    surroundings = os.environ | words | {"_FASTVLM_COMPLETE": "complete_bash", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "fastvlm_mlx"]
    done = subprocess.run(
        command, env=surroundings, capture_output=True, text=True, timeout=60, cwd=home
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_models(tmp_path: Path) -> None:
    put(tmp_path / "hub", "me/FastVLM-mine")
    other = put(tmp_path / "hub", "me/other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.txt").touch()
    assert completed("apple/", tmp_path) == [
        f"apple/FastVLM-{size}B" for size in ("0.5", "1.5", "7")
    ]
    assert completed("me", tmp_path) == ["me/FastVLM-mine"]
    assert completed("mi", tmp_path) == ["mine/"]
    assert completed("0", tmp_path) == ["0.5b"]
