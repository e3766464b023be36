"""What to turn on where a run does not fit: one setting after the other, each with what it leaves."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from diffdistill.networks.recompute import set_recompute
from diffdistill.training.memory.prediction import (
    MemoryPlan,
    PlayerBytes,
    block_growth,
    optimizer_bytes,
    saved_growth,
    show_bytes,
)
from diffdistill.training.speed.offload import is_offloaded
from diffdistill.training.trainer import Trainer


def advise(trainer: Trainer, plan: MemoryPlan, memory: int) -> list[str]:
    """What to turn on until `memory` bytes suffice, each as `setting: what is then needed`. Empty if they do.

    A smaller micro-batch comes first where it is enough: it changes no result. The rest is in the order of what it
    costs. The trainer is left as it was.
    """
    said: list[str] = []
    before = trainer.config
    try:
        for setting, change in _CHANGES.items():
            if plan.total <= memory:
                return said
            smaller = _smaller_micro_batch(plan, memory)
            if smaller:
                return [*said, smaller]
            better = change(trainer, plan)
            if better and better.total < plan.total:
                plan = better
                said.append(f"{setting}: {show_bytes(plan.total)}")
        if plan.total <= memory:
            return said
        least = replace(plan, micro_batch_size=1)
        too_much = f"train.micro_batch_size=1: {show_bytes(least.total)}, still too much: take a smaller network"
        return [*said, _smaller_micro_batch(plan, memory) or too_much]
    finally:
        trainer.config = before
        if not before.speed.activation_checkpointing:
            for player in trainer.players.values():
                set_recompute(player, False)


def _smaller_micro_batch(plan: MemoryPlan, memory: int) -> str | None:
    """The largest micro-batch that shares out the batch and fits."""
    divisors = (size for size in range(plan.micro_batch_size - 1, 0, -1) if plan.batch_size % size == 0)
    totals = ((size, replace(plan, micro_batch_size=size).total) for size in divisors)
    return next(
        (f"train.micro_batch_size={size}: {show_bytes(total)}" for size, total in totals if total <= memory), None
    )


def _halve_precision(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    trainer.config = replace(trainer.config, train=replace(trainer.config.train, precision="bf16"))
    return _measured_anew(trainer, plan)


def _halve_teacher(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    teacher = trainer.problem.teacher
    if teacher is None or is_offloaded(teacher):
        return None
    layers = [part for part in teacher.modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    saved = sum(p.nbytes // 2 for layer in layers for p in layer.parameters() if p.dtype == torch.float32)
    return replace(plan, players={**plan.players, "teacher": PlayerBytes(plan.players["teacher"].weights - saved)})


def _move_averages(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    return replace(plan, has_averages_on_device=False)


def _recompute_blocks(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    denoisers = [player for player in trainer.players.values() if hasattr(player, "net")]
    if not all(set_recompute(denoiser) for denoiser in denoisers):
        return None
    return _measured_anew(trainer, plan)


def _store_moments_in_8bit(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    players = dict(plan.players)
    for name, parameters in trainer.parameters.items():
        options = trainer.config.optimizer(name)
        if options.name in ("adam", "adamw"):
            eight = replace(options, name=f"{options.name}8bit", implementation="auto")  # type: ignore[arg-type]
            players[name] = replace(players[name], optimizer=optimizer_bytes(parameters, eight))
    return replace(plan, players=players)


def _measured_anew(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, activations=saved_growth(trainer), recomputed=block_growth(trainer))


_CHANGES: dict[str, Callable[[Trainer, MemoryPlan], MemoryPlan | None]] = {
    "speed.teacher_dtype=bf16": _halve_teacher,
    "train.precision=bf16": _halve_precision,
    "speed.ema_device=cpu": _move_averages,
    "speed.activation_checkpointing=true": _recompute_blocks,
    "optimizers.<player>.name=adam8bit (or adamw8bit; needs a CUDA GPU)": _store_moments_in_8bit,
}
"""Settings by what they cost in time, the cheapest first. Each leaves the trainer so that the next adds to it."""
