"""The files that are added to a pipeline: on disk, or by their name on the hub; safetensors alone."""

import re
from collections.abc import Sequence
from pathlib import Path as FilePath

from diffdistill.models.teachers.hub import fetch_file
from diffdistill.settings.schema import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ON_HUB = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?P<file>(/[\w. -]+)*\.safetensors)?(@(?P<revision>[\w./-]+))?$")
"""`organisation/model`, or `organisation/model/FILE.safetensors`, each with a revision or without."""


def find_added(key: str, place: str, names: Sequence[str]) -> FilePath:
    """A file of the setting `key`.  names: what it may be called where `place` is a folder, or a name on the hub.

    Raises UserError where there is none, it is a pickle, or a folder holds several.
    """
    path = FilePath(place).expanduser()
    if path.is_file():
        return _checked(key, path)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
        named = [file for file in found if file.name in names] or found
        if len(named) == 1:
            return named[0]
        if found:
            raise UserError(f"{key}: {place}: holds {', '.join(file.name for file in found[:5])}; name the file")
        pickled = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        return _checked(key, pickled) if pickled else _missing(key, place)
    on_hub = ON_HUB.match(place)
    if on_hub is None or FilePath(place.partition("/")[0]).exists():
        return _missing(key, place)
    if not on_hub["file"] and not names:
        raise UserError(f"{key}: {place}: name its file: {place}/FILE.safetensors")
    return fetch_file(on_hub["repo"], (on_hub["file"] or f"/{names[0]}")[1:], on_hub["revision"])


def _checked(key: str, file: FilePath) -> FilePath:
    if file.suffix in PICKLES:
        raise UserError(
            f"{key}: {file}: a pickle ({file.suffix}), which may run code and is not opened; convert it to .safetensors"
        )
    if file.suffix != ".safetensors":
        raise UserError(f"{key}: {file}: not a .safetensors file")
    return file


def _missing(key: str, place: str) -> FilePath:
    raise UserError(f"{key}: {place}: no such file; give a .safetensors file, or organisation/model/FILE.safetensors")
