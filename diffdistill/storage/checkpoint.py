"""Checkpoints that are whole or absent: safetensors and JSON, hashed, renamed into place, never pickled.

A checkpoint is a folder `step-00000500` with some `<group>.safetensors`, `state.json` and `manifest.json` (the
SHA-256 of each of the others, and of itself). Where processes share out the weights, a group is a folder of such files.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.distributed.processes import Processes
from diffdistill.distributed.sharded import is_sharded, sharded_as
from diffdistill.settings.links import refuse_link
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import printable
from diffdistill.storage.atomic import sync, write_synced, write_tensors
from diffdistill.storage.finite import find_dead, name_some
from diffdistill.storage.shard_files import check_whole, read_shards, write_shards

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}[0-9]{{8,}}")
"""The names that are ours; of any other folder nothing is read, counted or removed."""
WRITING = ".writing-"
SUFFIX = ".safetensors"
BEST = "best"
WRITERS = 4  # files that are written at once
STATE_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **{"student": str, "teacher": (str, type(None)), "data": str},
    **{"model": dict, "config": dict, "skips": dict, "teachers": dict, "sha256": dict},
}


class CheckpointError(UserError):
    """A checkpoint that is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """step: iterations done.  tensors: by group, then by name.  state: counters, configs."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(folder: FilePath, checkpoint: Checkpoint, *, keep: int | None, best: str | None = None) -> FilePath:
    """Write into a temporary folder, fsync, rename; then drop all but the newest `keep`, and any later step's: a run
    that went back to an earlier checkpoint has left those behind.

    keep: None drops no earlier one.  best: the name of a checkpoint, this one or an earlier one, that stays as well;
    `best` leads to it.
    Returns the checkpoint's folder. Raises OSError (the disk is full, say) with nothing half written left behind
    and all earlier checkpoints intact.
    """
    with being_written(folder, checkpoint.step) as temporary:
        hashes = _write_groups(temporary, checkpoint.tensors)
        return seal_checkpoint(temporary, checkpoint.state, keep=keep, best=best, known=hashes)


def _write_groups(folder: FilePath, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write a file for each group, some at once, as a disk syncs several sooner than one by one. Returns hashes."""
    with ThreadPoolExecutor(WRITERS) as threads:
        written = {
            f"{group}{SUFFIX}": threads.submit(write_tensors, folder / f"{group}{SUFFIX}", tensors)
            for group, tensors in groups.items()
        }
    return {name: future.result() for name, future in written.items()}


@contextmanager
def being_written(folder: FilePath, step: int) -> Iterator[FilePath]:
    """A temporary place for a checkpoint's groups, which `seal_checkpoint` makes a checkpoint; gone if that fails."""
    refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = writing_place(folder, step)
    clear_temporary(folder)
    try:
        temporary.mkdir()
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def writing_place(folder: FilePath, step: int) -> FilePath:
    """Where the checkpoint of a step is written."""
    return folder / f"{WRITING}{PREFIX}{step:08d}"


def seal_checkpoint(
    temporary: FilePath,
    state: Mapping[str, Any],
    *,
    keep: int | None,
    best: str | None,
    known: Mapping[str, str] | None = None,
) -> FilePath:
    """Give what lies in the temporary place its state and its hashes, and rename it; then drop older ones, and later
    ones, as `save_checkpoint` says.

    known: SHA-256 of files, by name, as they were hashed when they were written; others are read.
    Returns the checkpoint's folder.
    """
    folder, target = temporary.parent, temporary.with_name(temporary.name.removeprefix(WRITING))
    step = int(target.name.removeprefix(PREFIX))
    write_synced(temporary / STATE, json.dumps({**state, "step": step}, indent=1))
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    names = {file.relative_to(temporary).as_posix(): file for file in files}
    hashes = {name: (known or {}).get(name) or _hash(file) for name, file in names.items()}
    write_synced(temporary / MANIFEST, json.dumps({"files": hashes, "self": _hash_text(json.dumps(hashes))}))
    for place in {file.parent for file in files}:
        sync(place)
    if target.exists():  # the same step, written again after a resume from an earlier one
        _remove(target)
    temporary.rename(target)
    sync(folder)
    found = list_checkpoints(folder)
    end = found.index(target) + 1
    older = found[: max(0, end - keep)] if keep else []
    for other in older + found[end:]:
        if other.name != best:
            _remove(other)
    _point_to_best(folder, best)
    return target


