"""The loop: draw -> loss -> backward -> step -> EMA. It knows no paper; a method says who steps when.

Everything random depends on (seed, step, global sample index), every rate on the step alone: so a run that was
stopped and resumed equals one that was not, bit for bit on a CPU, and accumulation and several processes equal one
large batch.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.data.pictures import save_panels
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.threads import threads
from diffdistill.distillation.method import Loss, Method, Players, Problem, Update
from diffdistill.distributed.processes import Processes, others
from diffdistill.distributed.stopping import StopRequested, stop_signals
from diffdistill.models.negative_prompts import drawn_scale
from diffdistill.settings.links import refuse_link
from diffdistill.settings.values import dump
from diffdistill.storage.checkpoint import PREFIX, Checkpoint, list_checkpoints, save_checkpoint, save_sharded
from diffdistill.training.assembly import Assembly, assemble, keep_prepared, own_folder
from diffdistill.training.config import RunConfig
from diffdistill.training.ema import EMA
from diffdistill.training.iteration import MicroBatch
from diffdistill.training.nonfinite import NonfiniteGuard
from diffdistill.training.notes import notes_on_averages
from diffdistill.training.optimizers import clip, learning_rate
from diffdistill.training.plan import Plan, plan
from diffdistill.training.reports.log import Log, Meter, RunLog, Silence
from diffdistill.training.reports.preview import preview_panels
from diffdistill.training.speed.options import mark_step


class Trainer:
    """One run: an `Assembly`, or a `Plan` that becomes one when it is first needed, or a config, which is planned here.

    Raises UserError for whatever the config asks that cannot be, before anything is written.
    """

    def __init__(
        self,
        run: RunConfig | Plan | Assembly,
        *,
        resume: bool | str = False,
        quiet: bool = False,
        allow_changes: bool = False,
        trusts_code: bool = False,
        teacher: Denoiser | None = None,
        data: object = None,
    ) -> None:
        """Of a config: resume, allow_changes, trusts_code, teacher, data, see `plan`."""
        self._cpu_began, self._meter, self.quiet = time.process_time(), Meter(), quiet
        if isinstance(run, RunConfig):
            run = plan(
                run, resume=resume, allow_changes=allow_changes, trusts_code=trusts_code, teacher=teacher, data=data
            )
        self._assembly = run if isinstance(run, Assembly) else None
        self.plan: Plan = run.plan if isinstance(run, Assembly) else run
        train, self.step = self.plan.config.train, self.plan.step
        self.nonfinite = NonfiniteGuard(train.on_nonfinite, train.max_skips, self.plan.skips)

    @property
    def assembly(self) -> Assembly:
        """The run's parts; made in memory, with nothing written, where `run` has not made them yet."""
        return self._assembled(None)

    def _assembled(self, folder: FilePath | None) -> Assembly:
        if self._assembly is None:
            with threads(self.config.train.num_threads):
                self._assembly = assemble(self.plan, folder)
            self.plan = self._assembly.plan  # a teacher that is not needed any more leaves memory
        elif folder:
            self.processes.on_main_first(partial(keep_prepared, self._assembly, folder))
        return self._assembly

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def method(self) -> Method:
        return self.plan.method

    @property
    def problem(self) -> Problem:
        return self.assembly.plan.problem

    @property
    def folder(self) -> FilePath:
        return FilePath(self.config.run)

    @property
    def processes(self) -> Processes:
        return self.plan.processes

    @property
    def device(self) -> torch.device:
        return self.plan.device

    @property
    def players(self) -> Players:
        """The networks that losses are given, by name."""
        return self.assembly.iteration.players

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """The players that updates train, by name."""
        return self.assembly.plan.trained

    @property
    def ema(self) -> EMA | None:
        """The average that samples are taken from."""
        return self.assembly.emas.get("ema")

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from: the EMA where there is one. Whole: all processes ask for it."""
        return self.assembly.student

    @property
    def images_seen(self) -> int:
        return self.step * self.config.train.global_batch_size

    def run(self) -> FilePath:
        """Train to the last step. Returns the newest checkpoint's folder.

        SIGINT and SIGTERM save a checkpoint and raise StopRequested. Raises TrainingError when the losses stay
        non-finite, OSError when nothing can be written (the last good checkpoint stays).
        """
        train, processes, evaluator = self.config.train, self.processes, self.plan.evaluator
        with others(), threads(train.num_threads), ExitStack() as held:
            processes.on_main_first(lambda: held.enter_context(own_folder(self.folder, self.config)))
            distance = self._assembled(self.folder).distance
            if distance:
                distance.open(self.folder, self.step)
            log, stopping = held.enter_context(self._open_log()), held.enter_context(stop_signals())
            for note in self.plan.inputs.notes:
                log.note(note)
            for warning in notes_on_averages(self.config):
                log.note(warning)
                log.say(f"warning: {warning}")
            if self.plan.start:
                log.tell(f"{self.folder}: {self._resumed}")
            while self.step < train.steps:
                self.train_step(log)
                log.step(self.step)
                # A signal may arrive at any line, and at one process before another: what is decided here holds.
                last, signal = self.step == train.steps, processes.largest(stopping[0] if stopping else 0)
                if self.step % train.log_every == 0 or last:
                    self.report(log)
                if train.preview_every and (self.step % train.preview_every == 0 or last):
                    log.preview(self.step, self.save_preview())
                is_best = evaluator.examine(self, is_last=last, log=log)
                if self.step % train.checkpoint_every == 0 or last or signal or is_best:
                    saved = self.save()
                if signal:
                    raise StopRequested(signal, f"at step {self.step}; saved in {saved}")
            said = self.nonfinite.check_end(self.step)
            if said:
                log.say(said)
        return list_checkpoints(self.folder / "checkpoints")[-1]

    def train_step(self, log: Log | None = None) -> None:
        """One iteration: every update that is due, in the method's order, then the EMA."""
        assembly, method = self.assembly, self.method
        mark_step(self.config.speed)
        micros = list(self._micro_batches())
        due = [update for update in method.updates if update.is_due(self.step, self.images_seen)]
        if log:
            log.begin(len(due) * len(micros))
        train, amount = self.config.train, self.config.negative_scale
        drawn = drawn_scale(self.trained[method.student], amount, seed=train.seed, step=self.step)
        with threads(train.num_threads), drawn:
            self._updates(due, micros, log)
        self.step += 1
        with torch.no_grad():
            method.after_step(self.players, assembly.iteration.stored, self.step)

    def _updates(self, due: Sequence[Update], micros: list[MicroBatch], log: Log | None) -> None:
        """One optimiser step for each of these, the EMA after the student's."""
        assembly, method = self.assembly, self.method
        for update in due:
            is_done = self._update(update, micros, log)
            for ema in assembly.emas.values() if is_done and method.student in update.players else ():
                ema.update(
                    self.trained[method.student],
                    images_seen=self.images_seen,
                    batch_images=self.config.train.global_batch_size * update.every,
                )

    def report(self, log: Log) -> None:
        """Log the means since the last report, and the health signals when they are due, with their warnings."""
        values, signals = self.processes.means(self._meter.means()), dict[str, float]()
        health, distance, log_every = self.assembly.health, self.assembly.distance, self.config.train.log_every
        means = values
        if health and health.is_due(self.step, log_every):
            sampler, student, seed = self.method.sampler(self.problem), self.method.student, self.config.train.seed
            if self.method.keeps_teacher:
                signals |= health.examine(self.players, student, sampler, self.problem, step=self.step, seed=seed)
            stored, when = self.assembly.iteration.stored, {"step": self.step, "seed": seed}
            signals |= health.examine_method(self.method, self.players, self.problem, stored, **when)
        else:
            means = {}
        if distance and distance.is_due(self.step, log_every):
            signals |= distance.examine(self.student, self.step, self.processes)
        if health and signals:
            for warning in health.judge(self.step, signals, means):
                log.warn(warning)
            values |= {f"health/{name}": value for name, value in signals.items()}
        log.report(self.step, self.images_seen, values)

    def save(self) -> FilePath:
        """Write a checkpoint of everything that a resumed run needs, on any number of processes.

        While updates are skipped no earlier one is dropped. Raises TrainingError if weights are not finite.
        """
        folder, best = self.folder / "checkpoints", self.plan.evaluator.best(self.step)
        checkpoint = Checkpoint(self.step, self.assembly.state.tensors(), self._settings)
        self.nonfinite.check_weights(self.step, checkpoint.tensors, self.processes)
        keep = None if self.nonfinite.is_skipping else self.config.train.keep_checkpoints
        if self.plan.mesh:
            save_sharded(self.processes, folder, checkpoint, keep=keep, best=best)
        else:
            self.processes.on_main_first(lambda: save_checkpoint(folder, checkpoint, keep=keep, best=best))
        return folder / f"{PREFIX}{self.step:08d}"

    @property
    def _resumed(self) -> str:
        steps = self.config.train.steps
        return f"resumed at step {self.step} of {steps}" if self.step < steps else f"finished, {steps} steps"

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint says beside tensors."""
        return {"format": 1, "skips": self.nonfinite.skips, **self.plan.described}

    def save_preview(self) -> FilePath:
        """previews/step-*.png: the student's samples, and the other players' view of them. All processes make them, as
        they may hold parts of the players, and the first writes."""
        file = self.folder / "previews" / f"step-{self.step:08d}.png"
        student, sampler = self.method.student, self.method.sampler(self.problem)
        names, seed = self.plan.spec.class_names, self.config.train.seed
        views = preview_panels(
            self.players, student, self.student, sampler, self.problem, seed=seed, device=self.device, class_names=names
        )
        refuse_link(file.parent)
        columns = 10 if self.problem.num_classes == 10 else 8
        self.processes.on_main_first(lambda: save_panels(file, views, columns=columns, min_side=48))
        return file

    def _update(self, update: Update, micros: list[MicroBatch], log: Log | None) -> bool:
        """One optimiser step of some players. Returns whether it was taken."""
        iteration, optimizers, losses = self.assembly.iteration, self.assembly.optimizers, list[Loss]()
        self._gather(update, micros)
        for number, micro in enumerate(micros, 1):
            with self.assembly.averaging.of(update, is_last=number == len(micros)) as ask:
                loss = ask(partial(iteration.loss, update, micro))
                (loss.total / len(micros)).backward()
            micro.draw |= loss.carry
            losses.append(loss)
            if log:
                log.part()
        norms = {name: clip(iteration.trained[name], self.config.optimizer(name)) for name in update.players}
        numbers = torch.stack([*norms.values(), *(loss.total.detach() for loss in losses)]).isfinite().tolist()
        faulty = self.processes.ranks_where(not all(numbers[len(norms) :]))  # the gradients are the same in all
        is_finite = all(numbers) and not faulty
        if is_finite:
            for name in update.players:
                for group in optimizers[name].param_groups:
                    group["lr"] = learning_rate(self.config.optimizer(name), self.step, self.config.train.steps)
                optimizers[name].step()
            self.nonfinite.passed(update)
            with torch.no_grad():
                self.method.after_update(self.players, losses[-1].carry)
        for name in update.players:
            optimizers[name].zero_grad(set_to_none=True)
        if is_finite:
            self._note(update, losses, norms)
        else:
            said = self.nonfinite.refuse(self.step, update, losses, norms, self.processes, faulty)
            if log:
                log.say(said)
        return is_finite

    @torch.no_grad()
    def _gather(self, update: Update, micros: list[MicroBatch]) -> None:
        """What a loss needs to know of the whole batch, where the batch comes in pieces."""
        if update.statistics is None or len(micros) * self.processes.count == 1:
            return
        iteration = self.assembly.iteration
        iteration.select(update)  # for the dropout of the loss
        parts = [iteration.ask(update.statistics, micro, seed=update.loss) for micro in micros]
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        whole = {f"all {name}": self.processes.gather(values) for name, values in own.items()}
        for micro in micros:
            micro.draw |= whole

    def _note(self, update: Update, losses: list[Loss], norms: dict[str, Tensor]) -> None:
        """Record an update that was taken."""
        first = update.players[0]
        for loss in losses:
            self._meter.add({f"{first}/loss": loss.total, **{f"{first}/{k}": v for k, v in loss.logs.items()}})
        self._meter.add({f"{name}/gradient_norm": norm for name, norm in norms.items()})

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process's share of the step's samples, in pieces."""
        share, micro_size = self.plan.share, self.config.train.micro_batch_size
        begin = self.images_seen + share * self.processes.rank
        size = min(micro_size or share, share)
        images, cond = self.plan.real(begin, share)
        for first in range(begin, begin + share, size):
            part = slice(first - begin, first - begin + size)
            yield self.assembly.iteration.micro_batch(self.step, first, images[part], cond[part], size)

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
            first=self.method.student,
            trackers=self.config.trackers,
            settings=dump(self.config),
            cpu_began=self._cpu_began,
        )
