"""A folder, Hub id, published name or nothing → the folder of a model."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..checks import reason
from . import registry
from .fetch import (
    DiskFullError,
    check_room,
    disk_full_said,
    fetch,
    missing,
    unpack,
)
from .target import check_free, put_in_place

NANO = Path(__file__).parent.parent / "nano"
BUNDLED = "nano"  # its name
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NEEDED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "*.mlpackage/*")
LICENSES = ("LICENSE*", "README.md")  # a model card states the licence
PICKLES = ("*.bin", "*.pth")
TRAINED = ("non_lora_trainables.bin", "mm_projector.bin")  # of LLaVA's training, beside the rest
WEIGHTS = (".safetensors", ".bin", ".pth")


def resolve(source: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """The folder of a model, downloaded if necessary.

    Args:
        source: a folder, a Hub id (`user/name`), the name of a published model as `registry.find`
            takes it (`0.5b`), or `nano` or None for the bundled model. Folders come first.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: neither a folder nor a repository on the Hub.
        ValueError: a published archive is broken, or `revision` is given for what is not on the
            Hub.
        OSError: the download failed.
    """
    path = NANO if source is None else Path(source).expanduser()
    if os.fspath(path) == BUNDLED and not path.exists():
        path = NANO
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder, which has no revisions; leave out revision.")
        return path
    name = BUNDLED if source is None else os.fspath(source)
    if path.exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder or a Hub id.")
    if not registry.knows(name) and not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"There is no model folder {name}, nor is it a Hub id (user/name).")
    return download_model(name, revision=revision)


def download_model(
    name: str,
    *,
    stage: int | None = None,
    variant: str | None = None,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
) -> Path:
    """Download a published model, or any on the Hub, and return its folder.

    An interrupted download resumes where it stopped when called again. Models on the Hub are kept
    in the Hub's cache (`HF_HOME`), unpacked archives in `cache_folder()`.

    Args:
        name: as in `registry.find`, or a Hub id.
        stage, variant: as in `registry.find`; not for a Hub id.
        revision: branch, tag or commit on the Hub; archives have none.
        to: the folder to write instead of a cache. It appears only when it is whole.

    Raises:
        FileNotFoundError: there is no such model on the server.
        FileExistsError: the folder `to` exists and is not empty.
        ValueError: no such published model, or a broken archive.
        OSError: the download failed.
    """
    target = None if to is None else Path(to).expanduser().absolute()
    if target is not None:
        check_free(target)
    if not registry.knows(name) and HUB_ID.fullmatch(name):
        if stage is not None or variant is not None:
            raise ValueError(f"{name} is a Hub id: stage and variant choose published models.")
        return download(name, revision, to=target)
    entry = registry.find(name, stage=stage, variant=variant)
    if entry.on_hub:
        return download(entry.name, revision, to=target)
    if revision is not None:
        raise ValueError(f"{entry.name} is an archive without revisions.")
    return download_archive(entry, to=target)


def download(repo: str, revision: str | None = None, *, to: Path | None = None) -> Path:
    """Download a model from the Hub, or finish doing so, and return its folder.

    Args:
        repo: the Hub id.
        revision: branch, tag or commit.
        to: the folder to write instead of the Hub's cache. It appears only when it is whole.

    Raises:
        FileNotFoundError: there is no such model, or you may not read it.
        OSError: the download failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        raise _refusal(repo, revision, error.response.status_code) from None
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo} is not a Hub id: {str(error).rstrip('.')}.") from None
    except Exception as error:  # without a connection the HTTP library raises types of its own
        if to is not None:
            raise OSError(f"{repo}: the Hub can't be reached ({reason(error)}).") from None
        return _from_cache(repo, revision, error)
    if to is None:
        return _snapshot(info, repo, revision)
    temporary = to.with_name(f".{to.name}.{info.sha[:12]}.part")
    try:
        _snapshot(info, repo, revision, temporary)
    except DiskFullError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the Hub library's own files
    put_in_place(temporary, to)
    return to


