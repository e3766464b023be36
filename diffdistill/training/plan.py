"""A run before anything is written: `plan`. All faults of a config are found here; doctor reads nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffdistill.data.buckets import BucketOrder, order_of
from diffdistill.data.order import DataOrder
from diffdistill.data.source import ImageSource
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.threads import threads
from diffdistill.distillation.method import Method, Players, Problem, shapes_of
from diffdistill.distributed.processes import Processes, find_processes
from diffdistill.models.encoders import PixelDecoder
from diffdistill.models.load import PLAYERS, describe_model, is_routed, load_model, merge_model
from diffdistill.models.negative_prompts import guide_away, steer
from diffdistill.models.places import SHA256
from diffdistill.models.spec import ModelSpec, PlayerKind, TrainedModel
from diffdistill.models.teachers import pipeline_of
from diffdistill.networks.dropout import apply_dropout
from diffdistill.networks.lora import fingerprint, lora_of
from diffdistill.networks.qat import fake_quantise
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.training.agreement import check_same_inputs, check_same_protocol, check_same_settings
from diffdistill.training.config import RunConfig, TrainConfig
from diffdistill.training.inputs import Inputs, open_inputs
from diffdistill.training.iteration import Iteration
from diffdistill.training.objects import with_objects
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.reports.evaluator import Evaluator, make_evaluator
from diffdistill.training.resolve import check_labels, resolve_models, seeded
from diffdistill.training.resume import (
    Teachers,
    check_teachers_are_there,
    check_unchanged,
    contents_of,
    find_initial,
    find_start,
    find_teachers,
    read_start,
)
from diffdistill.training.sharding import make_mesh
from diffdistill.training.speed.options import apply_speed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run starts with.

    start, state: the checkpoint to go on from, and what it says beside tensors; None for a new run.
    mesh: the processes that will share out the weights, or None.  spec: what the student is.
    teacher: None also where the method no longer needs it; teacher_source: the checkpoint that it came from.
    teachers_source: of the others, by name.
    sha256: of the weights that it started from, by the settings that name them.
    trained, followers: the players at their start, those that updates name and the others.
    """

    config: RunConfig
    processes: Processes
    mesh: DeviceMesh | None
    start: FilePath | None
    state: Mapping[str, Any] | None
    inputs: Inputs
    teacher: TrainedModel | None
    teacher_source: str | None
    teachers_source: Mapping[str, str]
    sha256: Mapping[str, str]
    spec: ModelSpec
    problem: Problem
    order: DataOrder | BucketOrder
    trained: Mapping[str, nn.Module]
    followers: Mapping[str, nn.Module]
    evaluator: Evaluator

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def source(self) -> ImageSource:
        """The real images, or latents."""
        return self.inputs.source

    @property
    def step(self) -> int:
        """The last that the checkpoint to go on from has done; 0 for a new run."""
        return int(self.state["step"]) if self.state else 0

    @property
    def skips(self) -> dict[str, int]:
        """Updates that the run has skipped, by player."""
        return dict(self.state["skips"]) if self.state else {}

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def home(self) -> torch.device:
        """Where networks are built: what is shared out comes to the device in shards."""
        return torch.device("cpu") if self.mesh else self.device

    @property
    def players(self) -> Players:
        """All of them, the teachers included."""
        return Players(**self.problem.all_teachers, **self.trained, **self.followers)

    @property
    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the run: its student, config, data and teachers."""
        more: dict[str, Any] = {"teachers": dict(self.teachers_source)} if self.teachers_source else {}
        more |= {PLAYERS: kinds} if (kinds := self._other_kinds()) else {}
        about = {"student": self.method.student, "model": dump(self.spec), "config": dump(self.config)}
        return {**about, "data": self.source.key, "teacher": self.teacher_source, SHA256: dict(self.sha256), **more}

    def _other_kinds(self) -> dict[str, Any]:
        """The players that are of another kind than the student."""
        own = PlayerKind(predicts=self.spec.model.predicts, sigma_data=self.spec.model.sigma_data)
        kinds = {
            name: PlayerKind(predicts=module.predicts, sigma_data=module.sigma_data)
            for name, module in {**self.trained, **self.followers}.items()
            if isinstance(module, Denoiser) and name != self.method.student
        }
        return {name: dump(kind) for name, kind in kinds.items() if kind != own}

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from, as it is trained."""
        return self.trained[self.method.student]

    @property
    def share(self) -> int:
        """This process's samples of each batch."""
        return self.config.train.global_batch_size // self.processes.count

    @property
    def at_largest(self) -> "Plan":
        """The same with batches of the largest of its images' sizes alone, which need most memory."""
        return replace(self, order=self.order.largest)

    def iteration(self, stored: Mapping[str, Tensor]) -> Iteration:
        """The method's losses on these players.  stored: from the method's `prepare`."""
        train = self.config.train
        return Iteration.of(
            self.method,
            self.problem,
            self.players,
            self.trained,
            stored=stored,
            seed=train.seed,
            device=self.device,
            is_half=train.precision == "bf16",
            compiles=self.config.speed.compile == "inductor",
        )

    def real(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Real images and their condition for the samples from `first` on; none where the method needs none."""
        if not self.method.needs_images:
            return torch.empty(0, *self.source.image_shape, device=self.device), NO_COND
        images, labels = self.order.take(first, count, next_first=first + self.config.train.global_batch_size)
        if labels is None or not self.problem.num_classes:
            return images, NO_COND
        return images, Cond(label=labels)


def plan(
    config: RunConfig,
    *,
    resume: bool | str | None = False,
    allow_changes: bool = False,
    trusts_code: bool = False,
    teacher: Denoiser | None = None,
    data: object = None,
) -> Plan:
    """Load, check and build what a run needs. Nothing is written to its folder.

    resume: False for a new run (an existing run's folder is refused), True to go on from the newest checkpoint, a name
    ("step-00000500") for that one, None not to look at the folder.  allow_changes: from it, whatever has been changed
    since.  trusts_code: whether features that are a program may run in `eval`.  teacher, data: see `with_objects`; they
    are read once all processes have met.
    Raises UserError for whatever the config asks that cannot be.
    """
    with threads(config.train.num_threads):
        return _plan(config, resume, teacher, data, allow_changes=allow_changes, trusts_code=trusts_code)


def _plan(
    config: RunConfig,
    resume: bool | str | None,
    teacher: Denoiser | None,
    data: object,
    *,
    allow_changes: bool,
    trusts_code: bool,
) -> Plan:
    train, folder = config.train, FilePath(config.run)
    processes = find_processes(train.device)
    check_same_settings(config, processes)
    config = with_objects(config, teacher, data)
    start = None if resume is None else find_start(folder, resume)
    state = read_start(start, processes)
    mesh = make_mesh(config, processes)
    home = torch.device("cpu") if mesh else processes.device
    found = find_teachers(config, start, state, allow_changes=allow_changes)
    check_teachers_are_there(config, found)
    initial = find_initial(config, start)
    inputs = read_inputs(config, processes.device, found.teacher)
    shelf = torch.device("cpu") if config.speed.is_quantised else home  # it comes to its device layer by layer
    first, teachers = load_teacher(found.teacher, shelf, state), load_teachers(found.teachers, shelf)
    check_batch(train, processes.count)
    spec, problem = resolve_models(config, inputs, first, teachers, initial, is_checked=initial == str(start))
    share = train.global_batch_size // processes.count
    problem = replace(problem, at_a_time=min(train.micro_batch_size or share, share))
    show_pixels(config.method, first, processes.device)
    sources = Teachers(
        str(first.source) if first else None, {name: str(other.source) for name, other in teachers.items()}
    )
    sha256 = contents_of(sources, initial, start, state)
    check_same_inputs(inputs.source.key, sha256, processes)
    check_labels(config.method, problem, inputs.source)
    trained, followers = build_players(config, spec, problem, home)
    apply_speed(config.speed, trained, problem.all_teachers, followers, processes.device)
    check_optimizers(config, trained)
    trained[config.method.student].run_with(num_threads=train.num_threads)  # type: ignore[operator]
    evaluator = make_evaluator(
        config.eval, folder, trained[config.method.student], spec, processes, trusts_code=trusts_code
    )
    check_same_protocol(evaluator.protocol, processes)
    if state:
        check_unchanged(config, inputs.source, state, origin=start, allow_changes=allow_changes, sha256=sha256)
    return Plan(
        config=config,
        processes=processes,
        mesh=mesh,
        start=start,
        state=state,
        inputs=inputs,
        teacher=first,
        teacher_source=sources.teacher,
        teachers_source=sources.teachers,
        sha256=sha256,
        spec=spec,
        problem=problem,
        order=order_of(inputs.source, train.seed, batch=train.global_batch_size, classes=problem.classes),
        trained=trained,
        followers=followers,
        evaluator=evaluator,
    )


def load_teacher(
    place: str | None, device: torch.device, state: Mapping[str, Any] | None = None
) -> TrainedModel | None:
    """The frozen teacher in a run's folder or checkpoint.  state: of a resumed run's checkpoint."""
    if place is None:
        return None
    teacher = load_frozen("teacher", place, device)
    expected = state["model"].get("base") if state else None
    if expected and fingerprint(teacher.denoiser.net) != expected:
        raise UserError(
            f"teacher = {place!r}: has changed since this run started, and the run's LoRA factors belong to it"
        )
    return teacher


def load_teachers(places: Mapping[str, str], device: torch.device) -> dict[str, TrainedModel]:
    """The further teachers, by name."""
    return {name: load_frozen(f"teachers.{name}", place, device) for name, place in places.items()}


def load_frozen(key: str, place: str, device: torch.device) -> TrainedModel:
    """One frozen model, its factors merged.  key: the setting that names it."""
    if is_routed(FilePath(place)):
        raise UserError(f"{key} = {place!r}: holds joined students; name one model")
    model = merge_model(load_model(place))
    model.denoiser.to(device)
    return model


def show_pixels(method: Method, teacher: TrainedModel | None, device: torch.device) -> None:
    """Let the teacher's latents be decoded, where a loss looks at pixels."""
    pipeline = pipeline_of(teacher.spec) if teacher and method.judges_pixels else None
    if teacher and pipeline and pipeline.has_vae:
        teacher.denoiser.run_with(decode=PixelDecoder(pipeline, device))


def read_inputs(config: RunConfig, device: torch.device, teacher: str | None) -> Inputs:
    """Images and encoded prompts, before any network is in memory.  teacher: its place.  Raises UserError if something
    is missing."""
    return open_inputs(config, describe_model(teacher) if teacher else None, device)


def build_players(
    config: RunConfig, spec: ModelSpec, problem: Problem, home: torch.device
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The method's players at their start: those that its updates name, and the others, frozen.

    Raises UserError where the config's `starts`, optimisers, `lora` and `dropout` do not fit them.
    """
    with seeded(config.train.seed):
        modules = config.method.players(problem)
    check_starts(config.method, problem, modules)
    named = {name for update in config.method.updates for name in update.players}
    check_players(config, {name: module for name, module in modules.items() if name in named})
    apply_dropout({name: module for name, module in modules.items() if name in named}, config.dropout)
    if config.qat:
        fake_quantise(modules[config.method.student], config.qat)
    student = modules[config.method.student]
    steer(student, spec)
    if config.negative_teacher and problem.teacher:
        guide_away(problem.teacher, student)
    trained = {name: module.to(home).train() for name, module in modules.items() if name in named}
    return trained, {name: freeze(module.to(home)) for name, module in modules.items() if name not in named}


def check_starts(method: Method, problem: Problem, players: Mapping[str, nn.Module]) -> None:
    """Raise UserError if `starts` names what is no copy, or makes the student another model than its spec's."""
    for name in problem.teachers:
        if f"teacher_{name}" in players:
            raise UserError(f"teachers.{name}: the method has its own player teacher_{name}; choose another name")
    copies = [name for name, module in players.items() if isinstance(module, Denoiser)]
    for name, start in problem.starts.items():
        if name not in copies or method.trains_network:
            raise UserError(f"starts.{name}: not a player that starts as a copy; choose from {', '.join(copies)}")
        if name != method.student:
            continue
        found, described = problem.start_of(name), replace(problem, starts={}).start_of(name)
        if shapes_of(found) != shapes_of(described):
            what = "is another network than the student's"
        elif (found.predicts, found.sigma_data) != (described.predicts, described.sigma_data):
            what = (
                f"predicts {found.predicts} with sigma_data {found.sigma_data:g}, and the student would be saved as"
                f" one that predicts {described.predicts} with {described.sigma_data:g}"
            )
        else:
            continue
        raise UserError(f"starts.{name} = {start!r}: {what}; name it by `teacher` or `init`")


def check_players(config: RunConfig, players: Mapping[str, nn.Module]) -> None:
    """Raise UserError if a trained player has no optimiser, or an optimiser no player, or `lora` does nothing."""
    for key, named in (("optimizers", config.optimizers), ("lora", config.lora)):
        for name in named:
            if name not in players and name != "default":
                raise UserError(f"{key}.{name}: no such player; choose from {', '.join([*players, 'default'])}")
    for name in config.lora:
        if name != "default" and config.lora[name] and not lora_of(players[name]):
            raise UserError(f"lora.{name}: does not start from the teacher; it is trained in full")
    for name in players:
        config.optimizer(name)


def check_optimizers(config: RunConfig, trained: Mapping[str, nn.Module]) -> None:
    """Raise UserError where an optimiser cannot be, 8-bit ones mostly."""
    for name, module in trained.items():
        make_optimizer(module, config.optimizer(name))


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
