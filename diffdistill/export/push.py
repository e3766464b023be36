"""An exported folder on the Hugging Face hub.

The token is the user's, which huggingface_hub finds by itself (HF_TOKEN, or `hf auth login`). It is never asked for,
kept or shown here.
"""

from pathlib import Path as FilePath

from diffdistill.models.teachers.hub import NAME
from diffdistill.settings.schema import UserError


def check_push(repo: str) -> None:
    """Raise UserError, before any work, if the repository has no such name or nobody is logged in."""
    from huggingface_hub import get_token

    found = NAME.match(repo)
    if found is None or found["revision"]:
        raise UserError(f"--push {repo}: must be a name as in your-name/model")
    if get_token() is None:
        raise UserError("--push: you are not logged in to Hugging Face; set HF_TOKEN, or run `hf auth login`")


def push(folder: FilePath, repo: str, *, is_public: bool) -> str:
    """Upload a folder as it is; the repository is made where there is none. Returns its address.

    Raises UserError with the hub's reason.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from diffdistill")
    except Exception as error:  # its own, httpx' and the operating system's: it has no class for all
        reason = _without_token(" ".join(str(error).split()))[:300]
        raise UserError(f"--push {repo}: {type(error).__name__}: {reason}; the folder {folder} is complete") from None
    return str(address)


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text
