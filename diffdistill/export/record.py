"""diffdistill.json in an exported folder: what it is, so that others of our commands know how to use it."""

import json
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field

from diffdistill.checkpoint import write_text_atomically
from diffdistill.config import dump, validate
from diffdistill.sampling import AnySampler
from diffdistill.schema import UserError, schema

RECORD = "diffdistill.json"
Kind = Literal["stock", "self-contained", "lora", "kohya"]


@schema
class ExportRecord:
    """What a folder is.

    pipeline: the class that loads it.  call: how that is called.  sampler: the same steps as ours.  base: the pipeline
    that LoRA's file goes over, with which scheduler.  teacher: what the student was distilled from, and
    teacher_guidance: under which scale.
    """

    format: Literal[1] = 1
    version: str
    kind: Kind
    pipeline: str
    call: dict[Annotated[str, Field(min_length=1)], Any]
    sampler: AnySampler
    base: str | None = None
    scheduler: str | None = None
    teacher: str | None = None
    teacher_guidance: float = 1.0

    def write(self, folder: FilePath) -> None:
        write_text_atomically(folder / RECORD, json.dumps(dump(self), indent=1) + "\n")


def read_record(folder: FilePath) -> ExportRecord | None:
    """The record of a folder, None if it is no exported one. Raises UserError if it is damaged."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    return validate(ExportRecord, found, origin=str(file))
