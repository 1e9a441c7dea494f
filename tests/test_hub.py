import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, REPO, Fault, Hub

from fastvlm_mlx.hub import resolve as hub
from fastvlm_mlx.hub.resolve import NANO, resolve

OTHER = "fedcba9876543210fedcba9876543210fedcba98"
IMAGE = str(NANO / "images" / "penguins.png")
ANSWER = "The image shows 6 penguins."

# Without a network


def test_nothing_is_the_bundled_model() -> None:
    assert resolve() == resolve(None) == NANO
    assert (NANO / "config.json").is_file()


def test_it_has_a_name_unless_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("nano") == NANO
    (tmp_path / "nano").mkdir()
    assert resolve("nano") == Path("nano")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "user" / "name"
    folder.mkdir(parents=True)
    assert resolve(folder) == resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("user/name").resolve() == folder  # a folder comes before a name on the Hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/user/name") == folder


def test_folders_have_no_revisions(tmp_path: Path) -> None:
    for source in (tmp_path, str(tmp_path), None):
        with pytest.raises(ValueError, match=r"is a folder, which has no revisions; leave out"):
            resolve(source, revision="main")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    for source in (file, str(file)):
        with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file; a model is"):
            resolve(source)


@pytest.mark.parametrize(
    "source",
    [
        "name",
        "a b/c",
        "a/b/c",
        "/nothing/there",
        "./a/b",
        "../a",
        "a/",
        "/a",
        "a/b?c",
        "-a/b",
    ],
)
def test_malformed_ids(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *arguments, **options: pytest.fail("asks the Hub"))
    with pytest.raises(FileNotFoundError) as caught:
        resolve(source)
    message = str(caught.value)
    assert source in message and "nor is it a Hub id" in message and "\n" not in message


@pytest.mark.parametrize("source", ["apple/FastVLM-0.5B", "a/b", "user_1/na.me-x", "0/1"])
def test_well_formed_ids(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, revision, **options: (repo, revision))
    assert resolve(source, revision="v1") == (source, "v1")


# Against a server that answers as the Hub does


def python(code: str, endpoint: str, home: Path, **environment: str) -> Any:
    """Run code where the Hub is `endpoint` and nothing is cached but in `home`; what it printed.

    In a process of its own, since huggingface_hub reads its settings when it is imported.
    """
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOAD = f"""
import json, fastvlm_mlx as fv
model, processor = fv.load("user/nano")
print(json.dumps(fv.generate(model, processor, "Describe the image.", image={IMAGE!r})))
"""
ERRORS = """
import json, sys, time
from fastvlm_mlx.hub.resolve import resolve
found = []
for source, revision in %r:
    start = time.monotonic()
    try:
        found.append([str(resolve(source, revision=revision)), None, 0])
    except Exception as error:
        bases = [base.__name__ for base in type(error).__mro__]
        found.append([bases, str(error), time.monotonic() - start])
print(json.dumps(found))
"""
DEAD = "http://127.0.0.1:9"  # the discard port: nothing listens


def errors(sources: list[tuple[str, str | None]], endpoint: str, home: Path, **environment: str):
    return python(ERRORS % (sources,), endpoint, home, **environment)


def assert_one_sentence(found: list[Any], kind: str, *said: str) -> None:
    bases, message, seconds = found
    assert message is not None, f"no error: {bases}"
    assert kind in bases, (bases, message)
    assert "\n" not in message and message.endswith(".")
    for text in said:
        assert text in message
    assert seconds < 10


