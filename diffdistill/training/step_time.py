"""How long a step will take: one micro-batch of each update is timed, and multiplied."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from diffdistill.diffusion.threads import threads
from diffdistill.distillation.method import Update, first_with_all, phase_starts
from diffdistill.training.assembly import Assembly
from diffdistill.training.config import TrainConfig
from diffdistill.training.iteration import MicroBatch
from diffdistill.training.optimizers import clip
from diffdistill.training.plan import Plan
from diffdistill.training.speed.options import mark_step

BUDGET_SECONDS = 6.0
PASSES = 10
FEW = 2
"""Groups of samples that are timed first: they tell how many the budget allows."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch by loss, forward and backward, and of what follows once a step by loss: clipping, the
    optimisers and the averages.

    reading: of a micro-batch's images, conditions and random numbers, once a step.  earlier: of the run's phases before
    the last their steps, and the seconds of the losses that are due in them.  steps: of the whole run.
    num_measured: samples that were timed; fewer than a micro-batch has where that takes too long, and scaled.
    cpu_share: CPU seconds to seconds, where the CPU computes on one thread: far below 1, other programs have the rest.
    """

    micro_batches: Mapping[str, float]
    after: Mapping[str, float]
    updates: tuple[Update, ...]
    num_micro_batches: int
    reading: float = 0.0
    earlier: tuple[tuple[int, Mapping[str, float]], ...] = ()
    steps: int = 1
    num_measured: int = 0
    cpu_share: float | None = None

    @property
    def step(self) -> float:
        """The mean of the run's steps, each update as often as it is due."""
        last = self.steps - sum(count for count, _ in self.earlier)
        total = sum(count * self._cost(seconds) for count, seconds in (*self.earlier, (last, self.micro_batches)))
        return self.reading * self.num_micro_batches + total / self.steps

    def _cost(self, seconds: Mapping[str, float]) -> float:
        """Of a step of a phase."""
        due = (update for update in self.updates if update.loss in seconds)
        return sum(
            (seconds[update.loss] * self.num_micro_batches + self.after[update.loss]) / update.every for update in due
        )


@dataclass
class _Timed:
    """Seconds of each pass.  spent: of the budget, in the mean."""

    reading: list[float] = field(default_factory=list)
    micro_batches: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    after: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spent: float = 0.0


class _Meter(NamedTuple):
    """The clocks, in seconds."""

    clock: Callable[[], float]
    spent: Callable[[], float]


def own_seconds(train: TrainConfig) -> float:
    """The seconds that count for a budget: on a CPU those that it gave to this process, by thread, which a busy machine
    does not make more."""
    if train.device == "auto" and torch.cuda.is_available():
        return time.perf_counter()
    return time.process_time() / (train.num_threads or torch.get_num_threads())


def one_micro_batch(assembly: Assembly, size: int | None = None) -> Assembly:
    """The same with a batch of one micro-batch in each process: it needs the same memory, but for the batch itself.

    size: of the micro-batch; default: the run's.
    """
    plan = assembly.plan
    size = _size(plan) if size is None else size
    train = replace(plan.config.train, global_batch_size=size * plan.processes.count)
    if train.micro_batch_size is not None:
        train = replace(train, micro_batch_size=min(size, train.micro_batch_size))
    config = copy(plan.config)
    object.__setattr__(config, "train", train)  # whose other settings are checked, and may be a program's objects
    return replace(assembly, plan=replace(plan, config=config))


def measure_step_time(
    assembly: Assembly,
    budget: float = BUDGET_SECONDS,
    *,
    clock: Callable[[], float] = time.perf_counter,
    spent: Callable[[], float] | None = None,
) -> StepTime:
    """Train on one micro-batch a few times, as often as the budget of seconds allows, once at least; or on a part of
    it, where that takes longer. The first time warms up, and counts only where it is the last. Weights change, and
    nothing is written.

    clock: says the seconds.  spent: those that count for the budget; default `own_seconds`.
    """
    plan = assembly.plan
    train, size = plan.config.train, _size(plan)
    meter = _Meter(clock, spent or partial(own_seconds, train))
    began, cpu = clock(), time.process_time()
    starts = phase_starts(plan.method.updates, train.global_batch_size, train.steps)
    each = budget / len(starts)
    with threads(train.num_threads):
        *before, (few, many, measured) = [_measure(assembly, start, size, each, meter) for start in starts]
        is_alone = plan.device.type == "cpu" and torch.get_num_threads() == 1
    seconds = clock() - began
    lengths = [end - start for start, end in pairwise(starts)]
    return StepTime(
        micro_batches=_scaled(few, many, measured, size, plan.method.group),
        after=_means(many.after),
        updates=plan.method.updates,
        num_micro_batches=plan.share // size,
        reading=_mean(many.reading) * size / measured,
        earlier=tuple((n, _scaled(*found, size, plan.method.group)) for n, found in zip(lengths, before, strict=True)),
        steps=train.steps,
        num_measured=measured,
        cpu_share=(time.process_time() - cpu) / seconds if is_alone and seconds > 0 else None,
    )


