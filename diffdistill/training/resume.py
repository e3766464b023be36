"""From which checkpoint a run goes on, and whether it is still the same run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import Any
from zlib import crc32

from diffdistill.data.classes import class_names_of, same_names, told_classes
from diffdistill.data.source import ImageSource
from diffdistill.distributed.processes import Processes
from diffdistill.models.composed import AnyTeacher, ComposedTeacher
from diffdistill.models.given import is_given
from diffdistill.models.load import find_checkpoint
from diffdistill.models.places import SHA256, content_of, find_again, is_there
from diffdistill.models.teachers.compose import place_of
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import differences, dump
from diffdistill.storage.checkpoint import MANIFEST, check_checkpoint, list_checkpoints, read_state
from diffdistill.training.config import RunConfig, find_config, packaged_configs, parse_config
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
    "text_encoder",
    "data.kind",
    "data.key",
)  # the content must stay


FREE_GROUPS = ("run", "health", "trackers", "eval")


FREE_TO_CHANGE = (
    *PLACES,
    *(f"train.{name}" for name in ("steps", "device", "num_threads", "on_nonfinite", "max_skips", *PIECES, *LOGGING)),
    "prompts.encoder_dtype",  # where it makes other embeddings, the data has another key
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
            raise UserError(f"{folder}: holds a run already; add --resume to continue it, or choose another `run`")
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
    manifest = start / MANIFEST if start else None
    content = manifest.read_bytes() if manifest and manifest.is_file() else b""
    if not processes.agree(crc32(start.name.encode() + content) if start else -1):
        seen = f"{start.name} ({crc32(content):08x})" if start else "no checkpoint"
        raise UserError(f"--resume: the processes see different checkpoints; the newest for this one is {seen}")
    if start is None:
        return None
    processes.on_main_first(lambda: check_checkpoint(start))
    return read_state(start)


@dataclass(frozen=True)
class Teachers:
    """Places of a run's teachers: the first, and the others by name."""

    teacher: str | None
    teachers: Mapping[str, str]


def find_teachers(
    config: RunConfig, start: FilePath | None, state: Mapping[str, Any] | None, *, allow_changes: bool
) -> Teachers:
    """Where the teachers are: of a resumed run those that it had, in the order in which it had them, at the places that
    the config gives now if they are others, else where the checkpoint says.

    allow_changes: those of other weights are taken, which is said.  Raises UserError where there is none.
    """
    places = {name: place_of(teacher) for name, teacher in config.teachers.items()}
    first = None if config.teacher is None else place_of(config.teacher)
    if start is None or state is None:
        return Teachers(first, places)

    def find(key: str, before: object, setting: AnyTeacher | None, now: str | None) -> str:
        if is_given(before) or is_given(now):
            return _same_object(key, before, now)
        is_same = (dump(setting) if isinstance(setting, ComposedTeacher) else setting) == before
        return _find_teacher(key, start, state, given=None if is_same else now, allow_changes=allow_changes)

    before, known = state["config"], state.get("teachers", {})
    old = before.get("teachers") or {}
    places = {name: places[name] for name in dict.fromkeys([*known, *places]) if name in places}
    return Teachers(
        find("teacher", before.get("teacher"), config.teacher, first) if state["teacher"] else None,
        {
            name: find(f"teachers.{name}", old.get(name), config.teachers[name], now) if name in known else now
            for name, now in places.items()
        },
    )


def check_teachers_are_there(config: RunConfig, found: Teachers) -> None:
    """Raise UserError with the key and what would make it, where a teacher's place is nothing yet."""
    places = {"teacher": found.teacher, **{f"teachers.{name}": place for name, place in found.teachers.items()}}
    for key, place in places.items():
        if place is None or is_given(place) or FilePath(place).expanduser().exists() or is_there(place):
            continue
        packaged = next((name for name in packaged_configs() if name.startswith(f"pretrain/{config.data.name}")), None)
        makes = f"`diffdistill pretrain {packaged or 'CONFIG'} run={place}` makes one"
        if packaged is None:
            makes += f", import-edm or import-sit with --out {place} makes it of a published file"
        raise UserError(
            f"{key} = {place!r}: no such folder; {makes}, or name another with {key}=PATH (a run, a "
            "diffusers pipeline, or its name on the hub)"
        )


