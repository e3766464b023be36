"""From a config to what a run starts with. Whatever cannot be is a UserError, before anything is written."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path as FilePath
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from diffdistill.data.source import ImageSource
from diffdistill.distillation.method import Method, Problem
from diffdistill.distributed.processes import Processes
from diffdistill.models.load import TrainedPlayers, describe_model, is_routed, load_model, load_players, merge_model
from diffdistill.models.negative_prompts import steer
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.networks.lora import LoRAConfig, fingerprint, lora_of, settings_for
from diffdistill.settings.lock import locked
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import differences, dump, dump_yaml
from diffdistill.storage.atomic import write_tensors_atomically, write_text_atomically
from diffdistill.storage.checkpoint import check_checkpoint, clear_temporary, list_checkpoints, read_state
from diffdistill.training.config import RunConfig, TrainConfig, parse_config
from diffdistill.training.inputs import Inputs, open_inputs
from diffdistill.training.speed.offload import is_offloaded
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


@contextmanager
def own_folder(folder: FilePath, config: RunConfig) -> Iterator[None]:
    """Make the run's folder, write the resolved config, and keep other runs out while open.

    Raises UserError where that is not allowed.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
            write_text_atomically(folder / "config.yaml", dump_yaml(config))
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"run = {str(folder)!r}: cannot be written: {error.strerror}") from None
        clear_temporary(folder / "checkpoints")
        yield


def load_teacher(
    place: str | None, device: torch.device, state: Mapping[str, Any] | None = None
) -> TrainedModel | None:
    """The frozen teacher in a run's folder or checkpoint.  state: of a resumed run's checkpoint; the teacher it had."""
    if state:
        place = state["teacher"]
    if place is None:
        return None
    if is_routed(FilePath(place)):
        raise UserError(f"teacher = {place!r}: several students behind a router; name one model")
    teacher = merge_model(load_model(place))
    expected = state["model"].get("base") if state else None
    if expected and fingerprint(teacher.denoiser.net) != expected:
        raise UserError(f"teacher = {place!r}: has changed since this run began, whose LoRA factors stand over it")
    teacher.denoiser.to(device)
    return teacher


def read_inputs(config: RunConfig, device: torch.device, state: Mapping[str, Any] | None = None) -> Inputs:
    """Images and encoded prompts, before any network is in memory. Raises UserError if something is missing."""
    place = state["teacher"] if state else config.teacher
    return open_inputs(config, describe_model(place) if place else None, device)


def settle(config: RunConfig, inputs: Inputs, teacher: TrainedModel | None) -> tuple[ModelSpec, Problem]:
    """The student's description and the method's problem, from the teacher or from `model`."""
    source, method, shape = inputs.source, config.method, inputs.source.image_shape
    check_models(config, teacher)
    if teacher:
        teacher.denoiser.conditions = inputs.conditions
    if teacher and teacher.spec.image_shape != shape:
        raise UserError(f"data: images are {shape}, but the teacher's are {teacher.spec.image_shape}")
    initial = load_players(config.init, base=teacher.denoiser if teacher else None) if config.init else None
    check_lora(config, teacher, initial)
    for denoiser in initial.denoisers.values() if initial and teacher else ():
        denoiser.conditions = teacher.denoiser.conditions  # type: ignore[union-attr]
    problem = Problem(
        shape,
        teacher.denoiser.num_classes if teacher else len(inputs.conditions or ()) or source.num_classes,
        teacher.spec.model.path if teacher else config.model.path,  # type: ignore[union-attr]
        teacher=teacher.denoiser if teacher else None,
        initial=initial.denoisers if initial else {},
        num_steps=config.train.steps,
        batch_size=config.train.global_batch_size,
        lora=config.lora,
    )
    spec = describe_student(config, problem, teacher.spec if teacher else None, initial.spec if initial else None)
    if spec.model.path != problem.path:
        raise UserError("model.path: must be the teacher's")
    problem = replace(problem, classes=method.classes(problem, source))
    spec = replace(spec, classes=problem.classes)
    if config.negative_prompt is not None:
        spec = replace(spec, negative_prompt=config.negative_prompt, negative_scale=config.negative_scale)
    if teacher and any(config.lora.values()):
        spec = replace(spec, base=fingerprint(teacher.denoiser.net))
    if config.model is None and teacher and spec.model == teacher.spec.model:
        return spec, problem
    with seeded(config.train.seed):
        network = spec.build()
        network.conditions = inputs.conditions
        factors = lora_of(network)
        if factors:
            assert teacher is not None
            factors.mount(teacher.denoiser.net)
        return spec, replace(problem, network=network)


