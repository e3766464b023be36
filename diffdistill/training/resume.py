"""From which checkpoint a run goes on, and whether it is still the same run."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path as FilePath
from typing import Any
from zlib import crc32

from diffdistill.data.source import ImageSource
from diffdistill.distributed.processes import Processes
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import differences, dump
from diffdistill.storage.checkpoint import check_checkpoint, list_checkpoints, read_state
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.speed.options import SpeedConfig

PIECES = ("micro_batch_size", "on_out_of_memory")


LOGGING = ("log_every", "preview_every", "checkpoint_every", "keep_checkpoints")


PLACES = (
    "data.cache",
    "data.path",
    "data.root",
    "data.download",
    "data.labels_file",
    "data.captions_file",
)  # the content must stay


FREE_GROUPS = ("run", "health", "trackers", "eval")


FREE_TO_CHANGE = (
    *PLACES,
    *(f"train.{name}" for name in ("steps", "device", "num_threads", "on_nonfinite", "max_skips", *PIECES, *LOGGING)),
    *(f"speed.{setting.name}" for setting in fields(SpeedConfig) if setting.name != "teacher_dtype"),
)
"""Settings that a resumed run may change, beside whole groups."""


def find_start(folder: FilePath, resume: bool | str) -> FilePath | None:
    """The checkpoint of a run's folder to go on from, or None for a new run.

    resume: False, True (the newest checkpoint) or a checkpoint's name.  Raises UserError where that makes no sense.
    """
    found = list_checkpoints(folder / "checkpoints")
    if not resume:
        if found:
            raise UserError(f"{folder}: holds a run already; add --resume to go on, or name another `run`")
        return None
    if isinstance(resume, str):
        target = folder / "checkpoints" / resume
        if FilePath(resume).name != resume or resume == ".." or not target.is_dir():
            names = ", ".join(c.name for c in found) or "none"
            raise UserError(f"{target.parent}: no checkpoint {resume!r}; there are: {names}")
        return target
    return found[-1] if found else None


def read_start(start: FilePath | None, processes: Processes) -> dict[str, Any] | None:
    """What the checkpoint to go on from says beside tensors, once the first process has found it whole.

    Raises UserError where the processes see different ones: each would train on from its own.
    """
    if not processes.agree(crc32(start.name.encode()) if start else -1):
        seen = start.name if start else "no checkpoint"
        raise UserError(f"--resume: not all processes see the same checkpoint; this one sees {seen} as the newest")
    if start is None:
        return None
    processes.on_main_first(lambda: check_checkpoint(start))
    return read_state(start)


def check_unchanged(
    config: RunConfig, source: ImageSource, state: Mapping[str, Any], *, origin: FilePath | None, allow_changes: bool
) -> None:
    """Raise UserError, with the differences, if a resumed run is not the one that the checkpoint is of.

    allow_changes: settings may have changed, which is said; images and labels may not.
    """
    before = parse_config(state["config"], origin=str(origin))  # with defaults for newer settings
    changed = [
        f"{key}: was {old!r}, now {new!r}"
        for key, old, new in differences(dump(before), dump(config))
        if key not in FREE_TO_CHANGE and key.partition(".")[0] not in FREE_GROUPS
    ]
    if changed:
        said = f"{origin}: the config has changed since:\n  " + "\n  ".join(changed)
        if not allow_changes:
            raise UserError(f"{said}\nchange it back, or go on with --allow-changes")
        say(said)
    if state.get("data", source.key) != source.key:
        raise UserError(f"{origin}: the images or labels under `data` are not those that the run began with")
