"""A run that meets the end of its memory: it says what would fit, or goes on with smaller micro-batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import torch

from diffdistill.distributed.stopping import TrainingError
from diffdistill.settings.terminal import say
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.prediction import plan_memory, show_bytes
from diffdistill.training.plan import Plan
from diffdistill.training.trainer import Trainer


def run_with_oom_retry(
    config: RunConfig,
    *,
    resume: bool | str = False,
    allow_changes: bool = False,
    quiet: bool = False,
    trusts_code: bool = False,
    look: Callable[[Plan], None] | None = None,
) -> FilePath:
    """A `Trainer`'s run. Out of memory, and if the config says so, it goes on from its last checkpoint with half the
    micro-batch: the batch stays, and so does the result, but for rounding.

    look: is shown the plan before the first step.
    Raises TrainingError where it does not say so, or there is nothing left to halve. Of several processes one alone
    cannot go on: they all stop.
    """
    while True:
        trainer = Trainer(config, resume=resume, allow_changes=allow_changes, quiet=quiet, trusts_code=trusts_code)
        if look:
            look(trainer.plan)
        try:
            return trainer.run()
        except torch.OutOfMemoryError as error:
            can_go_on = config.train.on_out_of_memory == "halve" and trainer.processes.count == 1
            smaller = with_half(config) if can_go_on else None
            if smaller is None:
                raise TrainingError(explain(trainer, error)) from None
            config, resume = smaller, True
            message = (
                f"out of memory at step {trainer.step}; goes on from the last checkpoint with {half_named(smaller)}"
            )
            say(message)
        del trainer  # and with it all that it holds, outside the handler, whose error held the tensors of the step
        torch.cuda.empty_cache()


def explain(trainer: Trainer, error: torch.OutOfMemoryError) -> str:
    """What was asked for, what the run needs by its plan, and what to turn on."""
    asked = str(error).splitlines()[0] if str(error) else "no reason given"
    said = f"out of memory at step {trainer.step}: {asked} The last checkpoint is intact."
    # To prepare anew would take long, and sharded players do not compute in one process alone.
    is_known = trainer.plan.mesh is None and not trainer.assembly.iteration.stored
    plan = _plan(trainer) if is_known else ""
    smaller = with_half(trainer.config, trainer.processes.count)
    offer = f" With {half_named(smaller)} the batch and the result stay; go on with --resume." if smaller else ""
    return f"{said}{plan}{offer} `diffdistill doctor CONFIG` says what fits"


def with_half(config: RunConfig, num_processes: int = 1) -> RunConfig | None:
    """The same run in pieces half as large, or as near to half as shares out a process's part of the batch."""
    share = config.train.global_batch_size // num_processes
    now = min(config.train.micro_batch_size or share, share)
    sizes = [size for size in range(now // 2, 0, -1) if share % size == 0]
    return replace(config, train=replace(config.train, micro_batch_size=sizes[0])) if sizes else None


def half_named(config: RunConfig) -> str:
    return f"train.micro_batch_size={config.train.micro_batch_size}"


def _plan(trainer: Trainer) -> str:
    """The run's needs by its plan, if there is memory left to make one."""
    try:
        plan = plan_memory(trainer.plan.at_largest, trainer.assembly.iteration)
    except torch.OutOfMemoryError:
        return ""
    kept = f"{show_bytes(plan.fixed)} all the time, {show_bytes(plan.peak_activations)} for a micro-batch"
    return f" The plan: {show_bytes(plan.total)} ({kept} of {plan.micro_batch_size})."
