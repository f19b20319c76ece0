"""Pushing finished model folders to the Hugging Face hub."""

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from common.runtime.errors import UserError, as_user_error
from common.runtime.progress import Talk


def check_push(ids: Iterable[str]) -> None:
    """Make sure, before any work, that there is a token and that some ids are ids of repositories.

    Raises:
        UserError: one is none; or there is no token.
    """
    for repository in ids:
        with as_user_error(f"--push-to-hub {repository}", "is no id of a repository"):
            validate_repo_id(repository)
        if huggingface_hub.get_token() is None:
            raise UserError("--push-to-hub: there is no token; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: str | Path, repository: str, talk: Talk) -> str:
    """Upload a finished folder to a repository of models on the hub, which is made if it is not there.

    Other files of the repository stay, but for weights. Returns its address.

    Raises:
        UserError: it could not be pushed. The folder stays.
    """
    if talk.quiet or not talk.stream.isatty():
        disable_progress_bars()
    talk.say(f"{folder}: is pushed to {repository}")
    with as_user_error(folder, f"is there, but could not be pushed to {repository} (the same command tries again)"):
        address = huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="A model of composable-pruning",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return str(address)