def list_checkpoints(folder: FilePath) -> list[FilePath]:
    """The checkpoints in a folder, by their steps, damaged ones included. What has another name is no checkpoint of
    ours: a copy, say, that somebody keeps; nor is a link."""
    if not folder.is_dir():
        return []
    found = (place for place in folder.iterdir() if NAME.fullmatch(place.name) and not place.is_symlink())
    return sorted((place for place in found if place.is_dir()), key=step_of)


def step_of(checkpoint: FilePath) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix(PREFIX))


def load_checkpoint(
    target: FilePath, *, groups: tuple[str, ...] | None = None, device: str = "cpu", is_checked: bool = False
) -> Checkpoint:
    """Read a checkpoint after checking every hash. groups: only these tensors (default: all).  is_checked: the hashes
    have been.

    Raises CheckpointError naming the damaged file and the newest whole checkpoint before it.
    """
    if not is_checked:
        check_checkpoint(target)
    state = read_state(target)
    wanted = [group for group in list_groups(target) if groups is None or group in groups]
    return Checkpoint(
        step=state["step"], tensors={group: read_group(target, group, device=device) for group in wanted}, state=state
    )


def list_groups(target: FilePath) -> list[str]:
    """The groups of tensors that a whole checkpoint has."""
    names = [name for name in read_hashes(target) if name != STATE]
    return list(dict.fromkeys(name.partition("/")[0].removesuffix(SUFFIX) for name in names))


def read_hashes(target: FilePath) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by their names in its folder, as its manifest says. Raises CheckpointError."""
    try:
        return {str(name): str(sha256) for name, sha256 in _read_json(target / MANIFEST)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{target / MANIFEST}: cannot be read: {error}") from None


def check_checkpoint(target: FilePath) -> None:
    """Raise CheckpointError naming what is damaged and the newest whole checkpoint before it."""
    fault = find_damage(target)
    if fault:
        whole = [c for c in _before(target) if not find_damage(c)]
        offer = f"; the newest whole one before it is {whole[-1]}" if whole else "; there is no whole one before it"
        raise CheckpointError(f"{target}: damaged: {fault}{offer}")


def _before(target: FilePath) -> list[FilePath]:
    found = list_checkpoints(target.parent)
    return found[: found.index(target)] if target in found else []


def read_group(
    target: FilePath, group: str, like: Callable[[str], Tensor | None] = lambda _: None, *, device: str = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a group by name, without a look at hashes.

    like: by name a tensor whose parts the processes hold, if there is one: of a sharded group, each then reads its own
    alone, and all call this together.  Raises CheckpointError if the files make no sense.
    """
    file = target / f"{group}{SUFFIX}"
    if file.exists():
        return read_tensors(file, device)
    try:
        parts = read_shards(target / group, like)
        return {name: tensor if is_sharded(tensor) else tensor.to(device) for name, tensor in parts.items()}
    except UserError as error:
        raise CheckpointError(str(error)) from None


def flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Nested tensors by dotted name: {"fake": {"weight": w}} as {"fake.weight": w}."""
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def select_group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The part of `flatten`'s result that one group gave."""
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], *, origin: str, takes_tensors: bool = False
) -> None:
    """load_state_dict with one readable message.

    takes_tensors: put the tensors themselves in the place of the module's, which may be on the meta device.
    Raises UserError if names or shapes differ, or weights are not finite.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if faults:
        listed = printable("; ".join(sorted(faults)[:3])).replace("\n", "\\n")  # a name may have any
        raise UserError(f"{origin}: the weights are of another architecture: {listed} ({len(faults)} in all)")
    dead = find_dead({name: weights[name] for name, _ in module.named_parameters() if name in weights})
    if dead:
        raise UserError(f"{origin}: its weights are not finite: {name_some(dead)}")
    ready = {name: sharded_as(weights[name].to(tensor.dtype), tensor) for name, tensor in own.items()}
    module.load_state_dict(ready, assign=takes_tensors)


def find_damage(target: FilePath) -> str | None:
    """What is wrong with a checkpoint, or None: every file of the manifest is there, of the right hash."""
    try:
        manifest = _read_json(target / MANIFEST)
        hashes = manifest["files"]
        if manifest["self"] != _hash_text(json.dumps(hashes)):
            return f"{MANIFEST} does not match its own hash"
        for name, expected in hashes.items():
            if not 1 <= len(FilePath(name).parts) <= 2 or {"..", "/"} & set(FilePath(name).parts):
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            if not (target / name).is_file():
                return f"{name} is missing"
            if _hash(target / name) != expected:
                return f"{name} does not match its hash (truncated or changed)"
        for folder in {FilePath(name).parent for name in hashes} - {FilePath()}:  # of which all files are read
            for file in (target / folder).iterdir():
                if f"{folder}/{file.name}" not in hashes:
                    return f"{folder}/{file.name} is not in the {MANIFEST}"
    except FileNotFoundError as error:
        return f"{FilePath(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def clear_temporary(folder: FilePath) -> None:
    """Remove what a killed writer left behind."""
    for leftover in [*folder.glob(f"{WRITING}*"), *folder.glob(".removing-*")] if not folder.is_symlink() else []:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def read_state(target: FilePath) -> dict[str, Any]:
    """state.json, of which the hash fits: its author may still mean harm. Raises CheckpointError."""
    try:
        state = _read_json(target / STATE)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{target / STATE}: cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{target / STATE}: must be an object, not {type(state).__name__}")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise CheckpointError(f"{target / STATE}: step = {str(step)[:40]}: must be a number of iterations")
    for name, kind in STATE_TYPES.items():
        if name in state and not isinstance(state[name], kind):
            raise CheckpointError(f"{target / STATE}: {name} = {str(state[name])[:40]!r}: is of another type")
    return state


def _read_json(file: FilePath) -> Any:
    return read_json(file)


def read_tensors(file: FilePath, device: str) -> dict[str, Tensor]:
    """Tensors of a file. Raises CheckpointError if its header is invalid."""
    try:
        return load_file(file, device=device)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None


def _remove(checkpoint: FilePath) -> None:
    """Out of sight in one step, then off the disk."""
    doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find_best(folder: FilePath) -> FilePath | None:
    """The checkpoint that `best` in a folder of checkpoints leads to, if it is there: a link, or a file that names it
    where links cannot be made."""
    place = folder / BEST
    if place.is_symlink() or place.is_dir():
        return place if place.is_dir() else None
    if not place.is_file():
        return None
    with place.open(encoding="utf-8", errors="replace") as file:
        name = file.read(64).strip()
    return folder / name if NAME.fullmatch(name) and (folder / name).is_dir() else None


def _point_to_best(folder: FilePath, best: str | None) -> None:
    """Let `best` lead to the best checkpoint; where it leads nowhere it goes. A folder of that name is not ours."""
    place = folder / BEST
    if place.is_dir() and not place.is_symlink():
        return
    if best and (folder / best).is_dir():
        new = folder / f"{WRITING}{BEST}-link"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(best)
        except (OSError, NotImplementedError):  # Windows without the right to, or a file system without links
            write_synced(new, best)
        new.replace(place)
    elif (place.is_symlink() or place.is_file()) and not find_best(folder):
        place.unlink()


def _hash(file: FilePath) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_sharded(
    processes: Processes, folder: FilePath, checkpoint: Checkpoint, *, keep: int | None, best: str | None
) -> None:
    """As `save_checkpoint`, but each process writes its own parts of the tensors; all call it.

    Raises OSError, or TrainingError, in all where one cannot.
    """
    temporary = writing_place(folder, checkpoint.step)
    with ExitStack() as opened:
        processes.on_main_first(lambda: opened.enter_context(being_written(folder, checkpoint.step)))
        for group, tensors in checkpoint.tensors.items():
            if tensors:
                write_shards(temporary / group, tensors)
                processes.on_main_first(partial(check_whole, temporary / group, tensors))
            else:
                processes.on_main_first(partial(write_tensors, temporary / f"{group}{SUFFIX}", tensors))
        processes.on_main_first(lambda: seal_checkpoint(temporary, checkpoint.state, keep=keep, best=best))
