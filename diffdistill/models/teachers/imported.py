"""A network that was read from somebody else's file, as the folder of a run, which `load_model` reads."""

import hashlib
from dataclasses import replace
from pathlib import Path as FilePath

from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.storage.checkpoint import Checkpoint, flatten, list_checkpoints, save_checkpoint


def refuse_taken(out: FilePath) -> None:
    """Raise UserError if the folder holds a run."""
    if list_checkpoints(out / "checkpoints"):
        raise UserError(f"--out {out}: holds a run already; name a new folder")


def save_imported(model: TrainedModel, file: FilePath, out: FilePath) -> TrainedModel:
    """Write the model, read from `file`, as a checkpoint in `out`. Raises UserError if that cannot be written."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    state = {
        "format": 1,
        "student": "teacher",
        "model": dump(model.spec),
        "config": {},
        "teacher": None,
        "imported": {"file": file.name, "sha256": digest},
    }
    tensors = {"players": flatten({"teacher": model.denoiser.state_dict()})}
    try:
        source = save_checkpoint(out / "checkpoints", Checkpoint(0, tensors, state), keep=1)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    return replace(model, source=source)