def describe_student(
    config: RunConfig, problem: Problem, teacher: ModelSpec | None, initial: ModelSpec | None
) -> ModelSpec:
    """The student's network and sampler: the config's `model`, or what the method makes of its origin's."""
    method, sampler = config.method, config.method.sampler(problem)
    if config.model is not None:
        class_dropout = teacher.class_dropout if teacher else getattr(method, "class_dropout", 0.0)
        return ModelSpec(
            model=config.model,
            image_shape=problem.image_shape,
            num_classes=teacher.num_classes if teacher else 0 if config.text_encoder else problem.num_classes,
            class_dropout=class_dropout,
            sampler=sampler,
            text_encoder=teacher.text_encoder if teacher else config.text_encoder,
        )
    if initial:
        return replace(initial, sampler=sampler)
    assert teacher is not None
    origin: Any = teacher.model.network
    lora = settings_for(method.student, config.lora)
    if lora:
        origin = LoRAConfig(base=origin, lora=lora)
    network, predicts = method.student_model(origin, teacher.model.predicts, problem)
    return replace(teacher, sampler=sampler, model=replace(teacher.model, network=network, predicts=predicts))


def check_models(config: RunConfig, teacher: TrainedModel | None) -> None:
    """Raise UserError unless the config names the models that its method needs."""
    if config.method.trains_network:
        if config.model is None or teacher is None:
            raise UserError(f"{config.method.name} needs both: `model`, the student's, and `teacher`, a run's folder")
    elif (config.model is None) == (teacher is None):
        raise UserError("give either `model` (to pretrain) or `teacher` (to distil), not both or neither")
    if config.init and teacher is None:
        raise UserError("init: goes with a `teacher`; to go on with a run, use --resume")


def check_lora(config: RunConfig, teacher: TrainedModel | None, initial: TrainedPlayers | None) -> None:
    """Raise UserError where there is no teacher for the factors to stand over, or another network would start."""
    if not any(config.lora.values()):
        return
    if teacher is None or config.method.trains_network:
        raise UserError(f"lora: goes over a teacher, but {config.method.name} trains a new network; leave lora out")
    for name, denoiser in initial.denoisers.items() if initial else ():
        if settings_for(name, config.lora) and not lora_of(denoiser):
            raise UserError(f"init: its {name} was trained in full, and lora goes over the teacher; leave one out")


def prepare_once(
    file: FilePath, method: Method, problem: Problem, seed: int, *, is_kept: bool, device: torch.device
) -> None:
    """Write what the method makes before training, if it makes something.  is_kept: what is there already stays."""
    if is_kept and file.exists():
        return
    file.unlink(missing_ok=True)
    made = prepare(method, problem, seed, device)
    if made:
        write_tensors_atomically(file, made)


def prepare(method: Method, problem: Problem, seed: int, device: torch.device) -> dict[str, Tensor]:
    """What the method makes before training, on a device: the teacher, if it is not there yet, is brought there for
    that, and an earlier run's players for that time."""
    if problem.teacher and not is_offloaded(problem.teacher):
        problem.teacher.to(device)
    for player in problem.initial.values():
        player.to(device)
    with seeded(seed):  # for weights that it makes; numbers are drawn by step and index
        made = method.prepare(problem, seed)
    for player in problem.initial.values():
        player.to("cpu")
    return made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New networks depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_batch(train: TrainConfig, num_processes: int) -> None:
    """Raise UserError where the batch cannot be shared out."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % num_processes:
        raise UserError(f"train.global_batch_size = {batch}: must be a multiple of the {num_processes} processes")
    share = batch // num_processes
    if micro and (batch % micro or share % min(micro, share)):
        each = f", {share} in each of {num_processes} processes" if num_processes > 1 else ""
        raise UserError(
            f"train.global_batch_size = {batch}{each}: must be a multiple of train.micro_batch_size = {micro}"
        )


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


def check_labels(method: Method, problem: Problem, source: ImageSource) -> None:
    """Raise UserError if the data's labels are not the teacher's classes."""
    known, labels = problem.num_classes, source.labels
    if not known or not method.needs_images:
        return
    if labels is None:
        raise UserError(f"data: has no labels, but the teacher was trained on {known} classes; give it labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= known:
        raise UserError(f"data: labels go from {low} to {high}; the teacher knows 0 to {known - 1}")


def ready_players(config: RunConfig, spec: ModelSpec, players: Mapping[str, nn.Module]) -> None:
    """Check the trained players, and let the student steer away from its negative prompt. Raises UserError."""
    check_players(config, players)
    steer(players[config.method.student], spec)


def check_players(config: RunConfig, players: Mapping[str, nn.Module]) -> None:
    """Raise UserError if a trained player has no optimiser, or an optimiser no player, or `lora` does nothing."""
    for key, named in (("optimizers", config.optimizers), ("lora", config.lora)):
        for name in named:
            if name not in players and name != "default":
                raise UserError(f"{key}.{name}: no such player; choose from {', '.join([*players, 'default'])}")
    for name in config.lora:
        if name != "default" and config.lora[name] and not lora_of(players[name]):
            raise UserError(f"lora.{name}: does not start as the teacher; it is trained in full")
    for name in players:
        config.optimizer(name)
