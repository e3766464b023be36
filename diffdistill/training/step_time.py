"""How long a step will take: one micro-batch of each update is timed, and multiplied."""

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch

from diffdistill.distillation.method import Update, first_with_all
from diffdistill.training.assembly import Assembly
from diffdistill.training.iteration import MicroBatch
from diffdistill.training.optimizers import clip
from diffdistill.training.speed.options import mark_step

BUDGET_SECONDS = 6.0
PASSES = 5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch by loss, forward and backward, and of what follows once a step by loss: clipping, the
    optimisers and the averages.  reading: of a micro-batch's images, conditions and random numbers, once a step."""

    micro_batches: Mapping[str, float]
    after: Mapping[str, float]
    updates: tuple[Update, ...]
    num_micro_batches: int
    reading: float = 0.0

    @property
    def step(self) -> float:
        """The mean of the steps in which every update is due as often as it will be."""
        each = (
            (self.micro_batches[update.loss] * self.num_micro_batches + self.after[update.loss]) / update.every
            for update in self.updates
        )
        return self.reading * self.num_micro_batches + sum(each)


def one_micro_batch(assembly: Assembly) -> Assembly:
    """The same with a batch of one micro-batch in each process: it needs the same memory, but for the batch itself."""
    plan = assembly.plan
    size = min(plan.config.train.micro_batch_size or plan.share, plan.share)
    train = replace(plan.config.train, global_batch_size=size * plan.processes.count)
    config = copy(plan.config)
    object.__setattr__(config, "train", train)  # whose other settings are checked, and may be a program's objects
    return replace(assembly, plan=replace(plan, config=config))


def measure_step_time(
    assembly: Assembly, budget: float = BUDGET_SECONDS, clock: Callable[[], float] = time.perf_counter
) -> StepTime:
    """Train on one micro-batch a few times, as often as the budget of seconds allows, once at least. The first time
    warms up, and counts only where it is the last. Weights change, and nothing is written."""
    plan = assembly.plan
    size = min(plan.config.train.micro_batch_size or plan.share, plan.share)
    count = plan.share // size
    step = first_with_all(plan.method.updates, plan.config.train.global_batch_size)
    micro_batches, after, reading = dict[str, list[float]](), dict[str, list[float]](), list[float]()
    began = clock()
    for number in range(PASSES):
        mark_step(plan.config.speed)
        begin = clock()
        images, cond = plan.real(0, size)
        micro = assembly.iteration.micro_batch(step, 0, images, cond, size)
        reading.append(clock() - begin)
        for update in plan.method.updates:
            begin = clock()
            _train(assembly, update, micro, is_one_of_many=count > 1)
            middle = clock()
            _step(assembly, update)
            end = clock()
            micro_batches.setdefault(update.loss, []).append(middle - begin)
            after.setdefault(update.loss, []).append(end - middle)
        if (clock() - began) * (number + 2) / (number + 1) > budget:
            break
    return StepTime(_means(micro_batches), _means(after), plan.method.updates, count, _mean(reading))


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


def _means(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: _mean(found) for name, found in seconds.items()}


def _mean(seconds: list[float]) -> float:
    """Without the first, which warms up, where there are more."""
    warm = seconds[1:] or seconds
    return sum(warm) / len(warm)
