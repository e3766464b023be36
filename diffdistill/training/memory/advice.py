"""What to turn on where a run does not fit: one setting after the other, each with what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffdistill.networks.recompute import set_recompute
from diffdistill.training.iteration import Iteration
from diffdistill.training.memory.lora_over_nf4 import SETTINGS, with_factors_over_nf4
from diffdistill.training.memory.prediction import (
    MemoryPlan,
    PlayerBytes,
    block_growth,
    optimizer_bytes,
    part_of,
    saved_growth,
    show_bytes,
)
from diffdistill.training.plan import Plan
from diffdistill.training.speed.offload import is_offloaded


def advise(plan: Plan, iteration: Iteration, needs: MemoryPlan, memory: int) -> list[str]:
    """What to turn on until `memory` bytes suffice, each as `setting: what is then needed`. Empty if they do.

    A smaller micro-batch comes first where it is enough: it changes no result. The rest is in the order of what it
    costs. The players are left as they were.
    """
    said: list[str] = []
    try:
        for setting, change in _CHANGES.items():
            if needs.total <= memory:
                return said
            smaller = _smaller_micro_batch(needs, memory)
            if smaller:
                return [*said, smaller]
            changed = change(Asking(plan, iteration, needs))
            if changed and changed.needs.total < needs.total:
                needs = changed.needs
                said.append(f"{setting}: {show_bytes(needs.total)}")
            iteration = changed.iteration if changed else iteration
        if needs.total <= memory:
            return said
        smaller = _smaller_micro_batch(needs, memory)
        if smaller:
            return [*said, smaller]
        least = replace(needs, micro_batch_size=1)
        too_much = f"train.micro_batch_size=1: {show_bytes(least.total)}, still too much"
        return [*said, *_instead_of_copies(plan, iteration, least, memory, too_much)]
    finally:
        if not plan.config.speed.activation_checkpointing:
            for player in iteration.players.values():
                set_recompute(player, False)


@dataclass(frozen=True)
class Asking:
    """What a change starts from: the run, its losses as they are by now, and what they need."""

    plan: Plan
    iteration: Iteration
    needs: MemoryPlan

    @property
    def is_sharded(self) -> bool:
        """Whether the run asks for shards, with which some settings do not go."""
        return self.plan.config.speed.shard != "none"

    def measured_anew(self) -> "Asking":
        """With the activations that the losses now keep."""
        saved, blocks = saved_growth(self.plan, self.iteration), block_growth(self.plan, self.iteration)
        return replace(self, needs=replace(self.needs, activations=saved, recomputed=blocks))

    def with_needs(self, **changes: Any) -> "Asking":
        return replace(self, needs=replace(self.needs, **changes))


def _instead_of_copies(
    plan: Plan, iteration: Iteration, least: MemoryPlan, memory: int, too_much: str
) -> tuple[str, ...]:
    """What to train in the place of full copies that do not fit.  too_much: what they need."""
    smaller, lora = "take a smaller network", with_factors_over_nf4(plan, iteration, least)
    if lora is None or lora.total >= least.total:
        return (f"{too_much}: {smaller}",)
    fits = "" if lora.total <= memory else f", still too much: {smaller}"
    return too_much, f"factors over one base in the place of copies, {SETTINGS}: {show_bytes(lora.total)}{fits}"


def _smaller_micro_batch(plan: MemoryPlan, memory: int) -> str | None:
    """The largest micro-batch that shares out the batch and fits."""
    divisors = (size for size in range(plan.micro_batch_size - 1, 0, -1) if plan.batch_size % size == 0)
    totals = ((size, replace(plan, micro_batch_size=size).total) for size in divisors)
    return next(
        (f"train.micro_batch_size={size}: {show_bytes(total)}" for size, total in totals if total <= memory), None
    )


def _halve_precision(asking: Asking) -> Asking | None:
    return replace(asking, iteration=replace(asking.iteration, is_half=True)).measured_anew()


def _halve_teacher(asking: Asking) -> Asking | None:
    teachers, players = asking.iteration.problem.all_teachers, dict(asking.needs.players)
    for name, teacher in teachers.items():
        if is_offloaded(teacher):
            return None
        layers = [part for part in teacher.modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d))]
        weights = [p for layer in layers for p in layer.parameters() if p.dtype == torch.float32]
        saved = sum(part_of(weight, asking.needs.parts).nbytes // 2 for weight in weights)
        players[name] = PlayerBytes(players[name].weights - saved)
    return asking.with_needs(players=players) if teachers else None


def _move_averages(asking: Asking) -> Asking | None:
    if asking.is_sharded:
        return None
    return asking.with_needs(has_averages_on_device=False)


def _recompute_blocks(asking: Asking) -> Asking | None:
    denoisers = [player for player in asking.iteration.players.values() if hasattr(player, "net")]
    if not all(set_recompute(denoiser) for denoiser in denoisers):
        return None
    return asking.measured_anew()


def _store_moments_in_8bit(asking: Asking) -> Asking | None:
    if asking.is_sharded:
        return None
    players = dict(asking.needs.players)
    for name, parameters in asking.iteration.trained.items():
        options = asking.plan.config.optimizer(name)
        if options.name in ("adam", "adamw"):
            eight = replace(options, name=f"{options.name}8bit", implementation="auto")  # type: ignore[arg-type]
            players[name] = replace(players[name], optimizer=optimizer_bytes(parameters, eight))
    return asking.with_needs(players=players)


_CHANGES: dict[str, Callable[[Asking], Asking | None]] = {
    "speed.teacher_dtype=bf16": _halve_teacher,
    "train.precision=bf16": _halve_precision,
    "speed.ema_device=cpu": _move_averages,
    "speed.activation_checkpointing=true": _recompute_blocks,
    "optimizers.<player>.name=adam8bit (or adamw8bit; needs a CUDA GPU)": _store_moments_in_8bit,
}
"""Settings by what they cost in time, the cheapest first. Each starts from what the last left."""
