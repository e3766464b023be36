"""From a plan to a run that can loop: what is made once, averages, optimisers, a checkpoint's numbers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from diffdistill.distillation.method import Method, Problem
from diffdistill.networks.lora import lora_of
from diffdistill.settings.lock import locked
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, dump_yaml
from diffdistill.storage.atomic import write_tensors_atomically, write_text_atomically
from diffdistill.storage.checkpoint import clear_temporary, read_tensors
from diffdistill.training.config import RunConfig
from diffdistill.training.ema import EMA
from diffdistill.training.iteration import Iteration
from diffdistill.training.objective import Averaging, Replicas
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.plan import Plan
from diffdistill.training.reports.distance import Sampling, TeacherDistance, affordable, distilled_guidance
from diffdistill.training.reports.health import Health, Reference
from diffdistill.training.resolve import seeded
from diffdistill.training.run_state import RunState
from diffdistill.training.sharding import Shards, filled, outline, shard
from diffdistill.training.speed.offload import is_offloaded

PREPARED = "prepared.safetensors"


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A run that can loop.

    iteration: the method's losses on the players.  emas: averages of the student by their group in a checkpoint.
    averaging: how gradients become the processes' means.  outline: of the student, where processes hold parts of it.
    health, distance: None where they are not watched.
    """

    plan: Plan
    iteration: Iteration
    optimizers: Mapping[str, torch.optim.Optimizer]
    emas: Mapping[str, EMA]
    averaging: Averaging
    health: Health | None
    distance: TeacherDistance | None
    outline: nn.Module | None

    @property
    def state(self) -> RunState:
        """What a checkpoint holds in tensors."""
        return run_state(self.plan, self.emas, self.optimizers)

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from: the EMA where there is one. Whole: all processes ask for it."""
        average = self.emas.get("ema")
        student = average.on(self.plan.device) if average else self.plan.student
        return filled(self.outline, student, self.plan.device) if self.outline else student


def assemble(plan: Plan, folder: FilePath | None = None) -> Assembly:
    """Make what training needs, in the order in which one needs the other. A plan is assembled once: players change.

    folder: the run's, opened by `own_folder`; None for a run that writes nothing.
    Raises UserError where the processes do not see the same folder, or a checkpoint is of another architecture.
    """
    emas = make_averages(plan)
    health = make_health(plan)
    stored = prepared(plan, folder)
    if plan.start is None:
        initialise(plan, stored, emas)
    plan = without_idle_teachers(plan)
    student_outline = share_out(plan, emas)
    optimizers = {name: make_optimizer(m, plan.config.optimizer(name)) for name, m in plan.trained.items()}
    if plan.start:
        run_state(plan, emas, optimizers).restore(plan.start)
    return Assembly(
        plan=plan,
        iteration=plan.iteration(stored),
        optimizers=optimizers,
        emas=emas,
        averaging=make_averaging(plan),
        health=health,
        distance=make_distance(plan),
        outline=student_outline,
    )


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


def make_averages(plan: Plan) -> dict[str, EMA]:
    """Of the student, each where it lives."""
    device = plan.home if plan.config.speed.ema_device == "same" else torch.device("cpu")
    return {group: EMA(plan.student, settings, device) for group, settings in plan.config.emas.items()}


def prepared(plan: Plan, folder: FilePath | None) -> dict[str, Tensor]:
    """What the method makes once, on the device; kept in the folder, so that a resumed run and all processes use the
    same."""
    seed, processes = plan.config.train.seed, plan.processes
    if folder is None:
        made = prepare(plan.method, plan.problem, seed, plan.device)
        return {name: value.to(plan.device) for name, value in made.items()}
    file, is_kept = folder / PREPARED, plan.start is not None
    processes.on_main_first(
        lambda: prepare_once(file, plan.method, plan.problem, seed, is_kept=is_kept, device=plan.device)
    )
    if 0 < len(processes.ranks_where(file.exists())) < processes.count:
        raise UserError(f"run = {str(folder)!r}: is not the same folder for all processes; use a shared file system")
    return read_tensors(file, str(plan.device)) if file.exists() else {}


def keep_prepared(assembly: Assembly, folder: FilePath) -> None:
    """Write what a run has that was assembled without its folder; what is there already stays."""
    stored, file = assembly.iteration.stored, folder / PREPARED
    if stored and not file.exists():
        write_tensors_atomically(file, stored)


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
    """What the method makes before training, on a device: teachers that are not there yet are brought there for
    that, and an earlier run's players for that time."""
    for teacher in problem.all_teachers.values():
        if not is_offloaded(teacher):
            teacher.to(device)
    for player in problem.initial.values():
        player.to(device)
    with seeded(seed):  # for weights that it makes; numbers are drawn by step and index
        made = method.prepare(problem, seed)
    for player in problem.initial.values():
        player.to("cpu")
    return made


