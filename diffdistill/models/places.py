"""Where the models are that a checkpoint names: it holds paths of the day, and of the working folder, of its writing.

Each is looked for as it is said, then from the run's folder, then where the run's config.yaml says now. Where the
checkpoint says what the weights were, they decide, not the name.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from diffdistill.data import cache as kept
from diffdistill.data.shards import files_key
from diffdistill.models.composed import ComposedTeacher
from diffdistill.models.given import is_given
from diffdistill.models.spec import ModelSpec
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import read_yaml, validate
from diffdistill.storage.checkpoint import BEST, MANIFEST, STATE, find_best, list_checkpoints, read_hashes, read_state

CHECKPOINTS = "checkpoints"
SHA256 = "sha256"  # in a checkpoint's state: of what its other models' weights were, by setting


@dataclass(frozen=True)
class Found:
    """place: where a model is now, or None.  is_same: whether its weights are those that the checkpoint says; None
    where it says none, as older ones.  looked: all places that were tried."""

    place: str | None
    is_same: bool | None = None
    looked: list[str] = field(default_factory=list)


def find_again(key: str, checkpoint: FilePath, state: Mapping[str, Any], *, given: str | None = None) -> Found:
    """The model that a checkpoint's state names under `key`: "teacher", or "teachers.<name>".

    given: where it is now, by the user, who alone is then believed.
    """
    said, expected = str(_under(key, state)), (state.get(SHA256) or {}).get(key)
    starts = [given] if given else [*_places(said, checkpoint, state), *_told_now(key, checkpoint, state)]
    starts += [] if given else _made_again(key, said, state)
    looked = list(dict.fromkeys(place for start in starts for place in _checkpoints_of(start, said)))
    there = [place for place in looked if is_there(place)]
    if expected is None and not given:  # then the name is all there is to go by
        there = [place for place in there if FilePath(place).name == FilePath(said).name]
    if not there:
        return Found(None, looked=list(dict.fromkeys(starts)))
    if expected is None:
        return Found(there[0], looked=looked)
    same = next((place for place in there if _content_or_none(place) == expected), None)
    return Found(same or there[0], is_same=same is not None, looked=looked)


def content_of(place: str | FilePath) -> str:
    """SHA-256 of a model's weights: of a checkpoint by its manifest, which vouches for them; of a pipeline by the files
    of its network; of an object its place, which is of its weights. Raises UserError."""
    from diffdistill.models.teachers import is_pipeline, open_pipeline
    from diffdistill.models.teachers.image_size import size_files

    if is_pipeline(place):
        pipeline = open_pipeline(place)
        return files_key([*pipeline.network_files, *size_files(pipeline.folder)], root=kept.cache_folder(None))
    if is_given(place):
        return str(place)
    target = FilePath(place)
    hashes, base = read_hashes(target), (read_state(target).get("model") or {}).get("base")
    groups = {name: name.partition("/")[0].partition(".")[0] for name in hashes}
    group = "ema" if "ema" in groups.values() else "players"
    weights = {name: sha256 for name, sha256 in sorted(hashes.items()) if groups[name] == group}
    return hashlib.sha256(json.dumps([weights, base]).encode()).hexdigest()


def settle_places(spec: ModelSpec, checkpoint: FilePath, state: Mapping[str, Any]) -> ModelSpec:
    """A checkpoint's description of its model, with its pipeline and its text encoder where they are now."""
    now: dict[str, Any] = {}
    for name in ("pipeline", "text_encoder"):
        said = getattr(spec, name)
        if said is not None and not FilePath(said).expanduser().exists():
            places = [*_places(said, checkpoint, state)]
            places += _made_again("teacher", said, state) if said == state.get("teacher") else []
            now[name] = next((at for at in places if FilePath(at).exists()), said)
    return replace(spec, **now) if now else spec


def is_there(place: str) -> bool:
    """Whether a place is a folder, or may be a pipeline's name on the hub."""
    from diffdistill.models.teachers import is_pipeline

    return FilePath(place).is_dir() or is_pipeline(place)


def run_of(checkpoint: FilePath) -> FilePath:
    """The folder of the run that a checkpoint is of."""
    checkpoint = FilePath(os.path.abspath(checkpoint))
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint


def _places(said: str, checkpoint: FilePath, state: Mapping[str, Any]) -> Iterator[str]:
    """A path as it is said; and from the run's folder, as it lay when the run was written."""
    yield said
    run = (state.get("config") or {}).get("run")
    if isinstance(run, str) and FilePath(run).is_absolute() == FilePath(said).is_absolute():
        yield os.path.normpath(run_of(checkpoint) / os.path.relpath(said, run))


def _made_again(key: str, said: str, state: Mapping[str, Any]) -> list[str]:
    """The folder of a teacher that was made of several files, where the cache has lost it: from the same files."""
    from diffdistill.models.teachers.compose import place_of

    settings = _under(key, state.get("config") or {})
    if not isinstance(settings, Mapping) or FilePath(said).is_dir():
        return []
    try:
        return [place_of(validate(ComposedTeacher, settings, origin=key, is_saved=True))]
    except UserError as error:
        say(f"{said}: the teacher that was composed of several files is missing, and cannot be composed again: {error}")
        return []


def _told_now(key: str, checkpoint: FilePath, state: Mapping[str, Any]) -> Iterable[str]:
    """What the run's config.yaml says, which whoever moves things may edit."""
    file = run_of(checkpoint) / "config.yaml"
    try:
        told = _under(key, read_yaml(file)) if file.is_file() else None
    except UserError:
        return ()
    return (told, *_places(told, checkpoint, state)) if isinstance(told, str) else ()


def _under(key: str, settings: Mapping[str, Any]) -> Any:
    """What stands at a dotted place; None for nothing."""
    first, _, rest = key.partition(".")
    value = settings.get(first)
    return _under(rest, value) if rest and isinstance(value, Mapping) else None if rest else value


def _checkpoints_of(place: str, said: str) -> Iterator[str]:
    """The checkpoints that a place may mean, the likeliest first: that of the same step; the newest; any other."""
    folder = FilePath(place)
    if folder.name == BEST:
        folder = find_best(folder.parent) or folder
    if (folder / STATE).exists() or (folder / MANIFEST).exists() or folder.parent.name == CHECKPOINTS:
        yield str(folder)
        folder = folder.parent
    elif (folder / CHECKPOINTS).is_dir():
        folder /= CHECKPOINTS
    else:
        yield place
        return
    found = list_checkpoints(folder)
    yield from (str(one) for one in found if one.name == FilePath(said).name)
    yield from (str(one) for one in reversed(found))


def _content_or_none(place: str) -> str | None:
    try:
        return content_of(place)
    except UserError:
        return None
