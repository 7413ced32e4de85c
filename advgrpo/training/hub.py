"""Upload a folder's files to the Hugging Face hub; what goes wrong there is one line.

Token and endpoint are huggingface_hub's own: `hf auth login` or HF_TOKEN, and HF_ENDPOINT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from advgrpo.errors import UserError, one_line

_REMEDIES = {
    401: "the hub does not know the token: run hf auth login, or set HF_TOKEN",
    403: "this token may not write there: make one with write access at huggingface.co/settings/tokens, or choose a "
    "repository of your own",
    404: "no such user or organisation, or no access to it: see to the name and the token",
    409: "the repository is being changed or is of another kind: choose another name, or try again",
    413: "the files are too large for the hub",
    429: "too many requests: wait a few minutes and run the same command again",
}


def check_repository(name: str, flag: str) -> None:
    """UserError unless `name` is USER/NAME in the hub's spelling."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: no name of a repository ({one_line(str(error), 200)})") from None
    if "/" not in name:
        raise UserError(f"{flag} {name}: want USER/NAME, such as me/my-lora")


def upload(
    folder: Path, files: Sequence[str], repository: str, *, private: bool, flag: str, say: Callable[[str], None]
) -> str:
    """Make the repository if need be, and upload `files` of `folder` in one commit.

    Args:
        private: of a repository that is made; one that exists stays as it is, and this is said.
        flag: what names the repository, for errors.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token, no permission, no network, a full quota, ...
    """
    from huggingface_hub import HfApi

    say(f"uploading to {repository}{' (private)' if private else ''}:")
    for name in files:
        say(f"  {name}  {os.path.getsize(folder / name):,} bytes")
    api = HfApi()
    try:
        exists = api.repo_exists(repository)
        api.create_repo(repository, private=private, exist_ok=True)
        if exists and private and not api.model_info(repository).private:
            raise UserError(
                f"{flag} {repository}: --private, but the repository exists and is public; make it private on its "
                "settings page, or choose another name"
            )
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[_literally(name) for name in files],
            commit_message="LoRA and model card by advgrpo",
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, of its client and of the network below that
        raise UserError(f"{flag} {repository}: {_reason(error)}") from error
    return str(commit.commit_url)


def _literally(name: str) -> str:
    """A pattern that is this name and nothing else."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = one_line(str(error), 200)
    if type(error).__name__ == "LocalTokenNotFoundError":
        return "there is no token: run hf auth login, or set HF_TOKEN"
    if status is None:
        kind = type(error).__name__
        return f"the hub was not reached ({kind}: {said}); see to the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    remedy = _REMEDIES.get(status, "try again later; what was uploaded is not visible until the end")
    return f"the hub answered {status}: {remedy} ({said})"
