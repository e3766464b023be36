"""Files of weights: found on this machine or downloaded, and never used before their hash is verified.

A file lies in $DIFFDISTILL_WEIGHTS, or ~/.cache/diffdistill/weights, or where the caller says. A download goes to a
temporary name first, so a broken one is never taken for a whole one.
"""

import hashlib
import os
import secrets
import shutil
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.settings.links import open_plain
from diffdistill.settings.reading import check_regular
from diffdistill.settings.schema import UserError

ENVIRONMENT = "DIFFDISTILL_WEIGHTS"
DEFAULT = "~/.cache/diffdistill/weights"
TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class WeightsFile:
    """name: of the file.  sha256: all of its hash, or the first digits that its author publishes; None, not known.
    url: where it can be had; None, nowhere that may be relied on."""

    name: str
    sha256: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Found:
    """A file whose content is known.  sha256: all 64 digits."""

    path: FilePath
    sha256: str


def weights_folder() -> FilePath:
    """$DIFFDISTILL_WEIGHTS, or ~/.cache/diffdistill/weights."""
    return FilePath(os.environ.get(ENVIRONMENT) or DEFAULT).expanduser()


def find_weights(file: WeightsFile, given: FilePath | None = None) -> Found:
    """The file that the caller gives, or that of the cache, or a download into the cache; its hash verified.

    Raises UserError if it is not there and cannot be downloaded, saying where it belongs, or if it has another hash.
    """
    if given is not None:
        path = given.expanduser()
        if not path.is_file():
            raise UserError(f"weights {given}: no such file; it should be {file.name}{_from(file)}")
        return _verified(path, file)
    path = weights_folder() / file.name
    if not path.is_file():
        _download(file, path)
    return _verified(path, file)


def load_state(path: FilePath) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; of a checkpoint its "state_dict", without DataParallel's "module.".

    No pickled code is run.  Raises UserError if the file is no such thing.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds on damaged files
        raise UserError(f"{path}: cannot be read as weights: {_brief(error)}") from None
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no tensors by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], *, origin: FilePath) -> None:
    """Raises UserError if names or shapes do not fit."""
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"{origin}: not weights of this network: {_brief(error)}") from None


def _verified(path: FilePath, file: WeightsFile) -> Found:
    try:
        check_regular(path)
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if file.sha256 and not digest.startswith(file.sha256):
        raise UserError(
            f"{path}: damaged, or another file: its SHA-256 is {digest}, that of {file.name} "
            f"{'is' if len(file.sha256) == 64 else 'begins with'} {file.sha256}; replace it{_from(file)}"
        )
    return Found(path, digest)


def _download(file: WeightsFile, path: FilePath) -> None:
    """To a temporary name, verified, then to its own."""
    place = f"put {file.name} at {path} (or set ${ENVIRONMENT})"
    if file.url is None:
        raise UserError(f"weights: there is no {path}; {place}")
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_SECONDS) as source, open_plain(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        _verified(temporary, file)
        temporary.replace(path)
    except UserError:
        raise UserError(f"weights: the download of {file.url} is broken; try again, or {place}") from None
    except Exception as error:  # URLError, and what a connection that is cut off leads to
        raise UserError(f"weights: {file.url} cannot be downloaded ({_brief(error)}); {place}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _from(file: WeightsFile) -> str:
    return f" from {file.url}" if file.url else ""


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
