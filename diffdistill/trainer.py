"""The loop: draw -> loss -> backward -> step -> EMA. It knows no paper; a method says who steps when.

Everything random depends on (seed, step, global sample index), every rate on the step alone: so a run that was
stopped and resumed equals one that was not, bit for bit on a CPU, and accumulation equals one large batch.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffdistill.checkpoint import (
    Checkpoint,
    clear_temporary,
    flatten,
    list_checkpoints,
    load_checkpoint,
    load_strictly,
    save_checkpoint,
    select_group,
    write_tensors_atomically,
    write_text_atomically,
)
from diffdistill.config import RunConfig, differences, dump, dump_yaml, parse_config
from diffdistill.data.order import DataOrder
from diffdistill.denoiser import NO_COND, Cond, freeze
from diffdistill.draws import Draws
from diffdistill.ema import EMA
from diffdistill.health import Health, Reference
from diffdistill.log import Meter, RunLog
from diffdistill.method import Batch, Loss, Players, Update
from diffdistill.optimizers import learning_rate, make_optimizer, optimizer_tensors, restore_optimizer, trainable
from diffdistill.preview import preview_panels, save_panels
from diffdistill.schema import UserError
from diffdistill.setup import check_batch, check_labels, check_players, find_start, load_teacher, seeded, settle
from diffdistill.speed import SpeedConfig, apply_speed
from diffdistill.stopping import StopRequested, stop_signals
from diffdistill.watch import make_watch

LOGGING = ("log_every", "preview_every", "checkpoint_every", "keep_checkpoints")
PLACES = ("data.cache", "data.path", "data.root", "data.download", "data.labels_file")  # the content must stay
FREE_GROUPS = ("run", "health", "trackers", "eval")
FREE_TO_CHANGE = (
    *PLACES,
    *(f"train.{name}" for name in ("steps", "device", "num_threads", "on_nonfinite", "max_skips", *LOGGING)),
    *(f"speed.{setting.name}" for setting in fields(SpeedConfig) if setting.name != "teacher_dtype"),
)
"""Settings that a resumed run may change, beside whole groups."""


class TrainingError(RuntimeError):
    """Training cannot go on. The command line prints it without a traceback and exits with 1."""


@dataclass
class MicroBatch:
    """A part of the global batch on this process; `draw` gathers what the step's updates carry over."""

    rng: Draws
    batch: Batch
    draw: dict[str, Tensor] = field(default_factory=dict)


