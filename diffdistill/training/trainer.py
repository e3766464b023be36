"""The loop: draw -> loss -> backward -> step -> EMA. It knows no paper; a method says who steps when.

Everything random depends on (seed, step, global sample index), every rate on the step alone: so a run that was
stopped and resumed equals one that was not, bit for bit on a CPU, and accumulation and several processes equal one
large batch.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffdistill.data.order import DataOrder
from diffdistill.data.pictures import save_panels
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import freeze
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Loss, Players, Update
from diffdistill.distributed.processes import find_processes, others
from diffdistill.distributed.stopping import StopRequested, stop_signals
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.storage.checkpoint import (
    PREFIX,
    Checkpoint,
    list_checkpoints,
    read_tensors,
    save_checkpoint,
    save_sharded,
)
from diffdistill.training.config import RunConfig
from diffdistill.training.ema import EMA
from diffdistill.training.nonfinite import NonfiniteGuard
from diffdistill.training.objective import Averaging, Replicas
from diffdistill.training.optimizers import clip, learning_rate, make_optimizer, trainable
from diffdistill.training.reports.evaluator import make_evaluator
from diffdistill.training.reports.health import Health, Reference
from diffdistill.training.reports.log import Log, Meter, RunLog, Silence
from diffdistill.training.reports.preview import preview_panels
from diffdistill.training.run_state import RunState
from diffdistill.training.setup import (
    check_batch,
    check_labels,
    check_unchanged,
    find_start,
    load_teacher,
    own_folder,
    prepare_once,
    read_inputs,
    read_start,
    ready_players,
    seeded,
    settle,
)
from diffdistill.training.sharding import Shards, filled, make_mesh, outline, shard
from diffdistill.training.speed.offload import is_offloaded
from diffdistill.training.speed.options import apply_speed


@dataclass
class MicroBatch:
    """A part of the global batch on this process; `draw` gathers what the step's updates carry over."""

    rng: StepRandom
    batch: Batch
    draw: dict[str, Tensor] = field(default_factory=dict)


