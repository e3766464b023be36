"""Denoisers on disk: what a checkpoint says about its network, and how a run's weights become a Denoiser."""

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from diffdistill.data.classes import same_names, told_classes
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.router import AnyRouter, ClassRouter, RoutedDenoiser
from diffdistill.models.given import describe_given, is_given, load_given
from diffdistill.models.mistaken import no_run
from diffdistill.models.places import find_again, settle_places
from diffdistill.models.spec import ModelSpec, PlayerKind, TrainedModel
from diffdistill.networks.lora import (
    LoRASettings,
    fingerprint,
    lora_of,
    merge_lora,
    settings_for,
    with_lora,
    without_lora,
)
from diffdistill.networks.qat import on_grid
from diffdistill.settings.limits import MAX_PROCESSES
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.values import dump, validate
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.checkpoint import (
    BEST,
    MANIFEST,
    STATE,
    CheckpointError,
    find_best,
    list_checkpoints,
    list_groups,
    load_checkpoint,
    load_strictly,
    read_state,
    select_group,
)

ROUTER = "router.json"
PLAYERS = "players"  # in a checkpoint's state: what those are that are of another kind than its student


def load_model(
    place: str | FilePath, *, use_ema: bool = True, ema: str | None = None, rounds: bool = True
) -> TrainedModel:
    """The trained network of a run's folder (its newest checkpoint) or of one checkpoint folder; of a diffusers
    pipeline's folder, or its name on the Hugging Face hub; of an object that `give_teacher` keeps; or, from a folder
    that `join_students` wrote, all of its students as one.

    use_ema: the averaged weights where there are some.  ema: the name of one of the run's `more_emas`.
    rounds: whether weights that were trained with `qat` are those of few bits that it computed with.
    Raises UserError if there is none or it is damaged.
    """
    from diffdistill.models.negative_prompts import steer
    from diffdistill.models.teachers import is_pipeline, load_pipeline

    if is_given(place):
        return load_given(place)
    if is_pipeline(place):
        return load_pipeline(place)
    if is_routed(FilePath(place)):
        return _load_students(FilePath(place), use_ema=use_ema, ema=ema)
    target = find_checkpoint(FilePath(place))
    named = f"ema-{ema}" if ema else "ema"
    checkpoint = load_checkpoint(target, groups=("players", named))
    if ema and named not in checkpoint.tensors:
        names = sorted(group.removeprefix("ema-") for group in list_groups(target) if group.startswith("ema-"))
        known = ", ".join(names) or "none"
        raise UserError(f"{target}: no EMA {ema!r}; choose from: {known}")
    spec = _spec_of(checkpoint.state, target)
    if "student" not in checkpoint.state:
        raise UserError(f"{target}/state.json: does not name a student")
    student = f"{checkpoint.state['student']}."
    group = named if (use_ema or ema) and named in checkpoint.tensors else "players"
    weights = {k.removeprefix(student): v for k, v in checkpoint.tensors[group].items() if k.startswith(student)}
    denoiser = spec.build_empty()
    found = lora_of(denoiser)
    if found:
        found.mount(_read_base(spec, checkpoint.state, origin=target).net)
    load_strictly(denoiser, weights, origin=str(target), takes_tensors=True)
    freeze(denoiser)
    if spec.qat and rounds:
        on_grid(denoiser.net, spec.qat)
    steer(denoiser, spec)
    denoiser.run_with(num_threads=_threads_of(checkpoint.state))
    return TrainedModel(denoiser, spec, target)


def describe_model(place: str | FilePath) -> ModelSpec:
    """What `load_model` would load, from text files alone. Raises UserError if there is nothing."""
    from diffdistill.models.teachers import is_pipeline, open_pipeline

    if is_given(place):
        return describe_given(place)
    if is_pipeline(place):
        return open_pipeline(place).spec
    if is_routed(FilePath(place)):
        return _load_students(FilePath(place), use_ema=True, ema=None).spec
    target = find_checkpoint(FilePath(place))
    return _spec_of(read_state(target), target)


def _spec_of(state: Mapping[str, Any], target: FilePath) -> ModelSpec:
    """What a checkpoint's model is."""
    spec = validate(ModelSpec, state.get("model"), origin=f"{target}/state.json", is_saved=True)
    return settle_places(spec, target, state)


def _threads_of(state: Mapping[str, Any]) -> int | None:
    """The CPU threads that the checkpoint's run was trained on, where its config says."""
    train = (state.get("config") or {}).get("train")
    number = train.get("num_threads") if isinstance(train, dict) else None
    return number if type(number) is int and number > 0 else None


def _kinds_of(state: Mapping[str, Any], target: FilePath) -> dict[str, PlayerKind]:
    """Of a checkpoint's players those that are of another kind than its student."""
    origin = f"{target}/state.json: players"
    return validate(dict[str, PlayerKind], state.get(PLAYERS, {}), origin=origin, is_saved=True)


