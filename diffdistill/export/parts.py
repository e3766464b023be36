"""What an exported folder takes over from the teacher's pipeline as it is: its other parts, and its licence."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

from diffdistill.models.teachers import Pipeline
from diffdistill.models.teachers.pipeline import read_json
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_text_atomically

COPIED = (".json", ".txt", ".model", ".safetensors")
"""Endings of files that a pipeline's parts are made of. Pickles are left behind."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_parts(source: Pipeline, folder: FilePath, names: Iterable[str]) -> None:
    """Copy these parts of a pipeline, each a folder of its own, and the files of its licence.

    Raises UserError if a part has no weights that can be copied.
    """
    for name in names:
        _copy_part(source.folder / name, folder / name)
    for pattern in LICENCES:
        for file in source.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def other_parts(source: Pipeline) -> list[str]:
    """All parts that the pipeline's index names and its folder holds, but for the network and the scheduler."""
    found = (part.name for part in source.folder.iterdir() if part.is_dir() and source.index.get(part.name))
    return sorted(name for name in found if name not in (source.family.network, "scheduler"))


def _copy_part(part: FilePath, target: FilePath) -> None:
    """Weights of a variant ("fp16") are copied where there are no others, under the name without it."""
    target.mkdir(parents=True, exist_ok=True)
    files = [file for file in sorted(part.rglob("*")) if file.is_file() and file.name.endswith(COPIED)]
    names = {file.name for file in files}
    for file in files:
        plain = file.name.replace(".fp16.", ".")
        if plain != file.name and plain in names:
            continue
        if plain != file.name and "-of-" in file.name:
            raise UserError(f"{part}: weights in half precision in several files are not copied; give it them in full")
        place = target / file.relative_to(part).with_name(plain)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        if place.name == "config.json":
            _say_float32(place)
    pickles = [file.name for file in part.glob("*.bin")]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{part}: its weights are a pickle, {pickles[0]}, which is neither read nor copied")


def _say_float32(file: FilePath) -> None:
    """Have transformers load a part in float32, as diffusers loads all others where it is told no dtype.

    It takes what config.json names, and else what the weights are in: half precision, for many published encoders.
    """
    config = read_json(file)
    if "_class_name" not in config:  # diffusers' configs have it
        write_text_atomically(file, json.dumps(_with_float32(config) | {"dtype": "float32"}, indent=2) + "\n")


def _with_float32(config: dict[str, Any]) -> dict[str, Any]:
    """The same with that dtype wherever it names one, those of its parts included."""
    made = {name: _with_float32(value) if isinstance(value, dict) else value for name, value in config.items()}
    named = made.pop("torch_dtype", None) or made.get("dtype")
    return made | ({"dtype": "float32"} if named else {})