def _measure(assembly: Assembly, start: int, size: int, budget: float, meter: _Meter) -> tuple[_Timed, _Timed, int]:
    """A few samples and as many as the budget allows, at most `size`, of the phase from `start` on; and how many."""
    began, group = meter.spent(), assembly.plan.method.group
    least = min(FEW * group, size)
    few = _passes(assembly, start, least, 2, budget / 4, meter)
    left = budget - (meter.spent() - began)
    affordable = int(left / 2 / max(few.spent, 1e-9) * least)
    measured = min(size, affordable - affordable % group)
    if measured < 2 * least and measured < size:
        return few, few, least
    return few, _passes(assembly, start, measured, PASSES, left, meter), measured


def _passes(assembly: Assembly, start: int, size: int, most: int, budget: float, meter: _Meter) -> _Timed:
    plan, found, began, clock = assembly.plan, _Timed(), meter.spent(), meter.clock
    batch = plan.config.train.global_batch_size
    step = first_with_all(plan.method.updates, batch, start=start)
    due = [update for update in plan.method.updates if update.is_due(step, step * batch)]
    for number in range(most):
        mark_step(plan.config.speed)
        begin = clock()
        images, cond = plan.real(0, size)
        micro = assembly.iteration.micro_batch(step, 0, images, cond, size)
        found.reading.append(clock() - begin)
        for update in due:
            begin = clock()
            _train(assembly, update, micro, is_one_of_many=plan.share > _size(plan))
            middle = clock()
            _step(assembly, update)
            found.micro_batches[update.loss].append(middle - begin)
            found.after[update.loss].append(clock() - middle)
        found.spent = (meter.spent() - began) / (number + 1)
        if found.spent * (number + 2) > budget:
            break
    return found


def _scaled(few: _Timed, many: _Timed, measured: int, size: int, group: int = 1) -> dict[str, float]:
    """Seconds of each loss for `size` samples: by a line through few and many, or in proportion to one of them."""
    found = _means(many.micro_batches)
    if measured == size:
        return found
    if many is few or len(few.reading) == 1:
        return {name: seconds * size / measured for name, seconds in found.items()}
    least = _means(few.micro_batches)
    return {
        name: seconds + max(seconds - least[name], 0.0) / (measured - FEW * group) * (size - measured)
        for name, seconds in found.items()
    }


def _size(plan: Plan) -> int:
    """Samples of a micro-batch."""
    return min(plan.config.train.micro_batch_size or plan.share, plan.share)


def _train(assembly: Assembly, update: Update, micro: MicroBatch, *, is_one_of_many: bool) -> None:
    """Forward and backward; the whole batch's numbers are asked for where the batch comes in pieces."""
    iteration = assembly.iteration
    if update.statistics and is_one_of_many:
        iteration.select(update)
        with torch.no_grad():
            iteration.ask(update.statistics, micro, seed=update.loss)
    loss = iteration.loss(update, micro)
    loss.total.backward()
    micro.draw |= loss.carry
    _wait(assembly)


def _step(assembly: Assembly, update: Update) -> None:
    plan = assembly.plan
    for name in update.players:
        clip(assembly.iteration.trained[name], plan.config.optimizer(name))
        assembly.optimizers[name].step()
        assembly.optimizers[name].zero_grad(set_to_none=True)
    if plan.method.student in update.players:
        for ema in assembly.emas.values():
            ema.update(plan.student, images_seen=0, batch_images=plan.config.train.global_batch_size)
    _wait(assembly)


def _wait(assembly: Assembly) -> None:
    if assembly.plan.device.type == "cuda":
        torch.cuda.synchronize(assembly.plan.device)


def _means(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: _mean(found) for name, found in seconds.items()}


def _mean(seconds: Sequence[float]) -> float:
    """Without the first, which warms up, where there are more."""
    warm = seconds[1:] or seconds
    return sum(warm) / len(warm)
