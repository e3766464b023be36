"""What a run needs: weights, gradients, optimiser states and averages to the byte, activations by measuring small.

Activations are what autograd keeps for the backward pass. They grow by the same bytes with every sample, so losses on
micro-batches of 1 and 2, without a backward pass, tell those of any size.
Not predicted: what an operation needs while it runs, and what the allocator rounds up.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.config import OptimizerConfig
from diffdistill.counting import SavedTensors, storage_bytes
from diffdistill.method import Update
from diffdistill.networks.recompute import recomputable_blocks, set_recompute
from diffdistill.trainer import MicroBatch, Trainer

EIGHT_BIT_MINIMUM = 4096  # bitsandbytes keeps smaller parameters' moments in 32 bits
EIGHT_BIT_BLOCK = 256  # numbers that share a 4-byte scale
EIGHT_BIT_TABLES = 2 * 256 * 4  # the codes of both moments, once an optimiser


@dataclass(frozen=True)
class PlayerBytes:
    """One player. gradients: while one of its updates runs."""

    weights: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Growth:
    """Bytes for n samples: fixed + each n."""

    fixed: int = 0
    each: int = 0

    def at(self, size: int) -> int:
        return self.fixed + self.each * size

    @staticmethod
    def through(one: int, two: int) -> "Growth":
        """From the bytes for one sample and for two."""
        return Growth(2 * one - two, two - one)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes.

    averages: all of them, and whether they are on the device.  activations, recomputed: by loss, for one micro-batch;
    recomputed is the largest block's inside, which activation checkpointing brings back one block at a time.
    batch: images and random numbers of all the step's samples.
    """

    players: Mapping[str, PlayerBytes]
    averages: int
    has_averages_on_device: bool
    updates: tuple[Update, ...]
    activations: Mapping[str, Growth]
    recomputed: Mapping[str, Growth]
    batch: Growth
    batch_size: int
    micro_batch_size: int

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        stays = sum(player.weights + player.optimizer for player in self.players.values())
        return stays + self.averages * self.has_averages_on_device + self.batch.at(self.batch_size)

    @property
    def peak_activations(self) -> int:
        """Of the loss that keeps most."""
        return max(growth.at(self.micro_batch_size) for growth in self.activations.values())

    @property
    def total(self) -> int:
        """The device's bytes while the most demanding update runs."""
        return self.fixed + max(self._transient(update) for update in self.updates)

    def _transient(self, update: Update) -> int:
        kept = self.activations[update.loss].at(self.micro_batch_size)
        again = self.recomputed[update.loss].at(self.micro_batch_size)
        return kept + again + sum(self.players[name].gradients for name in update.players)


def plan_memory(trainer: Trainer) -> MemoryPlan:
    """Predict a run's memory from its trainer, before any step. Nothing is written."""
    train = trainer.config.train
    made = trainer.method.prepare(trainer.setting, train.seed)
    trainer.stored = {name: value.to(trainer.device) for name, value in made.items()}
    share = train.global_batch_size // trainer.accelerator.num_processes
    ones, twos = (_micro_batch(trainer, size) for size in (1, 2))
    return MemoryPlan(
        players={name: _player_bytes(trainer, name, module) for name, module in trainer.players.items()},
        averages=sum(module_bytes(ema.module) for ema in trainer.emas.values()),
        has_averages_on_device=trainer.config.speed.ema_device == "same",
        updates=trainer.method.updates,
        activations=_growth(trainer, _saved_bytes),
        recomputed=_growth(trainer, _block_bytes)
        if trainer.config.speed.activation_checkpointing
        else _nothing(trainer),
        batch=Growth.through(_batch_bytes(ones), _batch_bytes(twos)),
        batch_size=share,
        micro_batch_size=min(train.micro_batch_size or share, share),
    )


def optimizer_bytes(module: nn.Module, options: OptimizerConfig) -> int:
    """Bytes of the optimiser's state after its first step."""
    parameters = list(module.parameters())
    if options.name == "sgd":
        return sum(p.nbytes for p in parameters) if options.betas[0] else 0
    if options.name.endswith("8bit"):
        return EIGHT_BIT_TABLES + sum(_moments_in_8bit(p.numel()) for p in parameters)
    return sum(2 * p.nbytes + 4 for p in parameters)  # two moments and a counter


