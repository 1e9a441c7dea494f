"""Models by name: a folder, a Hub id, or the bundled one."""

from __future__ import annotations

import os
import re
from pathlib import Path

NANO = Path(__file__).parent / "nano"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NEEDED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*")
PICKLES = ("*.bin", "*.pth")


def resolve(source: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """The folder of a model, downloaded to the Hub's cache if need be.

    Args:
        source: a folder, a Hub id (`user/name`), or None for the bundled nano model.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: neither a folder nor a repository on the Hub.
        OSError: the download failed.
    """
    if source is None:
        return NANO
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder or a Hub id.")
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"There is no model folder {name}, and it is no Hub id (user/name) either."
        )
    return download(name, revision)


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch a model from the Hub, or finish an interrupted fetch, and return its folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings]
        has_safetensors = any(file.endswith(".safetensors") for file in files)
        patterns = [*NEEDED, *(() if has_safetensors else PICKLES)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        at = f" at revision {revision}" if revision else ""
        if status in (401, 403, 404):
            raise FileNotFoundError(
                f"The Hub has no model {repo}{at} that you may read; "
                "check the name, or log in with `hf auth login`."
            ) from None
        raise OSError(f"The Hub answered {status} for {repo}{at}; try again later.") from None
    except Exception as error:  # without a connection the HTTP library raises types of its own
        return _from_cache(repo, revision, error)


def _from_cache(repo: str, revision: str | None, error: Exception) -> Path:
    """Without a connection, what an earlier download left whole."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(NEEDED), local_files_only=True
            )
        )
    except Exception:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"{repo} is not downloaded and the Hub can't be reached ({reason})."
        ) from None
