"""Pushing finished model folders to the Hugging Face hub."""

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from common.cli import Talk
from common.errors import UserError

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # those of an earlier push that this one does not replace go


def check_push(ids: Iterable[str]) -> None:
    """Make sure, before any work, that folders can be pushed under some ids, as far as that can be told from here.

    Raises:
        UserError: one is no id of a repository; or there is no token.
    """
    ids = list(ids)
    for repository in ids:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(f"--push-to-hub {repository}: {_first_line(error)}") from None
    if ids and huggingface_hub.get_token() is None:
        raise UserError("--push-to-hub: there is no token; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: str | Path, repository: str, private: bool, talk: Talk) -> str:
    """Upload a finished folder to a repository of models on the hub, which is made if it is not there.

    The token is that of the environment (HF_TOKEN), or of the last login. Other files of the repository stay.

    Args:
        private: whether only its owners see a repository that is made; one that is there stays as it is.
    Returns:
        its address.
    Raises:
        UserError: it could not be pushed. The folder stays.
    """
    if talk.quiet or not talk.stream.isatty():
        disable_progress_bars()
    talk.say(f"{folder}: is pushed to {repository}")
    try:
        address = huggingface_hub.create_repo(repository, private=private or None, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="A model of composable-pruning",
            delete_patterns=WEIGHTS,
        )
    except Exception as error:  # of the hub's client, of httpx, of hf_xet: many classes
        raise UserError(
            f"{folder}: is there, but could not be pushed to {repository}: {_first_line(error)}; the same command "
            "tries again"
        ) from None
    return str(address)


def _first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