def _of_kind(spec: ModelSpec, kind: PlayerKind | None) -> ModelSpec:
    """The student's description, of a player of another kind: that is trained in full, so without LoRA's factors."""
    if kind is None:
        return spec
    network = without_lora(spec.model.network)
    model = replace(spec.model, network=network, predicts=kind.predicts, sigma_data=kind.sigma_data)
    return replace(spec, base=None, model=model)


def merge_model(model: TrainedModel) -> TrainedModel:
    """The same model without LoRA's factors, which become part of weights of its own."""
    network = without_lora(model.spec.model.network)
    spec = replace(model.spec, base=None, model=replace(model.spec.model, network=network))
    merged = merge_lora(model.denoiser)
    freeze(merged)
    return replace(model, denoiser=merged, spec=spec)


def _read_base(
    spec: ModelSpec, state: Mapping[str, Any], *, origin: FilePath, base: Denoiser | None = None
) -> Denoiser:
    """What LoRA's factors of a checkpoint stand over: `base`, or the teacher that the checkpoint names.

    Raises UserError if that is not there any more, or has other weights than it had.
    """
    place = "" if base else find_teacher(origin, state)
    try:
        base = base or merge_model(load_model(place)).denoiser
    except UserError as error:
        raise UserError(f"{origin}: holds only LoRA factors, and their base cannot be read: {error}") from None
    if fingerprint(base.net) != spec.base:
        raise UserError(f"{origin}: holds only LoRA factors, and their base, {place}, has changed")
    return base


def find_teacher(checkpoint: FilePath, state: Mapping[str, Any]) -> str:
    """Where the teacher that a checkpoint names is now; where it was, if nothing is found.

    Its weights may have changed: who needs it to be the same asks `find_again`.
    """
    return find_again("teacher", checkpoint, state).place or str(state["teacher"])


@schema
class Students:
    """router.json. students: places of runs or checkpoints, from the file's folder, by number."""

    format: Literal[1] = 1
    router: AnyRouter
    students: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_PROCESSES)]


def is_routed(place: FilePath) -> bool:
    """Whether a folder holds several students behind a router."""
    return (place / ROUTER).is_file()


def join_students(
    folder: str | FilePath, places: Sequence[str | FilePath], router: AnyRouter | None = None
) -> FilePath:
    """Write folder/router.json, so that `load_model(folder)` is all of these students as one model.

    router: default the one of prompts that the runs keep, else by class, as the students' own classes say.
    Returns the file.
    Raises UserError unless the students are alike and, by class, every class has exactly one of them; and where the
    folder is a run's, which it would hide.
    """
    folder = FilePath(folder)
    if (folder / STATE).exists() or list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{folder}: holds a run already; name another folder")
    models = [_load_student(place) for place in places]
    _check_alike(models)
    router = router or _prompt_router(models) or _class_router(models)
    folder.mkdir(parents=True, exist_ok=True)
    students = Students(router=router, students=tuple(os.path.relpath(place, folder) for place in places))
    write_text_atomically(folder / ROUTER, json.dumps(dump(students), indent=1) + "\n")
    return folder / ROUTER


def first_student(place: FilePath) -> FilePath:
    """Of several students behind a router the first's run; any other place is its own. Raises UserError."""
    return place / _read_students(place).students[0] if is_routed(place) else place


def _read_students(folder: FilePath) -> Students:
    try:
        data = read_json(folder / ROUTER)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ROUTER}: not valid JSON: {error}") from None
    return validate(Students, data, origin=str(folder / ROUTER))


def _load_students(folder: FilePath, *, use_ema: bool, ema: str | None) -> TrainedModel:
    students = _read_students(folder)
    models = [_load_student(folder / place, use_ema=use_ema, ema=ema) for place in students.students]
    _check_alike(models)
    unknown = set(getattr(students.router, "table", range(4))) - set(range(len(models)))
    if unknown:
        raise UserError(f"{folder / ROUTER}: the router names student {min(unknown)}, of {len(models)} students")
    denoiser = RoutedDenoiser([model.denoiser for model in models], students.router)
    freeze(denoiser)
    names = next((model.spec.class_names for model in models if model.spec.class_names), ())
    return TrainedModel(denoiser, replace(models[0].spec, classes=(), class_names=names), folder)


def _load_student(place: str | FilePath, *, use_ema: bool = True, ema: str | None = None) -> TrainedModel:
    """A model that is no router itself: one that leads to itself would have no end."""
    if is_routed(FilePath(place)):
        raise UserError(f"{place}: holds joined students; name them one by one")
    return load_model(place, use_ema=use_ema, ema=ema)