def test_load_and_answer_then_offline(server: Hub, tmp_path: Path) -> None:
    server.files[REPO] |= {".gitattributes": b"*", "pytorch_model.bin": b"-"}
    assert python(LOAD, server.url, tmp_path) == ANSWER
    fetched = {request.path.rpartition("/")[2] for request in server.asked(f"{REPO}/resolve")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {".gitattributes", "pytorch_model.bin"}
    server.requests.clear()
    assert python(LOAD, server.url, tmp_path) == ANSWER
    assert not server.asked(f"{REPO}/resolve")
    # Nothing answers any more, or the user works offline.
    assert python(LOAD, DEAD, tmp_path) == ANSWER
    assert python(LOAD, server.url, tmp_path, HF_HUB_OFFLINE="1") == ANSWER


def test_revisions(server: Hub, tmp_path: Path) -> None:
    server.tags = {"v2": OTHER}
    server.files[REPO] = {"config.json": b"{}", "model.safetensors": b"-"}
    sources = [("user/nano", revision) for revision in (None, "v2", COMMIT, "v3")]
    latest, second, same, unknown = errors(sources, server.url, tmp_path)
    assert Path(latest[0]).name == Path(same[0]).name == COMMIT
    assert Path(second[0]).name == OTHER
    assert_one_sentence(unknown, "FileNotFoundError", "user/nano", "v3")


def test_pickles_only_where_there_is_nothing_else(server: Hub, tmp_path: Path) -> None:
    names = ("config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "chat_template.jinja")
    others = ("training.log", "model.py", "images/cat.png")
    server.files[REPO] = {name: name.encode() for name in (*names, *others)}
    ((folder, _, _),) = errors([("user/nano", None)], server.url, tmp_path)
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert found == {name: name.encode() for name in names}
    # Offline too, a model of pickles is whole.
    ((again, *_),) = errors([("user/nano", None)], DEAD, tmp_path)
    assert again == folder


def test_answers_of_the_hub_that_are_no_model(server: Hub, tmp_path: Path) -> None:
    server.files["user/private"] = {}
    server.private.add("user/private")
    statuses = {"user/gated": 403, "user/down": 500, "user/busy": 503}
    server.faults = [Fault(name, times=99, status=code) for name, code in statuses.items()]
    names = ["user/nothing", "user/private", "user/gated", "user/down", "user/busy"]
    found = errors([(name, None) for name in names], server.url, tmp_path)
    for name, one in zip(names[:3], found[:3], strict=True):
        assert_one_sentence(one, "FileNotFoundError", name, "hf auth login")
    for name, code, one in zip(names[3:], ("500", "503"), found[3:], strict=True):
        assert_one_sentence(one, "OSError", name, code)
        assert "FileNotFoundError" not in one[0]


def test_no_connection_and_not_downloaded(tmp_path: Path) -> None:
    (refused,) = errors([("user/nano", None)], DEAD, tmp_path)
    assert_one_sentence(refused, "OSError", "user/nano is not downloaded")
    (offline,) = errors([("user/nano", None)], DEAD, tmp_path, HF_HUB_OFFLINE="1")
    assert_one_sentence(offline, "OSError", "user/nano is not downloaded")


def test_the_command_says_it_in_a_line(tmp_path: Path) -> None:
    code = """
import contextlib, io, json, sys
from fastvlm_mlx.cli.main import main
sys.argv = ["fastvlm", "generate", "--model", "user/nano", "--prompt", "Hi"]
said = io.StringIO()
with contextlib.redirect_stderr(said):
    try:
        main()
    except SystemExit as end:
        code = end.code
print(json.dumps([code, said.getvalue()]))
"""
    code, said = python(code, DEAD, tmp_path)
    assert code == 2
    assert said.startswith("Error: user/nano is not downloaded") and said.count("\n") == 1


def test_an_interrupted_download_is_finished(server: Hub, tmp_path: Path) -> None:
    server.files[REPO] = {"config.json": b"{}", "model.safetensors": b"-"}
    wanted = [("user/nano", None)]
    ((folder, *_),) = errors(wanted, server.url, tmp_path)
    weights = Path(folder) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    (offline,) = errors(wanted, DEAD, tmp_path)
    assert_one_sentence(offline, "OSError", "user/nano is not downloaded")
    errors(wanted, server.url, tmp_path)
    assert weights.read_bytes() == b"-"
