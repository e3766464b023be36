"""diffdistill.json in an exported folder: what it is, so that others of our commands know how to use it."""

import json
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field

from diffdistill.diffusion.sampling import AnySampler
from diffdistill.settings.limits import MAX_CLASSES
from diffdistill.settings.numbers import Classes, Number
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.values import dump, validate
from diffdistill.storage.atomic import write_text_atomically

RECORD = "diffdistill.json"
Kind = Literal["stock", "self-contained", "lora", "kohya"]


@schema
class ExportRecord:
    """What a folder is.

    pipeline: the class that loads it.  call: how that is called.  sampler: the same steps as ours.  base: the pipeline
    that LoRA's file goes over, with which scheduler.  absent: the parts that the class is loaded without.
    own_pipeline: the module of a class of pipeline that a stock folder holds as well.  teacher: what the student was
    distilled from, and teacher_guidance: under which scale.  class_names: of the classes, by number.  classes: that it
    was trained on; empty for all. What there is none of is not written.
    """

    format: Literal[1] = 1
    version: str
    kind: Kind
    pipeline: str
    call: dict[Annotated[str, Field(min_length=1)], Any]
    sampler: AnySampler
    base: str | None = None
    scheduler: str | None = None
    absent: tuple[str, ...] = ()
    own_pipeline: str | None = None
    teacher: str | None = None
    teacher_guidance: Number = 1.0
    class_names: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = ()
    classes: Annotated[tuple[Classes, ...], Field(max_length=MAX_CLASSES)] = ()

    @property
    def places(self) -> dict[str, str | None]:
        return {"base": self.base, "teacher": self.teacher}

    def write(self, folder: FilePath) -> None:
        """As JSON."""
        places = {name: place and without_home(place) for name, place in self.places.items()}
        told = dump(self) | places
        for name in ("class_names", "classes", "absent", "own_pipeline"):
            told = told if told[name] else {key: value for key, value in told.items() if key != name}
        write_text_atomically(folder / RECORD, json.dumps(told, indent=1) + "\n")


def without_home(place: str) -> str:
    """A path below the user's home as ~/..., so that an uploaded folder does not tell who the user is."""
    home = f"{FilePath.home()}/"
    return f"~/{place.removeprefix(home)}" if place.startswith(home) else place


def read_record(folder: FilePath) -> ExportRecord | None:
    """The record of a folder, None if it is no exported one. Raises UserError if it is damaged."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        found = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    record = validate(ExportRecord, found, origin=str(file))
    places = {name: place and str(FilePath(place).expanduser()) for name, place in record.places.items()}
    return replace(record, **places)  # type: ignore[arg-type]


def guidance_of(method: dict[str, Any]) -> float:
    """The scale that a method distils, of its config; the middle of a range; 1 where there is none."""
    found = method.get("guidance", method.get("base", {}).get("guidance", 1.0))
    low, high = found if isinstance(found, list) else (found, found)
    return (float(low) + float(high)) / 2 if isinstance(low, int | float) else 1.0
