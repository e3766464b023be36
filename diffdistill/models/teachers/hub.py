"""Pipelines by their name on the Hugging Face hub: safetensors and text files only, into its cache."""

import re
from functools import cache
from pathlib import Path as FilePath

from diffdistill.settings.schema import UserError

NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
"""`organisation/model`, or `organisation/model@revision`."""
LOCAL = ("runs", ".", "..")

FILES = (
    *("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),  # for the card of what is made of it
)
NOT_FILES = (
    *("*.fp16*.safetensors", "*.non_ema*.safetensors", "*.fp16.safetensors.index.json", "*/openvino*", "*/flax*"),
    "text_encoders/*",  # the same encoders once more, for other programs
)


def is_hub_name(place: str) -> bool:
    """Whether a place can only be a name on the hub: of its form, and no path that begins in a folder here, or in
    `runs`: a teacher that has yet to be trained is not looked for among strangers.
    """
    first = place.partition("/")[0]
    return NAME.match(place) is not None and first not in LOCAL and not FilePath(first).exists()


@cache
def fetch_pipeline(place: str) -> FilePath:
    """The folder of a pipeline in the hub's cache, downloaded first where it is not there.

    SampleRequest once a process, so that all parts are of one revision, whatever becomes of `main` meanwhile.
    Raises UserError if there is none of this name, or it cannot be reached.
    """
    if not is_hub_name(place):
        raise UserError(f"{place}: no such folder; give a run's, a diffusers pipeline's, or a name on the hub")
    from huggingface_hub import snapshot_download

    found = NAME.match(place)
    assert found is not None
    try:
        folder = snapshot_download(
            found["repo"], revision=found["revision"], allow_patterns=list(FILES), ignore_patterns=list(NOT_FILES)
        )
    except Exception as error:  # its own, requests', httpx' and the operating system's: it has no class for all
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{place}: no such folder, and not to be had from the Hugging Face hub: {type(error).__name__}: {reason}"
        ) from None
    return FilePath(folder)


@cache
def fetch_file(repo: str, file: str, revision: str | None) -> FilePath:
    """One file of a repository, in the hub's cache. Raises UserError where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return FilePath(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # as above
        raise UserError(f"{repo}/{file}: not to be had from the Hugging Face hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
