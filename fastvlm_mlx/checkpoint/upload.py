"""A model folder → a repository on the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..checks import reason
from ..hub import registry
from ..hub.resolve import BUNDLED, HUB_ID, answer_of
from ..model.fastvlm import FastVLM
from .card import license_of, license_text
from .layouts import adapters
from .load import load_processor, quantize_like
from .read import read_adapted

# Hidden files (`.cache`, `.DS_Store`) and unfinished downloads.
LEFT_OUT = [".*", "*/.*", "*.part", "*.part.version", "*.lock"]


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str = "Upload a FastVLM model",
) -> str:
    """Upload a model folder, its README.md as the model card, to a repository on the Hub.

    The repository is created if there is none. An upload that was interrupted goes on when this is
    called again. A folder that does not state its licence, and an adapter whose base is a folder,
    cause a `UserWarning`.

    Args:
        folder: a model folder that loads.
        repo: the Hub id, `user/name`.
        private: whether a repository that is created is private.
        message: of the commit.

    Returns:
        The repository's page.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        CheckpointError: the folder does not load.
        ValueError: `repo` is malformed, or the Hub refuses the model card.
        PermissionError: you are not logged in, or may not write there.
        OSError: the upload failed.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    check_repo_name(repo)
    check_folder(folder)
    for problem in (license_problem(folder), base_problem(folder)):
        if problem is not None:
            warnings.warn(problem, stacklevel=2)
    _check_login()
    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=LEFT_OUT
        )
        return str(url)
    except Exception as error:
        raise _explained(repo, error) from None


def check_repo(repo: str) -> None:
    """Raise what `upload` would raise for a repository, as far as that shows without writing to it.

    Raises:
        ValueError: its name is malformed.
        PermissionError: you are not logged in, or may not write there.
        OSError: the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    check_repo_name(repo)
    _check_login()
    try:
        user = HfApi().whoami()
    except Exception as error:
        if (answer := answer_of(error)) is None:
            raise OSError(f"{repo}: the Hub can't be reached ({reason(error)}).") from None
        if answer.response.status_code in (401, 403):
            raise _explained(repo, error) from None
        return  # a mirror need not know who asks
    owner = repo.partition("/")[0]
    roles = {each["name"]: each.get("roleInOrg") for each in user.get("orgs") or ()}
    token = (user.get("auth") or {}).get("accessToken") or {}
    if owner not in (user["name"], *roles) or roles.get(owner) == "read":
        raise PermissionError(
            f"You are logged in as {user['name']}, who may not write to {repo}; "
            "choose a repository of your own."
        )
    if token.get("role") == "read":
        raise PermissionError(
            f"Your token may only read; use one that may write to {repo} (`hf auth login`)."
        )


def _check_login() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise PermissionError("You are not logged in to the Hub: run `hf auth login` first.")


def _explained(repo: str, error: Exception) -> Exception:
    """The error to raise for one of the Hub's client: one sentence, of a fitting type."""
    answer = answer_of(error)
    if answer is None:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, as it is
            return error
        why = " ".join(str(error).split())
        if isinstance(error, ValueError):
            return ValueError(f"The Hub refuses the upload to {repo} ({why}).")
        return OSError(f"The upload to {repo} broke off ({why}); try again: it goes on from there.")
    status = answer.response.status_code
    if status == 401:
        return PermissionError("The Hub does not accept your token; run `hf auth login` again.")
    if status == 403:
        return PermissionError(
            f"Your token may not write to {repo}; use one that may (`hf auth login`), "
            "or a repository of your own."
        )
    if status == 404:
        return FileNotFoundError(f"The Hub has no repository {repo} that you may write to.")
    why = answer.server_message or f"it answered {status}"
    if status in (400, 422):
        return ValueError(f"The Hub refuses the upload to {repo} ({' '.join(why.split())}).")
    return OSError(f"The Hub answered {status} to the upload to {repo}; try again later.")


def check_repo_name(repo: str) -> None:
    """Raise a ValueError if a name can't be that of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = HUB_ID.fullmatch(repo) is not None
    if not valid:
        raise ValueError(f"{repo!r} is no name of a repository; it must be user/name.")


def check_folder(folder: str | Path) -> None:
    """Raise what loading a folder would raise; tensors are compared by shape and not read.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it does not load.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    load_processor(folder)
    config, tensors, _ = read_adapted(folder)
    quantize_like(FastVLM(config), tensors)


def license_problem(folder: str | Path) -> str | None:
    """A sentence about what a folder does not say about its licence, or None."""
    folder = Path(folder).expanduser()
    license = license_of(folder)
    if not license and not license_text(folder):
        return (
            f"{folder} states no licence: put `license:` into the metadata of its README.md, "
            "or add a LICENSE."
        )
    if license == registry.LICENSE and not license_text(folder):
        return (
            f"{folder} has no copy of its licence, which Apple's asks for: "
            f"save {registry.LICENSE['license_link']} as LICENSE in it."
        )
    return None


def base_problem(folder: str | Path) -> str | None:
    """A sentence about the base of an adapter that others can't have, or None."""
    folder = Path(folder).expanduser()
    base = adapters.base_of(folder)[0] if adapters.is_adapter(folder) else BUNDLED
    if base == BUNDLED or not Path(base).expanduser().is_dir():
        return None
    file = adapters.SETTINGS if (folder / adapters.SETTINGS).is_file() else "config.json"
    return (
        f"{folder} names its base by a folder of this machine, {base}, which no one else has: put "
        f"its Hub id into {file}, or upload what `fastvlm fuse` makes of both."
    )