def _check_alike(models: Sequence[TrainedModel]) -> None:
    """Raise UserError unless the models differ in weights and classes alone."""
    first, *others = models
    for other in others:
        is_alike = replace(other.spec, classes=(), class_names=()) == replace(first.spec, classes=(), class_names=())
        if not is_alike:
            raise UserError(f"{other.source}: network, image shape or sampler differ from {first.source}")
        if not same_names(other.spec.class_names, first.spec.class_names):
            told = " and ".join(
                told_classes(range(len(m.class_names)), m.class_names) for m in (first.spec, other.spec)
            )
            raise UserError(f"{other.source}: numbers its classes differently from {first.source}: {told}")


def _prompt_router(models: Sequence[TrainedModel]) -> AnyRouter | None:
    """The router of students of prompts, None if they are of classes. Raises UserError unless there are all four."""
    router = models[0].spec.router
    if router is not None and len(models) != 4:
        raise UserError(
            f"{len(models)} students: prompts are split into four quadrants; give all four students, in order"
        )
    return router


def _class_router(models: Sequence[TrainedModel]) -> ClassRouter:
    owner: dict[int, int] = {}
    names = next((model.spec.class_names for model in models if model.spec.class_names), ())
    for number, model in enumerate(models):
        for label in model.spec.classes or range(model.spec.num_classes):
            if label in owner:
                told = told_classes([label], names)
                raise UserError(
                    f"class {told} belongs to {models[owner[label]].source} and to {model.source}; give one"
                )
            owner[label] = number
    missing = sorted(set(range(models[0].spec.num_classes)) - owner.keys())
    if missing or not owner:
        told = told_classes(missing, names)
        raise UserError(f"no student has the classes {told}" if owner else "these models have no classes")
    return ClassRouter(table=tuple(owner[label] for label in sorted(owner)))


@dataclass(frozen=True)
class TrainedPlayers:
    """denoisers: a run's players by name, frozen, the student's averaged weights where there are some.  spec: what
    they are."""

    denoisers: dict[str, Denoiser]
    spec: ModelSpec


def load_players(place: str | FilePath, *, base: Denoiser | None = None, is_checked: bool = False) -> TrainedPlayers:
    """The players of a run's newest checkpoint (or of one checkpoint's folder) that are built as its student is.

    base: what LoRA's factors stand over, if it is in memory already.  is_checked: its hashes have been, which reads
    all of it.
    Raises UserError if there is none or it is damaged.
    """
    target = find_checkpoint(FilePath(place))
    checkpoint = load_checkpoint(target, groups=("players", "ema"), is_checked=is_checked)
    spec, kinds = _spec_of(checkpoint.state, target), _kinds_of(checkpoint.state, target)
    found = {}
    for name in sorted({key.split(".")[0] for key in checkpoint.tensors["players"]}):
        is_averaged = name == checkpoint.state["student"] and "ema" in checkpoint.tensors
        weights = select_group(checkpoint.tensors["ema" if is_averaged else "players"], name)
        denoiser = _start(name, _of_kind(spec, kinds.get(name)), checkpoint.state, weights, origin=target, base=base)
        if denoiser.state_dict().keys() == weights.keys():
            load_strictly(denoiser, weights, origin=f"{target} ({name})", takes_tensors=True)
            freeze(denoiser)
            found[name] = denoiser
    return TrainedPlayers(found, spec)


def _start(
    name: str,
    spec: ModelSpec,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    origin: FilePath,
    base: Denoiser | None,
) -> Denoiser:
    """A player before its weights: as the student; of a run with LoRA, over its base or a copy of that."""
    denoiser = spec.build_empty()
    if spec.base is None:
        return denoiser
    base = _read_base(spec, state, origin=origin, base=base)
    if denoiser.state_dict().keys() == weights.keys():
        found = lora_of(denoiser)
        if found:
            found.mount(base.net)
        return denoiser
    settings = settings_for(
        name, validate(dict[str, LoRASettings | None], state["config"].get("lora", {}), origin="config")
    )
    return with_lora(base, settings) if settings else deepcopy(base)


def find_checkpoint(place: FilePath) -> FilePath:
    """The newest checkpoint of a run's folder, or `place` itself if it is one. Raises CheckpointError."""
    if place.suffix == ".pkl" and place.is_file():
        raise CheckpointError(
            f"{place}: a pickle, which is not loaded; convert it: diffdistill import-edm {place} --out runs/teacher"
        )
    if place.suffix == ".pt" and place.is_file():
        raise CheckpointError(
            f"{place}: of torch.save, which is not loaded; SiT's and REPA's are converted: "
            f"diffdistill import-sit {place} --out runs/teacher"
        )
    if place.name == BEST and place.is_file():
        place = find_best(place.parent) or place
    if said := no_run(place):
        raise CheckpointError(f"{place}: {said}")
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; give a run's folder or one of its checkpoints")
    if (place / STATE).exists() or (place / MANIFEST).exists():
        return place
    found = list_checkpoints(place / "checkpoints")
    if not found:
        raise CheckpointError(f"{place}: holds no checkpoint (looked for {place}/checkpoints/step-*)")
    return found[-1]