class Trainer:
    """One run, from its config. Build it, then `run()`.

    Raises UserError for whatever the config asks that cannot be, before anything is written.
    """

    def __init__(self, config: RunConfig, *, resume: bool | str = False, quiet: bool = False) -> None:
        """resume: False starts anew (an existing run's folder is refused), True goes on from the newest
        checkpoint, a name ("step-00000500") from that one."""
        self.config, self.method, self.quiet = config, config.method, quiet
        self._cpu_began = time.process_time()
        train = config.train
        self.folder = FilePath(config.run)
        # accelerate allows one precision a process, but runs may follow each other in one: autocast is ours.
        self.accelerator = Accelerator(mixed_precision="no", cpu=train.device == "cpu")
        self.device = self.accelerator.device
        if train.num_threads:
            torch.set_num_threads(train.num_threads)
        self.start = find_start(self.folder, resume)
        self.source = config.data.load().to(self.device)
        checkpoint = load_checkpoint(self.start) if self.start else None
        self.teacher = load_teacher(config.teacher, self.device, checkpoint)
        self.teacher_source = str(self.teacher.source) if self.teacher else None
        check_batch(train, self.accelerator.num_processes)
        self.spec, self.setting = settle(config, self.source, self.teacher)
        check_labels(self.method, self.setting, self.source)
        self.order = DataOrder(self.source, train.seed, classes=self.setting.classes)
        with seeded(train.seed):
            modules = self.method.players(self.setting)
        teachers = {"teacher": self.teacher.denoiser} if self.teacher else {}
        trained = {name for update in self.method.updates for name in update.players}
        check_players(config, {name: module for name, module in modules.items() if name in trained})
        self.trained = {name: module.to(self.device).train() for name, module in modules.items() if name in trained}
        self.followers = {name: freeze(m.to(self.device)) for name, m in modules.items() if name not in trained}
        apply_speed(config.speed, self.trained, self.setting.teacher, self.followers)
        self.parameters = {name: trainable(module) for name, module in self.trained.items()}
        self.players = Players(**teachers, **self.trained, **self.followers)
        self.optimizers = {name: make_optimizer(m, config.optimizer(name)) for name, m in self.trained.items()}
        ema_device = self.device if config.speed.ema_device == "same" else torch.device("cpu")
        student = self.trained[self.method.student]
        self.emas = {group: EMA(student, settings, ema_device) for group, settings in config.emas.items()}
        self.watch = make_watch(config.eval, self.folder, student, self.spec, self.device)
        self.step = 0
        self.skips: dict[str, int] = {}  # by loss, so that one player's success does not hide another's failure
        self.stored: dict[str, Tensor] = {}
        self._meter = Meter()
        health = config.health if self.teacher and self.method.keeps_teacher else None
        self.health = Health(health, Reference.of_source(self.source, self.order.members)) if health else None
        if checkpoint:
            self._restore(checkpoint)

    @property
    def ema(self) -> EMA | None:
        """The average that samples are taken from."""
        return self.emas.get("ema")

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from: the EMA where there is one."""
        return self.ema.on(self.device) if self.ema else self.trained[self.method.student]

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
        train = self.config.train
        self._open_folder()
        self._prepare()
        title = f"{self.method.name} {self.folder}"
        log = RunLog(
            self.folder,
            title=title,
            start_step=self.step,
            num_steps=train.steps,
            quiet=self.quiet,
            trackers=self.config.trackers,
            settings=dump(self.config),
            cpu_began=self._cpu_began,
        )
        with log, stop_signals() as stopping:
            while self.step < train.steps:
                self.train_step(log)
                log.step(self.step)
                last, is_stopping = self.step == train.steps, bool(stopping)  # a signal may arrive at any line
                if self.step % train.log_every == 0 or last:
                    self.report(log)
                if train.preview_every and (self.step % train.preview_every == 0 or last):
                    log.preview(self.step, self.save_preview())
                is_best = self.watch.examine(self, is_last=last, log=log)
                if self.step % train.checkpoint_every == 0 or last or is_stopping or is_best:
                    self.save()
                if is_stopping:
                    raise StopRequested(stopping[0], self.step, self.folder)
        return list_checkpoints(self.folder / "checkpoints")[-1]

    def train_step(self, log: RunLog | None = None) -> None:
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

    def report(self, log: RunLog) -> None:
        """Log the means since the last report, and the health signals when they are due, with their warnings."""
        values, health = self._meter.means(), self.health
        if (
            health
            and self.step // health.config.every > (self.step - self.config.train.log_every) // health.config.every
        ):
            sampler, student, seed = self.method.sampler(self.setting), self.method.student, self.config.train.seed
            signals = health.examine(self.players, student, sampler, self.setting, step=self.step, seed=seed)
            for warning in health.judge(self.step, signals, values):
                log.warn(warning)
            values |= {f"health/{name}": value for name, value in signals.items()}
        log.report(self.step, self.images_seen, values)

    def save(self) -> FilePath:
        """Write a checkpoint of everything that a resumed run needs."""
        modules = self.trained | self.followers
        tensors = {"players": flatten({name: module.state_dict() for name, module in modules.items()})}
        for group, ema in self.emas.items():
            tensors[group] = flatten({self.method.student: ema.module.state_dict()})
        tensors["optimizers"] = flatten({n: optimizer_tensors(o) for n, o in self.optimizers.items()})
        state = {
            "format": 1,
            "skips": self.skips,
            "student": self.method.student,
            "model": dump(self.spec),
            "config": dump(self.config),
            "data": self.source.key,
            "teacher": self.teacher_source,
        }
        keep, best = self.config.train.keep_checkpoints, self.watch.best(self.step)
        return save_checkpoint(self.folder / "checkpoints", Checkpoint(self.step, tensors, state), keep=keep, best=best)

    def save_preview(self) -> FilePath:
        """previews/step-*.png: the student's samples, and the other players' view of them."""
        file = self.folder / "previews" / f"step-{self.step:08d}.png"
        student, sampler = self.method.student, self.method.sampler(self.setting)
        views = preview_panels(
            self.players, student, self.student, sampler, self.setting, seed=self.config.train.seed, device=self.device
        )
        save_panels(file, views, columns=10 if self.setting.num_classes == 10 else 8)
        return file

    def loss(self, update: Update, micro: MicroBatch) -> Loss:
        """An update's loss on a micro-batch, with a graph to the update's players alone; only they have dropout."""
        for name, parameters in self.parameters.items():
            if self.trained[name].training != (name in update.players):
                self.trained[name].train(name in update.players)
            for parameter in parameters:
                parameter.requires_grad_(name in update.players)
        made: Loss = self._ask(update.loss, micro, seed=update.loss)
        return made

    def _ask(self, function: str, micro: MicroBatch, *, seed: str) -> Any:
        """A function of the method's on a micro-batch.  seed: names the numbers of dropout inside the networks."""
        torch.manual_seed(micro.rng.torch_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            return self.method.call(function, self.players, micro.draw, micro.batch)

    @torch.no_grad()
    def _gather(self, update: Update, micros: list[MicroBatch]) -> None:
        """What a loss needs to know of the whole batch, where the batch comes in pieces."""
        if update.statistics is None or len(micros) == 1:
            return
        parts = [self._ask(update.statistics, micro, seed=update.loss) for micro in micros]
        whole = {f"all {name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
        for micro in micros:
            micro.draw |= whole

    def micro_batch(self, first: int, images: Tensor, cond: Cond, size: int) -> MicroBatch:
        """The samples from number `first` on, with this step's random numbers.  images: [size, ...], or empty."""
        rng = Draws(self.config.train.seed, self.step, torch.arange(first, first + size, device=self.device))
        return MicroBatch(rng, Batch(images, cond, self.stored), self.method.draw(rng, self.setting))

    def real(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Real images and their condition for the samples from `first` on; none where the method needs none."""
        if not self.method.needs_images:
            return torch.empty(0, *self.source.image_shape, device=self.device), NO_COND
        next_first = first + self.config.train.global_batch_size
        images, labels = self.order.take(first, count, next_first=next_first)
        return images, NO_COND if labels is None else self._class_cond(labels)

    def _update(self, update: Update, micros: list[MicroBatch], log: RunLog | None) -> bool:
        """One optimiser step of some players. Returns whether it was taken."""
        losses: list[Loss] = []
        self._gather(update, micros)
        for micro in micros:
            loss = self.loss(update, micro)
            self.accelerator.backward(loss.total / len(micros))
            micro.draw |= loss.carry
            losses.append(loss)
        norms = {name: self._clip(name) for name in update.players}
        is_finite = bool(
            torch.isfinite(torch.stack([*norms.values(), *(loss.total.detach() for loss in losses)])).all()
        )
        if is_finite:
            for name in update.players:
                for group in self.optimizers[name].param_groups:
                    group["lr"] = learning_rate(self.config.optimizer(name), self.step, self.config.train.steps)
                self.optimizers[name].step()
            self.skips[update.loss] = 0
            with torch.no_grad():
                self.method.remember(self.players, losses[-1].carry)
        for name in update.players:
            self.optimizers[name].zero_grad(set_to_none=True)
        self._note(update, losses, norms, is_finite, log)
        return is_finite

    def _clip(self, name: str) -> Tensor:
        """The gradient's norm before clipping, after clipping it as the config says."""
        options, parameters = self.config.optimizer(name), self.parameters[name]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if options.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_norm, norm)
        if options.clip_value:
            nn.utils.clip_grad_value_(parameters, options.clip_value)
        return norm

    def _note(
        self, update: Update, losses: list[Loss], norms: dict[str, Tensor], is_finite: bool, log: RunLog | None
    ) -> None:
        """Record an update; if it was not finite, say so by name, and stop when told to or when it goes on."""
        first = update.players[0]
        if is_finite:
            for loss in losses:
                self._meter.add({f"{first}/loss": loss.total, **{f"{first}/{k}": v for k, v in loss.logs.items()}})
            self._meter.add({f"{name}/gradient_norm": norm for name, norm in norms.items()})
            return
        skips = self.skips[update.loss] = self.skips.get(update.loss, 0) + 1
        parts = {
            name: float(value.detach())
            for loss in losses
            for name, value in ({"total": loss.total} | dict(loss.logs)).items()
        }
        bad = [f"{update.loss} ({name} = {value})" for name, value in parts.items() if not math.isfinite(value)]
        bad += [f"the gradient of {name}" for name, norm in norms.items() if not math.isfinite(float(norm))]
        message = f"step {self.step}, player {first}: {', '.join(dict.fromkeys(bad))} is not finite"
        if self.config.train.on_nonfinite == "stop" or skips >= self.config.train.max_skips:
            more = f", {skips} updates in a row" if skips > 1 else ""
            raise TrainingError(f"{message}{more}. The last checkpoint is intact; try a lower learning rate")
        if log:
            log.say(f"{message}; this update is skipped")

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process's share of the step's samples, in pieces."""
        train, processes = self.config.train, self.accelerator.num_processes
        share = train.global_batch_size // processes
        begin = self.images_seen + share * self.accelerator.process_index
        size = min(train.micro_batch_size or share, share)
        images, cond = self.real(begin, share)
        for first in range(begin, begin + share, size):
            part = slice(first - begin, first - begin + size)
            yield self.micro_batch(first, images[part], cond[part], size)

    def _class_cond(self, label: Tensor) -> Cond:
        return Cond(label=label) if self.setting.num_classes else NO_COND

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back as it was. Raises UserError if the config or the architecture has changed."""
        before = parse_config(checkpoint.state["config"], origin=str(self.start))  # with defaults for newer settings
        changed = [
            f"{key}: was {old!r}, now {new!r}"
            for key, old, new in differences(dump(before), dump(self.config))
            if key not in FREE_TO_CHANGE and key.partition(".")[0] not in FREE_GROUPS
        ]
        if changed:
            raise UserError(f"{self.start}: the config has changed since:\n  " + "\n  ".join(changed))
        if checkpoint.state.get("data", self.source.key) != self.source.key:
            raise UserError(f"{self.start}: the images or labels under `data` are not those that the run began with")
        for name, module in self.trained.items():
            load_strictly(module, select_group(checkpoint.tensors["players"], name), origin=f"{self.start} ({name})")
            restore_optimizer(self.optimizers[name], select_group(checkpoint.tensors["optimizers"], name))
        for name, module in self.followers.items():
            load_strictly(module, select_group(checkpoint.tensors["players"], name), origin=f"{self.start} ({name})")
        for group, ema in self.emas.items():
            weights = select_group(checkpoint.tensors[group], self.method.student)
            load_strictly(ema.module, weights, origin=f"{self.start} ({group})")
        self.step, self.skips = int(checkpoint.state["step"]), dict(checkpoint.state["skips"])

    def _open_folder(self) -> None:
        """Make the run's folder and write the resolved config. Raises UserError where that is not allowed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.folder / "config.yaml", dump_yaml(self.config))
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"run = {str(self.folder)!r}: cannot be written: {error.strerror}") from None
        clear_temporary(self.folder / "checkpoints")

    def _prepare(self) -> None:
        """What the method makes once; kept with the run, so that a resumed run uses the same."""
        from safetensors.torch import load_file

        file = self.folder / "prepared.safetensors"
        if not (self.start and file.exists()):
            file.unlink(missing_ok=True)
            with seeded(self.config.train.seed):  # for weights that it makes; numbers are drawn by step and index
                made = self.method.prepare(self.setting, self.config.train.seed)
            if made:
                write_tensors_atomically(file, made)
        self.stored = load_file(file, device=str(self.device)) if file.exists() else {}
        if self.start is None:
            with torch.no_grad():
                self.method.begin(self.players, self.stored)
                for ema in self.emas.values():
                    ema.copy_from(self.trained[self.method.student])
        if not self.method.keeps_teacher:
            self.players = Players(**self.trained, **self.followers)
            self.setting = replace(self.setting, teacher=None)
            self.teacher = None
