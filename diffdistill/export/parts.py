"""What an exported folder takes over from the teacher's pipeline as it is: its other parts, and its licence."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

from diffdistill.models.teachers import Pipeline
from diffdistill.models.teachers.compose import MADE_OF
from diffdistill.models.teachers.pipeline import read_json, refuse_quantised
from diffdistill.models.teachers.variants import variant_in, variant_of
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_text_atomically

COPIED = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""Endings of files that a pipeline's parts are made of. Pickles are left behind."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_parts(source: Pipeline, folder: FilePath, names: Iterable[str]) -> None:
    """Copy these parts of a pipeline, each a folder of its own, and the files of its licence.

    Raises UserError, before anything is written, if a part has no weights that can be copied.
    """
    names = list(names)
    check_parts(source, names)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "scheduler":  # of the oldest pipelines beside model_index.json
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.scheduler_file, folder / name / source.scheduler_file.name)
        else:
            _copy_part(source.folder / name, folder / name)
    if (source.folder / MADE_OF).is_file():
        shutil.copyfile(source.folder / MADE_OF, folder / MADE_OF)
    for pattern in LICENCES:
        for file in source.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def other_parts(source: Pipeline) -> list[str]:
    """The parts that its family uses and the pipeline has, but for the network. Others, such as a safety checker, are
    left out."""
    return sorted(name for name in source.family.parts if source.class_of(name) and (source.folder / name).is_dir())


def check_parts(source: Pipeline, names: Iterable[str]) -> None:
    """Raise UserError if a part has no weights that can be copied, or quantised ones."""
    for name in names:
        part = source.folder / name
        if (part / "config.json").is_file():
            refuse_quantised(read_json(part / "config.json"), part / "config.json")
        pickles = sorted(file.name for file in part.glob("*.bin"))
        if pickles and not any(part.glob("*.safetensors")):
            raise UserError(f"{part}: its weights are a pickle, {pickles[0]}, which is not opened or copied")


def _copy_part(part: FilePath, target: FilePath) -> None:
    """Weights of a variant ("fp16") are copied where there are no others, under the name without it."""
    target.mkdir(parents=True, exist_ok=True)
    variant = variant_of(part)
    for file in sorted(part.rglob("*")):
        name = _plain_name(file.name, variant)
        if not file.is_file() or not file.name.endswith(COPIED) or name is None:
            continue
        place = target / file.relative_to(part).with_name(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        if place.name == "config.json":
            _say_float32(place)
        elif variant and place.name.endswith(".safetensors.index.json"):
            _rename_in_index(place, variant)


def _plain_name(name: str, variant: str | None) -> str | None:
    """A file's name without the variant; None for weights, and the index of weights, of another variant."""
    _, is_index, ending = name.partition(".safetensors.index")
    found = ending.removesuffix(".json").removeprefix(".") if is_index else ""
    found = found or (variant_in(name.replace(".index.json", "")) if ".safetensors" in name else "")
    if found != (variant or ""):
        return None if ".safetensors" in name else name
    return name.replace(f".{variant}", "") if variant else name


def _rename_in_index(file: FilePath, variant: str) -> None:
    """Have an index of weights in several files name them without the variant."""
    index = read_json(file)
    names = {key: str(value).replace(f".{variant}", "") for key, value in index.get("weight_map", {}).items()}
    write_text_atomically(file, json.dumps(index | {"weight_map": names}, indent=2) + "\n")


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