def _moments_in_8bit(numbers: int) -> int:
    if numbers < EIGHT_BIT_MINIMUM:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * math.ceil(numbers / EIGHT_BIT_BLOCK))


def module_bytes(module: nn.Module) -> int:
    """Weights and buffers."""
    return sum(tensor.nbytes for tensor in _tensors(module))


def advise(trainer: Trainer, plan: MemoryPlan, memory: int) -> list[str]:
    """What to turn on, one after the other, until `memory` bytes suffice; each as `setting: what is left`."""
    said: list[str] = []
    for setting, change in _CHANGES.items():
        smaller = _with_smaller_micro_batch(plan, memory)
        if smaller:
            return [*said, f"train.micro_batch_size={smaller.micro_batch_size}: {show_bytes(smaller.total)}"]
        better = change(trainer, plan)
        if better and better.total < plan.total:
            plan = better
            said.append(f"{setting}: {show_bytes(plan.total)}")
        if plan.total <= memory:
            return said
    smaller = _with_smaller_micro_batch(plan, memory)
    if smaller:
        return [*said, f"train.micro_batch_size={smaller.micro_batch_size}: {show_bytes(smaller.total)}"]
    least = replace(plan, micro_batch_size=1)
    return [*said, f"train.micro_batch_size=1: {show_bytes(least.total)}, still too much: take a smaller network"]


def _with_smaller_micro_batch(plan: MemoryPlan, memory: int) -> MemoryPlan | None:
    """The largest micro-batch that shares out the batch and fits."""
    divisors = (size for size in range(plan.micro_batch_size - 1, 0, -1) if plan.batch_size % size == 0)
    plans = (replace(plan, micro_batch_size=size) for size in divisors)
    return next((smaller for smaller in plans if smaller.total <= memory), None)