def _snapshot(info: Any, repo: str, revision: str | None, folder: Path | None = None) -> Path:
    """Download the files of a model to the Hub's cache or to `folder`."""
    from huggingface_hub import constants, snapshot_download

    has_safetensors = any(file.rfilename.endswith(".safetensors") for file in info.siblings)
    patterns = [*NEEDED, *LICENSES, *(TRAINED if has_safetensors else PICKLES)]
    with disk_full_said(folder or Path(constants.HF_HUB_CACHE)):
        _fetch_large(info, repo, patterns, folder)
        try:
            return Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, local_dir=folder
                )
            )
        except Exception as error:
            if answer := answer_of(error):
                raise _refusal(repo, revision, answer.response.status_code) from None
            if isinstance(error, OSError) and error.errno is not None:  # the system's own
                raise
            raise OSError(
                f"The download of {repo} broke off ({reason(error)}); "
                "try again: files that are complete are kept."
            ) from None


def _fetch_large(info: Any, repo: str, patterns: list[str], folder: Path | None) -> None:
    """Download what is in the Hub's large file storage to where `snapshot_download` looks for it.

    By itself, that starts a file again if it was interrupted, and does not compare hashes.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers, filter_repo_objects

    storage = repo_folder_name(repo_id=repo, repo_type="model")
    blobs = Path(constants.HF_HUB_CACHE) / storage / "blobs"
    wanted = {}
    for file in filter_repo_objects(
        info.siblings, allow_patterns=patterns, key=lambda file: file.rfilename
    ):
        name, lfs = file.rfilename, file.lfs
        if lfs is None or not re.fullmatch(r"[0-9a-f]{64}", lfs.sha256):
            continue
        if ".." in name.split("/") or name.startswith("/"):  # which the Hub library refuses
            continue
        if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str):
            wanted[blobs / lfs.sha256 if folder is None else folder / name] = file
    check_room(folder or blobs, sum(missing(target, f.lfs.size) for target, f in wanted.items()))
    for target, file in wanted.items():
        try:
            fetch(
                hf_hub_url(repo, file.rfilename, revision=info.sha),
                target,
                name=file.rfilename,
                size=file.lfs.size,
                sha256=file.lfs.sha256,
                headers=build_hf_headers(),
            )
        except PermissionError as error:
            if error.errno is not None:  # the system's own
                raise
            raise _refusal(repo, None, 403) from None


def answer_of(error: BaseException) -> Any:
    """The Hub's answer behind an error of the Hub library, or None."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)), None)


def _refusal(repo: str, revision: str | None, status: int) -> OSError:
    """The error that an answer of the Hub means."""
    at = f" at revision {revision}" if revision else ""
    if status in (401, 403, 404):
        return FileNotFoundError(
            f"The Hub has no model {repo}{at} that you may read; "
            "check the name, or log in with `hf auth login`."
        )
    return OSError(f"The Hub answered {status} for {repo}{at}; try again later.")


def _from_cache(repo: str, revision: str | None, error: Exception) -> Path:
    """Without a connection, what an earlier download completed."""
    from huggingface_hub import snapshot_download

    said = f"{repo} is not downloaded and the Hub can't be reached ({reason(error)})."
    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(NEEDED), local_files_only=True
            )
        )
    except Exception:
        raise OSError(said) from None
    # Before huggingface-hub 2.4, an interrupted download counts as a whole one.
    if not any(path.suffix in WEIGHTS for path in folder.iterdir()):
        raise OSError(said)
    return folder


def cache_folder() -> Path:
    """Where unpacked archives are kept: `FASTVLM_CACHE`, by default `~/.cache/fastvlm-mlx`."""
    return Path(os.environ.get("FASTVLM_CACHE") or "~/.cache/fastvlm-mlx").expanduser()


def download_archive(entry: registry.Entry, *, to: Path | None = None) -> Path:
    """Download and unpack a published archive, unless it is in the cache; returns its folder.

    Args:
        entry: of `registry.ENTRIES`, with an archive.
        to: the folder to write instead of one in `cache_folder()`. It appears only when it is
            whole.

    Raises:
        ValueError: the archive is broken or not safe to unpack.
        OSError: as `fetch` and `unpack`.
    """
    from filelock import FileLock

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / entry.name if to is None else to
    with FileLock(cache / f"{entry.name}.lock"):
        if to is None and target.is_dir():
            return target
        archive = fetch(entry.url, cache / f"{entry.name}.zip", sha256=entry.sha256)
        try:
            unpack(archive, target)
        except ValueError as error:
            archive.unlink()
            raise ValueError(f"{error} It came from {entry.url} and was removed.") from None
        archive.unlink()
    return target
