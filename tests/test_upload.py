import hashlib
import json
import shutil
import time
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from hub_server import TOKEN, Fault, Hub, assert_one_sentence, use

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.upload import check_folder, check_repo, license_problem, upload
from fastvlm_mlx.config import CheckpointError
from fastvlm_mlx.hub import registry
from fastvlm_mlx.hub.resolve import NANO, download

REPO = "user/my-model"
CARD = "---\nlicense: mit\n---\n\n# Mine\n"


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx.*")


@pytest.fixture
def server(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with a licence."""
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images"))
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_folder_comes_back_as_it_was(server: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "cat.png").write_bytes(b"cat")
    for name in (".DS_Store", ".cache/huggingface/x.json", "images/._cat.png", "a.bin.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"-")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        url = upload(folder, REPO, private=True, message="Four bits")
    assert url == f"{server.url}/{REPO}"
    (made,) = server.created
    assert (made["name"], made["organization"]) == ("my-model", "user")
    assert made.get("visibility") == "private" or made.get("private") is True
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    names |= {"tokenizer.json", "tokenizer_config.json", "images/cat.png"}
    assert server.files[REPO].keys() == names
    for name in names:
        assert server.files[REPO][name] == (folder / name).read_bytes()
    ((_, lines),) = server.commits
    assert lines[0]["value"]["summary"] == "Four bits"
    back = download(REPO)
    assert mx.array_equal(
        fv.load_model(back).language_model.norm.weight,
        fv.load_model(folder).language_model.norm.weight,
    )


def test_a_repository_that_exists(server: Hub, folder: Path) -> None:
    server.files[REPO] = {"old.txt": b"old"}
    assert upload(folder, REPO) == f"{server.url}/{REPO}"
    assert not server.created
    assert server.files[REPO]["old.txt"] == b"old" and "config.json" in server.files[REPO]


def test_an_interrupted_upload_goes_on(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.faults = [Fault("/commit/", times=99, status=500)]
    with pytest.raises(OSError, match="answered 500 to the upload") as caught:
        upload(folder, REPO)
    assert_one_sentence(caught.value, REPO)
    server.faults.clear()
    server.requests.clear()
    upload(folder, REPO)
    assert not server.asked("^/upload/", method="PUT")  # large files are there
    data = (folder / "model.safetensors").read_bytes()
    assert server.files[REPO]["model.safetensors"] == data
    assert hashlib.sha256(data).hexdigest() in server.stored


@pytest.mark.parametrize(
    "repo", ["model", "", "user/", "/model", "a/b/c", "user/my model", "user/a--b", "user/a..b"]
)
def test_malformed_names(server: Hub, folder: Path, repo: str) -> None:
    with pytest.raises(ValueError, match="no name of a repository; it must be user/name") as caught:
        upload(folder, repo)
    assert_one_sentence(caught.value, repr(repo))
    assert not server.requests


def test_not_logged_in(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="run `hf auth login` first") as caught:
        upload(folder, REPO)
    assert_one_sentence(caught.value)
    assert not server.requests


@pytest.mark.parametrize(
    ("path", "status", "kind", "said"),
    [
        ("repos/create", 401, PermissionError, "run `hf auth login` again"),
        ("repos/create", 403, PermissionError, f"may not write to {REPO}"),
        ("repos/create", 400, ValueError, "refuses the upload"),
        ("repos/create", 503, OSError, "answered 503"),
        ("preupload", 403, PermissionError, f"may not write to {REPO}"),
        ("preupload", 404, FileNotFoundError, f"no repository {REPO}"),
        ("batch", 403, PermissionError, f"may not write to {REPO}"),
        ("^/upload/", 403, PermissionError, f"may not write to {REPO}"),
        ("^/upload/", 418, OSError, "answered 418"),
        ("/commit/", 403, PermissionError, f"may not write to {REPO}"),
        ("/commit/", 422, ValueError, "refuses the upload"),
        ("validate-yaml", 400, ValueError, "refuses the upload"),
    ],
)
def test_refusals(
    server: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: int,
    kind: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    body = json.dumps({"error": "No.\nNever.", "errors": [{"message": "No."}]}).encode()
    server.faults = [Fault(path, times=99, status=status, body=body)]
    with pytest.raises(kind) as caught:
        upload(folder, REPO)
    assert_one_sentence(caught.value, said)
    assert not server.commits


def test_no_connection(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:9"
    use(nowhere, tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OSError, match="broke off") as caught:
        upload(folder, REPO)
    assert_one_sentence(caught.value, REPO, "try again")
    with pytest.raises(OSError, match="can't be reached") as caught:
        check_repo(REPO)
    assert_one_sentence(caught.value, REPO)


# What shows before anything is written


def member(name: str, role: str) -> dict[str, str]:
    return {"name": name, "roleInOrg": role}


@pytest.mark.parametrize("repo", [REPO, "team/model", "helpers/model"])
def test_a_repository_to_write_to(server: Hub, repo: str) -> None:
    server.user["orgs"] = [member("team", "write"), member("helpers", "contributor")]
    server.user["auth"] = {"accessToken": {"role": "write"}}
    check_repo(repo)
    assert [request.path for request in server.requests] == ["/api/whoami-v2"]


@pytest.mark.parametrize("repo", ["another/model", "readers/model"])
def test_a_repository_of_another(server: Hub, repo: str) -> None:
    server.user["orgs"] = [member("readers", "read")]
    with pytest.raises(PermissionError, match="logged in as user, who may not write") as caught:
        check_repo(repo)
    assert_one_sentence(caught.value, repo)


def test_a_token_that_only_reads(server: Hub) -> None:
    server.user["auth"] = {"accessToken": {"role": "read"}}
    with pytest.raises(PermissionError, match="Your token may only read") as caught:
        check_repo(REPO)
    assert_one_sentence(caught.value, REPO)


def test_who_can_not_be_asked(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = [Fault("whoami", times=1, status=404)]
    check_repo(REPO)  # by a mirror: the upload will tell
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(PermissionError, match="run `hf auth login` again"):
        check_repo(REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="run `hf auth login` first"):
        check_repo(REPO)
    with pytest.raises(ValueError, match="must be user/name"):
        check_repo("mine")


# What does not load is not uploaded


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "lacking":
        tensors = mx.load(str(weights))
        tensors.pop("language_model.model.norm.weight")
        mx.save_safetensors(str(weights), tensors)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "other config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    "how", ["no tokenizer", "no weights", "cut", "lacking", "no config", "other config"]
)
def test_a_folder_that_does_not_load(server: Hub, folder: Path, how: str) -> None:
    check_folder(folder)
    damage(folder, how)
    with pytest.raises(CheckpointError) as caught:
        upload(folder, REPO)
    assert_one_sentence(caught.value, str(folder))
    assert not server.requests


def test_a_folder_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        upload(tmp_path / "nothing", REPO)
    assert not server.requests


def test_tensors_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("computes"))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    check_folder(folder)
    assert mx.get_peak_memory() - before < (folder / "model.safetensors").stat().st_size / 2


# Licences


def test_a_licence_is_asked_for(server: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match="states no licence"):
        upload(folder, REPO)
    assert server.commits  # all the same
    (folder / "README.md").unlink()
    problem = license_problem(folder)
    assert problem and str(folder) in problem
    (folder / "LICENSE").write_text("Do what you like.")
    assert license_problem(folder) is None


def test_apples_licence_comes_with_its_text(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apple-amlr\n---\n")
    problem = license_problem(folder)
    assert problem and registry.LICENSE["license_link"] in problem
    (folder / "LICENSE").write_text("This Apple Machine Learning Research Model is …")
    assert license_problem(folder) is None