def _same_object(key: str, before: object, now: str | None) -> str:
    if now is None or before != now:
        raise UserError(
            f"{key}: the run started with {before!r}, and now has {now!r}; an object is identified by its weights; "
            "pass the same again, as in dd.Trainer(config, teacher=..., resume=True)"
        )
    return now


def _find_teacher(
    key: str, start: FilePath, state: Mapping[str, Any], *, given: str | None, allow_changes: bool
) -> str:
    found = find_again(key, start, state, given=given)
    named = f"{key} = {given!r}" if given else f"{start}: {key}"
    if found.place is None:
        listed = ", ".join(found.looked)
        raise UserError(f"{named}: no such folder (looked for {listed}); pass its path: {key}=PATH")
    if found.is_same is False:
        said = f"{named}: {found.place} holds other weights than when this run began"
        if not allow_changes:
            raise UserError(f"{said}; pass the path of those, {key}=PATH, or use --allow-changes")
        say(said)
    return found.place


def find_initial(config: RunConfig, start: FilePath | None) -> str | None:
    """Where the run is that this one's players start from. A resumed run takes no weights from there: where it is gone,
    the checkpoint says as well how they are built.

    Raises UserError with the key and what would make it, where a new run's is nothing yet.
    """
    place = config.init
    if place is None or is_there(place):
        return place
    if start:
        return str(start)
    known = (
        name for name in packaged_configs() if f"\nrun: {place}\n" in find_config(name).read_text(encoding="utf-8")
    )
    makes = f"`diffdistill train {next(known, 'CONFIG')} run={place}` makes one"
    raise UserError(f"init = {place!r}: no such folder; {makes}, or name another run with init=PATH")


def contents_of(
    sources: Teachers, initial: str | None, start: FilePath | None, state: Mapping[str, Any] | None
) -> dict[str, str]:
    """SHA-256 of the weights that a run started from, by the settings that name them."""
    known = dict((state or {}).get(SHA256) or {})
    if sources.teacher:
        known["teacher"] = content_of(sources.teacher)
    known |= {f"teachers.{name}": content_of(place) for name, place in sources.teachers.items()}
    if initial and initial != str(start):
        known["init"] = content_of(find_checkpoint(FilePath(initial)))
    return known


def check_unchanged(
    config: RunConfig,
    source: ImageSource,
    state: Mapping[str, Any],
    *,
    origin: FilePath | None,
    allow_changes: bool,
    sha256: Mapping[str, str] | None = None,
) -> None:
    """Raise UserError, with the differences, if a resumed run is not the one that the checkpoint is of.

    allow_changes: settings may have changed, which is said; images and labels may not.  sha256: of the weights that the
    run starts from, by the settings that name them; where they are as before, another place is no change.
    """
    known = state.get(SHA256) or {}
    moved = {key for key, now in (sha256 or {}).items() if known.get(key) == now}
    before = parse_config(state["config"], origin=str(origin))  # with defaults for newer settings
    changed = [
        f"{key}: was {old!r}, now {new!r}"
        for key, old, new in differences(dump(before), dump(config))
        if key not in FREE_TO_CHANGE and key not in moved and key.partition(".")[0] not in FREE_GROUPS
    ]
    if changed:
        said = f"{origin}: the config has changed since:\n  " + "\n  ".join(changed)
        if not allow_changes:
            raise UserError(f"{said}\nchange it back, or use --allow-changes")
        say(said)
    names = tuple(state.get("model", {}).get("class_names", ()))
    if not same_names(names, class_names_of(source)):
        told = " and ".join(told_classes(range(len(known)), known) for known in (names, class_names_of(source)))
        raise UserError(f"{origin}: the class names under `data` differ from those at the start of the run: {told}")
    if state.get("data", source.key) != source.key:
        raise UserError(f"{origin}: the images or labels under `data` differ from those at the start of the run")
