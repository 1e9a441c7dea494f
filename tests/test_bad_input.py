"""What goes wrong with models, as the command says it: one sentence, exit code 2, nothing left."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from command import Result, Run
from hub_server import REPO, TOKEN, Fault, Hub, everything, fill_disk, special, use, zipped
from models import DEPTH
from sources import LAYOUTS, full_nano, with_tokenizer

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.files import read_tensors, save_checkpoint
from fastvlm_mlx.checkpoint.layouts.coreml import writer
from fastvlm_mlx.checkpoint.load import load_model, resolve_dtype
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import CheckpointError
from fastvlm_mlx.hub import registry as zoo
from fastvlm_mlx.hub.resolve import NANO, resolve
from fastvlm_mlx.image.resize import choose_resize

ARCHIVE = "llava-fastvithd_0.5b_stage2"
PENGUINS = str(NANO / "images" / "penguins.png")
ANSWER = "The image shows 6 penguins.\n"


def assert_one_error(result: Result, *said: str | Path) -> None:
    """Exit code 2, nothing on stdout, one sentence on stderr."""
    assert (result.code, result.out) == (2, ""), result
    line, end, rest = result.err.partition("\n")
    assert line.startswith("Error: ") and line.endswith(".") and end and not rest, result.err
    for text in said:
        assert str(text) in line


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model's folder, to be spoiled."""
    return with_tokenizer(small_folder, tmp_path / "model")


def assert_refused(run: Run, folder: Path, *said: str | Path) -> None:
    """Whichever command reads the folder."""
    there = everything(folder.parent)
    for arguments in (
        ("generate", "--model", folder, "--image", PENGUINS),
        ("chat", "--model", folder),
        ("convert", folder, folder.parent / "target"),
        ("convert", folder, folder.parent / "target", "--layout", "llava"),
        ("convert", folder, folder.parent / "target", "--quantize", "4"),
        ("upload", folder, "--repo", REPO),
    ):
        assert_one_error(run(*arguments), *said)
    assert everything(folder.parent) == there


# Folders


def test_an_unknown_layout(run: Run, folder: Path) -> None:
    """Both what was found and what is supported is said."""
    strange = {"model.resnet.conv.weight": mx.zeros(3), "lm_head.weight": mx.zeros(3)}
    mx.save_safetensors(str(folder / "model.safetensors"), strange)
    supported = ("PyTorch", "transformers", "MLX", "Apple silicon")
    assert_refused(run, folder, folder, "unknown layout", *strange, *supported)