class Trainer:
    """One run, from its config. Build it, then `run()`.

    Raises UserError for whatever the config asks that cannot be, before anything is written.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool | str = False,
        quiet: bool = False,
        allow_changes: bool = False,
        trusts_code: bool = False,
    ) -> None:
        """resume: False starts anew (an existing run's folder is refused), True goes on from the newest
        checkpoint, a name ("step-00000500") from that one.  allow_changes: from it, whatever has been changed since.
        trusts_code: whether features that are a program may run in `eval`."""
        self.config, self.method, self.quiet, self.allow_changes = config, config.method, quiet, allow_changes
        self._cpu_began = time.process_time()
        train = config.train
        self.folder = FilePath(config.run)
        self.processes = find_processes(train.device)
        self.device = self.processes.device
        if train.num_threads:
            torch.set_num_threads(train.num_threads)
        self.start = find_start(self.folder, resume)
        state = read_start(self.start, self.processes)
        self.mesh = make_mesh(config, self.processes)
        home = torch.device("cpu") if self.mesh else self.device  # what is shared out comes to the device in parts
        inputs = read_inputs(config, self.device, state)
        self.source, self.data_notes = inputs.source, inputs.notes
        self.teacher = load_teacher(config.teacher, home, state)
        self.teacher_source = str(self.teacher.source) if self.teacher else None
        check_batch(train, self.processes.count)
        self.spec, self.problem = settle(config, inputs, self.teacher)
        check_labels(self.method, self.problem, self.source)
        self.order = DataOrder(self.source, train.seed, classes=self.problem.classes)
        with seeded(train.seed):
            modules = self.method.players(self.problem)
        teachers = {"teacher": self.teacher.denoiser} if self.teacher else {}
        trained = {name for update in self.method.updates for name in update.players}
        ready_players(config, self.spec, {name: module for name, module in modules.items() if name in trained})
        self.trained = {name: module.to(home).train() for name, module in modules.items() if name in trained}
        self.followers = {name: freeze(m.to(home)) for name, m in modules.items() if name not in trained}
        apply_speed(config.speed, self.trained, self.problem.teacher, self.followers, self.device)
        self.players = Players(**teachers, **self.trained, **self.followers)
        ema_device = home if config.speed.ema_device == "same" else torch.device("cpu")
        student = self.trained[self.method.student]
        self.emas = {group: EMA(student, settings, ema_device) for group, settings in config.emas.items()}
        self.evaluator = make_evaluator(
            config.eval, self.folder, student, self.spec, self.processes, trusts_code=trusts_code
        )
        self._make_optimizers()
        self.averaging: Averaging = Replicas(self.processes, () if self.mesh else self.method.updates, self.trained)
        self.step = 0
        self.nonfinite = NonfiniteGuard(train.on_nonfinite, train.max_skips)
        self.stored: dict[str, Tensor] = {}
        self._outline: nn.Module | None = None  # of the student, where the processes hold parts of it
        self._meter = Meter()
        health = config.health if self.teacher and self.method.keeps_teacher else None
        self.health = Health(health, Reference.of_source(self.source, self.order.members)) if health else None
        if state:
            check_unchanged(config, self.source, state, origin=self.start, allow_changes=allow_changes)
            self.step, self.nonfinite.skips = int(state["step"]), dict(state["skips"])
        if self.start and not self.mesh:
            self._state.restore(self.start)

    @property
    def ema(self) -> EMA | None:
        """The average that samples are taken from."""
        return self.emas.get("ema")

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from: the EMA where there is one. Whole: all processes ask for it."""
        student = self.ema.on(self.device) if self.ema else self.trained[self.method.student]
        return filled(self._outline, student, self.device) if self._outline else student

    @property
    def images_seen(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def images(self) -> Tensor:
        """All real images at once: for small sets."""
        return self.source.rows(torch.arange(len(self.source)))

    def run(self) -> FilePath:
        """Train to the last step. Returns the newest checkpoint's folder.

        SIGINT and SIGTERM save a checkpoint and raise StopRequested. Raises TrainingError when the losses stay
        non-finite, OSError when nothing can be written (the last good checkpoint stays).
        """
        train, processes = self.config.train, self.processes
        with others(), ExitStack() as held:
            processes.on_main_first(lambda: held.enter_context(own_folder(self.folder, self.config)))
            self._prepare()
            log, stopping = held.enter_context(self._open_log()), held.enter_context(stop_signals())
            for note in self.data_notes:
                log.note(note)
            while self.step < train.steps:
                self.train_step(log)
                log.step(self.step)
                # A signal may arrive at any line, and at one process before another: what is decided here holds.
                last, signal = self.step == train.steps, processes.largest(stopping[0] if stopping else 0)
                if self.step % train.log_every == 0 or last:
                    self.report(log)
                if train.preview_every and (self.step % train.preview_every == 0 or last):
                    log.preview(self.step, self.save_preview())
                is_best = self.evaluator.examine(self, is_last=last, log=log)
                if self.step % train.checkpoint_every == 0 or last or signal or is_best:
                    self.save()
                if signal:
                    raise StopRequested(signal, self.step, self.folder)
        return list_checkpoints(self.folder / "checkpoints")[-1]

    def train_step(self, log: Log | None = None) -> None:
        """One iteration: every update that is due, in the method's order, then the EMA."""
        micros = list(self._micro_batches())
        for update in self.method.updates:
            if update.is_due(self.step, self.images_seen):
                is_done = self._update(update, micros, log)
                for ema in self.emas.values() if is_done and self.method.student in update.players else ():
                    ema.update(
                        self.trained[self.method.student],
                        images_seen=self.images_seen,
                        batch_images=self.config.train.global_batch_size * update.every,
                    )
        self.step += 1
        with torch.no_grad():
            self.method.after_step(self.players, self.stored, self.step)

    def report(self, log: Log) -> None:
        """Log the means since the last report, and the health signals when they are due, with their warnings."""
        values, health = self.processes.means(self._meter.means()), self.health
        if health and health.is_due(self.step, self.config.train.log_every):
            sampler, student, seed = self.method.sampler(self.problem), self.method.student, self.config.train.seed
            signals = health.examine(self.players, student, sampler, self.problem, step=self.step, seed=seed)
            for warning in health.judge(self.step, signals, values):
                log.warn(warning)
            values |= {f"health/{name}": value for name, value in signals.items()}
        log.report(self.step, self.images_seen, values)

    def save(self) -> FilePath:
        """Write a checkpoint of everything that a resumed run needs, on as many processes as it likes."""
        folder, keep = self.folder / "checkpoints", self.config.train.keep_checkpoints
        best, checkpoint = self.evaluator.best(self.step), Checkpoint(self.step, self._state.tensors(), self._settings)
        if self.mesh:
            save_sharded(self.processes, folder, checkpoint, keep=keep, best=best)
        else:
            self.processes.on_main_first(lambda: save_checkpoint(folder, checkpoint, keep=keep, best=best))
        return folder / f"{PREFIX}{self.step:08d}"

    @property
    def _state(self) -> RunState:
        return RunState(self.trained | self.followers, self.method.student, self.emas, self.optimizers)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint says beside tensors."""
        return {
            "format": 1,
            "skips": self.nonfinite.skips,
            "student": self.method.student,
            "model": dump(self.spec),
            "config": dump(self.config),
            "data": self.source.key,
            "teacher": self.teacher_source,
        }

    def save_preview(self) -> FilePath:
        """previews/step-*.png: the student's samples, and the other players' view of them. All processes make them, as
        they may hold parts of the players, and the first writes."""
        file = self.folder / "previews" / f"step-{self.step:08d}.png"
        student, sampler = self.method.student, self.method.sampler(self.problem)
        views = preview_panels(
            self.players, student, self.student, sampler, self.problem, seed=self.config.train.seed, device=self.device
        )
        columns = 10 if self.problem.num_classes == 10 else 8
        self.processes.on_main_first(lambda: save_panels(file, views, columns=columns))
        return file

    def loss(self, update: Update, micro: MicroBatch) -> Loss:
        """An update's loss on a micro-batch, with a graph to the update's players alone; only they have dropout."""
        self._let_learn(update)
        made: Loss = self._ask(update.loss, micro, seed=update.loss)
        return made

    def _let_learn(self, update: Update) -> None:
        for name, parameters in self.parameters.items():
            if self.trained[name].training != (name in update.players):
                self.trained[name].train(name in update.players)
            for parameter in parameters:
                parameter.requires_grad_(name in update.players)

    def _ask(self, function: str, micro: MicroBatch, *, seed: str) -> Any:
        """A function of the method's on a micro-batch.  seed: names the numbers of dropout inside the networks."""
        torch.manual_seed(micro.rng.torch_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            return self.method.call(function, self.players, micro.draw, micro.batch)

    @torch.no_grad()
    def _gather(self, update: Update, micros: list[MicroBatch]) -> None:
        """What a loss needs to know of the whole batch, where the batch comes in pieces."""
        if update.statistics is None or len(micros) * self.processes.count == 1:
            return
        self._let_learn(update)  # for the dropout of the loss
        parts = [self._ask(update.statistics, micro, seed=update.loss) for micro in micros]
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        whole = {f"all {name}": self.processes.gather(values) for name, values in own.items()}
        for micro in micros:
            micro.draw |= whole

    def micro_batch(self, first: int, images: Tensor, cond: Cond, size: int) -> MicroBatch:
        """The samples from number `first` on, with this step's random numbers.  images: [size, ...], or empty."""
        rng = StepRandom(self.config.train.seed, self.step, torch.arange(first, first + size, device=self.device))
        return MicroBatch(rng, Batch(images, cond, self.stored), self.method.draw(rng, self.problem))

    def real(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Real images and their condition for the samples from `first` on; none where the method needs none."""
        if not self.method.needs_images:
            return torch.empty(0, *self.source.image_shape, device=self.device), NO_COND
        next_first = first + self.config.train.global_batch_size
        images, labels = self.order.take(first, count, next_first=next_first)
        return images, NO_COND if labels is None else self._class_cond(labels)

    def _update(self, update: Update, micros: list[MicroBatch], log: Log | None) -> bool:
        """One optimiser step of some players. Returns whether it was taken."""
        losses: list[Loss] = []
        self._gather(update, micros)
        for number, micro in enumerate(micros, 1):
            with self.averaging.of(update, is_last=number == len(micros)) as ask:
                loss = ask(partial(self.loss, update, micro))
                (loss.total / len(micros)).backward()
            micro.draw |= loss.carry
            losses.append(loss)
        norms = {name: clip(self.parameters[name], self.config.optimizer(name)) for name in update.players}
        numbers = torch.stack([*norms.values(), *(loss.total.detach() for loss in losses)]).isfinite().tolist()
        faulty = self.processes.ranks_where(not all(numbers[len(norms) :]))  # the gradients are the same in all
        is_finite = all(numbers) and not faulty
        if is_finite:
            for name in update.players:
                for group in self.optimizers[name].param_groups:
                    group["lr"] = learning_rate(self.config.optimizer(name), self.step, self.config.train.steps)
                self.optimizers[name].step()
            self.nonfinite.passed(update)
            with torch.no_grad():
                self.method.after_update(self.players, losses[-1].carry)
        for name in update.players:
            self.optimizers[name].zero_grad(set_to_none=True)
        if is_finite:
            self._note(update, losses, norms)
        else:
            said = self.nonfinite.refuse(self.step, update, losses, norms, self.processes, faulty)
            if log:
                log.say(said)
        return is_finite

    def _note(self, update: Update, losses: list[Loss], norms: dict[str, Tensor]) -> None:
        """Record an update that was taken."""
        first = update.players[0]
        for loss in losses:
            self._meter.add({f"{first}/loss": loss.total, **{f"{first}/{k}": v for k, v in loss.logs.items()}})
        self._meter.add({f"{name}/gradient_norm": norm for name, norm in norms.items()})

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process's share of the step's samples, in pieces."""
        train, processes = self.config.train, self.processes
        share = train.global_batch_size // processes.count
        begin = self.images_seen + share * processes.rank
        size = min(train.micro_batch_size or share, share)
        images, cond = self.real(begin, share)
        for first in range(begin, begin + share, size):
            part = slice(first - begin, first - begin + size)
            yield self.micro_batch(first, images[part], cond[part], size)

    def _class_cond(self, label: Tensor) -> Cond:
        return Cond(label=label) if self.problem.num_classes else NO_COND

    def _make_optimizers(self) -> None:
        self.parameters = {name: trainable(module) for name, module in self.trained.items()}
        self.optimizers = {name: make_optimizer(m, self.config.optimizer(name)) for name, m in self.trained.items()}

    def _share_out(self, mesh: DeviceMesh) -> None:
        """Keep this process's part of each player alone, with optimisers of its own; go on where the run stopped."""
        teacher = [self.problem.teacher] if self.problem.teacher and not is_offloaded(self.problem.teacher) else []
        averages = [ema.module for ema in self.emas.values()]
        self._outline = outline(self.ema.module if self.ema else self.trained[self.method.student])
        for module in (*teacher, *self.trained.values(), *self.followers.values(), *averages):
            shard(module, mesh)
        self._make_optimizers()
        self.averaging = Shards(self.trained)
        if self.start:
            self._state.restore(self.start)

    def _open_log(self) -> Log:
        """The run's log; of the other processes nothing is told but through the first."""
        if not self.processes.is_main:
            return Silence()
        return RunLog(
            self.folder,
            title=f"{self.method.name} {self.folder}",
            start_step=self.step,
            num_steps=self.config.train.steps,
            quiet=self.quiet,
            trackers=self.config.trackers,
            settings=dump(self.config),
            cpu_began=self._cpu_began,
        )

    def _prepare(self) -> None:
        """What the method makes once; kept with the run, so that a resumed run and all processes use the same."""
        file = self.folder / "prepared.safetensors"
        seed, is_kept = self.config.train.seed, self.start is not None
        self.processes.on_main_first(
            lambda: prepare_once(file, self.method, self.problem, seed, is_kept=is_kept, device=self.device)
        )
        if 0 < len(self.processes.ranks_where(file.exists())) < self.processes.count:
            raise UserError(
                f"run = {str(self.folder)!r}: is not the same folder for all processes; put it where all see it"
            )
        self.stored = read_tensors(file, str(self.device)) if file.exists() else {}
        if self.start is None:
            with torch.no_grad():
                self.method.initialise(self.players, self.stored)
                self.processes.begin_equal([*self.trained.values(), *self.followers.values()])
                for ema in self.emas.values():
                    ema.copy_from(self.trained[self.method.student])
        if not self.method.keeps_teacher:
            self.players = Players(**self.trained, **self.followers)
            self.problem = replace(self.problem, teacher=None)
            self.teacher = None
        if self.mesh:
            self._share_out(self.mesh)