@torch.no_grad()
def initialise(plan: Plan, stored: Mapping[str, Tensor], emas: Mapping[str, EMA]) -> None:
    """A new run's players by what was prepared, equal in all processes; averages begin as the student."""
    plan.method.initialise(plan.players, stored)
    plan.processes.begin_equal([*plan.trained.values(), *plan.followers.values()])
    for ema in emas.values():
        ema.copy_from(plan.student)


def without_idle_teachers(plan: Plan) -> Plan:
    """The plan with the teachers that its losses ask. The others leave memory when nothing else holds them."""
    if not plan.method.takes_teachers:
        plan = replace(plan, problem=replace(plan.problem, teachers={}))
    if plan.method.keeps_teacher:
        return plan
    return replace(plan, teacher=None, problem=replace(plan.problem, teacher=None))


def share_out(plan: Plan, emas: Mapping[str, EMA]) -> nn.Module | None:
    """Where the processes share out the weights: keep this one's part of each player alone. Returns the outline of the
    student, without weights."""
    if plan.mesh is None:
        return None
    average = emas.get("ema")
    student_outline = outline(average.module if average else plan.student)
    teachers = [teacher for teacher in plan.problem.all_teachers.values() if not is_offloaded(teacher)]
    averages = [ema.module for ema in emas.values()]
    modules = [*teachers, *plan.trained.values(), *plan.followers.values(), *averages]
    shard(modules, plan.mesh)
    for player in filter(lora_of, modules):
        player.to(plan.device)  # its factors
    return student_outline


def run_state(plan: Plan, emas: Mapping[str, EMA], optimizers: Mapping[str, torch.optim.Optimizer]) -> RunState:
    """What a checkpoint holds in tensors."""
    return RunState({**plan.trained, **plan.followers}, plan.method.student, emas, optimizers)


def make_averaging(plan: Plan) -> Averaging:
    """Replicated players, or parts of all but those in factors."""
    in_factors = {name: player for name, player in plan.trained.items() if lora_of(player) or not plan.mesh}
    replicas = Replicas(plan.processes, plan.method.updates, in_factors)
    others = {name: player for name, player in plan.trained.items() if name not in in_factors}
    return Shards(others, replicas) if plan.mesh else replicas


def make_health(plan: Plan) -> Health | None:
    """Signals of a run whose teacher stays, or whose method has some of its own, if the config wants them."""
    settings, method = plan.config.health, plan.method
    if not (settings and plan.teacher and (method.keeps_teacher or method.has_signals)):
        return None
    source, members = plan.order.sample
    return Health(settings, Reference.of_source(source, members if method.keeps_teacher else members[:0]))


def make_distance(plan: Plan) -> TeacherDistance | None:
    """The distance to the teacher that a run with health signals and an average watches, where it can afford that."""
    settings, train, method = plan.config.health, plan.config.train, plan.method
    guidance = distilled_guidance(method)
    if not (settings and settings.distance_every and plan.config.ema and plan.teacher and method.keeps_teacher):
        return None
    if guidance is None:
        return None
    student, teacher = method.sampler(plan.problem), plan.teacher.spec.sampler
    images = train.global_batch_size // plan.processes.count  # every process makes all samples
    count = min(
        affordable(teacher.num_evaluations * (1 if guidance == 1 else 2), images * train.steps),
        affordable(student.num_evaluations, images * settings.distance_every),
    )
    if not count:
        return None
    sampling = Sampling(plan.problem, student, teacher, guidance, train.seed, count, max(1, plan.share))
    decides = [count, guidance, train.seed, dump(teacher), plan.problem.classes, dict(plan.sha256), plan.source.key]
    if plan.config.guidance_rule:
        decides.append(dump(plan.config.guidance_rule))
    return TeacherDistance(sampling, settings.distance_every, key=sha256(json.dumps(decides).encode()).hexdigest())
