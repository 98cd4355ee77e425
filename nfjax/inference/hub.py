"""Exports on the Hugging Face Hub: fetched where `nfjax.load("hf://USER/NAME")` asks for one, and sent where
`nfjax export --to-hub=USER/NAME` does.

What is fetched is settings, weights and the card; it is data, and read as that of any other export.
"""

from __future__ import annotations

import pathlib
import re

from nfjax.inference import _card, _folder

PREFIX = "hf://"
FETCHED = (_folder.SETTINGS, _folder.WEIGHTS, _card.FILE)
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def fetch(address: str) -> pathlib.Path:
    """The folder of an export on the Hub, on this machine: what is there already is not fetched again.

    Args:
        address: "hf://USER/NAME", or "hf://USER/NAME@REVISION" for a branch, a tag or a commit.

    Raises:
        ValueError: It is no such address.
        FileNotFoundError: There is no such repository or revision, or it is not for you.
        ConnectionError: The Hub cannot be reached, and the repository is not on this machine.
        ImportError: huggingface_hub is not installed.
    """
    repository, _, revision = address.removeprefix(PREFIX).partition("@")
    check_name(repository, address)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(FETCHED))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        of_revision = isinstance(error, errors.RevisionNotFoundError)
        what = f"no revision {revision!r} of {repository}" if of_revision else f"no repository {repository}"
        raise FileNotFoundError(
            f"{address}: there is {what} on the Hugging Face Hub, or it is private and you are not logged in (hf auth "
            "login)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"{address}: the Hugging Face Hub cannot be reached, and the repository is not on this machine: "
            f"{type(error).__name__}. With a network the same command fetches it"
        ) from error
    return pathlib.Path(folder)


def send(folder: pathlib.Path, repository: str, *, private: bool = False) -> str:
    """Sends an export to the Hub, into a repository that is made if there is none.

    Args:
        folder: Of the export.
        repository: "USER/NAME".
        private: Whether a new repository is for you alone.

    Returns:
        Where it is now.

    Raises:
        ValueError: It is no such name, or the folder no export.
        PermissionError: You are not logged in, or may not write there.
        ConnectionError: The Hub cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    check_name(repository)
    if not _folder.is_export(folder):
        raise ValueError(f"{folder} is no export: nothing is sent")
    import huggingface_hub
    from huggingface_hub import errors

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, exist_ok=True, private=private)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="A network of nfjax")
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise PermissionError(
            f"{repository}: the Hugging Face Hub does not take it ({type(error).__name__}): log in with a token that "
            f"may write there (hf auth login). The export is in {folder}; the same command with --overwrite tries again"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"{repository}: the Hugging Face Hub cannot be reached ({type(error).__name__}). The export is in {folder}"
        ) from error
    return f"{PREFIX}{repository}"


def check_name(repository: str, shown: str | None = None) -> None:
    """ValueError where this is no name of a repository; shown: what was given."""
    shown = shown or repository
    if not _NAME.fullmatch(repository) or ".." in repository:
        raise ValueError(f"{shown}: expected a repository of the Hugging Face Hub, USER/NAME")