def test_weights_that_are_a_pipe(run: Run, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    for command in (["generate", "--model", folder], ["convert", folder, folder.parent / "x"]):
        assert_one_error(run(*command), file, "a pipe or a device")
    assert not (folder.parent / "x").exists()


def test_a_truncated_file(run: Run, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(run, folder, file, "not a whole safetensors file")


@pytest.mark.parametrize("cut", [0, 5, 100], ids=["empty", "no header", "half a header"])
def test_a_file_cut_at_its_beginning(run: Run, folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert_one_error(run("generate", "--model", folder, "--image", PENGUINS), file)


def test_a_missing_and_a_truncated_shard(run: Run, folder: Path) -> None:
    tensors = read_tensors(folder)
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    save_checkpoint(tensors, folder, shard_bytes=500_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert_refused(run, folder, shard, "not a whole safetensors file")
    shard.unlink()
    index = folder / "model.safetensors.index.json"
    assert_refused(run, folder, index, shard.name, "download it again")


@pytest.mark.needs("coremltools")
def test_an_export_without_its_encoder(run: Run, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data / "apple-export-small", tmp_path / "model"))
    shutil.rmtree(folder / "fastvithd.mlpackage")
    assert_one_error(run("convert", folder, tmp_path / "target"), folder, "fastvithd.mlpackage")
    assert not (tmp_path / "target").exists()


# Disks that fill up


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_nano(tmp_path_factory.mktemp("nano") / "nano")


@pytest.mark.parametrize("layout", ["mlx", "llava", "transformers"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fills_up_with_weights(
    run: Run, nano_folder: Path, tmp_path: Path, monkeypatch, layout: str, exists: bool
) -> None:
    target = tmp_path / "target"
    if exists:
        shutil.copytree(nano_folder, target)
    before = everything(tmp_path)

    def fail(file: str, *arguments: object, **options: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("[write] Unable to write 300094 bytes to file.")  # as MLX says it

    monkeypatch.setattr(mx, "save_safetensors", fail)
    result = run("convert", nano_folder, target, "--layout", layout, "--overwrite")
    assert_one_error(result, tmp_path, "can't be written")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "README.md"])
def test_a_disk_that_fills_up_with_small_files(
    run: Run, nano_folder: Path, tmp_path: Path, monkeypatch, file: str
) -> None:
    for name in ("write_text", "write_bytes"):
        real = getattr(Path, name)

        def fail(path: Path, *arguments: object, real=real, **options: object) -> int:
            if path.name == file:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, name, fail)
    result = run("convert", nano_folder, tmp_path / "target", "--layout", "transformers")
    assert_one_error(result, file, os.strerror(errno.ENOSPC))
    assert everything(tmp_path) == []


LIMITED = """
import resource, signal, sys
import fastvlm_mlx.checkpoint.load
from fastvlm_mlx.cli.main import main
if "apple-export" in sys.argv:
    import coremltools
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files can't be limited there")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_may_not_grow(folder: Path, tmp_path: Path, layout: str) -> None:
    """In a process of its own, where nothing is simulated but the size of the disk."""
    there = everything(tmp_path)
    command = [sys.executable, "-c", LIMITED, "convert", folder, tmp_path / "target"]
    done = subprocess.run(
        [*map(str, command), "--layout", layout], capture_output=True, text=True, timeout=120
    )
    *_, last = done.stderr.splitlines()  # after what coremltools shows of its progress
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert last.startswith("Error: ") and "can't be written" in last and last.endswith(".")
    assert everything(tmp_path) == there


@pytest.mark.needs("coremltools")
def test_core_mls_own_error_is_a_sentence(folder: Path, tmp_path: Path, monkeypatch) -> None:
    import coremltools as ct

    pass

    config, tensors = read_checkpoint(folder)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from", None, "to")
    for error in (shutil.Error([("from", "to", str(full))]), RuntimeError("No room.\nAt all.")):

        def fail(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(ct, "convert", fail)
        with pytest.raises(OSError, match=r"encoder\.mlpackage can't be written") as caught:
            writer.write_vision_package(tensors, config.vision, tmp_path / "encoder.mlpackage")
        message = str(caught.value)
        assert "\n" not in message and message.endswith(").") and "from" not in message
        assert "No room" in message or os.strerror(errno.ENOSPC) in message


# The Hub and the archives


@pytest.fixture
def server(server: Hub, waits: list[float]) -> Hub:
    return server  # and nothing is waited for


def commands_that_download(name: str, tmp_path: Path) -> list[tuple[str | Path, ...]]:
    return [
        ("download", name),
        ("download", name, "--to", tmp_path / "model"),
        ("convert", name, tmp_path / "model"),
        ("generate", "--model", name, "--image", PENGUINS),
    ]


def test_a_hub_id_that_does_not_exist(run: Run, server: Hub, tmp_path: Path) -> None:
    for command in commands_that_download("user/nothing", tmp_path):
        assert_one_error(run(*command), "user/nothing", "check the name")
    result = run("download", REPO, "--revision", "nowhere")
    assert_one_error(result, REPO, "revision nowhere", "check the name")
    assert_one_error(run("download", "9b"), "'9b'", "0.5b, 1.5b, 7b")
    assert_one_error(run("download", "0.5b", "--stage", "4"), "stage 4")
    assert everything(tmp_path) == []


def test_no_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:9"
    use(nowhere, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(zoo, "CDN", nowhere.url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for command in commands_that_download(REPO, tmp_path):
        assert_one_error(run(*command), REPO, "can't be reached")
    assert_one_error(run("download", "0.5b", "--stage", "2"), ARCHIVE)
    assert_one_error(run("download", "0.5b"), "apple/FastVLM-0.5B", "can't be reached")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_one_error(run("upload", NANO, "--repo", REPO), REPO, "broke off")
    assert everything(tmp_path) == []


def test_a_truncated_repository(run: Run, server: Hub, tmp_path: Path) -> None:
    """Weights that the Hub itself has not whole come as it has them, and are refused."""
    whole = server.files[REPO]["model.safetensors"]
    server.files[REPO]["model.safetensors"] = whole[:-1000]
    for command in commands_that_download(REPO, tmp_path)[2:]:
        result = run(*command)
        *_, last = result.err.splitlines()  # after the Hub library's progress
        assert (result.code, result.out) == (2, "") and last.startswith("Error: ")
        assert "model.safetensors is not a whole safetensors file" in last
    assert not (tmp_path / "model").exists()


def nano_zip() -> bytes:
    files = {p.name: p.read_bytes() for p in NANO.iterdir() if p.is_file()}
    return zipped({f"{ARCHIVE}/{name}": data for name, data in files.items()})


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../../escaped"])
def test_an_archive_that_escapes_its_folder(
    run: Run, server: Hub, tmp_path: Path, name: str
) -> None:
    server.archives[f"/{ARCHIVE}.zip"] = special(name)
    for to in ((), ("--to", tmp_path / "here" / "model")):
        result = run("download", "0.5b", "--stage", "2", *to)
        assert_one_error(result, repr(name), "would leave the folder", server.cdn)
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/escaped").exists()
    assert [name for name in everything(tmp_path) if "json" in name or "zip" in name] == []


@pytest.mark.parametrize("command", [(REPO,), ("0.5b", "--stage", "2")])
def test_a_disk_that_fills_up_with_a_download(
    run: Run, server: Hub, tmp_path: Path, monkeypatch, command: tuple[str, ...]
) -> None:
    server.archives[f"/{ARCHIVE}.zip"] = nano_zip()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        for to in ((), ("--to", tmp_path / "model")):
            assert_one_error(run("download", *command, *to), "The disk is full")
            left = everything(tmp_path)
            assert not [name for name in left if "safetensors" in name or ".part" in name]
    result = run("download", *command, "--to", tmp_path / "model")  # with room again
    assert (
        result.code == 0 and load_model(tmp_path / "model").config.text.num_hidden_layers == DEPTH
    )


def test_a_disk_without_room(
    run: Run, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for command in commands_that_download(REPO, tmp_path):
        assert_one_error(run(*command), "There is no room for", tmp_path)
    assert everything(tmp_path) == []


# Downloads and uploads that go well


def test_download(run: Run, server: Hub, tmp_path: Path) -> None:
    result = run("download", REPO)
    assert result.code == 0 and result.out.endswith("\n")
    assert load_model(result.out[:-1]).config.text.num_hidden_layers == DEPTH
    server.requests.clear()
    again = run("download", REPO)
    assert again.out == result.out and not server.asked("^/large/")
    here = tmp_path / "here"
    assert run("download", REPO, "--to", here).out == f"{here}\n"
    assert everything(here) == sorted(server.files[REPO])
    assert_one_error(run("download", REPO, "--to", here), here, "exists already")
    assert run("generate", "--model", REPO, "--image", PENGUINS).out == ANSWER


def test_download_of_published_models(run: Run, server: Hub, tmp_path: Path) -> None:
    server.files["apple/FastVLM-0.5B"] = server.files[REPO]
    server.files["mlx-community/FastVLM-0.5B-bf16"] = server.files[REPO]
    server.archives[f"/{ARCHIVE}.zip"] = nano_zip()
    places = {
        ("download", "0.5b"): "models--apple--FastVLM-0.5B",
        ("download", "0.5b", "--variant", "mlx"): "models--mlx-community--FastVLM-0.5B-bf16",
        ("download", "0.5B", "--stage", "2"): ARCHIVE,
    }
    for command, place in places.items():
        result = run(*command)
        assert result.code == 0 and place in result.out
        assert load_model(result.out[:-1]).config.vision.image_size == 256
    assert run("generate", "--model", "0.5b", "--image", PENGUINS).out == ANSWER


def test_upload(run: Run, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images"))
    command = ("upload", folder, "--repo", "user/mine")
    assert_one_error(run(*command), "not logged in", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_one_error(run("upload", folder, "--repo", "mine"), "'mine'", "user/name")
    assert_one_error(run("upload", tmp_path / "nothing", "--repo", "user/mine"), "nothing")
    assert not server.created
    result = run(*command, "--private")
    assert result.code == 0 and result.out.splitlines()[-1] == f"{server.url}/user/mine"
    assert "Traceback" not in result.err
    (made,) = server.created
    assert made.get("visibility") == "private" or made.get("private") is True
    assert sorted(server.files["user/mine"]) == everything(folder)
    assert run("generate", "--model", "user/mine", "--image", PENGUINS).out == ANSWER
    server.faults = [Fault("/commit/", times=99, status=403)]
    result = run(*command)
    assert result.code == 2 and result.err.splitlines()[-1].startswith("Error: Your token may not")


def test_upload_says_what_is_missing_of_the_licence(
    run: Run, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images", "README.md"))
    result = run("upload", folder, "--repo", "user/mine")
    assert result.code == 0 and "Note: " in result.err and "licence" in result.err


def test_convert_and_upload(
    run: Run, server: Hub, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    target = tmp_path / "target"
    result = run("convert", nano_folder, target, "--quantize", "8", "--upload-repo", "user/mine")
    assert result.code == 0
    first, *_, last = result.out.splitlines()
    assert (first, last) == (f"Wrote {target}.", f"{server.url}/user/mine")
    assert sorted(server.files["user/mine"]) == everything(target)
    assert json.loads(server.files["user/mine"]["config.json"])["quantization"]["bits"] == 8
    assert run("generate", "--model", "user/mine", "--image", PENGUINS).out == ANSWER


def test_what_was_converted_stays_if_its_upload_fails(
    run: Run, server: Hub, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.faults = [Fault("/commit/", times=99, status=403)]
    target = tmp_path / "target"
    result = run("convert", nano_folder, target, "--upload-repo", "user/mine")
    assert (result.code, result.out) == (2, f"Wrote {target}.\n")
    assert result.err.splitlines()[-1].startswith("Error: Your token may not write")
    assert load_model(target) and not server.commits


def test_an_upload_that_can_not_be_is_said_before_the_conversion(
    run: Run, server: Hub, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload_to(repo: str, *target: Path) -> Result:
        return run("convert", nano_folder, *target, "--report", "--upload-repo", repo)

    target = tmp_path / "target"
    assert_one_error(upload_to("user/mine", target), "You are not logged in")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_one_error(upload_to("mine", target), "'mine'", "user/name")
    assert_one_error(upload_to("another/model", target), "another/model", "may not write")
    assert_one_error(upload_to("user/mine"), "--upload-repo needs the folder to write")
    assert not target.exists() and not server.created


def test_a_folder_has_no_revisions(run: Run, nano_folder: Path, tmp_path: Path) -> None:
    for command in (
        ["convert", nano_folder, tmp_path / "target"],
        ["generate", "--model", nano_folder, "--prompt", "Hi"],
        ["generate", "--prompt", "Hi"],
    ):
        result = run(*command, "--revision", "main")
        assert_one_error(result, "is a folder, which has no revisions")
    assert not (tmp_path / "target").exists()


def test_an_archive_by_its_name_is_checked_like_a_folder(server: Hub) -> None:
    server.archives[f"/{ARCHIVE}.zip"] = zipped({"model/config.json": b"{}"})
    with pytest.raises(CheckpointError, match="model_type"):
        load_model(resolve(ARCHIVE))


@pytest.mark.parametrize(
    "fails",
    [
        lambda model, long: fv.batch_generate(*model, [long]),
        lambda model, long: fv.generate(*model, "Hi", conv_mode=long),
        lambda _, long: resolve_dtype(long),
        lambda _, long: fv.convert(NANO, "never-written", layout=long),
        lambda _, long: choose_resize(256, long, None),
    ],
    ids=["request", "conv_mode", "dtype", "layout", "mode"],
)
def test_no_message_quotes_a_value_at_length(fails: Callable[..., object]) -> None:
    with pytest.raises(ValueError) as raised:
        fails(fv.load(), "x" * 10**6)
    assert "'xxx" in str(raised.value) and len(str(raised.value)) < 500
