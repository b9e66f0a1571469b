"""Push an exported model to the Hugging Face hub, or list what would be pushed."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from distilclip import files
from distilclip.errors import InputError
from distilclip.export.card import FILL_IN

CARD = "README.md"

_NO_ANSWER: tuple[type[BaseException], ...] = (HfHubHTTPError.__bases__[0], OSError)
"""What the client raises where nobody answers: the base of the errors of the HTTP library that it uses, which one that
is depends on its release."""


def list_push(folder: str, repo: str) -> dict[str, Any]:
    """Return what a push of the folder would upload: every file with its size in bytes, and the model card.

    Raises `InputError` for a name that no repository can have.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to {repo}: {error}") from error
    card = files.read_bytes(files.join(folder, CARD)).decode()
    sizes = {
        files.join(at, name)[len(files.join(folder, "")) :]: files.size(files.join(at, name))
        for at, names in files.walk(folder)
        for name in names
    }
    return {"repo": repo, "files": sizes, "num_bytes": sum(sizes.values()), "card": card, "to_fill_in": _blanks(card)}


def push_folder(folder: str, repo: str) -> str:
    """Upload the folder to a repository, in one commit, and return its address; a new repository is private.

    Raises `InputError` without a token, with one that may not write there, and without a network.
    """
    listed = list_push(folder, repo)
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            for name in listed["files"]:
                target = os.path.join(temporary, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "wb") as file:
                    file.write(files.read_bytes(files.join(folder, name)))
            commit = api.upload_folder(
                repo_id=repo, folder_path=temporary, commit_message="A model made with distilclip"
            )
    except LocalTokenNotFoundError as error:
        raise InputError(f"--push-to {repo} needs a token: run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "the token is not valid, or may not write there" if status in (401, 403) else f"the hub answered {status}"
        told = " ".join(str(error).split())
        raise InputError(f"--push-to {repo}: {why}. Check `hf auth whoami` and the name ({told}).") from error
    except _NO_ANSWER as error:
        raise InputError(
            f"--push-to {repo}: the hub cannot be reached ({error}). The export itself is done."
        ) from error
    return str(commit.repo_url)


def show_push(listed: dict[str, Any]) -> str:
    """Return the list of a push as text: files, sizes, and the card."""
    lines = [f"{size:>14,}  {name}" for name, size in listed["files"].items()]
    head = f"would push {len(lines)} files, {listed['num_bytes']:,} bytes, to {listed['repo']} (a new one is private):"
    blanks = f"{listed['to_fill_in']} places of the card are to be filled in by a person."
    return "\n".join([head, *lines, "", f"{CARD}: {blanks}", "", listed["card"]])


def _blanks(card: str) -> int:
    return card.count(FILL_IN) + card.count("# to be filled in")
