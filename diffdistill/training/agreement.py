"""What all processes of a run must have alike: settings, code, data and weights. Apart they would train on silently."""

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill import __version__
from diffdistill.distributed.processes import Processes
from diffdistill.settings.values import dump
from diffdistill.training.config import RunConfig
from diffdistill.training.resume import PLACES

PACKAGES = ("diffdistill", "diffdistill.methods", "diffdistill.eval")
EVAL_PLACES = ("eval.protocol", "eval.weights", "eval.references", "eval.captions")
OWN = (*PLACES, *EVAL_PLACES, "teacher", "teachers", "init", "trackers", "train.num_threads")
"""What a process may have of its own: places, whose contents are compared; and what only the first one is told."""


def check_same_settings(config: RunConfig, processes: Processes) -> None:
    """Raise UserError, in all processes, where they have different settings or code."""
    if processes.count > 1:
        flat = flatten(dump(config))
        settings = {key: value for key, value in flat.items() if not _is_own(key)}
        processes.check_same(settings | {"the code": code_version(config)})


def check_same_inputs(data: str, weights: Mapping[str, str], processes: Processes) -> None:
    """Raise UserError, in all processes, where their images, labels and prompts differ, or the weights that the run
    starts from.  data: the hash of the former.  weights: of the latter, by the settings that name them."""
    named = {f"the weights of {key}": sha256 for key, sha256 in weights.items()}
    processes.check_same({"the images, labels and prompts of data": data} | named)


def check_same_protocol(protocol: Mapping[str, Any], processes: Processes) -> None:
    """Raise UserError, in all processes, where they would evaluate otherwise.  protocol: of the evaluation while
    training, with the hashes of its weights, references and captions; empty for none."""
    processes.check_same(flatten({"the protocol of eval": protocol}))


def _is_own(key: str) -> bool:
    return any(key == own or key.startswith(f"{own}.") for own in OWN)


def flatten(settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested settings by dotted place; lists as they are."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{place}.{key}" if place else str(key)
        found |= flatten(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found


def code_version(config: RunConfig) -> str:
    """This package's version and the hash of its files, and of the method's if that is somebody else's; and torch's."""
    roots = [FilePath(place) for name in PACKAGES for place in _folders_of(name)]
    own = getattr(sys.modules.get(type(config.method).__module__), "__file__", None)
    files = [*(file for root in roots for file in root.rglob("*.py")), *([FilePath(own)] if own else [])]
    # However they are installed: a set, without their folders.
    parts = {hashlib.sha256(file.name.encode() + b"\0" + file.read_bytes()).digest() for file in files}
    digest = hashlib.sha256(b"".join(sorted(parts)))
    return f"diffdistill {__version__} ({digest.hexdigest()[:12]}), torch {torch.__version__}"


def _folders_of(package: str) -> list[str]:
    found = importlib.util.find_spec(package)
    return list(found.submodule_search_locations or ()) if found else []
