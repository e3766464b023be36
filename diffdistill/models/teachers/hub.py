"""Pipelines by their name on the Hugging Face hub: safetensors and text files only, into its cache."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path as FilePath

from diffdistill.models.teachers.family import Family
from diffdistill.models.teachers.registry import detect_family
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError

NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
"""`organisation/model`, or `organisation/model@revision`."""
COMMIT = re.compile(r"^[0-9a-f]{40}$")
"""What the hub's cache calls the folder of one revision."""
LOCAL = ("runs", ".", "..")
LONGEST_REASON = 1000

CARDS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # for the card of what is made of it
INDEX = ("model_index.json", "config.json", "scheduler_config.json")  # the last two: of networks in the root
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = "*.safetensors"
ROOT_WEIGHTS = "diffusion_pytorch_model*.safetensors"  # a pattern's * goes on behind a "/" on the hub
VARIANTS = ("bf16", "fp16")
"""Of weights, where there are none without: the first that is there is taken, and else any."""
NOT_WEIGHTS = ("*.non_ema*", "*/openvino*", "*/flax*")


def is_hub_name(place: str) -> bool:
    """Whether a place can only be a name on the hub: of its form, and no path that begins in a folder here, or in
    `runs`: a teacher that has yet to be trained is not looked for among strangers.
    """
    first = place.partition("/")[0]
    return NAME.match(place) is not None and first not in LOCAL and not FilePath(first).exists()


@cache
def fetch_pipeline(place: str) -> FilePath:
    """The folder of a pipeline in the hub's cache, downloaded first where it is not there: the parts that its family
    loads and no others, of each the weights without a variant, or of one variant where there are no others.

    Asked once a process, so that all parts are of one revision, whatever becomes of `main` meanwhile.
    Raises UserError if there is none of this name, or it cannot be reached.
    """
    if not is_hub_name(place):
        raise UserError(f"{place}: no such folder; give a run's, a diffusers pipeline's, or a name on the hub")
    folder = _fetch(place, [*INDEX, *CARDS])
    family, parts = _wanted(folder)
    pinned = f"{place.partition('@')[0]}@{folder.name}" if COMMIT.match(folder.name) else place
    if family and parts:
        texts = [f"{part}/{text}" for part in parts for text in TEXTS]
        weights = [f"{part}/{WEIGHTS}" for part in parts] + ([ROOT_WEIGHTS] if _is_network(folder, family) else [])
        folder = _fetch(pinned, [*texts, *weights], [f"*.{name}*" for name in VARIANTS])
        _fetch_variants(pinned, folder, parts)
    return folder


def _fetch_variants(place: str, folder: FilePath, parts: list[str]) -> None:
    """The weights of one variant, for parts that have no others."""
    for ending in (*(f"*.{name}*" for name in VARIANTS), "*"):
        lacking = [part for part in parts if _lacks_weights(folder / part)]
        if lacking:
            _fetch(place, [f"{part}/{ending}{end}" for part in lacking for end in (".safetensors", ".json")])


def _lacks_weights(folder: FilePath) -> bool:
    """Whether a part's config.json is there, of a model therefore, and no weights."""
    return (folder / "config.json").is_file() and not any(folder.glob(WEIGHTS))


def _is_network(folder: FilePath, family: Family) -> bool:
    """Whether the config.json in the root is of the family's network."""
    try:
        return read_json(folder / "config.json").get("_class_name") in family.network_classes
    except (OSError, ValueError, AttributeError):
        return False


def _wanted(folder: FilePath) -> tuple[Family | None, list[str]]:
    """The pipeline's family, and the parts that it loads; none where it is not known, which is said elsewhere."""
    try:
        index = read_json(folder / "model_index.json")
        family = detect_family(index.get("_class_name"), origin="")
    except (OSError, ValueError):
        return None, []
    named = (family.network, *family.parts, "scheduler")
    return family, [part for part in named if index.get(part) not in (None, [None, None])]


def _fetch(place: str, wanted: list[str], unwanted: Sequence[str] = ()) -> FilePath:
    from huggingface_hub import snapshot_download

    found = NAME.match(place)
    assert found is not None
    ignored = [*unwanted, *NOT_WEIGHTS]
    try:
        return FilePath(
            snapshot_download(found["repo"], revision=found["revision"], allow_patterns=wanted, ignore_patterns=ignored)
        )
    except Exception as error:  # its own, requests', httpx' and the operating system's: it has no class for all
        raise UserError(
            f"{place}: no such folder, and not available from the Hugging Face hub: {_reason(error)}"
        ) from None


@cache
def fetch_file(repo: str, file: str, revision: str | None) -> FilePath:
    """One file of a repository, in the hub's cache. Raises UserError where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return FilePath(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # as above
        raise UserError(f"{repo}/{file}: not available from the Hugging Face hub: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """All that it says; of a very long text whole sentences."""
    text = " ".join(str(error).split())
    whole = text if len(text) <= LONGEST_REASON else text[: text.rfind(". ", 0, LONGEST_REASON) + 1]
    return f"{type(error).__name__}: {whole or text[:LONGEST_REASON]}"