def _half_teacher(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    teacher = trainer.setting.teacher
    if teacher is None or trainer.config.speed.teacher_dtype == "bf16":
        return None
    layers = [part for part in teacher.modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    saved = sum(p.nbytes // 2 for layer in layers for p in layer.parameters() if p.dtype == torch.float32)
    players = {**plan.players, "teacher": PlayerBytes(plan.players["teacher"].weights - saved)}
    return replace(plan, players=players)


def _averages_on_cpu(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    return replace(plan, has_averages_on_device=False)


def _recompute(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    nets = [player for player in trainer.players.values() if hasattr(player, "net")]
    if trainer.config.speed.activation_checkpointing or not all(set_recompute(net) for net in nets):
        return None
    try:
        return replace(plan, activations=_growth(trainer, _saved_bytes), recomputed=_growth(trainer, _block_bytes))
    finally:
        for net in nets:
            set_recompute(net, False)


def _moments_8bit(trainer: Trainer, plan: MemoryPlan) -> MemoryPlan | None:
    players = dict(plan.players)
    for name, module in trainer.trained.items():
        options = trainer.config.optimizer(name)
        if options.name in ("adam", "adamw"):
            eight = replace(options, name=f"{options.name}8bit", implementation="auto")  # type: ignore[arg-type]
            players[name] = replace(players[name], optimizer=optimizer_bytes(module, eight))
    return replace(plan, players=players)


_CHANGES: dict[str, Callable[[Trainer, MemoryPlan], MemoryPlan | None]] = {
    "speed.teacher_dtype=bf16": _half_teacher,
    "speed.ema_device=cpu": _averages_on_cpu,
    "speed.activation_checkpointing=true": _recompute,
    "optimizers.<player>.name=adam8bit (or adamw8bit; needs a CUDA GPU)": _moments_8bit,
}
"""Settings by what they cost, the cheapest first."""


@dataclass(frozen=True)
class Rehearsal:
    """Counted in two real steps. seconds: of each; counting takes a part of them.  device_peak: the GPU allocator's."""

    players: Mapping[str, PlayerBytes]
    averages: int
    activations: int
    seconds: tuple[float, ...]
    device_peak: int | None


def rehearse(trainer: Trainer, steps: int = 2) -> Rehearsal:
    """Take real steps after `plan_memory` and count. Nothing is written."""
    gradients: dict[str, int] = {}

    def note(name: str, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients[name] = sum(p.grad.nbytes for p in parameters if p.grad is not None)

    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_pre_hook(partial(note, name))
    is_on_gpu = trainer.device.type == "cuda"
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = []
    with SavedTensors(_all_tensors(trainer)) as saved:
        for _ in range(steps):
            began = time.perf_counter()
            trainer.train_step()
            if is_on_gpu:
                torch.cuda.synchronize(trainer.device)
            seconds.append(time.perf_counter() - began)
    return Rehearsal(
        players={
            name: PlayerBytes(module_bytes(module), gradients.get(name, 0), _state_bytes(trainer.optimizers.get(name)))
            for name, module in trainer.players.items()
        },
        averages=sum(module_bytes(ema.module) for ema in trainer.emas.values()),
        activations=saved.peak,
        seconds=tuple(seconds),
        device_peak=torch.cuda.max_memory_allocated(trainer.device) if is_on_gpu else None,
    )


def show_bytes(count: int) -> str:
    """In MiB, or from 1024 of them on in GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _all_tensors(trainer: Trainer) -> list[Tensor]:
    return [tensor for player in trainer.players.values() for tensor in _tensors(player)]


def _player_bytes(trainer: Trainer, name: str, module: nn.Module) -> PlayerBytes:
    if name not in trainer.trained:
        return PlayerBytes(module_bytes(module))
    gradients = sum(p.nbytes for p in module.parameters())
    return PlayerBytes(module_bytes(module), gradients, optimizer_bytes(module, trainer.config.optimizer(name)))


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    return storage_bytes(v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))


def _micro_batch(trainer: Trainer, size: int) -> MicroBatch:
    images, cond = trainer.real(0, size)
    return trainer.micro_batch(0, images, cond, size)


def _batch_bytes(micro: MicroBatch) -> int:
    batch = micro.batch
    return storage_bytes([batch.images, *batch.cond.parts().values(), *batch.stored.values(), *micro.draw.values()])


def _growth(trainer: Trainer, measure: Callable[[Trainer, Update, MicroBatch], tuple[int, Any]]) -> dict[str, Growth]:
    """By loss, from micro-batches of one and two samples."""
    found: list[dict[str, int]] = []
    for size in (1, 2):
        micro = _micro_batch(trainer, size)
        found.append({})
        for update in trainer.method.updates:
            found[-1][update.loss], carry = measure(trainer, update, micro)
            micro.draw |= carry
    one, two = found
    return {name: Growth.through(one[name], two[name]) for name in one}


def _nothing(trainer: Trainer) -> dict[str, Growth]:
    return {update.loss: Growth() for update in trainer.method.updates}


def _saved_bytes(trainer: Trainer, update: Update, micro: MicroBatch) -> tuple[int, Mapping[str, Tensor]]:
    """What autograd keeps of a loss, and what the loss carries over."""
    with SavedTensors(_all_tensors(trainer)) as saved:
        carry = trainer.loss(update, micro).carry
    return saved.peak, carry


def _block_bytes(trainer: Trainer, update: Update, micro: MicroBatch) -> tuple[int, Mapping[str, Tensor]]:
    """What the largest block would keep if it were not recomputed."""
    blocks = [block for player in trainer.players.values() for block in recomputable_blocks(player)]
    before: list[int] = []
    inside = [0]
    with SavedTensors(_all_tensors(trainer)) as saved:
        handles = [block.register_forward_pre_hook(lambda *_: before.append(saved.live)) for block in blocks]
        handles += [
            block.register_forward_hook(lambda *_: inside.append(saved.live - before.pop())) for block in blocks
        ]
        was_recomputed = [block.is_recomputed for block in blocks]
        for block in blocks:
            block.is_recomputed = False
        try:
            carry = trainer.loss(update, micro).carry
        finally:
            for block, was in zip(blocks, was_recomputed, strict=True):
                block.is_recomputed = was
            for handle in handles:
                handle.remove()
    return max(inside), carry
